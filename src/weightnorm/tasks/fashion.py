"""Fashion-MNIST, 10,000 images of it that come with the package: a small net of the paper's style, ten classes.

The images are the first 800 of each class of the original training set and the first 200 of each class of the original
test set (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747), made by ``tools/make_fashion_subset.py``.
"""

import hashlib
import io
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from weightnorm.errors import UserError
from weightnorm.tasks.classification import Classification
from weightnorm.tasks.task import Norm

DATA = Path(__file__).parent / "data" / "fashion.npz"
SHA256 = "bb2614f61c9f81b17cb02d28a6fce1bd4b32808808ed1c33d1b1b1c6a2ef8fd0"


class Fashion(Classification):
    """Classify pictures of clothes.

    Args:
        device: where.
        path: the data file. Default: the one in the package.

    Raises:
        UserError: if the file is missing or damaged.
    """

    name: ClassVar[str] = "fashion"

    def __init__(self, device: torch.device | str = "cpu", path: Path = DATA):
        super().__init__(device)
        arrays = {name: torch.from_numpy(array).to(device) for name, array in read_data(path).items()}
        pixels = arrays["train_images"].float()
        mean, std = pixels.mean(), pixels.std()
        self.train, self.test = (
            (((arrays[f"{split}_images"] - mean) / std).unsqueeze(1), arrays[f"{split}_labels"].long())
            for split in ("train", "test")
        )

    def model(self, norm: Norm | None = None) -> nn.Module:
        """Return the net: 3x3 convolutions, leaky ReLU 0.1, max-pools, a 1x1, the average over positions, dense."""
        layers = [
            *_conv(1, 16, 3, norm),
            nn.MaxPool2d(2),
            *_conv(16, 32, 3, norm),
            nn.MaxPool2d(2),
            *_conv(32, 32, 3, norm),
            *_conv(32, 32, 3, norm, padding=0),
            *_conv(32, 32, 1, norm),
            nn.AdaptiveAvgPool2d(1),
            *_normed(nn.Conv2d(32, 10, 1, bias=norm is None), norm),  # the dense layer, as what every norm layer takes
            nn.Flatten(),
        ]
        model = nn.Sequential(*layers).to(self.device)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on CPU


def read_data(path: Path = DATA) -> dict[str, np.ndarray]:
    """Read the images and labels of the subset, as unsigned bytes.

    Args:
        path: the data file.

    Returns:
        ``train_images`` (8000, 28, 28), ``train_labels`` (8000,), ``test_images`` (2000, 28, 28) and ``test_labels``
        (2000,).

    Raises:
        UserError: if the file is missing or its hash is not the one it was made with.
    """
    remedy = "install again: pip install --force-reinstall --no-deps weightnorm"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"the Fashion-MNIST file {path} cannot be read ({error.strerror}); {remedy}") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"the Fashion-MNIST file {path} is damaged ({len(content):,} bytes, wrong hash); {remedy}")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def _conv(inputs: int, outputs: int, size: int, norm: Norm | None, padding: int | str = "same") -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, padding=padding, bias=norm is None)
    return [*_normed(conv, norm), nn.LeakyReLU(0.1)]


def _normed(layer: nn.Conv2d, norm: Norm | None) -> list[nn.Module]:
    return [layer] if norm is None else [layer, norm(layer.out_channels)]
