"""What tasks share that sort images into classes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, nn

from weightnorm.tasks.in_memory import InMemory, Part
from weightnorm.tasks.task import Measure


class Classification(InMemory):
    """A task whose loss is the cross-entropy of an image's class; ``train`` and ``test`` are images and labels."""

    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType(
        {"loss": Measure("loss", 3), "error": Measure("error %", 1)}
    )
    headline: ClassVar[str] = "error"

    def loss(self, model: nn.Module, batch: Part) -> tuple[Tensor, ...]:
        """Return the mean cross-entropy and the percentage of wrong answers."""
        images, labels = batch
        logits = model(images)
        return nn.functional.cross_entropy(logits, labels), 100 * (logits.argmax(1) != labels).float().mean()
