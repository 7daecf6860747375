"""What ``load_state_dict`` takes: state of ours, of this version or before; of a plain torch optimizer; no other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightnorm.formula import sum_rows
from weightnorm.optim.coordinates import LENGTH, MASTER, SCALE, State
from weightnorm.optim.groups import Group, group_axis, is_normalized
from weightnorm.optim.projection import project
from weightnorm.optim.rules import Rule, class_of, is_matrix_rule

FORMAT = "weightnorm_format"  # key of a state dict of ours; its value is the version
VERSION = 1


def as_ours(saved: dict[str, Any], groups: Sequence[Group], rule: Rule, g_rule: Rule | None) -> dict[str, Any]:
    """Return a state dict as one of ours: itself, or a plain torch optimizer's with its moments projected.

    Args:
        saved: what is being loaded.
        groups: those it is loaded into.
        rule: steps on ``v``.
        g_rule: steps on ``g`` and plain parameters; None: ``rule`` does.

    Raises:
        ValueError: if it is of a later version, of other parameters than those of the groups, or of another rule.
    """
    if saved.get(FORMAT, VERSION) > VERSION:
        raise ValueError(
            f"the state was saved in format {saved[FORMAT]}, and this version of weightnorm knows {VERSION}; update it"
        )
    _check_sizes(saved, groups)
    found: dict[Any, State] = {}
    index = -1
    for group, theirs in zip(groups, saved["param_groups"], strict=True):
        kept_by = {one: _kept_by(one, group | theirs) for one in {rule, g_rule or rule}}
        for saved_id, parameter in zip(theirs["params"], group["params"], strict=True):
            index += 1
            state = saved["state"].get(saved_id)
            if not state:
                continue
            stepping = g_rule if g_rule and not is_normalized(group, parameter) else rule
            _check_rule(index, state, kept_by[stepping], stepping)
            _check_shapes(index, state, _shapes(kept_by[stepping], state, parameter, group, rule), parameter)
            if is_normalized(group, parameter) and _is_plain(state):
                found[saved_id] = project(state, parameter, group, rule, has_g=g_rule is None)
    return saved | {"state": saved["state"] | found} if found else saved


def _is_plain(state: State) -> bool:
    """Say whether a normalised weight's state is a plain optimizer's: ours has a scale, or something of ``g``."""
    return not any(name == SCALE or name.startswith(LENGTH) for name in state)


def _check_sizes(saved: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Raise ValueError if the groups are others in number or size, with what to do where they are not ours."""
    theirs, ours = ([len(group["params"]) for group in some] for some in (saved["param_groups"], groups))
    if theirs == ours:
        return
    is_ours = FORMAT in saved or not all(map(_is_plain, saved["state"].values()))
    if not is_ours and sum(theirs) > sum(ours):
        raise ValueError(
            f"the state is of {sum(theirs)} parameters, this optimizer has {sum(ours)}. If it trained g and v of a "
            "model in module form, load it with that model and call weightnorm.from_module_form(model, optimizer)"
        )
    what = "number of parameter groups" if len(theirs) != len(ours) else "number of parameters in its groups"
    raise ValueError(
        f"the state has a different {what}: they have {theirs} members, here {ours}. Build from the same groups"
        + ("" if is_ours else ", as weightnorm.AdamW(model.parameters()) where it was torch's of model.parameters()")
    )


def _kept_by(rule: Rule, options: Group) -> dict[str, bool]:
    """Return what a rule of torch's keeps for a parameter, and whether by element; nothing for rules not known."""
    if not class_of(rule).__module__.startswith("torch.optim"):
        return {}
    probe = nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.zeros(2, 2)
    means = dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), False)
    given = {name: value for name, value in options.items() if name != "param_names"}
    optimizer = rule([{**given, **means, "lr": 0.0, "params": [probe]}])
    optimizer.step()
    kept = optimizer.state[probe].items()
    return {name: isinstance(value, Tensor) and value.shape == probe.shape for name, value in kept}


def _check_rule(index: int, state: State, kept: Mapping[str, bool], rule: Rule) -> None:
    """Raise ValueError if a state is of another rule: there is some, but not all that this one keeps."""
    names = [name for name in state if name not in (SCALE, MASTER) and not name.startswith(LENGTH)]
    missing = [name for name in kept if name not in names]
    if names and missing:
        raise ValueError(
            f"the state of parameter {index} is {', '.join(names)}, and {class_of(rule).__name__} wants "
            f"{', '.join(missing)} too: it is of another rule. Build an optimizer of that one, or start with fresh "
            "state (load the weights only)"
        )


def _shapes(
    kept: Mapping[str, bool], state: State, parameter: Tensor, group: Group, rule: Rule
) -> dict[str, torch.Size]:
    """Return the shapes that what is kept by element must have."""
    by_element = [name for name in kept if kept[name]]
    if not is_normalized(group, parameter) or _is_plain(state):
        return dict.fromkeys(by_element, parameter.shape)
    like, axis = torch.empty(parameter.shape, device="meta"), group_axis(group)
    of_v = axis.rows(like).shape if is_matrix_rule(rule) else like.shape
    of_g = sum_rows(axis.split(like), axis.kept(like)).shape
    shapes = dict.fromkeys(by_element, of_v) | dict.fromkeys([LENGTH + name for name in by_element], of_g)
    return shapes | {SCALE: of_g, MASTER: like.shape}


def _check_shapes(index: int, state: State, shapes: Mapping[str, torch.Size], parameter: Tensor) -> None:
    """Raise ValueError if a state is of a parameter of another shape; torch goes by position, and would take it."""
    for name, shape in shapes.items():
        value = state.get(name)
        if isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(
                f"{name} of parameter {index} has shape {tuple(value.shape)}, and a parameter of shape "
                f"{tuple(parameter.shape)} wants {tuple(shape)}. States are matched by position: build the optimizer "
                "from the same parameters in the same order"
            )
