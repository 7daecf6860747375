"""A run in module form goes on in the optimizer form: the layers folded, the optimizer's state carried over exactly."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weightnorm.formula import row_lengths, wide_dtype
from weightnorm.layers.compose import by_formula
from weightnorm.layers.folding import fold
from weightnorm.layers.found import Found, find
from weightnorm.optim import optimizers
from weightnorm.optim.coordinates import LENGTH, MASTER, SCALE, State
from weightnorm.optim.groups import Group
from weightnorm.optim.optimizer import WeightNormOptimizer
from weightnorm.optim.options import check_options
from weightnorm.optim.rules import check_rule, default_options

ModelOrModels = TypeVar("ModelOrModels", bound=nn.Module | Sequence[nn.Module])
_NAMED = {kind.rule: kind for kind in (optimizers.SGD, optimizers.Adam, optimizers.AdamW, optimizers.Adamax)}


@dataclass
class _Weight:
    """A weight in module form: every layer that holds it, and what its optimizer keeps for it."""

    places: list[Found]
    group: int | None  # of the optimizer; None: frozen
    options: Group = field(default_factory=dict)
    state: State = field(default_factory=dict)

    def parameter(self) -> nn.Parameter:
        """Return the plain parameter, once it is folded."""
        parameter = getattr(self.places[0].module, self.places[0].name)
        assert isinstance(parameter, nn.Parameter)
        return parameter


def from_module_form(
    model: ModelOrModels, optimizer: torch.optim.Optimizer | None = None
) -> tuple[ModelOrModels, WeightNormOptimizer | None]:
    """Fold the module form, and go on training in the optimizer form where the run is now.

    ``g`` and ``v`` become ``w = g v/‖v‖`` in the model, and ``scale = g/‖v‖`` and their moments in the optimizer, which
    then moves ``w`` as the old one would have moved it, to rounding; but for zero vectors, whose direction ``w`` does
    not have: they take a plain step. The module form may be ours, torch's parametrization or torch's old hooks.

    Args:
        model: a model, or several under one optimizer (a GAN's discriminators); changed in place.
        optimizer: what trains it, with its state: any of torch's that step on each parameter by its own gradient and
            state. It holds parameters that are no longer the model's afterwards; so does a learning rate scheduler of
            its (docs/optimizer.md has how to go on). None: the model is folded, no more.

    Returns:
        The model, and the new optimizer: ``SGD``, ``Adam``, ``AdamW`` or ``Adamax`` of this library for torch's of that
        name, what ``wrap`` returns for others; None where none was given. Its groups have the old ones' options, in
        their order, split where members differ in axis, or are plain. A frozen ``g`` becomes ``g_lr=0``; where ``g``
        had a learning rate of its own, ``g_lr`` is its share; where only ``g`` decayed, ``decay="g"``.

    Raises:
        ValueError: if there is nothing in module form, or something has no counterpart: logarithmic lengths with state,
            a frozen ``v`` beside a trained ``g``, options in which they differ otherwise. Nothing has changed then.

    Source: Salimans & Kingma 2016, eq. 2 and 3.

    Example:
        >>> import weightnorm as wn
        >>> model = wn.weight_norm(nn.Linear(8, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> model, optimizer = wn.from_module_form(model, optimizer)
        >>> type(model).__name__, type(optimizer).__name__, sorted(optimizer.state[model.weight])[-2:]
        ('Linear', 'AdamW', ['scale', 'step'])
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    found = list(chain.from_iterable(map(find, models)))
    if not found:
        raise ValueError(
            "there is nothing in module form in what was given; a plain model needs no more than an optimizer of this "
            "library's, weightnorm.AdamW(model)"
        )
    if optimizer is None:
        for one in models:
            fold(one)
        return model, None
    maker = _maker(optimizer)
    weights = _weights(found, optimizer)
    for group in optimizer.param_groups:
        check_options(group)
    if all(weight.group is None for weight in weights):
        raise ValueError(
            "none of the directions v in these models is in a group of the optimizer; pass the one that has them"
        )
    for one in models:
        fold(one)
    groups, states = _groups(weights, optimizer)
    new = maker(groups)
    saved = new.state_dict()
    saved["state"] = dict(enumerate(states))
    new.load_state_dict(saved)
    return model, new


def _maker(optimizer: torch.optim.Optimizer) -> Callable[[list[Group]], WeightNormOptimizer]:
    """Return what makes the new optimizer from groups; refuse what has none, before anything is changed."""
    kind = type(optimizer)
    if isinstance(optimizer, WeightNormOptimizer):
        raise ValueError("this optimizer is in the optimizer form already; pass the one of torch that trains g and v")
    taken = inspect.signature(kind).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in taken}
    check_rule(kind, None)
    try:
        default_options(lambda params: kind(params, **options))
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot be made from its defaults ({error}); use weightnorm.wrap") from error
    if kind in _NAMED:
        return lambda groups: _NAMED[kind](groups, **options)
    return lambda groups: optimizers.wrap(kind, groups, **options)


def _weights(found: list[Found], optimizer: torch.optim.Optimizer) -> list[_Weight]:
    """Return each weight once, however many layers share it, with the options and the state it will have."""
    index_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    shared: dict[tuple[int, int], list[Found]] = {}
    for one in found:
        shared.setdefault((id(one.g), id(one.v)), []).append(one)
    weights = []
    for places in shared.values():
        one = places[0]
        g_index, v_index = index_of.get(one.g), index_of.get(one.v)
        if one.v.requires_grad and not one.g.requires_grad:
            g_index = None  # frozen; where both are, that may be for the moment, as a GAN's critic is
        if g_index is not None and (v_index is None or one.g.requires_grad > one.v.requires_grad):
            raise ValueError(f"{one.whole_name}: v is frozen or in no group, and g is trained; no group can say that")
        weight = _Weight(places, v_index)
        if v_index is not None:
            weight.options = _options(one, optimizer.param_groups, v_index, g_index)
            weight.state = _state(one, optimizer.state.get(one.v, {}), optimizer.state.get(one.g, {}))
        weights.append(weight)
    return weights


def _options(one: Found, groups: list[Group], v_index: int, g_index: int | None) -> Group:
    """Return the options of a weight's group that are weight normalization's own."""
    of_v, of_g = groups[v_index], groups[v_index if g_index is None else g_index]
    options: Group = {"weight_norm": True, "dim": one.axis.dim, "groups": one.axis.groups, "g_lr": 1.0, "decay": "both"}
    if g_index is None:
        options["g_lr"] = 0.0
    elif float(of_g["lr"]) != float(of_v["lr"]):
        if not float(of_v["lr"]):
            raise ValueError(f"{one.whole_name}: v has learning rate 0 and g has not; g's is a multiple of v's here")
        options["g_lr"] = float(of_g["lr"]) / float(of_v["lr"])
    if of_g.get("weight_decay") != of_v.get("weight_decay"):
        if of_v["weight_decay"]:
            raise ValueError(
                f"{one.whole_name}: weight decay is {of_v['weight_decay']} on v and {of_g['weight_decay']} on g; it "
                'can act on both alike or, decay="g", on g alone'
            )
        options |= {"decay": "g", "weight_decay": of_g["weight_decay"]}
    ignored = ("params", "param_names", "lr", "initial_lr", "weight_decay")
    differ = [name for name in of_v if name not in ignored and of_v[name] != of_g.get(name)]
    if differ:
        raise ValueError(f"{one.whole_name}: v and g are in groups that differ in {', '.join(differ)}; make them alike")
    return options


def _state(one: Found, of_v: State, of_g: State) -> State:
    """Return the optimizer form's state of a weight: its scale, and the rule's state for v and g."""
    if one.log_g and (of_v or of_g):
        raise ValueError(
            f"{one.whole_name} holds lengths as logarithms, and moments of a logarithm are not those of a length; go "
            "on with fresh state: fold the model and build a new optimizer"
        )
    for tensor, kept in ((one.v, of_v), (one.g, of_g)):
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != tensor.shape:
                raise ValueError(
                    f"{one.whole_name}: {name} has shape {tuple(value.shape)}, its parameter {tuple(tensor.shape)}; "
                    "only rules that keep state element by element can be carried over"
                )
    wide = wide_dtype(one.v.dtype)
    v, g = one.v.detach().to(wide), one.lengths().detach().to(wide)
    length, alive = row_lengths(one.axis.split(v), one.axis.kept(v))
    state: State = {SCALE: torch.where(alive, g.reshape(length.shape) / length, 0)}
    state |= _copied(of_v)
    for name, value in of_g.items():
        counts = (
            isinstance(of_v.get(name), Tensor) and of_v[name].ndim == 0
        )  # a g for a whole tensor has no axes either
        is_array = isinstance(value, Tensor) and value.shape == one.g.shape and not counts
        state |= _copied({LENGTH + name: value.reshape(length.shape) if is_array else value})
    if wide != one.v.dtype:
        state[MASTER] = by_formula(v, g, one.axis)
    return state


def _copied(state: State) -> State:
    """Return a state that the old optimizer does not write to."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def _groups(weights: list[_Weight], optimizer: torch.optim.Optimizer) -> tuple[list[Group], list[State]]:
    """Return the new groups, and the state of each of their members in order."""
    of_v = {weight.places[0].v: weight for weight in weights}
    gone = {weight.places[0].g for weight in weights}
    groups: list[Group] = []
    members: list[list[State]] = []
    for old in optimizer.param_groups:
        shared = {name: value for name, value in old.items() if name not in ("params", "param_names")}
        made: dict[tuple[Any, ...], int] = {}
        for parameter in old["params"]:
            if parameter in gone:
                continue
            weight = of_v.get(parameter)
            options = weight.options if weight else {"weight_norm": False}
            state = weight.state if weight else _copied(optimizer.state.get(parameter, {}))
            key = tuple(sorted(options.items(), key=str))
            if key not in made:
                made[key] = len(groups)
                groups.append(shared | options | {"params": []})
                members.append([])
            groups[made[key]]["params"].append(weight.parameter() if weight else parameter)
            members[made[key]].append(state)
    return groups, [state for states in members for state in states]
