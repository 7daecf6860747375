"""Weight norm as a parametrization of torch's: ``parametrizations.weight.original0`` is g, ``original1`` is v."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightnorm.axes import Axis
from weightnorm.formula import decompose, length_floor, wide_dtype
from weightnorm.layers.compose import compose, compose_unwatched, is_watched
from weightnorm.layers.computed import writes_counted, written_through

_V_STD = 0.05  # of the direction of a vector that has none, as the paper draws all (section 3)


class WeightNorm(nn.Module):
    """``w = g v/‖v‖`` (eq. 2) for ``torch.nn.utils.parametrize``; or ``g = exp(s)``, and ``s`` is what is trained.

    Args:
        axis: where the weight's vectors lie.
        weight: the weight, for the dtype of its lengths.
        log_g: keep lengths as their logarithm (section 2). A checkpoint then has a marker, ``log_g``, beside them.
    """

    def __init__(self, axis: Axis, weight: Tensor, log_g: bool = False):
        super().__init__()
        self.axis = axis
        self.log_g: Tensor | None
        self.like_g: Tensor
        self.register_buffer("log_g", torch.tensor(True, device=weight.device) if log_g else None)
        # Follows the module from dtype to dtype as g does, so that right_inverse knows g's.
        like = torch.empty(0, dtype=wide_dtype(weight.dtype), device=weight.device)
        self.register_buffer("like_g", like, persistent=False)

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Return the weight; outside of compilers and transforms, one that writes through."""
        if is_watched():
            return compose(v, self.lengths(g), self.axis)
        with writes_counted():
            return written_through(compose(v, self.lengths(g), self.axis), self, g, v)

    def lengths(self, g: Tensor) -> Tensor:
        """Return the lengths themselves."""
        return g if self._buffers["log_g"] is None else g.exp()

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``g`` and ``v`` of a weight: ``v = w``; drawn N(0, 0.05²) where w is zero, so that it can learn."""
        split, kept = self.axis.split(weight), self.axis.kept(weight)
        v, g = decompose(split, kept)
        dead = g <= length_floor(weight.dtype)
        if not weight.is_meta and dead.any():
            v = torch.where(dead, torch.randn_like(v) * _V_STD, v)
        if self.log_g is not None:
            g = _logarithm(g)
        g = g.reshape(()) if self.axis.dim is None else g  # torch's way with one length
        return g.to(self.like_g.dtype), v.reshape(weight.shape)

    def extra_repr(self) -> str:
        """Say along which axis, for ``print(model)``."""
        groups = f", groups={self.axis.groups}" if self.axis.groups > 1 else ""
        return f"dim={self.axis.dim}{groups}{', log_g=True' if self.log_g is not None else ''}"


def _logarithm(g: Tensor) -> Tensor:
    if not g.is_meta and not (g > 0).all():
        raise ValueError(
            f"{int((g <= 0).sum())} of {g.numel()} vectors are zero, and exp(s) is not; initialise them first, or hold "
            "lengths as they are (log_g=False)"
        )
    return g.log()


CACHED = "cached_weight"  # where the holder of g and v has a weight that was composed beforehand


class Cached:
    """A weight composed beforehand, for this holder alone: a deep copy of the holder has none.

    Args:
        held: the holder.
        weight: the weight, a leaf.
    """

    __slots__ = ("held", "weight")

    def __init__(self, held: Any, weight: Tensor):
        self.held, self.weight = held, weight

    def to_write(self) -> Tensor:
        """Return the weight for someone who may write to it; the same tensor."""
        return written_through(self.weight, self.held[0], self.held.original0, self.held.original1)

    def __deepcopy__(self, _: Any) -> None:
        return None


def attach(module: nn.Module, name: str, parametrization: WeightNorm) -> None:
    """Register the parametrization, with a property that reads the weight faster than torch's chain of modules."""
    if parametrize.is_parametrized(module):
        module.__class__ = class_without(type(module), "")  # deep copies share a class; the other must not change
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    forward: Any = type(module).forward
    reader = forward.__code__ if forward.__module__.startswith("torch.nn.") else None
    slow: Any = getattr(type(module), name)
    setattr(type(module), name, property(_getter(name, slow.fget, reader), slow.fset))


def _getter(name: str, slow: Callable[[nn.Module], Tensor], reader: Any) -> Callable[[nn.Module], Tensor]:
    """Return what reads a weight: ``slow`` where torch has more in mind; without write-through for ``reader``.

    ``reader`` is the code of a layer's own forward, where that is one of torch's and so known not to write.
    """

    def read(module: nn.Module) -> Tensor:
        if parametrize._cache_enabled or is_watched():
            return slow(module)
        held: Any = module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        reads_only = sys._getframe(1).f_code is reader
        cached: Cached | None = held.__dict__.get(CACHED)
        if cached is not None:
            return cached.weight if reads_only else cached.to_write()
        tensors = held._parameters or held._buffers  # a buffer may be weight-normalised as well
        if len(held._modules) > 1 or "original0" not in tensors:  # DataParallel's replicas have plain attributes
            return slow(module)
        ours, g, v = held._modules["0"], tensors["original0"], tensors["original1"]
        if reads_only:
            return compose_unwatched(v, ours.lengths(g), ours.axis)
        weight: Tensor = ours.forward(g, v)
        return weight

    return read


def class_without(kind: type, name: str) -> type:
    """Return a copy of a parametrized class that lacks the property ``name``."""
    left_out = (name, "__dict__", "__weakref__")
    return type(kind.__name__, kind.__bases__, {key: value for key, value in vars(kind).items() if key not in left_out})
