"""Compose the weights of a model once for several forwards, and pull their gradients back once."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightnorm.layers.apart import compose_apart
from weightnorm.layers.computed import writes_counted, writes_to
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
        >>> import torch, weightnorm as wn
        >>> model = wn.weight_norm(nn.Linear(3, 2))
        >>> with wn.cached(model):
        ...     model(torch.ones(1, 3)).sum().backward()
        ...     model(torch.ones(1, 3)).sum().backward()
        >>> model.parametrizations.weight.original0.grad.shape
        torch.Size([2, 1])
    """
    held = [one for one in _holders(model) if one.__dict__.get(CACHED) is None]
    forms, (gs, vs) = [one._modules["0"] for one in held], _tensors(held)
    with writes_counted():
        lengths = [form.lengths(g) for form, g in zip(forms, gs, strict=True)]
        weights, pull_back = compose_apart(vs, lengths, [form.axis for form in forms])
    before = _marks(held)
    ours = [Cached(one, weight) for one, weight in zip(held, weights, strict=True)]
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
    pull_back()


def _holders(model: nn.Module) -> list[Any]:
    """Return what holds ``g`` and ``v`` of each weight that ours alone parametrizes."""
    found, parts = list[Any](), {model: None}  # walked here, since model.modules() takes several times as long
    waiting = [model]
    for part in waiting:
        if isinstance(part, parametrize.ParametrizationList):
            if len(part._modules) == 1 and isinstance(part._modules["0"], WeightNorm):
                found.append(part)
            continue
        new = [child for child in part._modules.values() if child is not None and child not in parts]
        parts |= dict.fromkeys(new)
        waiting += dict.fromkeys(new)
    return found


def _tensors(held: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return every ``g`` and every ``v``."""
    of_each = [one._parameters or one._buffers for one in held]  # a buffer may be weight-normalised as well
    return [one["original0"] for one in of_each], [one["original1"] for one in of_each]


def _marks(held: list[Any]) -> list[tuple[int, int, int]]:
    """Return what tells whether a tensor was written to, replaced, or given other memory."""
    tensors = chain(*_tensors(held))
    return [(id(tensor), tensor.data_ptr(), writes_to(tensor)) for tensor in tensors]
