"""The paper's experiment 5.2 on CIFAR-10: a deep variational autoencoder with several layers of latents.

[P] is the paper, which gives no sizes; [IP] and [I] are the IAF paper, appendix C, and its code, whose model is
``LadderVAE``.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from weightnorm.errors import UserError
from weightnorm.tasks.cifar10 import DATA
from weightnorm.tasks.generative import refuse
from weightnorm.tasks.in_memory import Part
from weightnorm.tasks.subset import subset
from weightnorm.tasks.task import Measure, Norm, Paper, PaperArm
from weightnorm.tasks.vae.ladder import STD, LadderVAE
from weightnorm.tasks.vae.logistic import VALUES, bits_per_dimension
from weightnorm.tasks.vae.training import Autoencoder

LEVELS = 2  # of 16 x 16 and of 8 x 8 [I]

_EPOCHS = (50, 100, 200, 300, 400, 450)


def _reported(bound: tuple[float, ...]) -> PaperArm:
    # The axis has no unit. That of log p(x/256), a density, is the one that fits published bits per dimension.
    return PaperArm.after(_EPOCHS, [8 - bits_per_dimension(nats) for nats in bound])


PAPER = Paper(  # figure 3, read off
    epochs=450,
    curve=("test", "bits"),
    at=tuple(epoch - 1 for epoch in _EPOCHS),
    levels=(),
    final=("test", "bits"),
    arms={
        "plain": _reported((8307, 8624, 8888, 9023, 9108, 9148)),
        "weight_norm": _reported((8549, 8849, 9095, 9196, 9253, 9277)),
    },
    scaled=False,
    notes=(
        "The paper's model was larger, by how much is not stated; its bits are converted from an axis without a unit.",
        "Minus the bound in training includes the free bits; on test images it does not.",
        "Where the images went through lossy compression, as in some copies of the data set, they are easier to model.",
    ),
)


class CifarVae(Autoencoder):
    """Model photographs, in bits per dimension.

    Args:
        device: where.
        folder: the data set in the Hub's layout; None: ``$WEIGHTNORM_DATA/cifar10``, or it is downloaded.
        limit: train on so many images, and score on a fifth as many; None: on all.
        holdout: score on a fifth of the training images, in place of the test images, and train on the others.
        width: feature maps in every layer.
        depth: layers of latents in each of the two levels.

    Raises:
        UserError: if the data is missing or damaged, an option is out of its range.
    """

    name: ClassVar[str] = "vae_cifar10"
    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType(
        {
            "loss": Measure("−bound, nats", 1),  # in training free bits are added
            "bits": Measure("bits/dim", 3),
            "reconstruction": Measure("reconstruction", 1),
            "divergence": Measure("KL", 1),
        }
    )
    headline: ClassVar[str] = "bits"
    init_std: ClassVar[float | Mapping[str, float]] = MappingProxyType(STD)
    paper: ClassVar[Paper | None] = PAPER

    def __init__(
        self,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        limit: int | None = None,
        holdout: bool = False,
        width: int = 96,
        depth: int = 2,
    ):
        super().__init__(device)
        if not (width >= 1 and depth >= 1):
            raise UserError(f"the autoencoder needs maps and layers; got --width {width}, --depth {depth}")
        chosen = subset(DATA.sizes, limit, holdout, self.batch_size)
        data = DATA.load(folder)
        self.holdout, self.width, self.depth = chosen.held_out, width, depth
        self.train = (data["train_images"][chosen.train].to(self.device),)
        self.test = (data[f"{chosen.scored}_images"][chosen.where].to(self.device),)

    def inputs(self, images: Tensor) -> Tensor:
        """Return images as the numbers from 0 to 255 that the model takes."""
        return images.float()

    def shown(self, images: Tensor) -> Tensor:
        """Return them in [0, 1]."""
        return images / (VALUES - 1)

    def model(self, norm: Norm | None = None) -> nn.Module:
        """Return the network."""
        refuse(norm)
        return LadderVAE(self.width, depths=[self.depth] * LEVELS).to(self.device)

    def loss(self, model: nn.Module, batch: Part) -> tuple[Tensor, ...]:
        """Return minus the bound, in training with free bits, and then without them in bits, and its two parts."""
        assert isinstance(model, LadderVAE)
        *parts, penalty = model.objective(self.inputs(*batch))
        reconstruction, divergence = (part.mean() for part in parts)
        bound = reconstruction + divergence
        return bound + penalty * model.training, bits_per_dimension(bound), reconstruction, divergence
