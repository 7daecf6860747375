"""What tasks share whose data set lives on the device: a batch is an index into it."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from weightnorm.tasks.task import Task

Part = tuple[Tensor, ...]  # of each thing that a batch holds, those of all examples


class InMemory(Task):
    """A task on a data set that fits in the device's memory.

    Attributes:
        batch_size: examples a step. Default 100, the authors'.
        init_size: examples for the data-dependent initialisation. Default 500, the authors'.
        train: all examples to train on.
        test: those to score on.
    """

    batch_size: ClassVar[int] = 100
    init_size: ClassVar[int] = 500
    train: Part
    test: Part

    @property
    def steps_per_epoch(self) -> int:
        """Return how many batches ``train_batches`` yields."""
        return len(self.train[0]) // self.batch_size

    def init_batch(self) -> Tensor | None:
        """Return what the model sees of the first training examples."""
        return self.train[0][: self.init_size]

    def train_batches(self, seed: int, epoch: int) -> Iterator[Part]:
        """Yield the training set in batches, in a new order every epoch."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train[0]), generator=generator)
        for chosen in order.to(self.device).split(self.batch_size):
            yield tuple(whole[chosen] for whole in self.train)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Part) -> tuple[Tensor, ...]:
        """Return all measures of a batch, the one to differentiate first."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> list[float]:
        """Score a model on the test set."""
        # In parts that fit in the cache: three times as fast as all at once.
        parts = zip(*(whole.split(self.batch_size) for whole in self.test), strict=True)
        return torch.stack([torch.stack(self.loss(model, part)) for part in parts]).mean(0).tolist()
