"""Compose the weights of a model once for several forwards, and pull their gradients back once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightnorm.layers.compose import compose_all
from weightnorm.layers.computed import Origin, written_through
from weightnorm.layers.parametrization import CACHED, Cached, WeightNorm


@contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Compute every weight-normalised weight of a model once, however often the model runs inside.

    Gradients of any number of backward passes are gathered at the weights; on leaving, one backward takes them to ``g``
    and ``v``. So the optimizer steps outside, and gradients of ``g`` and ``v`` are there from then on:

        with wn.cached(model):
            for batch in micro_batches:
                loss(model, batch).backward()
        optimizer.step()

    Also worth it where a model runs often and is not trained: streaming, sampling. Fold a model that is done.

    Args:
        model: a model in this library's module form.

    Raises:
        ValueError: on leaving, if ``g`` or ``v`` changed inside.

    Example:
        >>> import weightnorm as wn
        >>> model = wn.weight_norm(nn.Linear(3, 2))
        >>> with wn.cached(model):
        ...     model(torch.ones(1, 3)).sum().backward()
        ...     model(torch.ones(1, 3)).sum().backward()
        >>> model.parametrizations.weight.original0.grad.shape
        torch.Size([2, 1])
    """
    held = [one for one in _holders(model) if one.__dict__.get(CACHED) is None]
    weights = compose_all(
        [one.original1 for one in held], [one[0].lengths(one.original0) for one in held], [one[0].axis for one in held]
    )
    leaves = [_leaf(one, weight) for one, weight in zip(held, weights, strict=True)]
    before = _marks(held)
    ours = [Cached(leaf) for leaf in leaves]
    for one, cached_weight in zip(held, ours, strict=True):
        one.__dict__[CACHED] = cached_weight  # past nn.Module, which would register it
    try:
        yield
    finally:
        for one, cached_weight in zip(held, ours, strict=True):
            if one.__dict__.get(CACHED) is cached_weight:  # another thread's has taken its place otherwise
                del one.__dict__[CACHED]
    if _marks(held) != before:
        raise ValueError(
            "g or v of a cached weight changed inside cached(): an optimizer stepped, or a weight was set. Leave the "
            "context first; gradients were dropped"
        )
    used = [(w, leaf.grad) for w, leaf in zip(weights, leaves, strict=True) if leaf.grad is not None]
    if used:
        torch.autograd.backward([w for w, _ in used], [grad for _, grad in used])


def _holders(model: nn.Module) -> list[Any]:
    """Return what holds ``g`` and ``v`` of each weight that ours alone parametrizes."""
    return [
        part
        for part in model.modules()
        if isinstance(part, parametrize.ParametrizationList) and len(part) == 1 and isinstance(part[0], WeightNorm)
    ]


def _leaf(held: Any, weight: Tensor) -> Tensor:
    leaf = weight.detach().as_subclass(Tensor).requires_grad_(weight.requires_grad)
    return written_through(leaf, Origin(held[0], held.original0, held.original1))


def _marks(held: list[Any]) -> list[tuple[int, int, int]]:
    """Return what tells whether a tensor was written to, replaced, or given other memory."""
    tensors = [tensor for one in held for tensor in (one.original0, one.original1)]
    return [(id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
