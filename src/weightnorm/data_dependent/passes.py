"""The passes over a model in which each layer is standardised on what the corrected layers before it put out."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightnorm.data_dependent.attention import AttentionCall, Compute
from weightnorm.data_dependent.moments import Moments, over_ranks, together
from weightnorm.data_dependent.report import LayerReport
from weightnorm.data_dependent.units import Found, Key, Units
from weightnorm.mean_only import MeanOnlyBatchNorm
from weightnorm.preserve import as_found, cuda_devices

Meet = Callable[[Units, Compute, Compute], None]
"""Told of units when they first run in a pass: what computes their output, and what does after they were changed."""


class Enough(BaseException):
    """Ends a pass that has seen what it was for. No ``Exception``: no model may catch it."""


class Passes:
    """The passes over a model, and what they have found and changed.

    Args:
        model: the model.
        found: what of it can be standardised; what turns out not to be is added to ``left_out``.
        run: runs the model on the batch of a number.
        std_of: the standard deviation wanted, by a layer's name.
        train: the mode to run in.
        sync: take moments over the batches of all ranks.

    Attributes:
        centred: units whose mean is taken away by what follows, and that: their biases stay.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Found,
        run: Callable[[int], object],
        std_of: Callable[[str], float],
        train: bool,
        sync: bool,
    ):
        self._model, self._found, self._run = model, found, run
        self._std_of, self._train, self._sync = std_of, train, sync
        self._before = dict[nn.Parameter, Tensor]()  # every parameter that was changed, as it was
        self._measured = dict[Units, Moments]()  # the units that were changed, in this order
        self._after = dict[Units, Moments]()
        self._taken = set[Key]()
        self.centred = dict[Units, MeanOnlyBatchNorm]()
        self._means = dict[MeanOnlyBatchNorm, Tensor]()

    def one(self) -> None:
        """Standardise every layer in one pass over the only batch, each when it first runs."""

        def meet(units: Units, compute: Compute, again: Compute) -> None:
            if (own := self._moments(units, compute)) is not None:
                self._set(units, self._over_all(units, [own]))
                self._show_means()
                # Computed again rather than corrected: the bits later passes will see, the weights' rounding included.
                self._after[units] = self._over_all(units, [units.moments(again())])

        self.look(0, meet)

    def many(self, batches: int) -> None:
        """Standardise every layer on all batches together: a pass over each for each layer, as far as that layer."""
        while self._next(batches):
            pass
        parts: dict[Units, list[Moments]] = {units: [] for units in self._measured}

        def meet(units: Units, compute: Compute, _: Compute) -> None:
            if units in parts:
                parts[units].append(units.moments(compute()))

        for batch in range(batches):
            self.look(batch, meet)
        self._after = {units: self._over_all(units, own) for units, own in parts.items()}

    def look(self, batch: int, meet: Meet) -> None:
        """Run the model on a batch, and tell ``meet`` of all units; the model is then as before but for parameters."""
        with torch.no_grad(), as_found(self._model), _hooks(self._found, meet):
            self._model.train(self._train)
            self._show_means()
            if batch:  # the first has the noise that comes next
                _draw_other_noise(self._model, batch)
            with suppress(Enough):
                self._run(batch)

    def undo(self) -> None:
        """Put every parameter back."""
        with torch.no_grad():
            for parameter, before in self._before.items():
                parameter.copy_(before)
        torch.clear_autocast_cache()

    def keep_means(self) -> None:
        """Let the running means of the norms behind layers that were set be those of the first batch they have seen."""
        self._show_means()
        for norm in self._means:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.fill_(1)

    def reports(self) -> tuple[LayerReport, ...]:
        """Return what was done to each layer, in the order in which they ran."""
        return tuple(LayerReport.of(units, before, self._after[units]) for units, before in self._measured.items())

    def _next(self, batches: int) -> bool:
        """Standardise the first layer that has not been; say whether there was one."""
        target, parts = list[Units](), list[Moments]()

        def meet(units: Units, compute: Compute, _: Compute) -> None:
            if units not in target and target:
                return
            if (own := self._moments(units, compute)) is not None:
                target[:] = [units]
                parts.append(own)
                raise Enough

        for batch in range(batches):
            self.look(batch, meet)
        for units in target:
            self._set(units, self._over_all(units, parts))
        return bool(target)

    def _moments(self, units: Units, compute: Compute) -> Moments | None:
        """Measure what units put out; None if they have been standardised, or cannot be."""
        if units in self._measured or units.name in self._found.left_out:
            return None
        if not self._taken.isdisjoint(units.keys()):
            self._found.left_out[units.name] = "shares a parameter with a layer that ran before"
            return None
        ts = compute()
        if reason := units.misfit(ts):
            self._found.left_out[units.name] = reason
            return None
        return units.moments(ts)

    def _over_all(self, units: Units, parts: list[Moments]) -> Moments:
        whole = over_ranks(together(parts)) if self._sync else together(parts)
        if not whole.count.all():
            raise ValueError(f"layer {units.name} puts out nothing. Pass a batch that is not empty")
        if not (whole.mean.isfinite() & whole.squares.isfinite()).all():
            raise ValueError(
                f"layer {units.name} puts out NaN or infinity on this batch, so nothing was set. Look at the batch"
            )
        return whole

    def _set(self, units: Units, found: Moments) -> None:
        """Standardise units (eq. 6), but for those that are constant."""
        constant = found.is_constant()
        mean, factor = found.mean, torch.where(constant, 1, self._std_of(units.name) / found.std)
        for parameter in units.parameters():
            self._before.setdefault(parameter, parameter.detach().clone())
        self._taken |= set(units.keys())
        self._measured[units] = found
        norm = self.centred.get(units)
        units.standardise(torch.where(constant, 0, mean) if norm is None else None, factor)
        if norm is not None and norm.running_mean is not None:
            bias = units.own_bias()
            self._means[norm] = mean * factor if bias is None else (mean - bias) * factor + bias

    def _show_means(self) -> None:
        for norm, mean in self._means.items():
            assert norm.running_mean is not None
            norm.running_mean.copy_(mean)


