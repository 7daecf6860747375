"""What tasks share that model images: the loss is minus a bound on their log-likelihood."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from weightnorm.errors import UserError
from weightnorm.tasks.in_memory import InMemory, Part
from weightnorm.tasks.task import Measure, Norm

SHOWN = 8  # rows and columns of images in a picture


class Generative(InMemory):
    """A task whose models return the two parts of minus the bound of each image, in nats; ``train`` is images.

    A model's ``forward(x)`` returns ``−log p(x|z)`` and ``KL(q(z|x) ‖ p(z))``, or a sample of it, (N,) each;
    ``sample(count)`` and ``reconstruct(x)`` return images in [0, 1].
    """

    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType(
        {
            "loss": Measure("−bound, nats", 2),
            "reconstruction": Measure("reconstruction", 2),
            "divergence": Measure("KL", 2),
        }
    )

    def inputs(self, images: Tensor) -> Tensor:
        """Return what the model sees of images. Default: the images."""
        return images

    def shown(self, images: Tensor) -> Tensor:
        """Return in [0, 1] what the model sees. Default: that."""
        return images

    def init_batch(self) -> Tensor | None:
        """Return what the model sees of the first training images."""
        return self.inputs(self.train[0][: self.init_size])

    def loss(self, model: nn.Module, batch: Part) -> tuple[Tensor, ...]:
        """Return minus the bound, and its two parts: means over the batch, in nats."""
        reconstruction, divergence = (part.mean() for part in model(self.inputs(*batch)))
        return reconstruction + divergence, reconstruction, divergence

    def pictures(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return samples; and test images, in each second row the reconstructions of those above."""
        images = self.inputs(self.test[0][: SHOWN**2 // 2])
        rows = [part.unflatten(0, (-1, SHOWN)) for part in (self.shown(images), model.reconstruct(images))]  # type: ignore[operator]
        samples = model.sample(SHOWN**2).unflatten(0, (-1, SHOWN))  # type: ignore[operator]
        return {"samples": samples, "reconstructions": torch.stack(rows, dim=1).flatten(0, 1)}


def refuse(norm: Norm | None) -> None:
    """Refuse norm layers: batch norm hurts these models (section 5.3; IAF paper, C.6), so there is no place for any."""
    if norm is not None:
        raise UserError("a generative model of the paper has no layers that a batch norm follows; leave that arm out")
