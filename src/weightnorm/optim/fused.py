"""The kernels inside: they step on weights, lengths and plain parameters in one pass.

As with the torch optimizers in ``engine``, all state lives in the outer optimizer's ``state[weight]``, under the same
names; only the counts of steps are tensors on the device, as torch's fused optimizers have them.
"""

from collections.abc import Callable, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from weightnorm.formula import wide_dtype
from weightnorm.kernels import columns
from weightnorm.kernels.step import FusedStep, MakeLauncher
from weightnorm.kernels.tables import Member, is_recording
from weightnorm.optim.coordinates import LENGTH, MASTER, SCALE, State
from weightnorm.optim.groups import Group, g_lr_factor, group_axis, is_normalized

_ARRAYS = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adamax": ("exp_avg", "exp_inf"),
}
_OF_V = (columns.FIRST, columns.SECOND, columns.THIRD)
_OF_G = (columns.G_FIRST, columns.G_SECOND, columns.G_THIRD)


class Fused:
    """Steps by kernels on those of its parameters that have, or had, a gradient.

    Args:
        groups: the outer optimizer's groups.
        parameters: those that kernels take, with the index of their group.
        rule_of: names the kernels' rule for a group.
        make_launcher: the backend's.
        state: the outer optimizer's state; it takes what a first step makes.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        parameters: Sequence[tuple[Tensor, int]],
        rule_of: Callable[[Group], str | None],
        make_launcher: MakeLauncher,
        state: MutableMapping[Any, State],
    ):
        self._groups = groups
        self._gradients: list[list[Tensor | None]] = []
        self._waiting = [p for p, _ in parameters if p.grad is None and not state.get(p)]
        self._steps: list[FusedStep] = []  # one a device
        self._parameters: list[list[Tensor]] = []  # of each
        self._known: list[Tensor] = []
        devices: dict[torch.device, list[tuple[Tensor, int]]] = {}
        for parameter, index in parameters:
            if parameter.grad is not None or state.get(parameter):
                devices.setdefault(parameter.device, []).append((parameter, index))
        for device, found in devices.items():
            if is_recording(device):
                raise ValueError(
                    "a CUDA graph cannot record the first step, nor the first since a tensor moved or a gradient came "
                    "in another layout; take an eager one before"
                )
            members = [self._enter(p, index, rule_of(groups[index]) or "", state[p]) for p, index in found]
            here = [parameter for parameter, _ in found]
            examples = [p if p.grad is None else p.grad for p in here]
            self._steps.append(FusedStep(members, examples, make_launcher))
            self._parameters.append(here)
        self._look(state)

    @property
    def is_recorded(self) -> bool:
        """Say whether a CUDA graph knows where the weights and their state are."""
        return any(step.recorded for step in self._steps)

    def is_stale(self, state: MutableMapping[Any, State]) -> bool:
        """Say whether a tensor has moved, was replaced, or has its first gradient."""
        if any(parameter.grad is not None for parameter in self._waiting):
            return True
        if list(map(id, state.values())) != self._dicts or self._parts_now() != self._parts:
            return True
        self._gradients = [[parameter.grad for parameter in parameters] for parameters in self._parameters]
        return not all(step.fits(found) for step, found in zip(self._steps, self._gradients, strict=True))

    def step(self, _: MutableMapping[Any, State], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step every parameter that has a gradient."""
        for step, gradients in zip(self._steps, self._gradients, strict=True):
            step.run(gradients, self._groups, grad_scale, found_inf)
        self._gradients = []  # theirs to free

    def _look(self, state: MutableMapping[Any, State]) -> None:
        """Remember which tensors the state holds, so that a later look tells whether any was replaced.

        The dicts and their tensors are kept alive: what replaces one cannot have its identity.
        """
        self._held = [state[parameter] for parameter in self._known]
        self._parts_held = list(chain.from_iterable(map(dict.values, self._held)))
        self._dicts, self._parts = list(map(id, state.values())), self._parts_now()

    def _parts_now(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._held))))

    def _enter(self, parameter: Tensor, index: int, rule: str, state: State) -> Member:
        """Complete the state of a parameter and describe it to the kernels."""
        group = self._groups[index]
        axis = group_axis(group) if is_normalized(group, parameter) else None
        arrays = _ARRAYS[rule] if rule != "sgd" or group["momentum"] else ()
        names = dict(zip(_OF_V, arrays, strict=False))
        dtype = wide_dtype(parameter.dtype) if axis else parameter.dtype
        _keep_counts(state, parameter.device, arrays, counts_g=axis is not None)
        for name in arrays:
            state[name] = _like(parameter, dtype, state.get(name))
        if arrays:
            names[columns.STEP] = "step"
        stochastic = axis is not None and group["stochastic_rounding"] and parameter.dtype == torch.bfloat16
        if axis:
            lengths = torch.empty(
                [n if i in axis.kept(parameter) else 1 for i, n in enumerate(axis.split(parameter).shape)]
            )
            lengths = lengths.to(parameter.device)
            of_g = {column: LENGTH + name for column, name in zip(_OF_G, arrays, strict=False)}
            for name in (*of_g.values(), SCALE):
                state[name] = _like(lengths, dtype, state.get(name))
            names |= of_g | {columns.SCALE: SCALE} | ({columns.G_STEP: LENGTH + "step"} if arrays else {})
        if axis and parameter.dtype != dtype and not stochastic:
            state[MASTER] = _like(parameter, dtype, state.get(MASTER, parameter))
            names[columns.MASTER] = MASTER
        else:
            state.pop(MASTER, None)
        self._known.append(parameter)
        length = axis.row_length(parameter) if axis else 1
        return Member(
            weight=parameter,
            axis=axis,
            group=index,
            parts={column: state[name] for column, name in names.items()},
            v_length=(group["v_std"] or 0.0) * length**0.5,
            v_decay=0.0 if axis and group["decay"] == "g" else 1.0,
            g_rate=g_lr_factor(group, length),
            rule=rule,
            stochastic=stochastic,
        )


def _keep_counts(state: State, device: torch.device, arrays: Sequence[str], counts_g: bool) -> None:
    """Give the state its counts of steps, on the device; torch's SGD keeps none, and its first step differs."""
    if not arrays:
        return
    has_stepped = isinstance(state.get(arrays[0]), Tensor)
    for name in ("step", LENGTH + "step") if counts_g else ("step",):
        count = state.get(name, state.get("step", 1.0)) if has_stepped else 0.0
        state[name] = torch.as_tensor(count, dtype=torch.float32, device=device)
    if counts_g and state["step"] is state[LENGTH + "step"]:
        state[LENGTH + "step"] = state["step"].clone()


def _like(example: Tensor, dtype: torch.dtype, value: Any) -> Tensor:
    """Return a state tensor as the kernels read it, laid out as ``example``; zeros where there is none."""
    if not isinstance(value, Tensor):
        return torch.zeros_like(example, dtype=dtype)
    known = (value.dtype, value.device, value.shape, value.stride())
    if known == (dtype, example.device, example.shape, example.stride()):
        return value
    return torch.empty_like(example, dtype=dtype).copy_(value)
