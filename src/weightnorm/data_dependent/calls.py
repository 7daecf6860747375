"""One call of a layer: what its units put out, and what the layer does once they have changed, with the same noise."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import get_device_states, set_device_states

from weightnorm.data_dependent.units import PROJECTIONS, Settable, Units


class Call:
    """A call of a layer, and the random state that it began with.

    Args:
        layer: the layer.
        args: of the call.
        kwargs: of the call.
    """

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._layer, self._args, self._kwargs = layer, args, kwargs
        self._random = torch.get_rng_state(), *get_device_states(*args, *kwargs.values())
        self._result: Any = None
        self.is_stale = True  # the weights are others than those that the result was computed with

    def result(self) -> Any:
        """Return what the layer puts out, with the weights that it has now."""
        if self.is_stale:
            self.keep(self._again())
        return self._result

    def keep(self, result: Any) -> None:
        """Take note of what the layer puts out."""
        self._result, self.is_stale = result, False

    def put_out(self, units: Units) -> list[Any]:
        """Return what units of the layer put out, in one or in several parts; of several things the first tensor."""
        result = self.result()
        if isinstance(result, tuple | list):
            result = next((part for part in result if isinstance(part, Tensor)), result)
        return [result]

    def _again(self) -> Any:
        with self._same_noise():
            return self._layer.forward(*self._args, **self._kwargs)

    @contextmanager
    def _same_noise(self) -> Iterator[None]:
        state, devices, states = self._random
        with torch.random.fork_rng(devices):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            yield


class AttentionCall(Call):
    """A call of ``nn.MultiheadAttention``, which uses its projections without calling them."""

    def put_out(self, units: Units) -> list[Any]:
        """Return what one of its weights puts out."""
        if units.layer is not self._layer:
            return [functional.linear(self._heads(), units.layer.weight, units.layer.bias)]  # type: ignore[arg-type]
        inputs = signature(nn.MultiheadAttention.forward).bind(self._layer, *self._args, **self._kwargs).arguments
        given = [inputs[name] for name in ("query", "key", "value")]
        weight, bias = getattr(self._layer, units.weight), units.own_bias()
        if units.weight in PROJECTIONS:
            return [functional.linear(given[PROJECTIONS.index(units.weight)], weight, bias)]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        return [functional.linear(*each) for each in zip(given, weight.chunk(3), biases, strict=True)]

    def _heads(self) -> Tensor:
        """Return what the heads put out, side by side: what attention does if its last projection is the identity."""
        own: Any = self._layer
        last, size = own.out_proj, own.embed_dim
        like = {"device": last.weight.device, "dtype": last.weight.dtype}
        identity = nn.utils.skip_init(nn.Linear, size, size, last.bias is not None, **like)
        nn.init.eye_(identity.weight)
        if identity.bias is not None:
            nn.init.zeros_(identity.bias)
        own._modules["out_proj"] = identity
        try:
            heads: Tensor = self._again()[0]
        finally:
            own._modules["out_proj"] = last
        return heads


Meet = Callable[[Units, Call], None]
"""Told of units when they first run, and of the call."""


@contextmanager
def each_call(found: Settable, meet: Meet) -> Iterator[None]:
    """Tell ``meet`` of each layer's units when they first run inside."""
    met, calls = set[Units](), list[Call]()

    def first(units: Units, call: Call) -> None:
        if units not in met:
            met.add(units)
            meet(units, call)

    with ExitStack() as hooks:
        for layer, own in found.layers.items():
            kind = AttentionCall if isinstance(layer, nn.MultiheadAttention) else Call
            begin, end = partial(_begin, calls, kind), partial(_end, calls, own, first)
            hooks.enter_context(layer.register_forward_pre_hook(begin, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(end, prepend=True, with_kwargs=True))
        yield


def _begin(
    calls: list[Call], kind: type[Call], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    calls.append(kind(layer, args, kwargs))


def _end(calls: list[Call], own: list[Units], meet: Meet, _: nn.Module, __: Any, ___: Any, output: Any) -> Any:
    """Forward hook of a layer: hand on what it puts out once its units have been met."""
    call = calls.pop()
    call.keep(output)
    with torch.no_grad():
        for units in own:
            meet(units, call)
    # The same again where autograd is to follow, as it does in models that differentiate by their input.
    call.is_stale = call.is_stale or (torch.is_grad_enabled() and call.result() is not output)
    return call.result()
