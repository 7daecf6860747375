"""The weight of the module form and its gradients: the formula, by the fastest means at hand.

Whoever traces, transforms or differentiates through a gradient meets ``formula`` itself in plain torch. Everybody else
gets a fused forward and a fused backward: Triton's on a GPU; on the CPU torch's own where there is one.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from weightnorm import formula
from weightnorm.axes import Axis
from weightnorm.kernels import compose as kernels
from weightnorm.kernels.layout import is_dense
from weightnorm.kernels.trust import works

if TYPE_CHECKING:
    from weightnorm.kernels.compose_launches import Alone

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
    kernel = kernel_of(v, g, axis)
    if torch.is_grad_enabled() and (v.requires_grad or g.requires_grad):
        return _apply(v, g, axis, kernel)
    return by_formula(v, g, axis) if kernel is None else kernel.forward(v, g)


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
    def forward(ctx: Any, v: Tensor, g: Tensor, axis: Axis, kernel: "Alone | None") -> Tensor:
        ctx.axis, ctx.kernel = axis, kernel
        ctx.save_for_backward(v, g)
        if kernel is not None:
            return kernel.forward(v, g)
        return by_formula(v, g, axis).detach()  # not a view, which a Function's result must not be

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor) -> tuple[Tensor, Tensor, None, None]:
        v, g = ctx.saved_tensors
        if ctx.kernel is None or torch.is_grad_enabled():  # enabled: it will be differentiated again
            return *gradients(grad_w, v, g, ctx.axis), None, None
        return *ctx.kernel.backward(grad_w, v, g), None, None


# Function.apply first asks about functorch, as ``compose`` has done.
_apply: Any = super(torch.autograd.Function, _Compose).apply


def kernel_of(v: Tensor, g: Tensor, axis: Axis) -> "Alone | None":
    """Return what composes a weight by kernels, tried and found right; None where plain torch does."""
    kernel = kernels.one(v, g, axis)
    return kernel if kernel is not None and works("the weight", v.device, _composes_rightly) else None


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
        back: the order that undoes it.
        shape: with the axes in that order.
        size: then as a matrix.
        copies: whether that is another order than the memory's, so that it takes a copy each way.
    """

    dim: int
    order: tuple[int, ...] | None = None
    back: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    size: tuple[int, int] = (0, 0)
    copies: bool = False

    def to_matrix(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.permute(self.order).reshape(self.size)

    def from_matrix(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        w = x.reshape(self.shape).permute(self.back)
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
    dim, copies = int(bool(kept) and order[len(order) - len(kept) :] == kept), False
    if dim == 0:
        copies = order[: len(kept)] != kept
        if copies and not v.is_contiguous():
            return None
        order = (*kept, *(i for i in order if i not in kept))
    back = tuple(sorted(range(v.ndim), key=order.__getitem__))
    return _View(dim, order, back, tuple(shape[i] for i in order), size[::-1] if dim else size, copies)
