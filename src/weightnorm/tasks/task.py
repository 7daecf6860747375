"""What a task is: something to train, with the data, the loss and the settings that its experiment fixes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

import weightnorm as wn

Batch = Any  # whatever the task's own ``loss`` takes
Norm = Callable[[int], nn.Module]  # from a number of channels to a layer that normalises their pre-activations


class Scores(NamedTuple):
    """How a model does on held-out data: mean loss, and error in percent."""

    loss: float
    error: float


@dataclass(frozen=True)
class PaperArm:
    """What a paper reports of an arm.

    Attributes:
        test_error: at the end, in percent.
        train_error: epoch, from 0 -> training error, in percent.
        first_epoch: training error, in percent -> first epoch at or under it.
    """

    test_error: float
    train_error: Mapping[int, float]
    first_epoch: Mapping[float, int]


@dataclass(frozen=True)
class Paper:
    """What a paper reports of an experiment.

    Attributes:
        epochs: how long it trained.
        train_epochs: at which of them training errors are known.
        levels: training errors, in percent, of which the first epoch is known.
        arms: by the arm's name.
        notes: what a reader who compares needs to know.
    """

    epochs: int
    train_epochs: tuple[int, ...]
    levels: tuple[float, ...]
    arms: Mapping[str, PaperArm]
    notes: tuple[str, ...] = ()


class Schedule(NamedTuple):
    """What an epoch's optimizer has: a factor on the learning rate, and Adam's β; None: as it was made."""

    lr: float = 1.0
    betas: tuple[float, float] | None = None


class Task(ABC):
    """Something to train in several arms.

    Attributes:
        name: what it is called on the command line.
        v_std: the standard deviation from which the experiment draws ``v``. Default 0.05, the paper's.
        rates: the experiment's learning rate in each arm, by the arm's name; where none is known, the user says.
        paper: what the paper reports of the experiment, if it is one of a paper's.
        holdout: how many training examples it is scored on in place of the test set, to choose settings by; 0: none.

    Args:
        device: where data and models live.
    """

    name: ClassVar[str]
    v_std: ClassVar[float] = 0.05
    rates: ClassVar[Mapping[str, float]] = MappingProxyType({})
    paper: ClassVar[Paper | None] = None
    holdout: int = 0

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Return how many batches ``train_batches`` yields."""

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

    def schedule(self, epoch: int, epochs: int) -> Schedule:
        """Return the optimizer's settings in an epoch, counted from 0, of so many. Default: they stay."""
        return Schedule()

    def draw_weights(self, model: nn.Module) -> None:
        """Draw the experiment's initial weights: v ~ N(0, v_std²), biases 0 (section 3)."""
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.normal_(layer.weight, std=self.v_std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def optimizer(self, params: ParamsT, lr: float) -> torch.optim.Optimizer:
        """Return the optimizer for plain weights, or for lengths and directions in module form. Default: Adam.

        Args:
            params: parameters, or groups of them.
            lr: learning rate.
        """
        return torch.optim.Adam(params, lr=lr, fused=True)

    def weight_norm_optimizer(self, model: nn.Module, lr: float, g_lr: float | str) -> torch.optim.Optimizer:
        """Return the same optimizer on length and direction.

        Args:
            model: the model.
            lr: learning rate.
            g_lr: multiplies it for lengths, as in ``wn.Adam``.
        """
        return wn.Adam(model, lr=lr, fused=True, v_std=self.v_std, g_lr=g_lr)
