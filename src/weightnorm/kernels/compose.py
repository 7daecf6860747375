"""The weight ``w = g v/‖v‖`` and its gradients on a GPU.

One weight: one launch forward and one backward, with as little on the host beside them as there can be. Several at
once: one launch each way for all of them, through tables that stay while nothing moves.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightnorm.axes import Axis
from weightnorm.kernels.compose_tiles import Kind, chunks_of, described, layout_of, tile_of

if TYPE_CHECKING:
    from weightnorm.kernels.compose_launches import Alone
    from weightnorm.kernels.compose_together import Together

HOMES = {"cuda"}  # the devices whose tensors the kernels take; under Triton's interpreter a test may add the CPU

_DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


def one(v: Tensor, g: Tensor, axis: Axis) -> "Alone | None":
    """Return what composes a weight, and pulls its gradients back; None where the kernels cannot take it.

    Args:
        v: the direction.
        g: its lengths, one a vector.
        axis: where the vectors lie.
    """
    if v.device.type not in HOMES or v.device != g.device or not g.is_contiguous():
        return None
    return _alone(*_facts(v, g, axis))


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
        return [_known(vs[0], gs[0], axes[0]).forward(vs[0], gs[0])]
    return [w for w, _ in _all(vs, gs, axes, None)]


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
    if len(vs) == 1:
        grad, v, g = grad_ws[0], vs[0], gs[0]
        pairs = [(None, None) if grad is None else _known(v, g, axes[0]).backward(grad, v, g)]
    else:
        members = zip(grad_ws, vs, axes, strict=True)
        grads = [grad if grad is None else described(grad, v, axis) for grad, v, axis in members]
        pairs = _all(vs, gs, axes, grads)
    return [grad_v for grad_v, _ in pairs], [grad_g for _, grad_g in pairs]


def _facts(v: Tensor, g: Tensor, axis: Axis) -> tuple[Any, ...]:
    """Return the first fields of ``Kind``, plain: every pass of every layer looks them up."""
    return v.shape, v.stride(), v.dtype, v.device, g.shape, g.dtype, axis.dim, axis.groups


def _known(v: Tensor, g: Tensor, axis: Axis) -> "Alone":
    alone = _alone(*_facts(v, g, axis))
    assert alone is not None
    return alone


@lru_cache(maxsize=4096)
def _alone(*facts: Any) -> "Alone | None":
    """Return what does weights with these facts, or None."""
    kind = Kind(*facts)
    if not {kind.dtype, kind.g_dtype} <= _DTYPES or not importlib.util.find_spec("triton"):
        return None
    at = layout_of(kind.shape, kind.stride, kind.stride, Axis(kind.dim, kind.groups))
    if at is None or at.rows != kind.g_shape.numel():
        return None
    from weightnorm.kernels.compose_launches import Alone

    return Alone(kind)


def _all(
    vs: Sequence[Tensor], gs: Sequence[Tensor], axes: Sequence[Axis], grads: Sequence[Tensor | None] | None
) -> list[tuple[Any, Any]]:
    """Return a pair for each weight: it and None; or, with gradients, those at v and g."""
    likes = (
        [None] * len(vs) if grads is None else [v if grad is None else grad for v, grad in zip(vs, grads, strict=True)]
    )
    alone, together = _model(tuple(map(_kind, vs, gs, axes, likes)))
    pairs: list[tuple[Any, Any]] = [(None, None)] * len(vs)
    arrays: list[Sequence[Tensor | None]] = [vs, gs] if grads is None else [vs, gs, grads]
    for i in alone:
        one = _known(vs[i], gs[i], axes[i])
        if grads is None:
            pairs[i] = one.forward(vs[i], gs[i]), None
        elif (grad := grads[i]) is not None:
            pairs[i] = one.backward(grad, vs[i], gs[i])
    for indices, launch in together:
        at = [0 if x is None else x.data_ptr() for x in (tensors[i] for tensors in arrays for i in indices)]
        for i, out, grad_g in zip(indices, *launch(at), strict=True):
            if grads is None or grads[i] is not None:
                pairs[i] = out, grad_g
    return pairs


def _kind(v: Tensor, g: Tensor, axis: Axis, grad: Tensor | None) -> tuple[Any, ...]:
    """Return the fields of ``Kind``."""
    if grad is None:
        return *_facts(v, g, axis), v.data_ptr() % 16 == 0, None, None
    return *_facts(v, g, axis), (v.data_ptr() | grad.data_ptr()) % 16 == 0, grad.stride(), grad.dtype


@lru_cache(maxsize=64)
def _model(kinds: tuple[tuple[Any, ...], ...]) -> tuple[list[int], list[tuple[list[int], "Together"]]]:
    """Return which weights have launches of their own, and which share one: those of one device and the same dtypes."""
    from weightnorm.kernels.compose_together import Together

    alone, groups = list[int](), dict[Any, list[int]]()
    made = [Kind(*kind) for kind in kinds]
    for i, kind in enumerate(made):
        if chunks_of(kind.at, tile_of(kind))[0] > 1:
            alone.append(i)
        else:
            groups.setdefault((kind.device, kind.dtype, kind.g_dtype, kind.grad_dtype), []).append(i)
    return alone, [(group, Together([made[i] for i in group])) for group in groups.values()]
