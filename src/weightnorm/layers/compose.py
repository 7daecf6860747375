"""The weight of the module form and its gradients: the formula, by the fastest means at hand.

Whoever traces, transforms or differentiates through a gradient meets ``formula`` itself in plain torch. Everybody else
gets one fused forward and one fused backward: Triton's on a GPU; on the CPU torch's own, where there is one.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from weightnorm import formula
from weightnorm.axes import Axis
from weightnorm.kernels.layout import is_dense, rows_of

_DTYPES = (torch.float32, torch.float64)  # of torch's kernels, as far as their results are good enough
_PLAIN = (Tensor, nn.Parameter)  # subclasses (DTensor, FakeTensor) have their own ways


def compose(v: Tensor, g: Tensor, axis: Axis) -> Tensor:
    """Make the weight ``w = g v/‖v‖`` (eq. 2); right to any order of differentiation.

    Args:
        v: the direction, any layout.
        g: its lengths, in the shape of ``lengths_shape``.
        axis: where the vectors of ``v`` lie.

    Returns:
        The weight, in the shape, dtype and layout of ``v``.
    """
    if is_watched() or type(v) not in _PLAIN or type(g) not in _PLAIN:
        return by_formula(v, g, axis)
    if torch.is_grad_enabled() and (v.requires_grad or g.requires_grad):
        return _apply(v, g, axis)
    return _fused_forward(v, g, axis)[0]


def by_formula(v: Tensor, g: Tensor, axis: Axis) -> Tensor:
    """Return ``compose`` in plain torch."""
    return formula.compose(axis.split(v), g, axis.kept(v)).reshape(v.shape)


def gradients(grad_w: Tensor, v: Tensor, g: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return the gradients at ``v`` and ``g`` (eq. 3) in plain torch, themselves differentiable."""
    grad_v, grad_g = formula.pull_back(axis.split(grad_w), axis.split(v), g, axis.kept(v))
    return grad_v.reshape(v.shape), grad_g


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, axis: Axis) -> Tensor:
        w, length, ctx.plan = _fused_forward(v, g, axis)
        ctx.axis = axis
        ctx.save_for_backward(v, g, length)
        return w

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor) -> tuple[Tensor, Tensor, None]:
        v, g, length = ctx.saved_tensors
        if ctx.plan and not torch.is_grad_enabled():  # enabled: the gradient will be differentiated again
            return (*ctx.plan.backward(grad_w, v, g, length), None)
        return (*gradients(grad_w, v, g, ctx.axis), None)


# Function.apply first asks about functorch, as ``compose`` has done.
_apply: Any = super(torch.autograd.Function, _Compose).apply


def is_watched() -> bool:
    """Say whether operations are followed one by one: by a compiler, an exporter, ``torch.func``, forward mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _fused_forward(v: Tensor, g: Tensor, axis: Axis) -> tuple[Tensor, Tensor | None, "_Plan | None"]:
    """Return the weight; its lengths and the plan by which the backward goes, where it can be a fused one."""
    plan = _plan(v.shape, v.stride(), axis) if v.dtype == g.dtype in _DTYPES and v.is_cpu else None
    if plan:
        w, length = torch._weight_norm_interface(plan.matrix(v), plan.lengths(g), plan.dim)
        if length.all():  # torch divides by the length of a row of zeros
            return plan.tensor(w, v), length, plan
    return by_formula(v, g, axis).detach(), None, None  # not a view, which a custom Function's result must not be


@dataclass(frozen=True)
class _Plan:
    """How torch's kernels can be given a tensor: along ``dim``; of a matrix of ``size`` in its memory, or as it is."""

    dim: int
    size: tuple[int, int] | None = None

    def backward(self, grad_w: Tensor, v: Tensor, g: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        if grad_w.stride() != v.stride():
            grad_w = torch.empty_like(v).copy_(grad_w)
        if self.size is None:
            return _backward(grad_w, v, g, length, self.dim)
        grad_v, grad_g = _backward(self.matrix(grad_w), self.matrix(v), self.lengths(g), length, self.dim)
        return self.tensor(grad_v, v), grad_g.reshape(g.shape)

    def matrix(self, x: Tensor) -> Tensor:
        return x if self.size is None else x.as_strided(self.size, (self.size[1], 1))

    def tensor(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix if self.size is None else matrix.as_strided_(like.shape, like.stride())

    def lengths(self, g: Tensor) -> Tensor:
        return g if self.size is None else g.reshape((-1, 1) if self.dim == 0 else (1, -1))


_backward: Any = torch.ops.aten._weight_norm_interface_backward.default


@lru_cache(maxsize=1024)
def _plan(shape: torch.Size, stride: tuple[int, ...], axis: Axis) -> _Plan | None:
    """Return how torch's kernels, which know the first and the last axis of contiguous tensors, can take a layout."""
    v = torch.empty_strided(shape, stride, device="meta")
    if v.ndim < 2 or v.numel() == 0 or axis.row_length(v) == 1 or not is_dense(v):
        return None
    if v.is_contiguous() and axis.groups == 1 and axis.kept(v) in ((0,), (v.ndim - 1,)):
        return _Plan(axis.kept(v)[0])
    at = rows_of(v, v, axis)
    if at is None:
        return None
    if at.contiguous:
        return _Plan(0, (at.rows, at.length))
    whole = at.row_split == at.rows and at.split == at.length
    return _Plan(1, (at.length, at.rows)) if whole and at.row[1] == 1 and at.column[1] == at.rows else None
