"""What tasks share that sort images into classes: data lives on the device, and a batch is an index into it."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from weightnorm.tasks.task import Scores, Task

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W), standardised; labels (N,)


class Classification(Task):
    """A task whose loss is the cross-entropy of an image's class.

    Attributes:
        batch_size: images a step. Default 100, the authors'.
        init_size: images for the data-dependent initialisation. Default 500, the authors'.
        train: all images and labels to train on.
        test: those to score on.
    """

    batch_size: ClassVar[int] = 100
    init_size: ClassVar[int] = 500
    train: Batch
    test: Batch

    @property
    def steps_per_epoch(self) -> int:
        """Return how many batches ``train_batches`` yields."""
        return len(self.train[1]) // self.batch_size

    def init_batch(self) -> Tensor:
        """Return the first training images."""
        return self.train[0][: self.init_size]

    def train_batches(self, seed: int, epoch: int) -> Iterator[Batch]:
        """Yield the training set in batches, in a new order every epoch."""
        images, labels = self.train
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for chosen in order.to(self.device).split(self.batch_size):
            yield images[chosen], labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy and the share of wrong answers."""
        images, labels = batch
        logits = model(images)
        return nn.functional.cross_entropy(logits, labels), (logits.argmax(1) != labels).float().mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Scores:
        """Score a model on the test images."""
        # In parts that fit in the cache: three times as fast as all at once.
        parts = zip(*(whole.split(self.batch_size) for whole in self.test), strict=True)
        loss, error = torch.stack([torch.stack(self.loss(model, part)) for part in parts]).mean(0).tolist()
        return Scores(loss, 100 * error)
