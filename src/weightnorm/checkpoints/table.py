"""What normalised weights are in a file: a row each, for people."""

from collections.abc import Sequence

from torch import Tensor

from weightnorm.axes import Axis
from weightnorm.checkpoints.spelling import Stored
from weightnorm.formula import decompose

NOTHING = "–"

COLUMNS = ("weight", "shape", "spelling", "axis", "g min", "median", "max", "‖v‖ min", "max", "zero rows")


def row(stored: Stored) -> list[str]:
    """Return a weight's cells, in the order of ``COLUMNS``; of one that cannot be told, what is open.

    Example:
        >>> import torch
        >>> row(Stored("w", "gv", ("w_v", "w_g"), torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])))
        ['w', '1x2', 'gv', '0', '2', '2', '2', '5', '5', '0']
    """
    shape = NOTHING if stored.v is None else "x".join(map(str, stored.v.shape))
    head = [stored.name, shape, f"{stored.spelling}, log g" if stored.log else stored.spelling, _axis(stored)]
    if len(stored.axes) != 1 or stored.v is None or stored.v.numel() == 0:
        return head + [NOTHING] * (len(COLUMNS) - len(head))
    axis, g = stored.axes[0], stored.lengths.double().flatten()
    _, norms = decompose(axis.split(stored.v), axis.kept(stored.v))
    norms = norms.flatten()
    zero = int(((g == 0) | (norms == 0)).sum())
    return [*head, *_numbers(g.min(), g.median(), g.max(), norms.min(), norms.max()), str(zero)]


def summary(weights: Sequence[Stored], others: int) -> str:
    """Return a line that counts weights, their elements, and the other tensors of a file."""
    plain = f"{others} plain tensor{'s' * (others != 1)}"
    if not weights:
        return f"no normalised weights; {plain}"
    halves = [[half.numel() for half in (w.v, w.g) if half is not None] for w in weights]
    return f"{counted(weights)}, {sum(map(sum, halves)):,} numbers in g and v; {plain}"


def counted(weights: Sequence[Stored]) -> str:
    """Return how many weights there are of each spelling, in words."""
    spellings = [stored.spelling for stored in weights]
    kinds = " and ".join(f"{spellings.count(kind)} {kind}" for kind in dict.fromkeys(spellings))
    if len(set(spellings)) < 2:
        kinds = spellings[0] if spellings else "none normalised"
    return f"{len(weights)} weight{'s' * (len(weights) != 1)}: {kinds}"


def _axis(stored: Stored) -> str:
    if stored.v is None or stored.g is None:
        return f"no {'v' if stored.v is None else 'g'}"
    return " or ".join(map(_place, stored.axes)) + "?" * (len(stored.axes) > 1) or "fits none"


def _place(axis: Axis) -> str:
    if axis.dim is None:
        return "whole tensor"
    return f"{axis.dim} in {axis.groups} groups" if axis.groups > 1 else str(axis.dim)


def _numbers(*values: Tensor) -> list[str]:
    return [f"{value.item():.4g}" for value in values]
