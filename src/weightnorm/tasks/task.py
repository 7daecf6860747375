"""What a task is: something to train, with the data, the loss and the settings that its experiment fixes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

import weightnorm as wn
from weightnorm.tasks.drawing import draw_normal

Batch = Any  # whatever the task's own ``loss`` takes
Split = Literal["train", "test"]
NO_LEVELS: Mapping[float, int] = MappingProxyType({})
Norm = Callable[[int], nn.Module]  # from a number of channels to a layer that normalises their pre-activations


class Measure(NamedTuple):
    """A number that says how a model does, the lower the better: its name, and the decimals worth showing."""

    label: str
    digits: int


@dataclass(frozen=True)
class PaperArm:
    """What a paper reports of an arm.

    Attributes:
        curve: epoch, from 0 -> what was measured, as far as it is known.
        first_epoch: a level -> first epoch at or under it.
        final: what was measured at the end.
    """

    curve: Mapping[int, float]
    first_epoch: Mapping[float, int]
    final: float

    @classmethod
    def after(
        cls, epochs: Sequence[int], values: Sequence[float], first: Mapping[float, int] = NO_LEVELS
    ) -> "PaperArm":
        """Return what was measured after so many epochs, the last of them at the end; ``first`` counts from 1 too."""
        curve = {epoch - 1: value for epoch, value in zip(epochs, values, strict=True)}
        return cls(curve, {level: epoch - 1 for level, epoch in first.items()}, values[-1])


@dataclass(frozen=True)
class Paper:
    """What a paper reports of an experiment.

    Attributes:
        epochs: how long it trained.
        curve: what it shows along the way: "train" or "test", and the name of a measure of the task.
        at: at which epochs, from 0, it is known.
        levels: those of which the first epoch is known.
        final: what it reports at the end, as ``curve``.
        arms: by the arm's name.
        scaled: where fewer epochs are trained, an epoch is compared with that at the same place in the schedule; else
            with the one of the same number.
        notes: what a reader who compares needs to know.
    """

    epochs: int
    curve: tuple[Split, str]
    at: tuple[int, ...]
    levels: tuple[float, ...]
    final: tuple[Split, str]
    arms: Mapping[str, PaperArm]
    scaled: bool = True
    notes: tuple[str, ...] = ()


class Schedule(NamedTuple):
    """What an epoch's optimizer has: a factor on the learning rate, and Adam's β; None: as it was made."""

    lr: float = 1.0
    betas: tuple[float, float] | None = None


class Task(ABC):
    """Something to train in several arms.

    Attributes:
        name: what it is called on the command line.
        measures: what is measured at every step and on held-out data, by name; the first is "loss".
        headline: the one that people look at.
        v_std: the standard deviation from which the experiment draws ``v``. Default 0.05, the paper's. None: ``v`` is
            the weight itself.
        init_std: what data-dependent initialisation gives the layers' outputs, as in ``wn.data_init``. Default 1.
        max_norm: gradients, those of lengths and directions where there are any, are clipped to it. None: they are not.
        average_epochs: how many epochs the running average of the weights, which is what is scored, goes back. None:
            the weights themselves are scored.
        finals: what is measured besides when training has ended, by name.
        rates: the experiment's learning rate in each arm, by the arm's name; where none is known, the user says.
        paper: what the paper reports of the experiment, if it is one of a paper's.
        holdout: how many training examples it is scored on in place of the test set, to choose settings by; 0: none.

    Args:
        device: where data and models live.
    """

    name: ClassVar[str]
    measures: ClassVar[Mapping[str, Measure]]
    headline: ClassVar[str] = "loss"
    v_std: float | None = 0.05
    init_std: ClassVar[float | Mapping[str, float]] = 1.0
    max_norm: ClassVar[float | None] = None
    average_epochs: ClassVar[float | None] = None
    finals: ClassVar[Mapping[str, Measure]] = MappingProxyType({})
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
        """Return what ``wn.data_init`` passes through a model, the same at every call; None: weights stay as drawn."""

    @abstractmethod
    def train_batches(self, seed: int, epoch: int) -> Iterator[Batch]:
        """Yield an epoch's batches, in an order that depends on seed and epoch and on nothing else."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Return the mean loss over a batch, to differentiate, and then its other measures, in their order."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Sequence[float]:
        """Score a model, in eval mode, on held-out data; return all measures in their order."""

    def finish(self, model: nn.Module) -> Mapping[str, float]:
        """Score a model that is trained, in eval mode, by ``finals``. Default: by nothing more."""
        return {}

    def pictures(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return pictures of what a model in eval mode does: title -> (rows, columns, C, H, W) in [0, 1]. None here."""
        return {}

    def schedule(self, epoch: int, epochs: int) -> Schedule:
        """Return the optimizer's settings in an epoch, counted from 0, of so many. Default: they stay."""
        return Schedule()

    def draw_weights(self, model: nn.Module) -> None:
        """Draw the experiment's initial weights: v ~ N(0, v_std²), biases 0 (section 3)."""
        assert self.v_std is not None, "an experiment without one draws its weights as it does"
        draw_normal(model, self.v_std)

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
