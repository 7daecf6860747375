"""How both autoencoders of section 5.2 are trained: the paper's [P] one optimizer, and its average of the weights."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

import weightnorm as wn
from weightnorm.tasks.generative import Generative

RATE = 0.002  # Adamax's, in both arms [P]
AVERAGED = 10.0  # epochs that the average of the weights goes back [P]


class Autoencoder(Generative):
    """A generative task that is trained by Adamax and scored on averaged weights."""

    average_epochs: ClassVar[float | None] = AVERAGED
    rates: ClassVar[Mapping[str, float]] = MappingProxyType({"plain": RATE, "weight_norm": RATE})

    def optimizer(self, params: ParamsT, lr: float) -> torch.optim.Optimizer:
        """Return Adamax [P]."""
        return torch.optim.Adamax(params, lr=lr)

    def weight_norm_optimizer(self, model: nn.Module, lr: float, g_lr: float | str) -> torch.optim.Optimizer:
        """Return Adamax on lengths and directions [P]."""
        return wn.Adamax(model, lr=lr, v_std=self.v_std, g_lr=g_lr)
