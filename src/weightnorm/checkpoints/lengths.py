"""Along which axis a stored weight's lengths run: read off the shape of g, or asked; never guessed."""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from weightnorm.axes import Axis
from weightnorm.checkpoints.spelling import Stored


@dataclass(frozen=True)
class Lengths:
    """Where a weight's lengths lie, and how g is kept.

    Attributes:
        axis: where the vectors lie, one per length.
        shape: the shape of g.
    """

    axis: Axis
    shape: tuple[int, ...]


def along(axis: Axis, weight: Tensor) -> Lengths:
    """Return the lengths of ``weight`` along ``axis`` in torch's shape: 0-D for the whole tensor.

    Raises:
        ValueError: if ``weight`` has no such axis.

    Example:
        >>> import torch
        >>> along(Axis(1), torch.zeros(6, 4, 3)).shape, along(Axis(1, groups=2), torch.zeros(6, 4, 3)).shape
        ((1, 4, 1), (2, 1, 4, 1))
    """
    split, kept = axis.split(weight), axis.kept(weight)
    shape = tuple(size if index in kept else 1 for index, size in enumerate(split.shape))
    return Lengths(axis, shape if kept else ())


def read_off(stored: Stored, said: Lengths | None) -> Lengths:
    """Return where the lengths of a stored weight lie.

    Args:
        stored: the weight, not a plain one.
        said: what the user says of it. It counts only where the shape of g leaves the axis open.

    Raises:
        ValueError: if a half of the weight is missing, or neither shape nor user tell the axis.
    """
    v, g = _halves(stored)
    if len(stored.axes) == 1:
        return along(stored.axes[0], v) if g.ndim == 1 else Lengths(stored.axes[0], tuple(g.shape))
    if said and g.ndim == 1 and prod(said.shape) == len(g):
        return said
    shapes = f"g of shape {tuple(g.shape)} with v of shape {tuple(v.shape)}"
    if stored.axes:
        axes = " and ".join(f"axis {axis.dim}" for axis in stored.axes)
        raise ValueError(f"{shapes} fits {axes}; say which one it is with dim= or model=")
    raise ValueError(
        f"{shapes} fits no axis; if it is along the outputs of a grouped transposed convolution, pass model=, "
        "and if it is not weight normalization, leave it out with keys="
    )


def same_vectors(a: Lengths, b: Lengths) -> bool:
    """Say whether two descriptions of one weight's lengths mean the same vectors, whatever the shape of g."""
    return a.shape == b.shape or prod(a.shape) == prod(b.shape) == 1


def _halves(stored: Stored) -> tuple[Tensor, Tensor]:
    """Return direction and stored lengths."""
    if stored.v is not None and stored.g is not None:
        return stored.v, stored.g
    v_key, g_key = stored.keys[:2]
    there, missing = (g_key, v_key) if stored.v is None else (v_key, g_key)
    raise ValueError(
        f"{there} is there and {missing} is not; look for it in another file, or leave it out with keys= "
        "if it is not weight normalization"
    )
