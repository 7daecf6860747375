"""A step of the kernels beside one of torch's optimizer, on something small."""

from functools import partial

import torch
from torch import Tensor, nn

from weightnorm.kernels.step import MakeLauncher
from weightnorm.optim.coordinates import State
from weightnorm.optim.engine import Engine
from weightnorm.optim.fused import Fused
from weightnorm.optim.groups import Group
from weightnorm.optim.rules import default_options

_RULE = partial(torch.optim.AdamW, lr=0.1)
_OPTIONS = {"v_std": None, "g_lr": 1.0, "decay": "both", "stochastic_rounding": False, "weight_norm": True, "dim": 0}


@torch.no_grad()
def steps_rightly(device: torch.device, make_launcher: MakeLauncher) -> bool:
    """Say whether kernels take the step that torch's optimizer on ``(v, g)`` takes.

    Args:
        device: where.
        make_launcher: the backend's.
    """

    def weight() -> tuple[nn.Parameter, list[Group], dict[Tensor, State]]:
        made = nn.Parameter(torch.linspace(-1, 2, 3 * 40, device=device, dtype=torch.float32).reshape(3, 40))
        made.grad = made.detach().flip(0, 1).cos()
        return made, [default_options(_RULE) | _OPTIONS | {"groups": 1, "params": [made]}], {made: {}}

    expected, groups, state = weight()
    Engine(groups, [(expected, 0)], _RULE, None, state).step(state, None, None)
    found, groups, state = weight()
    fused = Fused(groups, [(found, 0)], lambda _: "adam", make_launcher, state)
    fused.is_stale(state)
    fused.step(state, None, None)
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
