"""What ``data_init`` is called with, checked and made plain."""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from weightnorm.data_dependent.units import Found, Units
from weightnorm.survey import Choice

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


def check_batches(batches: list[Any], forward: Any) -> None:
    """Refuse batches that a model cannot be called with, unless something of the user's calls it."""
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


def std_by_name(std: float | Mapping[str, float], found: Found) -> Callable[[str], float]:
    """Return what gives a layer's standard deviation."""
    stds = dict(std) if isinstance(std, Mapping) else {"*": std}
    for value in stds.values():
        if not 0 < value < math.inf:
            raise ValueError(f"std must be a positive number; got {value!r}")
    if isinstance(std, Mapping):
        chosen_units(found, list(stds), "std")
    return lambda name: next((value for pattern, value in stds.items() if fnmatchcase(name, pattern)), 1.0)


def chosen_units(found: Found, choices: Sequence[Choice], what: str) -> list[Units]:
    """Return the units whose name matches a pattern, or whose layer is of a type; each choice must choose some."""
    chosen = list[Units]()
    for choice in choices:
        own = [
            units
            for layer, several in found.layers.items()
            for units in several
            if (fnmatchcase(units.name, choice) if isinstance(choice, str) else isinstance(layer, choice))
        ]
        if not own and isinstance(choice, str) and not any(fnmatchcase(name, choice) for name in found.left_out):
            names = ", ".join(units.name for several in list(found.layers.values())[:4] for units in several)
            raise ValueError(f"{what}: {choice!r} matches no layer; names are {names}, ... and * stands for anything")
        chosen += own
    return chosen
