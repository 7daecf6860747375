"""State that is not ours: a plain torch optimizer's, loaded into one that steps on ``(v, g)``."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weightnorm.formula import pull_back, row_lengths, sum_rows, wide_dtype
from weightnorm.optim.coordinates import LENGTH, SCALE, State
from weightnorm.optim.groups import Group, group_axis, is_normalized

FORMAT = "weightnorm_format"  # key of a state dict of ours; its value is the version
VERSION = 1
_FIRST = ("exp_avg", "momentum_buffer", "grad_avg")  # averages of gradients
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # of their squares
_LARGEST = ("exp_inf",)  # of their absolute values


def as_ours(saved: dict[str, Any], groups: list[Group], strict: bool) -> dict[str, Any]:
    """Return a state dict as one of ours, with a warning if it was not.

    Args:
        saved: what is being loaded.
        groups: those it is loaded into, as many and as large as it has.
        strict: refuse what is not ours.

    Raises:
        ValueError: if it is of a later version, not ours and refused, or fits the parameters in number only.
    """
    if saved.get(FORMAT, VERSION) > VERSION:
        raise ValueError(
            f"the state was saved in format {saved[FORMAT]}, and this version of weightnorm knows {VERSION}; update it"
        )
    members = [(group, parameter) for group in groups for parameter in group["params"]]
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    if len(ids) > len(members):
        raise ValueError(
            f"the state is of {len(ids)} parameters, this optimizer has {len(members)}. If it trained g and v of a "
            "model in module form, load it with that model and call weightnorm.from_module_form(model, optimizer)"
        )
    if FORMAT in saved or not saved["state"] or any(SCALE in state for state in saved["state"].values()):
        return saved
    if not any(is_normalized(group, parameter) for group, parameter in members):
        return saved
    if strict:
        raise ValueError("the state is not of an optimizer of weightnorm's, and strict=True allows no other")
    projected = {}
    for index, (i, (group, parameter)) in enumerate(zip(ids, members, strict=False)):
        state = saved["state"].get(i, {})
        _check_shapes(index, state, parameter)
        if state:
            projected[i] = _projected(state, parameter, group) if is_normalized(group, parameter) else state
    warnings.warn(
        "the state is of a plain torch optimizer: its moments were projected into those of v and g, second moments "
        "as if gradients of different elements were uncorrelated. Pass strict=True to refuse it",
        stacklevel=5,
    )
    return saved | {"state": projected}


def _check_shapes(index: int, state: State, parameter: Tensor) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
            raise ValueError(
                f"{name} of parameter {index} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}. "
                "Torch matches states by position: build the optimizer from the same parameters in the same order"
            )


def _projected(state: State, weight: Tensor, group: Group) -> State:
    """Return the state of ``v`` and ``g`` that a state of the weight stands for."""
    axis = group_axis(group)
    kept = axis.kept(weight)
    w = axis.split(weight.detach().to(wide_dtype(weight.dtype)))
    length, alive = row_lengths(w, kept)
    initial = (
        torch.ones_like(length)
        if group["v_std"] is None
        else length / (group["v_std"] * axis.row_length(weight) ** 0.5)
    )
    scale = torch.where(alive, initial, 0)

    def first(x: Tensor) -> tuple[Tensor, Tensor]:
        """Project averages of gradients as gradients (eq. 3), which are linear."""
        of_v, of_g = pull_back(x, w, torch.where(alive, length, 0), kept)
        return scale * of_v, of_g

    def second(x: Tensor) -> tuple[Tensor, Tensor]:
        """Project second moments q: ``E[(u·∂w)²] = Σu²q`` and ``E[(∂w − u u·∂w)²] = (1 − 2u²) q + u² Σu²q``."""
        squares = torch.where(alive, (w / length).square(), 0)
        of_g = sum_rows(squares * x, kept)
        return scale.square() * ((1 - 2 * squares) * x + squares * of_g), of_g

    def largest(x: Tensor) -> tuple[Tensor, Tensor]:
        of_v, of_g = second(x.square())
        return of_v.sqrt(), of_g.sqrt()

    made: State = {SCALE: scale}
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.ndim:
            made |= {name: value, LENGTH + name: value}
            continue
        of_v, of_g = _how(name, first, second, largest)(axis.split(value.to(weight.device, w.dtype)))
        made |= {name: of_v.reshape(weight.shape), LENGTH + name: of_g}
    return made


def _how(name: str, first: Callable[..., Any], second: Callable[..., Any], largest: Callable[..., Any]) -> Any:
    for names, how in ((_FIRST, first), (_SECOND, second), (_LARGEST, largest)):
        if name in names:
            return how
    raise ValueError(
        f"the state is of a plain torch optimizer, and how its {name} would be for v and g is not known; start with "
        "fresh state (load the weights only)"
    )
