"""What ``data_init`` is called with, checked and made plain."""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from weightnorm.data_dependent.units import Settable, Units
from weightnorm.survey import Choice, is_chosen

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


def check_batches(batches: list[Any], forward: Any) -> None:
    """Refuse batches that a model cannot be called with, unless something of the user's calls it."""
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be a function of model and batch; got {forward!r}")
    if not batches:
        raise ValueError("batch is an empty list; pass at least one batch")
    wrong = [batch for batch in batches if not isinstance(batch, Tensor | tuple | Mapping)]
    if wrong and forward is None:
        raise TypeError(
            "batch must be a tensor, a tuple of positional arguments, a dict of keyword arguments or a list of these; "
            f"got {type(wrong[0]).__name__}. For anything else pass forward="
        )
    kinds = {(batch.ndim, batch.dtype) for batch in batches if isinstance(batch, Tensor)}
    if len(kinds) > 1 and forward is None:
        raise TypeError(
            "a list is several batches, and these differ in dtype or number of axes, as a loader's [inputs, labels] "
            "do: pass the inputs; several positional arguments go in a tuple"
        )


def call(model: nn.Module, batch: Batch) -> object:
    """Call a model with a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def std_by_name(std: float | Mapping[str, float], found: Settable) -> Callable[[str], float]:
    """Return what gives a layer's standard deviation."""
    stds = dict(std) if isinstance(std, Mapping) else {"*": std}
    for value in stds.values():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"std must be a positive number, or a dict from patterns of names to such; got {value!r}")
    if isinstance(std, Mapping):
        chosen_units(found, list(stds), "std")
    return lambda name: next((value for pattern, value in stds.items() if fnmatchcase(name, pattern)), 1.0)


def chosen_units(found: Settable, choices: Choice | Sequence[Choice], what: str) -> list[Units]:
    """Return the units whose name matches a pattern, or whose layer is of a type; each pattern must match some."""
    choices = [choices] if isinstance(choices, str | type) else choices
    if not isinstance(choices, Sequence) or not all(isinstance(choice, str | type) for choice in choices):
        raise TypeError(f"{what} must be a pattern of names, a type of layer, or a list of these; got {choices!r}")
    uses = {units: (units.name, layer) for layer, several in found.layers.items() for units in several}
    names = [name for name, _ in uses.values()]
    for choice in choices:
        if isinstance(choice, str) and not any(fnmatchcase(name, choice) for name in [*names, *found.left_out]):
            raise ValueError(
                f"{what}: {choice!r} matches no layer; names are {', '.join(names[:4])}, ... and * stands for anything"
            )
    return [units for units, use in uses.items() if is_chosen(use, choices)]
