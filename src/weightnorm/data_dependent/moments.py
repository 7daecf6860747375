"""Mean and spread of each output unit over any number of pieces: batches, positions, ranks."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch import distributed as dist

from weightnorm.formula import wide_dtype


@dataclass(frozen=True)
class Moments:
    """What a number of values of each unit come to: their count, mean ``μ`` and sum of squared deviations from it.

    Attributes:
        count: how many values, shape (units,).
        mean: shape (units,), float32 at least.
        squares: ``Σ (t − μ)²``, shape (units,).
        dtype: of the values themselves.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    dtype: torch.dtype

    @property
    def std(self) -> Tensor:
        """Return ``σ``, the population's, with nothing added to it."""
        return (self.squares / self.count).sqrt()

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both together, exactly (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp(min=1), 0)
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart.square() * self.count * share
        return Moments(count, self.mean + apart * share, squares, self.dtype)

    def is_constant(self) -> Tensor:
        """Say which units vary by no more than rounding does, so that dividing by ``σ`` would blow up noise.

        The floor is 4 ulps of the unit's mean in the dtype of the values, or of the layer's root mean square in the
        wide dtype, in which products are summed.

        Returns:
            A mask, one element a unit.
        """
        size = (self.mean.square() + self.std.square()).mean().sqrt()
        rounding = torch.finfo(self.dtype).eps * self.mean.abs() + torch.finfo(self.mean.dtype).eps * size
        return self.std <= 4 * rounding


def moments_of(t: Tensor, axis: int) -> Moments:
    """Measure ``μ[t]`` and ``σ[t]`` of each unit over the batch and all positions (eq. 5).

    Args:
        t: pre-activations, any floating dtype.
        axis: where the units lie.

    Example:
        >>> moments_of(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), -1).std
        tensor([1., 0.])
    """
    units = t.movedim(axis, 0).reshape(t.shape[axis], -1).to(wide_dtype(t.dtype))
    count = torch.full(units.shape[:1], units.shape[1], dtype=units.dtype, device=t.device)
    if not units.shape[1]:
        return Moments(count, count, count, t.dtype)
    variance, mean = torch.var_mean(units, dim=1, correction=0)
    return Moments(count, mean, variance * count, t.dtype)


def side_by_side(parts: Iterable[Moments]) -> Moments:
    """Return the moments of units that were measured apart, one after the other."""
    parts = list(parts)
    count, mean, squares = (torch.cat([getattr(part, name) for part in parts]) for name in ("count", "mean", "squares"))
    return Moments(count, mean, squares, parts[0].dtype)


def together(parts: Iterable[Moments]) -> Moments:
    """Return the moments of the same units over all pieces."""
    return reduce(Moments.__add__, parts)


def over_ranks(own: Moments) -> Moments:
    """Return the moments over the pieces of all ranks, the same bits on each: added up in the order of the ranks."""
    mine = torch.stack([own.count, own.mean, own.squares])
    return together(Moments(theirs[0], theirs[1], theirs[2], own.dtype) for theirs in gathered(mine))


def gathered(mine: Tensor) -> list[Tensor]:
    """Return a tensor as each rank has it."""
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return theirs
