"""Attention uses its projections without calling them: here what they put out is computed beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import get_device_states, set_device_states

Compute = Callable[[], list[Tensor]]

_APART = "q_proj_weight", "k_proj_weight", "v_proj_weight"  # where key or value are of another size


class AttentionCall:
    """One call of ``nn.MultiheadAttention``, and the random state that it began with.

    Args:
        attention: the module.
        args: of the call.
        kwargs: of the call.
    """

    def __init__(self, attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._attention = attention
        self._call = partial(attention.forward, *args, **kwargs)
        given = signature(nn.MultiheadAttention.forward).bind(attention, *args, **kwargs).arguments
        self._inputs = given["query"], given["key"], given["value"]
        self._random = torch.get_rng_state(), *get_device_states(*self._inputs)

    def computation(self, weight: str) -> Compute:
        """Return what computes the output of one of attention's weights, by its name."""
        if weight == "in_proj_weight":
            return self._projections
        if weight in _APART:
            return lambda: [self._projections()[_APART.index(weight)]]
        return self._outputs

    def again(self) -> Any:
        """Return what the call now puts out, with the same noise."""
        with self._same_noise():
            return self._call()

    def _projections(self) -> list[Tensor]:
        """Return what query, key and value are projected to."""
        own, bias = self._attention, self._attention.in_proj_bias
        stacked = own.in_proj_weight
        weights = stacked.chunk(3) if stacked is not None else [getattr(own, name) for name in _APART]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        return [functional.linear(*given) for given in zip(self._inputs, weights, biases, strict=True)]

    def _outputs(self) -> list[Tensor]:
        """Return what the heads' results are projected to."""
        last = self._attention.out_proj
        return [functional.linear(self._heads(), last.weight, last.bias)]

    def _heads(self) -> Tensor:
        """Return what the heads put out, side by side: what attention does if its last projection is the identity."""
        own = self._attention
        last, size = own.out_proj, own.embed_dim
        like = {"device": last.weight.device, "dtype": last.weight.dtype}
        identity = nn.utils.skip_init(nn.Linear, size, size, last.bias is not None, **like)
        nn.init.eye_(identity.weight)
        if identity.bias is not None:
            nn.init.zeros_(identity.bias)
        own._modules["out_proj"] = identity
        try:
            with self._same_noise():
                return self._call()[0]
        finally:
            own._modules["out_proj"] = last

    @contextmanager
    def _same_noise(self) -> Iterator[None]:
        state, devices, states = self._random
        with torch.random.fork_rng(devices):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            yield
