"""The paper's experiment 5.2 on MNIST: a convolutional variational autoencoder with residual blocks.

[P] is the paper. It does not say everything; then the IAF paper is followed [IP] (Kingma et al. 2016, appendix B),
which it names as the description of the model, though of a later version.
"""

from collections.abc import Mapping
from math import log
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from weightnorm.tasks.generative import refuse
from weightnorm.tasks.mnist import BinaryMnist
from weightnorm.tasks.task import Measure, Norm, Paper, PaperArm
from weightnorm.tasks.vae.posterior import mask_weights
from weightnorm.tasks.vae.resnet import ConvolutionalVAE
from weightnorm.tasks.vae.training import Autoencoder

SAMPLES = 128  # of each test image's z, for the estimate of its log-likelihood
AT_ONCE = 1280  # of them

_EPOCHS = (50, 100, 150, 200, 250, 300)


PAPER = Paper(  # figure 3, read off
    epochs=300,
    curve=("test", "loss"),
    at=tuple(epoch - 1 for epoch in _EPOCHS),
    levels=(),
    final=("test", "loss"),
    arms={
        "plain": PaperArm.after(_EPOCHS, (87.30, 86.16, 85.89, 85.81, 85.80, 85.83)),
        "weight_norm": PaperArm.after(_EPOCHS, (87.28, 86.05, 85.58, 85.41, 85.31, 85.33)),
    },
    scaled=False,
    notes=(
        "Minus the bound, in nats. The paper's bars at the end are about 0.22 wide for plain, 0.025 for weight norm.",
    ),
)


class MnistVae(Autoencoder, BinaryMnist):
    """Model digits by 32 latents.

    Args:
        device: where.
        folder: the data set in the Hub's layout; None: ``$WEIGHTNORM_DATA/mnist``, or it is downloaded.
        limit: train on so many images, and score on a fifth as many; None: on all.
        holdout: score on a fifth of the training images, in place of the test images, and train on the others.
        binarise: "dynamic": draw black and white training images anew at every step [IP]; "fixed": once.
        flows: steps of the posterior's inverse autoregressive flow.

    Raises:
        UserError: if the data is missing or damaged, an option is out of its range.
    """

    name: ClassVar[str] = "vae"
    finals: ClassVar[Mapping[str, Measure]] = MappingProxyType(
        {"log_likelihood": Measure(f"−log p(x), {SAMPLES} samples", 2)}
    )
    paper: ClassVar[Paper | None] = PAPER

    def __init__(
        self,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        limit: int | None = None,
        holdout: bool = False,
        binarise: str = "dynamic",
        flows: int = 2,
    ):
        super().__init__(device, folder, limit, holdout, binarise)
        self.flows = flows

    def model(self, norm: Norm | None = None) -> nn.Module:
        """Return the network."""
        refuse(norm)
        return ConvolutionalVAE(steps=self.flows).to(self.device)

    def draw_weights(self, model: nn.Module) -> None:
        """Draw v ~ N(0, 0.05²), biases 0 [P]; what the flow's masks hide is 0."""
        super().draw_weights(model)
        mask_weights(model)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> Mapping[str, float]:
        """Estimate the test images' log-likelihood by importance sampling."""
        losses = []
        for images in self.test[0].split(AT_ONCE // SAMPLES):
            parts: tuple[Tensor, Tensor] = model(images, SAMPLES)
            losses.append(log(SAMPLES) - torch.logsumexp(-sum(parts).view(-1, SAMPLES), dim=1))  # type: ignore[union-attr]
        return {"log_likelihood": torch.cat(losses).mean().item()}
