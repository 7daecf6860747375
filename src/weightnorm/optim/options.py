"""The options of a param group that are weight normalization's own, checked before anything is built on them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weightnorm.optim.backends import BACKENDS
from weightnorm.optim.groups import Group, group_axis, is_normalized


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_dim(value: Any) -> bool:
    axes = value if isinstance(value, tuple) else (value,)
    return value is None or all(isinstance(axis, int) for axis in axes)


_MAY_BE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "v_std": (lambda value: value is None or (_is_number(value) and 0 < value < math.inf), "None or a positive number"),
    "g_lr": (lambda value: value == "sqrt" or (_is_number(value) and 0 <= value < math.inf), '"sqrt" or a number >= 0'),
    "decay": (lambda value: value in ("both", "g"), '"both" or "g"'),
    "stochastic_rounding": (lambda value: isinstance(value, bool), "True or False"),
    "weight_norm": (lambda value: value is None or isinstance(value, bool), "None, True or False"),
    "dim": (_is_dim, "an axis of the weight, a tuple of axes, or None for the whole tensor"),
    "groups": (lambda value: isinstance(value, int) and value > 0, "a number of groups"),
    "differentiable": (lambda value: not value, "False, since the step runs outside autograd"),
}


def members_of(params: Any) -> list[Any]:
    """Return a group's ``params`` as a list of tensors, or of (name, tensor) pairs where they are named."""
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, set):
        raise TypeError("parameters need an order, which a set does not have; pass a list")
    return list(params)


def check_options(options: Group) -> None:
    """Raise ValueError, with the rule, for an option that is out of its range."""
    for name, (is_right, what) in _MAY_BE.items():
        if name in options and not is_right(options[name]):
            raise ValueError(f"{name} must be {what}; got {options[name]!r}")


def check_axes(group: Group) -> None:
    """Raise ValueError if a normalised member of a group has no such axis as the group says."""
    axis = group_axis(group)
    for parameter in group["params"]:
        if is_normalized(group, parameter):
            if parameter.shape[0] % axis.groups:
                raise ValueError(
                    f"groups={axis.groups} does not divide axis 0 of a weight of shape {tuple(parameter.shape)}"
                )
            axis.kept(parameter)
            if group["stochastic_rounding"] and parameter.dtype == torch.float16:
                raise ValueError("stochastic_rounding is for bfloat16 weights; float16 ones keep a float32 master")


def check_backend(backend: str) -> None:
    """Raise ValueError if there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


def refusal(gradient: Tensor | None) -> str:
    """Return what keeps a gradient from being pulled back, "sparse" or "complex"; empty where nothing does."""
    if gradient is None:
        return ""
    return "sparse" if gradient.layout != torch.strided else "complex" if gradient.is_complex() else ""


def check_gradient(weight: Tensor, group: Group) -> None:
    """Raise ValueError for the gradient of a normalised weight that cannot be pulled back."""
    kind = refusal(weight.grad) if is_normalized(group, weight) else ""
    if kind:
        raise ValueError(
            f"the gradient of a weight of shape {tuple(weight.shape)} is {kind}; weight normalization needs "
            "dense real ones. Leave the weight plain (skip= in param_groups, weight_norm=False in its group)"
            + (" or give its layer sparse=False" if kind == "sparse" else "")
        )


def structure_of(group: Group) -> Group:
    """Return the options that say what a group's tensors are, not how they are trained."""
    return {name: group[name] for name in ("weight_norm", "dim", "groups")}


def check_structure(ours: list[Group], saved_groups: list[Group]) -> None:
    """Raise ValueError if a saved state is of groups that were normalised otherwise than ours."""
    if len(saved_groups) != len(ours):
        return  # torch says so
    for mine, saved in zip(map(structure_of, ours), saved_groups, strict=True):
        if (theirs := structure_of(mine | saved)) != mine:
            raise ValueError(f"saved for a group with {theirs}, loaded into one with {mine}; build both alike")
