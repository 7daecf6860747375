"""Which layer feeds which norm, so that a shift and a scale per channel can go from the one into the other.

A norm and a layer are a pair if, wherever either runs, the norm takes what the layer put out and nothing else does.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from weightnorm.mean_only.tracing import Dense, Flow, Layer, Norm
from weightnorm.scaling import weight_in_module_form
from weightnorm.survey import refuse_lazy

_HOLDERS = ("DistributedDataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class Pair:
    """A norm and the layer in front of it.

    Attributes:
        name: the norm's name in the model.
        norm: the norm.
        layer_name: the layer's name in the model.
        layer: a Linear, a Bilinear or a convolution, its weight plain or in module form.
    """

    name: str
    norm: Any
    layer_name: str
    layer: Any


def find_pairs(model: nn.Module, kind: type[nn.Module]) -> tuple[list[Pair], dict[str, str]]:
    """Find the layers in front of a model's norms.

    Args:
        model: any model; it is left as it is.
        kind: which norms, of the two types of ``Norm``.

    Returns:
        The pairs, in the model's order; and the names of the norms that are in none, with the reason.

    Raises:
        ValueError: if a parameter or buffer is not initialised yet (lazy layers), or a wrapper holds on to parameters.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        >>> pairs, left = find_pairs(block, nn.BatchNorm2d)
        >>> [(pair.layer_name, pair.name) for pair in pairs], left
        ([('0', '1')], {'3': 'is fed by 2 (ReLU)'})
    """
    _refuse(model)
    norms = [module for module in model.modules() if isinstance(module, kind)]
    if not norms:
        return [], {}
    flow = Flow(model)
    holders = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    shared = flow.read | {parameter for parameter, count in holders.items() if count > 1}
    found = {norm: _layer_before(norm, flow, shared) for norm in norms}
    name = flow.names
    pairs = [Pair(name[norm], norm, name[layer], layer) for norm, layer in found.items() if not isinstance(layer, str)]
    return pairs, {name[norm]: reason for norm, reason in found.items() if isinstance(reason, str)}


def warn_of(left: Mapping[str, str], of: int, what: str, most: int = 4) -> None:
    """Warn, for a function of the public page, of norms that stay: the first few by name, and how many more."""
    if left:
        reasons = "; ".join(f"{name} {reason}" for name, reason in list(left.items())[:most])
        more = f"; and {len(left) - most} more" if len(left) > most else ""
        warnings.warn(f"{what} left {len(left)} of {of} norms: {reasons}{more}", stacklevel=3)


def _refuse(model: nn.Module) -> None:
    refuse_lazy(chain(model.named_parameters(), model.named_buffers()), "through the model first")
    wrappers = [kind.__name__ for module in model.modules() for kind in type(module).__mro__]
    for wrapper in _HOLDERS:
        if wrapper in wrappers:
            raise ValueError(f"{wrapper} holds on to the parameters; give the model inside (.module) and wrap it anew")


def _layer_before(norm: nn.Module, flow: Flow, shared: set[Tensor]) -> Layer | str:
    """Return the layer that feeds a norm, or why there is none that could take over from it."""
    feeders = flow.feeders[norm]
    if not feeders:
        return "is not called by any forward"
    layer = feeders[0]
    if len(feeders) > 1 or not isinstance(layer, Layer):
        return f"is fed by {flow.told(feeders)}"
    name = flow.names[layer]
    others = [taker for taker in flow.takers[layer] if taker is not norm]
    if others:
        return f"shares what {name} puts out with {flow.told(others)}"
    for prefix, module in (("", norm), (f"comes after {name}, which ", layer)):
        if oddity := _oddity(module):
            return prefix + oddity
    if not shared.isdisjoint(layer.parameters()):
        return f"comes after {name}, whose parameters are used elsewhere too"
    units = layer.out_features if isinstance(layer, Dense) else layer.out_channels
    on_last_axis = isinstance(layer, Dense) and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)
    if on_last_axis or units != norm.num_features:
        return f"has other channels than the {units} outputs of {name}"
    return layer


def _oddity(module: nn.Module) -> str:
    """Return what keeps a norm or layer from doing what torch's does, to parameters that are what they seem."""
    kind: Any = type(module)
    methods = [kind.forward, *([kind._conv_forward] if hasattr(kind, "_conv_forward") else [])]
    known = all(method.__module__.startswith(("torch.nn.modules.", "weightnorm.")) for method in methods)
    if not known or "forward" in vars(module):
        return "has a forward of its own"
    if isinstance(module, Norm):
        hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        plain = not is_parametrized(module)
    else:
        hooks = module._forward_hooks  # one before it changes what it takes, not what it does
        plain = _is_plain(module, "bias") and (_is_plain(module, "weight") or _in_module_form(module))
    return "has hooks" if hooks else "" if plain else "has parameters that are computed"


def _is_plain(module: nn.Module, name: str) -> bool:
    """Say whether a parameter is the module's own, not computed by a hook, and an ordinary tensor."""
    return name in module._parameters and type(module._parameters[name]) in (nn.Parameter, type(None))


def _in_module_form(layer: nn.Module) -> bool:
    try:
        return weight_in_module_form(layer) is not None
    except ValueError:  # another parametrization sits on top
        return False
