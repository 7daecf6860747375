"""What each spelling calls a weight's length and direction, and which keys of a state dict hold them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from weightnorm.axes import Axis, axes_of_lengths
from weightnorm.formula import wide_dtype
from weightnorm.survey import last_part

Spelling = Literal["plain", "gv", "original"]
SPELLINGS: tuple[Spelling, ...] = ("plain", "gv", "original")

_PARAMETRIZED = re.compile(r"((?:.+\.)?)parametrizations\.([^.]+)\.(.+)")
_HOOKED = re.compile(r"(.+)_[gv]")
_LOG = "0.log_g"  # our module form's own: a flag beside an original0 that holds log g


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as a state dict holds it, or a lone half of one.

    Attributes:
        name: what the plain weight is called.
        spelling: how it is stored.
        keys: the keys that hold it, that of the direction (or the weight itself) first.
        v: the direction, or the weight itself; None if it is missing.
        g: what is stored for its lengths; None for a plain weight, or if it is missing.
        log: whether that is their logarithm.
    """

    name: str
    spelling: Spelling
    keys: tuple[str, ...]
    v: Tensor | None
    g: Tensor | None = None
    log: bool = False

    @property
    def axes(self) -> list[Axis]:
        """The axes along which the lengths can lie, by their shape; none where they fit nowhere."""
        if self.v is None or self.g is None or self.v.ndim < 2 or not self.v.is_floating_point():
            return []
        return axes_of_lengths(self.v.shape, self.g.shape)

    @property
    def lengths(self) -> Tensor:
        """The lengths g themselves, in the dtype they are stored in."""
        assert self.g is not None
        return self.g.to(wide_dtype(self.g.dtype)).exp().to(self.g.dtype) if self.log else self.g


def keys_of(name: str, spelling: Spelling) -> tuple[str, ...]:
    """Return the keys of a weight: those of g and v, or its own.

    Args:
        name: what the plain weight is called.
        spelling: the way.

    Example:
        >>> keys_of("conv.weight", "gv"), keys_of("conv.weight", "original")[0]
        (('conv.weight_g', 'conv.weight_v'), 'conv.parametrizations.weight.original0')
    """
    if spelling == "plain":
        return (name,)
    if spelling == "gv":
        return f"{name}_g", f"{name}_v"
    prefix = name.removesuffix(last_part(name)) + f"parametrizations.{last_part(name)}"
    return f"{prefix}.original0", f"{prefix}.original1"


def find(sd: Mapping[str, Any]) -> list[Stored]:
    """Return the normalised weights of a state dict, by their names and shapes.

    Whatever cannot be one is left out: other parametrizations with two originals, tensors that merely end in ``_g`` or
    ``_v``. Where only weight normalization can be meant (lone halves of ``original0/1``; a ``_g`` at a name with
    "weight" in it) the weight is listed even if it does not fit, for the caller to complain of.

    Args:
        sd: the state dict.

    Returns:
        The weights, in the order of the state dict.

    Example:
        >>> import torch
        >>> sd = {"conv.weight_g": torch.ones(4, 1, 1), "conv.weight_v": torch.ones(4, 3, 5), "step": 3}
        >>> [(weight.name, weight.spelling, weight.axes) for weight in find(sd)]
        [('conv.weight', 'gv', [Axis(dim=0, groups=1)])]
    """
    names: dict[tuple[str, Spelling], None] = {}
    members: dict[str, set[str]] = {}  # what lies under each list of parametrizations
    for key in sd:
        if not isinstance(key, str):
            continue
        if match := _PARAMETRIZED.fullmatch(key):
            members.setdefault(match[1] + match[2], set()).add(match[3])
            names[match[1] + match[2], "original"] = None
        elif match := _HOOKED.fullmatch(key):
            names[match[1], "gv"] = None
    found = (
        _hooked(sd, name) if spelling == "gv" else _parametrized(sd, name, members[name]) for name, spelling in names
    )
    return [stored for stored in found if stored]


def _hooked(sd: Mapping[str, Any], name: str) -> Stored | None:
    """Return what ``name_g`` and ``name_v`` hold if it can be a weight."""
    g_key, v_key = keys_of(name, "gv")
    g, v = _tensor(sd, g_key), _tensor(sd, v_key)
    stored = Stored(name, "gv", (v_key, g_key), v, g)
    if g is not None and "weight" in last_part(name):
        return stored
    return stored if stored.axes and g is not None and v is not None and g.ndim >= v.ndim else None


def _parametrized(sd: Mapping[str, Any], name: str, members: set[str]) -> Stored | None:
    """Return what a list of parametrizations holds if it can be weight normalization and nothing else."""
    g_key, v_key = keys_of(name, "original")
    log_key = g_key.removesuffix("original0") + _LOG
    lone = not {"original0", "original1"} <= members
    if not members & {"original0", "original1"} or members - {"original0", "original1", _LOG}:
        return None
    keys = (v_key, g_key, log_key) if _LOG in members else (v_key, g_key)
    log = _LOG in members and bool(sd[log_key])
    stored = Stored(name, "original", keys, _tensor(sd, v_key), _tensor(sd, g_key), log)
    return stored if lone or stored.axes else None


def _tensor(sd: Mapping[str, Any], key: str) -> Tensor | None:
    value = sd.get(key)
    return value if isinstance(value, Tensor) else None
