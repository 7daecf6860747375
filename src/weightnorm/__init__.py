"""Weight normalization for PyTorch: in the optimizer, on a plain model (Salimans & Kingma, 2016).

The public page. Names are looked up when first used, so that the command line starts without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightnorm._version import __version__

if TYPE_CHECKING:
    from weightnorm import formula as formula
    from weightnorm.axes import register_axis as register_axis
    from weightnorm.checkpoints import convert_state_dict as convert_state_dict
    from weightnorm.data_dependent import data_init as data_init
    from weightnorm.layers import cached as cached
    from weightnorm.layers import fold as fold
    from weightnorm.layers import remove_weight_norm as remove_weight_norm
    from weightnorm.layers import weight_norm as weight_norm
    from weightnorm.mean_only import MeanOnlyBatchNorm as MeanOnlyBatchNorm
    from weightnorm.mean_only import fold_mean as fold_mean
    from weightnorm.mean_only import replace_batch_norm as replace_batch_norm
    from weightnorm.optim import SGD as SGD
    from weightnorm.optim import Adam as Adam
    from weightnorm.optim import Adamax as Adamax
    from weightnorm.optim import AdamW as AdamW
    from weightnorm.optim import clip_grad_norm_ as clip_grad_norm_
    from weightnorm.optim import from_module_form as from_module_form
    from weightnorm.optim import param_groups as param_groups
    from weightnorm.optim import wrap as wrap

_HOME = {
    "SGD": "optim",
    "Adam": "optim",
    "AdamW": "optim",
    "Adamax": "optim",
    "wrap": "optim",
    "param_groups": "optim",
    "from_module_form": "optim",
    "clip_grad_norm_": "optim",
    "register_axis": "axes",
    "data_init": "data_dependent",
    "weight_norm": "layers",
    "remove_weight_norm": "layers",
    "fold": "layers",
    "cached": "layers",
    "convert_state_dict": "checkpoints",
    "MeanOnlyBatchNorm": "mean_only",
    "replace_batch_norm": "mean_only",
    "fold_mean": "mean_only",
}

__all__ = ["__version__", "formula", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "formula":
        return import_module("weightnorm.formula")
    if name in _HOME:
        return getattr(import_module(f"weightnorm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'weightnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
