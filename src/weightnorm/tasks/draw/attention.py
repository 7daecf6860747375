"""Selective attention: a grid of Gaussian filters reads a patch of an image, or writes one (DRAW, section 3.2).

[D] is jbornschein/draw, the implementation that the weight-norm paper used.
"""

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # added to a filter's sum, so that one far outside of the image is zero and not undefined [D]
OUTPUTS = 5  # of a layer that aims a grid: centre y and x, log δ, log σ², log γ


class Filterbank(nn.Module):
    """Gaussian filters on an ``n`` by ``n`` grid, separable: one bank for the rows of an image, one for its columns.

    Args:
        image: height and width of the image in pixels.
        n: filters along either axis; at least 2.

    Source: DRAW, equations 19-26; but the centre is [D]'s, ``(g + 1) / 2`` times the image's size from the first pixel.
    The paper's, with pixels counted from 1, is ``(1 - g) / 2`` pixels before that.
    """

    pixels: Tensor
    steps: Tensor

    def __init__(self, image: int, n: int):
        super().__init__()
        self.image = image
        # In half images from the middle, as the centre is given: it then needs no conversion in every glimpse.
        pixels = torch.arange(image) * (2 / image) - 1
        steps = (torch.arange(n) - (n - 1) / 2) * (2 * (image - 1) / (image * (n - 1)))
        self.register_buffer("pixels", pixels, persistent=False)
        self.register_buffer("steps", steps, persistent=False)

    def forward(self, aim: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the filters.

        Args:
            aim: (N, 5): the grid's centre y and x, -1 at the first pixel and 1 just after the last; log of its stride
                δ, 0 where it spans the image; log of the filters' variance σ² in pixels² ([D]'s "log sigma"); log of
                the intensity γ.

        Returns:
            float32: bank of rows (N, n, image), bank of columns (N, n, image), γ (N, 1, 1).
        """
        aim = aim.float()
        stride, variance, gamma = aim[:, 2:, None, None].exp().unbind(1)
        means = torch.addcmul(aim[:, :2, None], stride, self.steps)
        distances = self.pixels - means[..., None]  # (N, 2, n, image); in pixels: times image / 2
        weights = torch.exp(distances.square() / (variance[..., None] * (-8 / self.image**2)))
        rows, columns = (weights / (weights.sum(-1, keepdim=True) + TOLERANCE)).unbind(1)
        return rows, columns, gamma


class AttentionReader(nn.Module):
    """Read a patch of ``n`` by ``n`` where a state says (DRAW, equation 27).

    Args:
        units: size of the state.
        image: height and width of the images in pixels.
        n: height and width of the patch; at least 2.
    """

    def __init__(self, units: int, image: int, n: int):
        super().__init__()
        self.aim = nn.Linear(units, OUTPUTS)
        self.filterbank = Filterbank(image, n)

    def forward(self, images: Tensor, state: Tensor) -> Tensor:
        """Return the same patch of every channel: (N, n, C, n).

        Args:
            images: (N, H, C, W): with rows first, one product reads all channels.
            state: (N, units).
        """
        rows, columns, gamma = self.filterbank(self.aim(state))
        seen = (rows @ images.flatten(2)).unflatten(2, images.shape[2:])
        patch = seen.flatten(1, 2) @ columns.mT
        return (gamma * patch).unflatten(1, seen.shape[1:3])


class AttentionWriter(nn.Module):
    """Write a patch of ``n`` by ``n``, both of a state's choosing (DRAW, equations 28 and 29).

    Args:
        units: size of the state.
        image: height and width of the images in pixels.
        n: height and width of the patch; at least 2.
    """

    def __init__(self, units: int, image: int, n: int):
        super().__init__()
        self.n = n
        self.aim_and_patch = nn.Linear(units, OUTPUTS + n * n)
        self.filterbank = Filterbank(image, n)

    def forward(self, state: Tensor) -> Tensor:
        """Return what a state (N, units) adds to the canvas: (N, H, W)."""
        aim, patch = self.aim_and_patch(state).split((OUTPUTS, self.n**2), 1)
        rows, columns, gamma = self.filterbank(aim)
        return rows.mT @ (patch.unflatten(1, (self.n, self.n)) / gamma) @ columns
