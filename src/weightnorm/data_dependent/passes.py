"""The passes over a model in which each layer is standardised on what the corrected layers before it put out."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from weightnorm.data_dependent.calls import Call, Meet, each_call
from weightnorm.data_dependent.moments import Moments, gathered, over_ranks, together
from weightnorm.data_dependent.report import LayerReport
from weightnorm.data_dependent.units import Settable, Units
from weightnorm.mean_only import MeanOnlyBatchNorm
from weightnorm.preserve import as_found, cuda_devices
from weightnorm.scaling import show_weight, weight_in_module_form

_NEAR = 0.1  # how far the standard deviation may be from the one that was set: bfloat16 has two digits


class Enough(BaseException):
    """Ends a pass that has seen what it was for. No ``Exception``: no model may catch it."""


class Passes:
    """The passes over a model, and what they have found and changed.

    Args:
        model: the model.
        found: what of it can be standardised; what turns out not to be is left out there.
        run: runs the model on a batch.
        batches: the batches.
        std_of: the standard deviation wanted, by a layer's name.
        train: the mode to run in.
        sync: take moments over the batches of all ranks.

    Attributes:
        centred: units whose mean is taken away by what follows, and that: their biases stay.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Settable,
        run: Callable[[nn.Module, Any], object],
        batches: list[Any],
        std_of: Callable[[str], float],
        train: bool,
        sync: bool,
    ):
        self._model, self._found, self._run, self._batches = model, found, run, batches
        self._std_of, self._train, self._sync = std_of, train, sync
        self._numbers = {units: number for number, units in enumerate(found.units())}
        self._keys = {units: units.keys() for units in self._numbers}
        self._before = dict[nn.Parameter, Tensor]()  # every parameter that was changed, as it was
        self._measured = dict[Units, Moments]()  # the units that were changed, in this order
        self._after = dict[Units, Moments]()
        self._means = dict[MeanOnlyBatchNorm, Tensor]()
        self.centred = dict[Units, MeanOnlyBatchNorm]()

    def one(self) -> None:
        """Standardise every layer in one pass over the only batch, each when it first runs."""

        def meet(units: Units, call: Call) -> None:
            if (own := self._moments(units, call)) is not None:
                self._set(units, [own])
                self._show_means()
                # Computed again rather than corrected: the bits later passes will see, the weights' rounding included.
                call.is_stale = True
                self._check(units, [units.moments(call.put_out(units))])

        self.look(meet)
        self._agree(None)

    def many(self) -> None:
        """Standardise every layer on all batches together: a pass over each for each layer, as far as that layer."""
        while self._next():
            pass
        parts: dict[Units, list[Moments]] = {units: [] for units in self._measured}

        def meet(units: Units, call: Call) -> None:
            if units in parts:
                parts[units].append(units.moments(call.put_out(units)))

        self.look(meet)
        for units, own in parts.items():
            self._check(units, own)

    def look(self, meet: Meet) -> None:
        """Run the model on each batch, and tell ``meet`` of all units; afterwards all but parameters is as before."""
        for number, batch in enumerate(self._batches):
            with torch.no_grad(), as_found(self._model), each_call(self._found, meet):
                self._model.train(self._train)
                self._show_means()
                if number:  # the first has the noise that comes next
                    _draw_other_noise(self._model, number)
                with suppress(Enough):
                    self._run(self._model, tree_map_only(Tensor, Tensor.clone, batch))  # a model may write to it

    def undo(self) -> None:
        """Put every parameter back."""
        with torch.no_grad():
            for parameter, before in self._before.items():
                parameter.copy_(before)
        for units in self._measured:
            if (form := weight_in_module_form(units.layer, units.weight)) is not None:
                show_weight(form)
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

    def _next(self) -> bool:
        """Standardise the first layer that has not been; say whether there was one."""
        target, parts = list[Units](), list[Moments]()

        def meet(units: Units, call: Call) -> None:
            if units not in target and target:
                return
            if (own := self._moments(units, call)) is not None:
                target[:] = [units]
                parts.append(own)
                raise Enough

        self.look(meet)
        for units in target:
            self._set(units, parts)
            return True
        self._agree(None)
        return False

    def _moments(self, units: Units, call: Call) -> Moments | None:
        """Measure what units put out; None if they have been standardised, or cannot be."""
        if units in self._measured or units.name in self._found.left_out:
            return None
        if any(not self._keys[units].isdisjoint(self._keys[other]) for other in self._measured):
            self._found.leave(units.name, "shares a parameter with a layer that ran before")
            return None
        if self._keys[units] != units.keys():
            self._found.leave(units.name, "runs with another weight than its own")
            return None
        ts = call.put_out(units)
        if why := units.misfit(ts):
            self._found.leave(units.name, why)
            return None
        return units.moments(ts)

    def _set(self, units: Units, parts: list[Moments]) -> None:
        """Standardise units (eq. 6), but for those that are constant."""
        self._agree(units)
        self._measured[units] = found = self._over_all(units, parts)
        constant = found.is_constant()
        factor = torch.where(constant, 1, self._std_of(units.name) / found.std)
        for parameter in units.parameters():
            self._before.setdefault(parameter, parameter.detach().clone())
        norm = self.centred.get(units)
        units.standardise(torch.where(constant, 0, found.mean) if norm is None else None, factor)
        if norm is not None and norm.running_mean is not None:
            bias = units.own_bias()
            self._means[norm] = found.mean * factor if bias is None else (found.mean - bias) * factor + bias

    def _check(self, units: Units, parts: list[Moments]) -> None:
        """Measure again what units put out, and refuse what does not follow from their weights."""
        if not parts:
            raise ValueError(
                f"layer {units.name} ran in one pass and not in the next, so nothing was set. Use one batch"
            )
        self._after[units] = after = self._over_all(units, parts)
        wanted = self._std_of(units.name)
        away = ((after.std / wanted - 1).abs() > _NEAR) & ~self._measured[units].is_constant()
        if away.any():
            raise ValueError(
                f"layer {units.name}: unit {int(away.nonzero()[0])} was given the standard deviation {wanted:g} and "
                f"has {float(after.std[away][0]):.3g}, so nothing was set. Either what it puts out does not follow "
                "from its weight (there is a cache of weights), or it saw other inputs then (another order of layers)"
            )

    def _over_all(self, units: Units, parts: list[Moments]) -> Moments:
        whole = over_ranks(together(parts)) if self._sync else together(parts)
        if not whole.count.all():
            raise ValueError(f"layer {units.name} puts out nothing. Pass a batch that is not empty")
        if not (whole.mean.isfinite() & whole.squares.isfinite()).all():
            raise ValueError(
                f"layer {units.name} puts out NaN, infinity or numbers whose squares are, so nothing was set. "
                "Look at the batch"
            )
        return whole

    def _agree(self, units: Units | None) -> None:
        """Make sure that all ranks are at the same layer, or all at their end."""
        if self._sync:
            device = next(self._model.parameters()).device
            numbers = torch.stack(gathered(torch.tensor(-1 if units is None else self._numbers[units], device=device)))
            if (numbers != numbers[0]).any():
                names = {number: units.name for units, number in self._numbers.items()} | {-1: "no other layer"}
                raise ValueError(
                    f"ranks run different layers: {', '.join(names[number] for number in numbers.tolist())} come next; "
                    "let all run the same ones, or pass sync=False"
                )

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
