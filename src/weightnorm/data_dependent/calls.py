"""One call of a layer: what its units put out, and what the layer does once they have changed, with the same noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import get_device_states, set_device_states

from weightnorm.data_dependent.units import PROJECTIONS, Units


class Call:
    """A call of a layer, and the random state that it began with.

    Args:
        layer: the layer.
        args: of the call.
        kwargs: of the call.
    """

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._layer, self._args, self._kwargs = layer, args, kwargs
        self._random = torch.get_rng_state(), *get_device_states(*args)
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
