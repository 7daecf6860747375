"""What a model says of the weights in its state dict: which are normalised, and along which axis."""

import re
from dataclasses import dataclass

from torch import nn

from weightnorm.checkpoints.lengths import Lengths, along, read_off
from weightnorm.checkpoints.spelling import Stored, find
from weightnorm.optim.groups import param_groups

# What wrappers put into a model's names: DDP and DataParallel, compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Known:
    """A weight of a model.

    Attributes:
        shape: its shape.
        lengths: where its lengths lie, and the shape of g; None: it carries another parametrization.
        held: whether the model holds it in module form.
    """

    shape: tuple[int, ...]
    lengths: Lengths | None
    held: bool


class KnownWeights:
    """The weights that a model normalises, found by name whatever wraps the model.

    They are those that it holds in module form, along that form's axis, so that it can load what is written; if there
    are none, those that ``param_groups`` would normalise.

    Args:
        model: the model, in whatever form, wrapped or not.

    Example:
        >>> known = KnownWeights(nn.Sequential(nn.Linear(3, 4)))
        >>> known.get("module.0.weight").lengths.shape, known.normalises("0.bias")
        ((4, 1), False)
    """

    def __init__(self, model: nn.Module):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        axes = {entry.parameter: entry.axis for entry in param_groups(model).entries}
        known = {
            name: Known(tuple(parameter.shape), along(axis, parameter), held=False)
            for name, parameter in parameters.items()
            if (axis := axes[parameter])
        }
        for stored in find(parameters):
            if stored.v is not None and len(stored.axes) == 1:
                foreign = stored.spelling == "original" and not _is_weight_norm(model, stored)
                lengths = None if foreign else read_off(stored, None)
                known[stored.name] = Known(tuple(stored.v.shape), lengths, held=not foreign)
        self._known = {unwrapped(name): weight for name, weight in known.items()} | known
        self._in_module_form = any(weight.held for weight in known.values())

    def get(self, name: str) -> Known | None:
        """Return what is known of the weight of this plain name, or None."""
        return self._known.get(name) or self._known.get(unwrapped(name))

    def normalises(self, name: str) -> bool:
        """Say whether the model normalises the weight of this plain name."""
        known = self.get(name)
        return known is not None and known.held == self._in_module_form


def unwrapped(name: str) -> str:
    """Return a name without what wrappers have put into it.

    Example:
        >>> unwrapped("module.encoder._orig_mod.conv.weight")
        'encoder.conv.weight'
    """
    return _WRAPPERS.sub("", name)


def _is_weight_norm(model: nn.Module, stored: Stored) -> bool:
    """Say whether a parametrization with two originals is weight normalization: torch's, ours or a subclass."""
    parametrization = model.get_submodule(stored.keys[0].replace(".original1", ".0"))
    return any("weightnorm" in kind.__name__.replace("_", "").lower() for kind in type(parametrization).__mro__)
