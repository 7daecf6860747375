"""A weight's ``g`` and ``v`` under a torch optimizer, in the terms of the optimizer form: its options and its state."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn

from weightnorm.formula import row_lengths, wide_dtype
from weightnorm.layers.compose import by_formula
from weightnorm.layers.found import Found
from weightnorm.optim.coordinates import LENGTH, MASTER, SCALE, State
from weightnorm.optim.groups import Group

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # a group's learning rate, and what schedules keep beside it


@dataclass(frozen=True)
class Pair:
    """What trains one weight, as the optimizer form says it.

    Attributes:
        found: a layer that holds the weight.
        options: those of its param group that are weight normalization's own, or differ from those of ``v``'s.
        state: what is kept for it, as in the optimizer form.
    """

    found: Found
    options: Group
    state: State


def pairs_of(model: nn.Module, found: Sequence[Found], optimizer: torch.optim.Optimizer) -> dict[Tensor, Pair]:
    """Return what an optimizer does with each weight in module form, by its ``v``; weights it leaves alone left out.

    Args:
        model: holds the weights.
        found: the weights, in every layer that holds them.
        optimizer: trains them.

    Raises:
        ValueError: if something has no counterpart in the optimizer form.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    _check_ties(model, found)
    pairs = {}
    for one in found:
        of_v, of_g = groups.get(one.v), groups.get(one.g)
        if one.v not in pairs and _is_trained(one, of_v, of_g):
            assert of_v is not None
            options = _options(one, of_v, of_g if one.g.requires_grad or not one.v.requires_grad else None, optimizer)
            state = _state(one, optimizer.state.get(one.v, {}), optimizer.state.get(one.g, {}))
            pairs[one.v] = Pair(one, options, state)
    return pairs


def _check_ties(model: nn.Module, found: Sequence[Found]) -> None:
    """Raise ValueError where ``g`` or ``v`` is more than one weight's, since folding would part them."""
    holders: Counter[Tensor | None] = Counter(p for part in model.modules() for p in part._parameters.values())
    places = Counter((one.g, one.v) for one in found)
    for one in found:
        if max(holders[p] for p in (one.g, one.v)) > places[one.g, one.v]:
            raise ValueError(
                f"{one.whole_name}: g or v is a parameter of another layer too, and would not be once folded; untie it"
            )


def _is_trained(one: Found, of_v: Group | None, of_g: Group | None) -> bool:
    """Say whether an optimizer with these groups steps on a weight; refuse one that it has only in part."""
    if of_v is None and of_g is None and not (one.v.requires_grad or one.g.requires_grad):
        return False
    lost = [name for name, p, of in (("v", one.v, of_v), ("g", one.g, of_g)) if p.requires_grad and of is None]
    if lost:
        raise ValueError(
            f"{one.whole_name}: {' and '.join(lost)} would be trained, but not by this optimizer. Give the models that "
            "it trains, and freeze (requires_grad_(False)) what shall stay as it is"
        )
    if of_v is None or (one.g.requires_grad and not one.v.requires_grad):
        raise ValueError(f"{one.whole_name}: v is frozen and g is trained, which no option can say; unfreeze v")
    return True


def _options(one: Found, of_v: Group, of_g: Group | None, optimizer: torch.optim.Optimizer) -> Group:
    """Return the options of a weight; ``of_g`` is None where ``g`` is frozen."""
    own: Group = {"weight_norm": True, "dim": one.axis.dim, "groups": one.axis.groups, "g_lr": 0.0, "decay": "both"}
    if of_g is None:
        return own
    own["g_lr"] = _ratio(one, of_v, of_g)
    decays = of_v.get("weight_decay"), of_g.get("weight_decay")
    if decays[0] != decays[1]:
        if decays[0]:
            raise ValueError(
                f"{one.whole_name}: weight decay is {decays[0]} on v and {decays[1]} on g; it can act on both alike "
                'or, decay="g", on g alone'
            )
        own |= {"decay": "g", "weight_decay": decays[1]}
    shared = [name for name in optimizer.defaults if name not in (*_RATES, "weight_decay")]
    differ = [name for name in shared if of_v.get(name) != of_g.get(name)]
    if differ:
        raise ValueError(f"{one.whole_name}: v and g are in groups that differ in {', '.join(differ)}; make them alike")
    return own


def _ratio(one: Found, of_v: Group, of_g: Group) -> float:
    """Return by how much the learning rate of ``g`` is that of ``v``, now and wherever a schedule takes them."""
    rates = [(float(of_v[name]), float(of_g[name])) for name in _RATES if name in of_v and name in of_g]
    ratios = [rate_g / rate_v for rate_v, rate_g in rates if rate_v] or [1.0]
    if any(not isclose(rate_g, ratios[0] * rate_v, rel_tol=1e-6) for rate_v, rate_g in rates):
        raise ValueError(
            f"{one.whole_name}: the learning rates {', '.join(_RATES)} of v and g are {rates}, and g's can only be a "
            "fixed multiple of v's (g_lr); give both the same schedule"
        )
    return ratios[0]


def _state(one: Found, of_v: State, of_g: State) -> State:
    """Return the optimizer form's state of a weight: its scale, and the rule's state for v and g."""
    if one.log_g and (of_v or of_g):
        raise ValueError(
            f"{one.whole_name} holds lengths as logarithms, and moments of a logarithm are not those of a length; go "
            "on with fresh state: weightnorm.fold(model), and build a new optimizer"
        )
    for p, kept in ((one.v, of_v), (one.g, of_g)):
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != p.shape:
                raise ValueError(
                    f"{one.whole_name}: {name} has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}; only "
                    "rules that keep state element by element can be carried over"
                )
    wide = wide_dtype(one.v.dtype)
    v, g = one.v.detach().to(wide), one.lengths().detach().to(wide)
    length, alive = row_lengths(one.axis.split(v), one.axis.kept(v))
    state: State = {SCALE: torch.where(alive, g.reshape(length.shape) / length, 0), **of_v}
    if wide != one.v.dtype:
        state[MASTER] = by_formula(v, g, one.axis)
    for name, value in of_g.items():
        # The g of a whole tensor has no axes, as counts have none; v's state tells them apart.
        is_array = isinstance(value, Tensor) and _shape(of_v.get(name)) == one.v.shape
        state[LENGTH + name] = value.reshape(length.shape) if is_array else value
    return state


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None
