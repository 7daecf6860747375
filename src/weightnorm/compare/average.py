"""The running average of a model's weights (Polyak averaging), which some experiments score in place of the last."""

import copy

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """An exponential moving average of the parameters: of lengths and directions apart, where the model holds them.

    At first it goes back a fifth of the epochs up to the present one, or it would remember the initial weights.

    Args:
        model: whose parameters.
        epochs: how many it goes back.
        steps: how many steps an epoch has.
    """

    def __init__(self, model: nn.Module, epochs: float, steps: int):
        self.model = copy.deepcopy(model)
        self._averaged, self._followed = list(self.model.parameters()), list(model.parameters())
        self._epochs, self._steps = epochs, steps

    def update(self, epoch: int) -> None:
        """Take in the model's parameters after a step of an epoch, counted from 0."""
        length = max(min(self._epochs, (epoch + 1) / 5) * self._steps, 1)
        get_ema_multi_avg_fn(1 - 1 / length)(self._averaged, self._followed, None)
