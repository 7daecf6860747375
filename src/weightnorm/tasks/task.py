"""What a task is: something to train, with the data, the loss and the settings that its experiment fixes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import weightnorm as wn

Batch = Any  # whatever the task's own ``loss`` takes
Norm = Callable[[int], nn.Module]  # from a number of channels to a layer that normalises their pre-activations


class Scores(NamedTuple):
    """How a model does on held-out data: mean loss, and error in percent."""

    loss: float
    error: float


class Task(ABC):
    """Something to train in several arms.

    Attributes:
        name: what it is called on the command line.
        v_std: the standard deviation from which the experiment draws ``v``. Default 0.05, the paper's.
        steps_per_epoch: how many batches ``train_batches`` yields.

    Args:
        device: where data and models live.
    """

    name: ClassVar[str]
    v_std: ClassVar[float] = 0.05
    steps_per_epoch: int

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    @abstractmethod
    def model(self, norm: Norm | None = None) -> nn.Module:
        """Return a fresh model with torch's own initial weights.

        Args:
            norm: makes the layer that follows every convolution and dense layer, in place of their biases; None: none.
        """

    @abstractmethod
    def init_batch(self) -> Any:
        """Return what ``wn.data_init`` passes through a model; the same at every call."""

    @abstractmethod
    def train_batches(self, seed: int, epoch: int) -> Iterator[Batch]:
        """Yield an epoch's batches, in an order that depends on seed and epoch and on nothing else."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss over a batch, to differentiate, and the share of its examples that are got wrong."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Scores:
        """Score a model, in eval mode, on held-out data."""

    def draw_weights(self, model: nn.Module) -> None:
        """Draw the experiment's initial weights: v ~ N(0, v_std²), biases 0 (section 3)."""
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.normal_(layer.weight, std=self.v_std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Return the optimizer for plain weights. Default: Adam, as in the paper's experiment 5.1."""
        return torch.optim.Adam(model.parameters(), lr=lr, fused=True)

    def weight_norm_optimizer(self, model: nn.Module, lr: float, g_lr: float | str) -> torch.optim.Optimizer:
        """Return the same optimizer on length and direction.

        Args:
            model: the model.
            lr: learning rate.
            g_lr: multiplies it for lengths, as in ``wn.Adam``.
        """
        return wn.Adam(model, lr=lr, fused=True, v_std=self.v_std, g_lr=g_lr)
