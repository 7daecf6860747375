"""The weight of the module form and its gradients: the formula, by the fastest means at hand.

Whoever traces, transforms or differentiates through a gradient meets ``formula`` itself in plain torch. Everybody else
gets a fused forward and a fused backward: Triton's on a GPU; on the CPU torch's own where there is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from weightnorm import formula
from weightnorm.axes import Axis
from weightnorm.kernels import compose as kernels
from weightnorm.kernels.layout import is_dense
from weightnorm.kernels.trust import works

_DTYPES = (torch.float32, torch.float64)  # of torch's kernels, as far as their results are good enough
_PLAIN = (Tensor, nn.Parameter)  # subclasses (DTensor, FakeTensor) have their own ways


def compose(v: Tensor, g: Tensor, axis: Axis) -> Tensor:
    """Make the weight ``w = g v/‖v‖`` (eq. 2); right to any order of differentiation.

    Args:
        v: the direction, any layout.
        g: its lengths, one element per vector.
        axis: where the vectors of ``v`` lie.

    Returns:
        The weight, in the shape, dtype and layout of ``v``.
    """
    return by_formula(v, g, axis) if is_watched() else compose_unwatched(v, g, axis)


def compose_unwatched(v: Tensor, g: Tensor, axis: Axis) -> Tensor:
    """Return ``compose`` where it is known that nobody watches."""
    if type(v) not in _PLAIN or type(g) not in _PLAIN:
        return by_formula(v, g, axis)
    if v.is_cpu and v.dtype == g.dtype in _DTYPES and (view := _view(v.shape, v.stride(), axis)):
        w = _by_torch(v, g, view)
        if w is not None:
            return w
    if torch.is_grad_enabled() and (v.requires_grad or g.requires_grad):
        return _apply(v, g, axis)
    return _fused(v, g, axis)


def compose_all(vs: Sequence[Tensor], gs: Sequence[Tensor], axes: Sequence[Axis]) -> list[Tensor]:
    """Return the weights of a model; where kernels take them, by one launch forward and one backward.

    Args:
        vs: the directions.
        gs: their lengths.
        axes: where the vectors lie.
    """
    weights = list[Any]([None] * len(vs))
    together = [i for i, (v, g, axis) in enumerate(zip(vs, gs, axes, strict=True)) if _has_kernels(v, g, axis)]
    if len(together) > 1 and not is_watched():
        pairs = [tensor for i in together for tensor in (vs[i], gs[i])]
        for i, weight in zip(together, _ComposeAll.apply([axes[i] for i in together], *pairs), strict=True):
            weights[i] = weight
    return [
        compose(v, g, axis) if weight is None else weight
        for weight, v, g, axis in zip(weights, vs, gs, axes, strict=True)
    ]


def by_formula(v: Tensor, g: Tensor, axis: Axis) -> Tensor:
    """Return ``compose`` in plain torch."""
    return formula.compose(axis.split(v), g, axis.kept(v)).reshape(v.shape)


def gradients(grad_w: Tensor, v: Tensor, g: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return the gradients at ``v`` and ``g`` (eq. 3) in plain torch, themselves differentiable."""
    grad_v, grad_g = formula.pull_back(axis.split(grad_w), axis.split(v), g, axis.kept(v))
    return grad_v.reshape(v.shape), grad_g