def _draw_other_noise(model: nn.Module, batch: int) -> None:
    """Begin another stream of random numbers, one for each batch, that depends on the random state there is."""
    seed = int(torch.randint(2**62, (batch,))[-1])
    torch.default_generator.manual_seed(seed)
    for device in cuda_devices(model):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def _hooks(found: Found, meet: Meet) -> Iterator[None]:
    """Tell ``meet`` of each layer's units when they first run inside."""
    met = set[Units]()

    def first(units: Units, compute: Compute, again: Compute) -> None:
        if units not in met:
            met.add(units)
            meet(units, compute, again)

    with ExitStack() as hooks:
        for layer, own in found.layers.items():
            if isinstance(layer, nn.MultiheadAttention):
                calls = list[AttentionCall]()
                begin, end = partial(_begin_attention, calls), partial(_end_attention, calls, own, first)
                hooks.enter_context(layer.register_forward_pre_hook(begin, with_kwargs=True))
            else:
                end = partial(_end_layer, own[0], first)
            hooks.enter_context(layer.register_forward_hook(end, prepend=True, with_kwargs=True))
        yield


def _end_layer(
    units: Units, meet: Meet, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook of a layer: hand on what it puts out once its units have been met."""
    outputs = [output]

    def again() -> list[Any]:
        outputs[0] = layer.forward(*args, **kwargs)
        return [_tensor_of(outputs[0])]

    meet(units, lambda: [_tensor_of(output)], again)
    return outputs[0]


def _begin_attention(
    calls: list[AttentionCall], layer: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    calls.append(AttentionCall(layer, args, kwargs))


def _end_attention(
    calls: list[AttentionCall], own: list[Units], meet: Meet, _: nn.Module, __: Any, ___: Any, output: Any
) -> Any:
    """Forward hook of attention: the same for each of its weights."""
    call, changed = calls.pop(), []

    def again(compute: Compute) -> list[Tensor]:
        changed.append(True)
        return compute()

    for units in own:
        compute = call.computation(units.weight)
        meet(units, compute, partial(again, compute))
    return call.again() if changed else output


def _tensor_of(output: Any) -> Any:
    """Return what a layer puts out; of several things the first tensor."""
    if isinstance(output, tuple | list):
        return next((part for part in output if isinstance(part, Tensor)), output)
    return output
