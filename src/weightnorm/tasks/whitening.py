"""ZCA whitening: what is left of images once their pixels' covariance is the identity."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightnorm.tasks.hub import cached

_PART = 10_000  # images at a time


@dataclass(frozen=True)
class Whitening:
    """The map ``x -> (x − μ) U diag(1/√(S + ε)) Uᵀ``, with ``μ`` and ``U diag(S) Uᵀ`` the images' mean and covariance.

    Pixels are first scaled to [−1, 1), as ``(pixel − 127.5)/128``.

    Attributes:
        mean: float32, (C H W,).
        matrix: float32, (C H W, C H W).
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fitted(cls, images: Tensor, epsilon: float, device: torch.device) -> "Whitening":
        """Return the whitening of images; it takes a minute on a CPU, and is cached.

        Args:
            images: uint8 (N, C, H, W).
            epsilon: added to the eigenvalues.
            device: where it is computed, in float64 (``epsilon`` may be less than float32's rounding of the largest
                eigenvalue), and where it stays.
        """
        key = hashlib.sha256(images.numpy().data).hexdigest()[:16]
        arrays = cached(f"zca-{key}-{epsilon:g}", lambda: _fit(images, epsilon, device))
        return cls(*(torch.from_numpy(arrays[name]).to(device) for name in ("mean", "matrix")))

    def __call__(self, images: Tensor) -> Tensor:
        """Return whitened images, float32 (N, C, H, W), channels last in memory, where the whitening is."""
        parts = (_scaled(part.to(self.mean.device)) - self.mean for part in images.flatten(1).split(_PART))
        rows = torch.cat([part @ self.matrix for part in parts])
        return rows.view(images.shape).contiguous(memory_format=torch.channels_last)


def _fit(images: Tensor, epsilon: float, device: torch.device) -> dict[str, np.ndarray]:
    parts = [part.to(device) for part in images.flatten(1).split(_PART)]
    mean = torch.stack([_scaled(part).double().sum(0) for part in parts]).sum(0) / len(images)
    covariance = torch.zeros(len(mean), len(mean), dtype=mean.dtype, device=device)
    for part in parts:
        centred = _scaled(part).double() - mean
        covariance += centred.T @ centred / len(images)
    values, vectors = torch.linalg.eigh(covariance)
    matrix = vectors * (values.clamp(min=0) + epsilon).rsqrt() @ vectors.T
    return {"mean": mean.float().cpu().numpy(), "matrix": matrix.float().cpu().numpy()}


def _scaled(pixels: Tensor) -> Tensor:
    return (pixels.float() - 127.5) / 128