def is_watched() -> bool:
    """Say whether operations are followed one by one: by a compiler, an exporter, ``torch.func``, forward mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        ctx.save_for_backward(v, g)
        return _fused(v, g, axis).detach()  # not a view, which a Function's result must not be

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor) -> tuple[Tensor, Tensor, None]:
        v, g = ctx.saved_tensors
        if torch.is_grad_enabled() or not _has_kernels(v, g, ctx.axis):  # enabled: it will be differentiated again
            return (*gradients(grad_w, v, g, ctx.axis), None)
        (grad_v,), (grad_g,) = kernels.backward([grad_w], [v], [g], [ctx.axis])
        return grad_v, grad_g, None


# Function.apply first asks about functorch, as ``compose`` has done.
_apply: Any = super(torch.autograd.Function, _Compose).apply


class _ComposeAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axes: list[Axis], *pairs: Tensor) -> tuple[Tensor, ...]:
        ctx.axes = axes
        ctx.save_for_backward(*pairs)
        ctx.set_materialize_grads(False)
        return tuple(kernels.forward(pairs[::2], pairs[1::2], axes))

    @staticmethod
    def backward(ctx: Any, *grad_ws: Tensor | None) -> tuple[Any, ...]:
        vs, gs = ctx.saved_tensors[::2], ctx.saved_tensors[1::2]
        if torch.is_grad_enabled():
            members = zip(grad_ws, vs, gs, ctx.axes, strict=True)
            found = [(None, None) if grad is None else gradients(grad, v, g, axis) for grad, v, g, axis in members]
        else:
            found = list(zip(*kernels.backward(grad_ws, vs, gs, ctx.axes), strict=True))
        return (None, *(grad for pair in found for grad in pair))


def _fused(v: Tensor, g: Tensor, axis: Axis) -> Tensor:
    return kernels.forward([v], [g], [axis])[0] if _has_kernels(v, g, axis) else by_formula(v, g, axis)


def _has_kernels(v: Tensor, g: Tensor, axis: Axis) -> bool:
    return kernels.takes(v, g, axis) and works("the weight", v.device, _composes_rightly)


def _composes_rightly(device: torch.device) -> bool:
    """Say whether the kernels find the weight and the gradients that the formula finds, for one weight and for two."""
    v = torch.linspace(-1, 2, 3 * 40, device=device, dtype=torch.float32).reshape(3, 40)
    g, grad_w = torch.tensor([[1.0], [-2.0], [0.5]], device=device, dtype=v.dtype), v.flip(0, 1).cos()
    expected = by_formula(v, g, Axis(0)), *gradients(grad_w, v, g, Axis(0))
    for count in (1, 2):
        given = [v] * count, [g] * count, [Axis(0)] * count
        found = kernels.forward(*given)[-1], *(grads[-1] for grads in kernels.backward([grad_w] * count, *given))
        if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(found, expected, strict=True)):
            return False
    return True


@dataclass(frozen=True)
class _View:
    """How torch's kernels, which know the first and the last axis of contiguous tensors, can see a tensor.

    Attributes:
        dim: the axis they are told.
        order: of the tensor's axes in memory; None: as they are, and nothing needs to be done.
        shape: with the axes in that order.
        size: then as a matrix.
        copies: whether that is another order than the memory's, so that it takes a copy each way.
    """

    dim: int
    order: tuple[int, ...] | None = None
    shape: tuple[int, ...] = ()
    size: tuple[int, int] = (0, 0)
    copies: bool = False

    def to_matrix(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.permute(self.order).reshape(self.size)

    def from_matrix(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        w = x.reshape(self.shape).permute(back)
        return w.contiguous() if self.copies else w

    def lengths(self, g: Tensor) -> Tensor:
        return g if self.order is None else g.reshape((-1, 1) if self.dim == 0 else (1, -1))


def _by_torch(v: Tensor, g: Tensor, view: _View) -> Tensor | None:
    """Return the weight by torch's fused kernels, with right second derivatives; None if a vector has no direction."""
    x, lengths = view.to_matrix(v), view.lengths(g)
    w, norms = torch._weight_norm_interface(x, lengths, view.dim)
    if not norms.min().item():  # it has divided by zero
        return None
    if w.grad_fn is not None:
        w.grad_fn.register_hook(partial(_right_gradients, x, lengths, view.dim))
    return view.from_matrix(w)


def _right_gradients(
    v: Tensor, g: Tensor, dim: int, found: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...] | None:
    """Replace what torch ``found`` where it will be differentiated again: there torch takes ‖v‖ for constant."""
    if not torch.is_grad_enabled():
        return None
    right = gradients(grads[0], v, g, Axis(dim))
    return tuple(None if one is None else other for one, other in zip(found, right, strict=True))


@lru_cache(maxsize=1024)
def _view(shape: torch.Size, stride: tuple[int, ...], axis: Axis) -> _View | None:
    """Return how torch's kernels can see a layout, if they can."""
    v = torch.empty_strided(shape, stride, device="meta")
    if v.ndim < 2 or v.numel() == 0 or axis.groups > 1 or axis.row_length(v) == 1 or not is_dense(v):
        return None
    kept = axis.kept(v)
    if v.is_contiguous() and kept in ((0,), (v.ndim - 1,)):
        return _View(kept[0])
    order = tuple(sorted(range(v.ndim), key=lambda i: (-stride[i], i)))
    rows = prod(shape[i] for i in kept)
    size = (rows, v.numel() // rows)
    if order[len(order) - len(kept) :] == kept and kept:
        return _View(1, order, tuple(shape[i] for i in order), size[::-1])
    copies = order[: len(kept)] != kept
    if copies and not v.is_contiguous():
        return None
    order = (*kept, *(i for i in order if i not in kept))
    return _View(0, order, tuple(shape[i] for i in order), size, copies)
