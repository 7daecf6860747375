"""Centring, ``t~ = t − μ[t] + b`` (eq. 7), and its gradients (eq. 8), in three passes over memory each.

A pass reads or writes all activations once. Either way takes a sum (one read) and a shift of each channel (one read,
one write); autograd, left to itself, would write the mean's gradient out in full and add it to the other.
"""

from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from weightnorm.formula import wide_dtype
from weightnorm.layers.compose import is_watched

_PART = 1 << 20  # elements: in float32 they stay in a cache


def centre(t: Tensor, bias: Tensor | None, group: "dist.ProcessGroup | None" = None) -> tuple[Tensor, Tensor]:
    """Centre each channel; right to any order of differentiation.

    Args:
        t: the activations, shape (N, C) or (N, C, *).
        bias: ``b``, shape (C,), or None for 0.
        group: the processes whose batches share one mean; None: this process alone.

    Returns:
        ``t~``, like ``t``, and ``μ[t]``, shape (C,), in float32 at least, which carries no gradient.

    Raises:
        ValueError: if there is nothing to average.

    Source: Salimans & Kingma 2016, equations 7 and 8.

    Example:
        >>> centre(torch.tensor([[1.0, 10.0], [3.0, 30.0]]), None)
        (tensor([[ -1., -10.],
                [  1.,  10.]]), tensor([ 2., 20.]))
    """
    if group is None:
        refuse_empty(t, count_of(t))
        if is_watched():  # who follows the operations one by one will fuse or transform them
            wide = t.to(wide_dtype(t.dtype))
            mean = wide.mean([axis for axis in range(t.ndim) if axis != 1])
            return shifted(wide, shift_of(bias, mean)).to(t.dtype), mean.detach()
    out, _, mean = _centre(t, bias, group)
    return out, mean


def shifted(t: Tensor, shift: Tensor) -> Tensor:
    """Add one number to each channel, in the wider of both dtypes; the sum is rounded to the dtype of ``t`` once.

    Args:
        t: the activations, shape (N, C) or (N, C, *).
        shift: shape (C,).

    Returns:
        The sum: shape, dtype and memory format of ``t``.

    Example:
        >>> shifted(torch.zeros(1, 2, 2), torch.tensor([3.0, 5.0]))
        tensor([[[3., 3.],
                 [5., 5.]]])
    """
    if t.dtype.itemsize == 2 and shift.dtype == torch.float32 and not _is_followed(t, shift):
        # torch's sums of two dtypes are slow: on a CPU they first write a float32 copy. Its batch normalization reads
        # such a pair in one pass: here with mean 0 and variance 0, 1/sqrt(0 + eps) = 1.
        zero = torch.zeros_like(shift)
        if t.is_contiguous():
            return F.batch_norm(t, zero, zero, None, shift, eps=1.0)
        if (rows := t.movedim(1, -1)).is_contiguous():  # channels last
            out = F.batch_norm(rows.view(-1, shift.numel()), zero, zero, None, shift, eps=1.0)
            return out.view(rows.shape).movedim(-1, 1).detach()
    return (t + shift.reshape(-1, *[1] * (t.ndim - 2))).to(t.dtype)


def shift_of(bias: Tensor | None, mean: Tensor) -> Tensor:
    """Return ``b − μ``, in float32 at least: one number a channel, so that activations are read and written once."""
    mean = mean.to(wide_dtype(mean.dtype))  # a running mean is kept in the layer's dtype
    return -mean if bias is None else bias - mean


class _Centre(torch.autograd.Function):
    """``(t, b) -> (t − μ[t] + b, Σt)``, which is linear and symmetric, and so its own backward.

    Pulled back, ``(∂t~, ∂Σ)`` is ``(∂t~ − μ[∂t~] + ∂Σ, Σ∂t~)``: eq. 8, and the bias's gradient. ``μ`` is over the
    group, ``Σ`` over this process alone.
    """

    @staticmethod
    def forward(
        ctx: Any, t: Tensor, bias: Tensor | None, group: "dist.ProcessGroup | None", total: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, sums, mean, total = _run(t, bias, group, total)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean)
        ctx.like, ctx.group, ctx.total = (t.shape, t.dtype), group, total
        return out, sums, mean

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_sums: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            if grad_sums is None:
                return None, None, None, None
            shape, dtype = ctx.like
            grad = grad_sums.new_zeros(shape, dtype=dtype)
        if not ctx.needs_input_grad[0]:
            return None, channel_sums(grad), None, None
        grad_t, grad_bias, _mean = _centre(grad, grad_sums, ctx.group, ctx.total)
        return grad_t, grad_bias if ctx.needs_input_grad[1] else None, None, None


def _centre(
    t: Tensor, bias: Tensor | None, group: "dist.ProcessGroup | None", total: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``t~``, this process's sums and the mean, for autograd to follow if it would."""
    if torch.is_grad_enabled() and (t.requires_grad or (bias is not None and bias.requires_grad)):
        return _Centre.apply(t, bias, group, total)
    return _run(t, bias, group, total)[:3]


def _run(
    t: Tensor, bias: Tensor | None, group: "dist.ProcessGroup | None", total: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ``t~``, this process's sums, the mean and, over a group, how many elements a channel has there."""
    sums = channel_sums(t)
    if group is None:
        mean = sums / count_of(t)
    elif total is None:
        everything = torch.cat([sums, sums.new_full((1,), count_of(t))])
        dist.all_reduce(everything, group=group)
        total = everything[-1]
        refuse_empty(t, total)
        mean = everything[:-1] / total
    else:
        everything = sums.clone()
        dist.all_reduce(everything, group=group)
        mean = everything / total
    return shifted(t, shift_of(bias, mean)), sums, mean, total


def channel_sums(t: Tensor) -> Tensor:
    """Return ``Σt`` of each channel, shape (C,), in float32 at least."""
    wide = wide_dtype(t.dtype)
    if t.is_cpu and t.dtype != wide and t.numel() > _PART and len(t) > 1:
        # There torch sums another dtype by writing a copy: a part at a time, so that the copy is not all activations.
        return torch.stack([channel_sums(part) for part in t.split(max(1, len(t) * _PART // t.numel()))]).sum(0)
    # Within each example first: torch is slow where the summed axes lie on both sides of the kept one.
    each = t.sum(list(range(2, t.ndim)), dtype=wide) if t.ndim > 2 else t
    return each.sum(0, dtype=wide)


def count_of(t: Tensor) -> int:
    """Return how many elements a channel has."""
    return len(t) * prod(t.shape[2:])


def refuse_empty(t: Tensor, total: int | Tensor) -> None:
    """Raise if ``t`` is empty and so is the whole; only an empty ``t`` makes the host wait for a device's ``total``."""
    if t.numel() == 0 and not total:
        raise ValueError(
            f"an empty batch has no mean; got shape {tuple(t.shape)}. Skip it, or use the running mean: call eval()"
        )


def _is_followed(*tensors: Tensor) -> bool:
    """Say whether autograd or anybody else follows what is done with these."""
    return (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) or is_watched()
