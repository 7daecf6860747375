"""The torch optimizers inside: they step on ``v``, ``g`` and the plain parameters.

Between steps they hold nothing. All state lives in the outer optimizer's ``state[weight]`` and is lent to them for the
length of a step, so there is one place to save, load, edit or clear it, and it is the one that torch's users know.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from weightnorm.optim.buckets import Buckets
from weightnorm.optim.coordinates import LENGTH, MASTER, SCALE, Coordinates, State
from weightnorm.optim.groups import WEIGHT_DTYPES, Group, group_axis, is_normalized
from weightnorm.optim.options import refusal
from weightnorm.optim.rules import Rule, check_sharding, is_matrix_rule


class Engine:
    """The inner optimizers for an outer optimizer's groups as they were when this was built.

    Args:
        groups: the outer optimizer's groups.
        parameters: those of theirs that this steps on.
        rule: makes the optimizer for ``v``, and for ``g`` and plain parameters too where ``g_rule`` is None.
        g_rule: makes the optimizer for those.
        state: the outer optimizer's state; it takes what a rule's constructor makes.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        parameters: Sequence[tuple[nn.Parameter, int]],
        rule: Rule,
        g_rule: Rule | None,
        state: MutableMapping[Any, State],
    ):
        self._parameters = [parameter for parameter, _ in parameters]
        self._built_for = _kinds(self._parameters)
        self._selected = [parameter for parameter, index in parameters if is_normalized(groups[index], parameter)]
        check_sharding(rule, self._selected)
        self._normalized: list[tuple[Coordinates, Group]] = []
        self._plain: list[nn.Parameter] = []
        self._buckets = Buckets(rule, g_rule)
        for parameter, index in parameters:
            self._enter(parameter, groups[index], as_matrix=is_matrix_rule(rule))
        self._main = rule(self._buckets.main)
        self._rest = g_rule(self._buckets.rest) if g_rule else self._main
        self._adopt_constructed_state(state)

    def is_stale(self, _: MutableMapping[Any, State]) -> bool:
        """Say whether a parameter is another in kind than this was built for, or has a gradient that is refused."""
        return any(refusal(weight.grad) for weight in self._selected) or self._built_for != _kinds(self._parameters)

    def step(self, state: MutableMapping[Any, State], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step every parameter that has a gradient, and leave its state in ``state``.

        Args:
            state: the outer optimizer's.
            grad_scale: by which the loss was multiplied, for rules that take it (torch's fused ones); None: 1.
            found_inf: not 0: skip the step; None: 0.
        """
        self._buckets.sync()
        moving = [(c, group) for c, group in self._normalized if c.weight.grad is not None]
        plain = [parameter for parameter in self._plain if parameter.grad is not None]
        try:
            for coordinates, group in moving:
                coordinates.open(state[coordinates.weight], group)
                self._lend(coordinates, state[coordinates.weight])
            self._rest.state.update({parameter: state[parameter] for parameter in plain if state.get(parameter)})
            self._main.state.update(_named(state))
            for inner in {id(self._main): self._main, id(self._rest): self._rest}.values():
                # Torch's own protocol, in attributes; set at every step, or the next would unscale by this one's.
                inner.grad_scale, inner.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
                inner.step()
            self._buckets.check_untouched()
            self._take_back_rest(state, plain)
            for coordinates, group in moving:
                self._take_back(coordinates, state[coordinates.weight])
                coordinates.apply(state[coordinates.weight], group)
                coordinates.close()  # memory for the next one
        finally:
            self._clear()

    def _enter(self, parameter: nn.Parameter, group: Group, as_matrix: bool) -> None:
        if is_normalized(group, parameter) and parameter.dtype in WEIGHT_DTYPES:
            coordinates = Coordinates(parameter, group_axis(group), as_matrix=as_matrix)
            self._normalized.append((coordinates, group))
            self._buckets.add_normalized(coordinates, group)
        else:
            self._plain.append(parameter)
            self._buckets.add_plain(parameter, group)

    def _lend(self, coordinates: Coordinates, state: State) -> None:
        of_v = {name: value for name, value in state.items() if _is_of_v(name)}
        of_g = {name.removeprefix(LENGTH): value for name, value in state.items() if name.startswith(LENGTH)}
        if of_v:  # rules tell a first step by an empty state, or by none
            self._main.state[coordinates.v] = of_v
        if of_g:
            self._rest.state[coordinates.g] = of_g

    def _take_back(self, coordinates: Coordinates, state: State) -> None:
        of_v, of_g = self._main.state.get(coordinates.v, {}), self._rest.state.get(coordinates.g, {})
        for name in [name for name in state if name not in (SCALE, MASTER)]:
            del state[name]  # what the rule forgot is forgotten
        state.update({**of_v, **{LENGTH + name: value for name, value in of_g.items()}})

    def _take_back_rest(self, state: MutableMapping[Any, State], plain: list[nn.Parameter]) -> None:
        """Keep the state of plain parameters, and what a rule keeps under names of its own."""
        for parameter in plain:
            if parameter in self._rest.state:
                state[parameter] = self._rest.state[parameter]
        state.update(_named(self._main.state))

    def _adopt_constructed_state(self, state: MutableMapping[Any, State]) -> None:
        """Keep what rules such as Adagrad make in their constructor, for parameters that have no state yet."""
        for coordinates, _ in self._normalized:
            if self._main.state.get(coordinates.v) and not state.get(coordinates.weight):
                self._take_back(coordinates, state[coordinates.weight])
        self._take_back_rest(state, [parameter for parameter in self._plain if not state.get(parameter)])
        self._clear()

    def _clear(self) -> None:
        self._main.state.clear()
        self._rest.state.clear()
        for coordinates, _ in self._normalized:
            coordinates.close()


def _named(state: Mapping[Any, State]) -> dict[Any, State]:
    """Return what is kept under names rather than parameters: counters of some rules."""
    return {name: value for name, value in state.items() if isinstance(name, str)}


def _is_of_v(name: str) -> bool:
    return name not in (SCALE, MASTER) and not name.startswith(LENGTH)


def _kinds(parameters: Sequence[Tensor]) -> list[Any]:
    return [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
