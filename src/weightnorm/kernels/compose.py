"""The weight ``w = g v/‖v‖`` and its gradients on a GPU.

One weight: one launch forward and one backward, with as little on the host beside them as there can be. Several at
once: one launch each way for all of them, through tables that stay while nothing moves.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from weightnorm.axes import Axis
from weightnorm.kernels.compose_tiles import Kind, chunks_of, layout_of, tile_of

HOMES = {"cuda"}  # the devices whose tensors the kernels take; under Triton's interpreter a test may add the CPU

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def takes(v: Tensor, g: Tensor, axis: Axis) -> bool:
    """Say whether the kernels can take a weight.

    Args:
        v: the direction.
        g: its lengths, one a vector.
        axis: where the vectors lie.
    """
    if v.device.type not in HOMES or v.device != g.device or not _is_installed():
        return False
    if v.dtype not in _DTYPES or g.dtype not in _DTYPES or not g.is_contiguous():
        return False
    at = layout_of(v.shape, v.stride(), v.stride(), axis)
    return at is not None and at.rows == g.numel()


@lru_cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def forward(vs: Sequence[Tensor], gs: Sequence[Tensor], axes: Sequence[Axis]) -> list[Tensor]:
    """Compose weights that the kernels take (eq. 2).

    Args:
        vs: the directions.
        gs: their lengths.
        axes: where the vectors lie.

    Returns:
        The weights, each in the shape, dtype and layout of its direction.
    """
    if len(vs) == 1:
        return [_forward(vs[0], gs[0], axes[0])]
    return _all(vs, gs, axes, vs, back=False)[0]


def backward(
    grad_ws: Sequence[Tensor | None], vs: Sequence[Tensor], gs: Sequence[Tensor], axes: Sequence[Axis]
) -> tuple[list[Any], list[Any]]:
    """Pull gradients at weights back to directions and lengths (eq. 3).

    Args:
        grad_ws: the gradients, in any layout; None where there is none.
        vs: the directions.
        gs: their lengths.
        axes: where the vectors lie.

    Returns:
        The gradients at ``vs`` and at ``gs``, each in the shape, dtype and layout of these; None where there is none.
    """
    grads = [_described(grad, v, axis) for grad, v, axis in zip(grad_ws, vs, axes, strict=True)]
    if len(vs) > 1:
        return _all(vs, gs, axes, grads, back=True)
    grad_v, grad_g = (None, None) if grads[0] is None else _backward(grads[0], vs[0], gs[0], axes[0])
    return [grad_v], [grad_g]


def _described(grad: Tensor | None, v: Tensor, axis: Axis) -> Tensor | None:
    """Return a gradient in a layout that the kernels can follow."""
    if grad is None or grad.stride() == v.stride():
        return grad
    follows = layout_of(v.shape, v.stride(), grad.stride(), axis) is not None
    return grad if follows else torch.empty_like(v, dtype=grad.dtype).copy_(grad)


def _forward(v: Tensor, g: Tensor, axis: Axis) -> Tensor:
    w, at, g_at = torch.empty_like(v), v.data_ptr(), g.data_ptr()
    # The kernel reads no gradient and writes none.
    _alone(_fields(v, g, axis, v, at % 16 == 0, back=False))(at, g_at, at, w.data_ptr(), g_at)
    return w


def _backward(grad: Tensor, v: Tensor, g: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    grad_v, grad_g = torch.empty_like(v), torch.empty_like(g)
    at, grad_at = v.data_ptr(), grad.data_ptr()
    launch = _alone(_fields(v, g, axis, grad, (at | grad_at) % 16 == 0, back=True))
    launch(at, g.data_ptr(), grad_at, grad_v.data_ptr(), grad_g.data_ptr())
    return grad_v, grad_g


def _all(
    vs: Sequence[Tensor], gs: Sequence[Tensor], axes: Sequence[Axis], grads: Sequence[Tensor | None], back: bool
) -> tuple[list[Any], list[Any]]:
    """Return the weights, for ``grads`` that are ``vs``; or the gradients at v and at g."""
    described = [v if grad is None else grad for v, grad in zip(vs, grads, strict=True)]
    fields = [
        _fields(v, g, axis, grad, (v.data_ptr() | grad.data_ptr()) % 16 == 0, back)
        for v, g, axis, grad in zip(vs, gs, axes, described, strict=True)
    ]
    alone, together = _model(tuple(fields))
    outs, grad_gs = list[Any]([None] * len(vs)), list[Any]([None] * len(vs))
    for i in alone:
        grad = grads[i]
        if not back:
            outs[i] = _forward(vs[i], gs[i], axes[i])
        elif grad is not None:
            outs[i], grad_gs[i] = _backward(grad, vs[i], gs[i], axes[i])
    for indices, launch in together:
        found = launch([vs[i] for i in indices], [gs[i] for i in indices], [grads[i] for i in indices])
        for i, out, grad_g in zip(indices, *found, strict=True):
            if grads[i] is not None:
                outs[i], grad_gs[i] = out, grad_g
    return outs, grad_gs


def _fields(v: Tensor, g: Tensor, axis: Axis, grad: Tensor, aligned: bool, back: bool) -> tuple[Any, ...]:
    """Return those of ``Kind``, as a plain tuple, which is made faster: every pass looks one up."""
    facts = v.shape, v.stride(), v.dtype, g.shape, g.dtype
    return *facts, axis, v.device, aligned, grad.stride(), grad.dtype, back


@lru_cache(maxsize=4096)
def _alone(fields: tuple[Any, ...]) -> Any:
    """Return the launch of a weight."""
    from weightnorm.kernels.compose_launches import Alone

    return Alone(Kind(*fields))


@lru_cache(maxsize=64)
def _model(fields: tuple[tuple[Any, ...], ...]) -> tuple[list[int], list[tuple[list[int], Any]]]:
    """Return which weights have launches of their own, and which share one: those of one device and the same dtypes."""
    from weightnorm.kernels.compose_launches import Together

    kinds = [Kind(*each) for each in fields]
    alone, groups = list[int](), dict[Any, list[int]]()
    for i, kind in enumerate(kinds):
        if chunks_of(kind.at, tile_of(kind))[0] > 1:
            alone.append(i)
        else:
            groups.setdefault((kind.device, kind.dtype, kind.g_dtype, kind.grad_dtype), []).append(i)
    return alone, [(group, Together([kinds[i] for i in group])) for group in groups.values()]
