"""MNIST, its pixels made black or white by chance."""

from pathlib import Path

import torch
from torch import Tensor

from weightnorm.tasks.generative import Generative
from weightnorm.tasks.hub import HubData
from weightnorm.tasks.subset import subset

DATA = HubData(
    name="mnist",
    repository="ylecun/mnist",
    image="image",
    label="label",
    shape=(28, 28),
    sizes={"train": 60_000, "test": 10_000},
    classes=None,
)
SEED = 0  # of the draw that fixes which pixels are white


class BinaryMnist(Generative):
    """Model handwritten digits, each pixel white with a probability that is its brightness.

    What is scored, and what the data-dependent initialisation sees, is drawn once, the same for every arm and seed.

    Args:
        device: where.
        folder: the data set in the Hub's layout; None: ``$WEIGHTNORM_DATA/mnist``, or it is downloaded.
        limit: train on so many images, and score on a fifth as many; None: on all.
        holdout: score on a fifth of the training images, in place of the test images, and train on the others.
        binarise: "dynamic": draw training images anew at every step; "fixed": once.

    Raises:
        UserError: if the data is missing or damaged, or the limit not a multiple of the batch size in range.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        limit: int | None = None,
        holdout: bool = False,
        binarise: str = "dynamic",
    ):
        super().__init__(device)
        chosen = subset(DATA.sizes, limit, holdout, self.batch_size)
        data = DATA.load(folder)
        self.holdout, self.binarise = chosen.held_out, binarise
        generator = torch.Generator().manual_seed(SEED)
        brightness = data["train_images"][chosen.train] / 255
        drawn = torch.bernoulli(brightness, generator=generator)
        self._init = drawn[: self.init_size].to(self.device)
        self.train = ((brightness if binarise == "dynamic" else drawn).to(self.device),)
        scored = data[f"{chosen.scored}_images"][chosen.where] / 255
        self.test = (torch.bernoulli(scored, generator=generator).to(self.device),)

    def init_batch(self) -> Tensor | None:
        """Return the first training images."""
        return self._init

    def inputs(self, images: Tensor) -> Tensor:
        """Return images with every pixel drawn; those that are drawn already stay as they are."""
        return torch.bernoulli(images)
