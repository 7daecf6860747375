"""The paper's experiment 5.1: CIFAR-10, ten classes, no augmentation. This file is its list of settings.

Where the paper is silent, its released code (openai/weightnorm, ``lasagne/``) is followed; [P] and [L] say which. Ours
differs in two places, neither of which can be seen in the results: Adam's eps, 1e-8, is added outside the root ([L]:
inside), as in torch; and the last, dense layer is a 1x1 convolution on the one position that is left. Where both speak
and differ, in what plain weights are, the arm ``plain`` is [P]'s and ``plain_released`` [L]'s.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

import weightnorm as wn
from weightnorm.tasks.classification import Classification
from weightnorm.tasks.hub import HubData
from weightnorm.tasks.subset import subset
from weightnorm.tasks.task import Norm, Paper, PaperArm, Schedule
from weightnorm.tasks.whitening import Whitening

DATA = HubData(
    name="cifar10",
    repository="uoft-cs/cifar10",
    image="img",
    label="label",
    shape=(32, 32, 3),
    sizes={"train": 50_000, "test": 10_000},
    classes=10,
)
NOISE = 0.15  # standard deviation of the Gaussian noise on the whitened input [L]
SLOPE = 0.1  # of the leaky ReLU below zero [L]
BETAS = (0.9, 0.999), (0.5, 0.999)  # Adam's: in the first half of the epochs, and in the second [P]
EPSILON = 1e-8  # Adam's [L]
RATES = {  # the best of 0.0003, 0.001, 0.003, 0.01 in each arm [P, figure 1; the third: not said apart]
    "plain": 0.0003,
    "plain_released": 0.0003,  # probably the one that this rate was found for
    "weight_norm": 0.003,
    "weight_norm_mean_only": 0.003,
    "batch_norm": 0.003,
    "mean_only": 0.003,
}
WHITENING = 1e-5  # added to the eigenvalues [L]

# Ten normalised layers, 1,405,344 weights: channels, kernel, padding. [P], with channels and paddings of [L].
STAGE_1 = [(96, 3, 1), (96, 3, 1), (96, 3, 1)]  # on 32 x 32; then max-pool 2 x 2, dropout 0.5
STAGE_2 = [(192, 3, 1), (192, 3, 1), (192, 3, 1)]  # on 16 x 16; then max-pool 2 x 2, dropout 0.5
STAGE_3 = [(192, 3, 0), (192, 1, 0), (192, 1, 0)]  # on 8 x 8, 6 x 6 from the first on; then average
CLASSES = 10


_EPOCHS, _LEVELS = (15, 25, 50, 75, 100, 125, 150, 175, 199), (3.0, 1.0)


def _reported(test_error: float, train_error: tuple[float, ...], first: tuple[int, int]) -> PaperArm:
    return PaperArm(dict(zip(_EPOCHS, train_error, strict=True)), dict(zip(_LEVELS, first, strict=True)), test_error)


_PLAIN = _reported(8.43, (12.3, 8.2, 4.7, 3.6, 3.0, 2.0, 1.1, 0.52, 0.18), (101, 150))
PAPER = Paper(  # test errors: figure 2 [P]; the others read off figure 1
    epochs=200,
    curve=("train", "error"),
    at=_EPOCHS,
    levels=_LEVELS,
    final=("test", "error"),
    arms={
        "plain": _PLAIN,
        "plain_released": _PLAIN,
        "weight_norm": _reported(8.46, (12.4, 7.7, 3.3, 2.0, 1.5, 0.89, 0.41, 0.18, 0.09), (54, 120)),
        "weight_norm_mean_only": _reported(7.31, (12.4, 8.0, 3.5, 2.2, 1.7, 1.0, 0.53, 0.28, 0.14), (57, 121)),
        "batch_norm": _reported(8.05, (10.1, 6.4, 2.9, 1.9, 1.4, 0.81, 0.46, 0.26, 0.15), (49, 117)),
        "mean_only": _reported(8.52, (12.5, 8.9, 5.4, 4.2, 3.7, 2.3, 1.3, 0.63, 0.23), (110, 160)),
    },
    notes=(
        "The paper's batch norm took 16 % more time than its plain weights; every arm of it was run once.",
        "Where the images went through lossy compression, as in some copies of the data set, errors are higher.",
    ),
)


class GaussianNoise(nn.Module):
    """Add noise in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with noise on it."""
        return x + NOISE * torch.randn_like(x) if self.training else x


class Cifar10(Classification):
    """Classify photographs, whitened; [L]: in batches of 100, the first 500 for the data-dependent initialisation.

    Args:
        device: where.
        folder: the data set in the Hub's layout; None: ``$WEIGHTNORM_DATA/cifar10``, or it is downloaded.
        limit: train on so many images, and score on a fifth as many; None: on all. Whitening is fitted on all.
        holdout: score on a fifth of the training images, in place of the test images, and train on the others.

    Raises:
        UserError: if the data is missing or damaged, or the limit not a multiple of the batch size in range.
    """

    name: ClassVar[str] = "cifar10"
    v_std: float | None = 0.05  # v ~ N(0, 0.05²), in every arm [P]
    rates: ClassVar[Mapping[str, float]] = RATES
    paper: ClassVar[Paper | None] = PAPER

    def __init__(
        self,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        limit: int | None = None,
        holdout: bool = False,
    ):
        super().__init__(device)
        chosen = subset(DATA.sizes, limit, holdout, self.batch_size)
        data = DATA.load(folder)
        whiten = Whitening.fitted(data["train_images"], WHITENING, self.device)
        self.holdout = chosen.held_out
        self.train = self._part(data, whiten, "train", chosen.train)
        self.test = self._part(data, whiten, chosen.scored, chosen.where)

    def _part(self, data: dict[str, Tensor], whiten: Whitening, split: str, which: slice) -> tuple[Tensor, Tensor]:
        return whiten(data[f"{split}_images"][which]), data[f"{split}_labels"][which].to(self.device)

    def model(self, norm: Norm | None = None) -> nn.Module:
        """Return ConvPool-CNN-C as the paper changed it: noise for the first dropout, 192 units, 2 x 2 pools."""
        layers: list[nn.Module] = [GaussianNoise()]
        channels = 3
        for stage in (STAGE_1, STAGE_2, STAGE_3):
            for outputs, kernel, padding in stage:
                layers += [*_layer(channels, outputs, kernel, padding, norm), nn.LeakyReLU(SLOPE)]
                channels = outputs
            layers += [nn.AdaptiveAvgPool2d(1)] if stage is STAGE_3 else [nn.MaxPool2d(2), nn.Dropout(0.5)]
        model = nn.Sequential(*layers, *_layer(channels, CLASSES, 1, 0, norm), nn.Flatten()).to(self.device)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def schedule(self, epoch: int, epochs: int) -> Schedule:
        """Return a constant rate for the first half of the epochs, then a linear one to zero; and Adam's β [P]."""
        half = epochs / 2
        return Schedule(min(2 - epoch / half, 1), BETAS[epoch >= half])

    def optimizer(self, params: ParamsT, lr: float) -> torch.optim.Optimizer:
        """Return Adam [P]."""
        return torch.optim.Adam(params, lr=lr, betas=BETAS[0], eps=EPSILON, fused=True)

    def weight_norm_optimizer(self, model: nn.Module, lr: float, g_lr: float | str) -> torch.optim.Optimizer:
        """Return Adam on lengths and directions [P]."""
        return wn.Adam(model, lr=lr, betas=BETAS[0], eps=EPSILON, fused=True, v_std=self.v_std, g_lr=g_lr)


def _layer(inputs: int, outputs: int, kernel: int, padding: int, norm: Norm | None) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=norm is None)
    return [conv] if norm is None else [conv, norm(outputs)]
