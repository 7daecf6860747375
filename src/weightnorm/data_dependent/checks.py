"""Who may be initialised: fresh models, and on several ranks the same one."""

import warnings

import torch
from torch import nn

from weightnorm.data_dependent.moments import gathered
from weightnorm.data_dependent.norms import NORMS
from weightnorm.data_dependent.units import Settable
from weightnorm.optim.optimizer import is_trained


def check_fresh(model: nn.Module, expected: bool) -> None:
    """Warn of signs of training, or refuse them."""
    stepped = is_trained(model.parameters())
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    signs = {
        "an optimizer has taken steps on it": stepped,
        "it has gradients": any(parameter.grad is not None for parameter in model.parameters()),
        "its batch norms have seen batches": any(
            norm.num_batches_tracked for norm in norms if norm.track_running_stats
        ),
    }
    seen = " and ".join(sign for sign, there in signs.items() if there)
    if expected and seen:
        raise ValueError(f"data_init is for fresh weights, and this model has been trained: {seen}")
    if stepped:
        warnings.warn(
            "data_init changes what the model computes, and an optimizer has taken steps on it: use it on fresh "
            "weights, before training, and build the optimizer afterwards",
            stacklevel=3,
        )


def check_ranks_agree(found: Settable, several: bool) -> bool:
    """Refuse ranks with different weights; return whether any of them has several batches, which all go about alike."""
    own = [parameter for units in found.units() for parameter in units.parameters()]
    if not own:
        return several
    sums = [parameter.detach().double().sum() for parameter in own]
    mine = torch.stack([torch.full_like(sums[0], several), *sums])
    every = torch.stack(gathered(mine))
    if not torch.equal(every.nan_to_num()[:, 1:], mine.nan_to_num()[1:].expand(len(every), -1)):
        raise ValueError(
            "ranks hold different weights, and would end with different ones; wrap the model in DDP first, which "
            "makes them equal, or pass sync=False"
        )
    return bool(every[:, 0].any())
