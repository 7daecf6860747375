"""A plain optimizer's moments of ``w`` as moments of ``v`` and ``g``: averages of gradients exactly, squares nearly."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from weightnorm.formula import compose, sum_rows, wide_dtype
from weightnorm.optim.coordinates import LENGTH, SCALE, Coordinates, State
from weightnorm.optim.groups import Group, group_axis
from weightnorm.optim.rules import Rule, is_matrix_rule

_GRADIENTS = ("exp_avg", "momentum_buffer")  # averages of gradients
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # of their squares
_MAGNITUDES = ("exp_inf",)  # of their absolute values


def project(state: State, weight: Tensor, group: Group, rule: Rule, *, has_g: bool) -> State:
    """Return the state of ``v`` and ``g`` that a plain optimizer's state of their weight stands for.

    Gradients transform linearly (eq. 3), and so do averages of them. Of averages ``q`` of squares, the products of
    different elements are not known; as if they averaged to zero, with ``u`` the direction,

        E[(u·∂w)²] = Σ u²q        E[(∂w − u (u·∂w))²] = (1 − 2u²) q + u² Σ u²q

    Args:
        state: what is kept for ``weight``.
        weight: as it is now; load it before the optimizer's state.
        group: its param group, whose ``v_std`` sets the scale.
        rule: steps on ``v``.
        has_g: whether it steps on ``g`` too.

    Returns:
        The state, ``scale`` included.

    Raises:
        ValueError: if it is not known of something in the state how it would be for ``v`` and ``g``.
    """
    axis, wide = group_axis(group), nn.Parameter(weight.detach().to(wide_dtype(weight.dtype)), requires_grad=False)
    coordinates = Coordinates(wide, axis, as_matrix=is_matrix_rule(rule))
    made: State = {}

    def gradients(x: Tensor) -> tuple[Any, Any]:
        wide.grad = x
        coordinates.open(made, group)
        return coordinates.v.grad, coordinates.g.grad

    gradients(torch.zeros_like(wide))  # sets the scale, as a first step does
    w, kept = axis.split(wide.detach()), axis.kept(wide)
    shares = compose(w, torch.ones_like(made[SCALE]), kept).square()  # u²; 0 where there is no direction
    scale = torch.where(made[SCALE] == 0, 1, made[SCALE])

    def squares(x: Tensor) -> tuple[Any, Any]:
        q = axis.split(x)
        of_g = sum_rows(shares * q, kept)
        of_v = ((1 - 2 * shares) * q + shares * of_g).clamp(min=0)  # rounding may take it below
        return (scale.square() * of_v).reshape(wide.shape), of_g

    def magnitudes(x: Tensor) -> tuple[Any, Any]:
        of_v, of_g = squares(x.square())
        return of_v.sqrt(), of_g.sqrt()

    how = (
        dict.fromkeys(_GRADIENTS, gradients) | dict.fromkeys(_SQUARES, squares) | dict.fromkeys(_MAGNITUDES, magnitudes)
    )
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            of_v, of_g = value, copy.deepcopy(value)  # counts, which go on in place
        elif name in how and not _is_of_steps(name, state):
            of_v, of_g = how[name](value.to(wide.device, wide.dtype))
        else:
            raise ValueError(
                f"the state is of a plain torch optimizer, and how its {name} would be for v and g is not known; start "
                "with fresh state (load the weights only)"
            )
        made |= {name: of_v, LENGTH + name: of_g} if has_g else {name: of_v}
    coordinates.close()
    return made


def _is_of_steps(name: str, state: State) -> bool:
    """Say whether a buffer averages steps: RMSprop's momentum comes after the division by the root of squares."""
    return name == "momentum_buffer" and "square_avg" in state
