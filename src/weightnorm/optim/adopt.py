"""A run in module form goes on in the optimizer form: the layers folded, the optimizer's state carried over exactly."""

import copy
import inspect
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weightnorm.layers.folding import fold
from weightnorm.layers.found import find
from weightnorm.optim import optimizers
from weightnorm.optim.groups import Group
from weightnorm.optim.optimizer import WeightNormOptimizer
from weightnorm.optim.pairs import Pair, pairs_of
from weightnorm.optim.rules import check_rule, default_options

ModelOrModels = TypeVar("ModelOrModels", bound=nn.Module | Sequence[nn.Module])
_NAMED: dict[Any, Any] = {
    kind.rule: kind for kind in (optimizers.SGD, optimizers.Adam, optimizers.AdamW, optimizers.Adamax)
}


def from_module_form(
    model: ModelOrModels, optimizer: torch.optim.Optimizer | None = None, *, backend: str = "auto"
) -> tuple[ModelOrModels, WeightNormOptimizer | None]:
    """Fold the module form, and go on training in the optimizer form where the run is now.

    ``g`` and ``v`` become ``w = g v/‖v‖`` in the model, and ``scale = g/‖v‖`` and their moments in the optimizer, which
    then moves ``w`` as the old one would have moved it, to rounding. The module form may be ours, torch's
    parametrization or torch's old hooks. Call it between steps, and before wrapping in DDP.

    Args:
        model: a model, or several under one optimizer (a GAN's discriminators); changed in place.
        optimizer: what trains it, fresh or with state: any of torch's that step on each parameter by its own gradient
            and state. It is done with afterwards: it holds parameters that are no longer the model's, and a learning
            rate scheduler keeps to it (docs/optimizer.md has how to go on). None: the model is folded, no more, and
            ``‖v‖`` is lost, which decides how far a step turns a direction.
        backend: the new optimizer's.

    Returns:
        The model, and the new optimizer: ``SGD``, ``Adam``, ``AdamW`` or ``Adamax`` of this library for torch's of that
        name, what ``wrap`` returns for others; None where none was given. Its groups have the old ones' options, in
        their order, split where members differ in axis, or are plain. A frozen ``g`` becomes ``g_lr=0``; where ``g``
        had a learning rate of its own, ``g_lr`` is its share; where only ``g`` decayed, ``decay="g"``. What is not in
        module form stays plain. A vector with ``v = 0`` or ``g = 0`` starts afresh.

    Raises:
        TypeError: if ``optimizer`` is none of torch's.
        ValueError: if there is nothing in module form, or something has no counterpart: logarithmic lengths with state,
            a frozen ``v`` beside a trained ``g``, options in which they differ otherwise, ``g`` or ``v`` of several
            weights, trainable ones that are not in the optimizer. Nothing has changed then.

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
    whole = model if isinstance(model, nn.Module) else nn.ModuleList(model)
    found = list(find(whole))
    if not found:
        raise ValueError(
            "there is nothing in module form in what was given; a plain model needs no more than an optimizer of this "
            "library's, weightnorm.AdamW(model)"
        )
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in whole.modules()):
        raise ValueError(
            "DistributedDataParallel holds on to g and v; give the model inside (.module) and wrap it anew"
        )
    if optimizer is None:
        fold(whole)
        return model, None
    rule = _rule_of(optimizer)
    pairs = pairs_of(whole, found, optimizer)
    # Built on v, which is in all but its values as w will be: whatever is refused is refused before anything changes.
    new = _build(rule, optimizer, pairs, backend)
    fold(whole)
    _exchange(new, {v: getattr(pair.found.module, pair.found.name) for v, pair in pairs.items()})
    return model, new


def _rule_of(optimizer: Any) -> partial[torch.optim.Optimizer]:
    """Return what makes optimizers like this one."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer; got {type(optimizer).__name__}. Load state dicts first")
    if isinstance(optimizer, WeightNormOptimizer):
        raise ValueError("this optimizer is in the optimizer form already; pass the one of torch that trains g and v")
    kind = type(optimizer)
    taken = inspect.signature(kind).parameters
    rule = partial(kind, **{name: value for name, value in optimizer.defaults.items() if name in taken})
    check_rule(kind, None)
    try:
        default_options(rule)
    except (TypeError, AttributeError) as error:  # it takes more than params, or not them
        raise ValueError(f"another {kind.__name__} cannot be made ({error}); pass the optimizer it wraps") from error
    return rule


def _build(
    rule: partial[torch.optim.Optimizer], old: torch.optim.Optimizer, pairs: Mapping[Tensor, Pair], backend: str
) -> WeightNormOptimizer:
    """Return the new optimizer with its state, on ``v`` in place of the weights."""
    groups = _groups(old, pairs)
    named = _NAMED.get(rule.func)
    options = {**rule.keywords, "backend": backend}
    new = named(groups, **options) if named else optimizers.wrap(rule.func, groups, **options)
    members = [p for group in new.param_groups for p in group["params"]]
    states = {i: pairs[p].state if p in pairs else old.state.get(p) for i, p in enumerate(members)}
    by_name = {name: state for name, state in old.state.items() if isinstance(name, str)}
    saved = new.state_dict()
    # A copy, so that neither optimizer writes to what is the other's.
    saved["state"] = copy.deepcopy({i: state for i, state in states.items() if state} | by_name)
    new.load_state_dict(saved)
    return new


def _groups(old: torch.optim.Optimizer, pairs: Mapping[Tensor, Pair]) -> list[Group]:
    """Return the new groups, ``v`` in place of the weights."""
    lengths = {pair.found.g for pair in pairs.values()}
    groups: dict[str, Group] = {}
    for index, group in enumerate(old.param_groups):
        names = group.get("param_names", [None] * len(group["params"]))
        for name, p in zip(names, group["params"], strict=True):
            if p in lengths:
                continue
            options = pairs[p].options if p in pairs else {"weight_norm": False}
            made = groups.setdefault(f"{index} {options}", _shared(group) | options | {"params": []})
            made["params"].append(p if name is None else (_plain_name(name, pairs.get(p)), p))
    return list(groups.values())


def _shared(group: Group) -> Group:
    """Return a group's options; learning rates that are tensors change in place, so each group gets its own."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name not in ("params", "param_names")
    }


def _plain_name(name: str, pair: Pair | None) -> str:
    """Return what a parameter is called once it is folded, if it is the ``v`` of a pair."""
    if pair is None:
        return name
    return name.removesuffix("_v") if pair.found.hook else re.sub(r"parametrizations\.(.+)\.original1$", r"\1", name)


def _exchange(optimizer: WeightNormOptimizer, weights: Mapping[Any, nn.Parameter]) -> None:
    """Let an optimizer step on other parameters, group by group and state by state."""
    for group in optimizer.param_groups:
        group["params"] = [weights.get(p, p) for p in group["params"]]
    state = {weights.get(p, p): kept for p, kept in optimizer.state.items()}
    optimizer.__setstate__({"state": defaultdict(dict, state)})
