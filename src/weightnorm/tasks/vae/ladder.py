"""The deep variational autoencoder of CIFAR-10: residual layers, each with its map of latents, inferred both ways.

The paper says no more than "ResNet units and multiple intermediate stochastic layers" [P]. Structure and sizes are from
the IAF paper's appendix C [IP] and its code, openai/iaf [I]. Ours differs in four things. Posteriors are diagonal
Gaussians given the layers above, without autoregressive steps, so that divergences are exact. Zero padding is not
marked by a channel of its own. What enters at the top is a learned map, not one vector, and begins random, not at 0,
since data-dependent initialisation needs what varies. The likelihood's scale begins at the spread of the pixels, not
at 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightnorm.tasks.vae.logistic import VALUES, log_probability

COLOURS, SIZE = 3, 32  # of an image
RESIDUAL = 0.1  # multiplies residual branches [I]
STD = {"*_in": 0.1, "output": 0.1}  # for wn.data_init; with 1, what exponentiates log standard deviations diverges
LOG_SCALE = -2.0  # at first: a logistic with this scale has a standard deviation of 0.25, about that of the pixels


class Gaussian(NamedTuple):
    """Maps of independent Gaussians; both (N, C, H, W), float32."""

    mean: Tensor
    log_std: Tensor

    def sample(self) -> Tensor:
        """Draw a value of each."""
        return self.mean + self.log_std.exp() * torch.randn_like(self.mean)

    def combined(self, other: "Gaussian") -> "Gaussian":
        """Return the Gaussians whose means and log standard deviations are the sums of both."""
        return Gaussian(self.mean + other.mean, self.log_std + other.log_std)

    def divergence(self, prior: "Gaussian") -> Tensor:
        """Return KL(self ‖ prior) of each, in nats."""
        log_ratio = self.log_std - prior.log_std
        distance = (self.mean - prior.mean) * torch.exp(-prior.log_std)
        return (torch.expm1(2 * log_ratio) + distance.square()) / 2 - log_ratio


class Layer(nn.Module):
    """A pre-activation residual layer, in both directions, with a map of latents.

    Args:
        width: feature maps.
        latents: channels of the map of latents.
        halves: halve height and width on the way up, and double them on the way down.
        topmost: there is no layer above that takes features on the way up.

    Source: Kingma et al. 2016 (IAF), appendix C.
    """

    def __init__(self, width: int, latents: int, halves: bool, topmost: bool):
        super().__init__()
        self.latents, self.halves = latents, halves
        self.up_in = nn.Conv2d(width, 2 * latents + width * (not topmost), 3, stride=1 + halves, padding=1)
        self.up_out = None if topmost else nn.Conv2d(width, width, 3, padding=1)
        self.down_in = nn.Conv2d(width, 4 * latents + width, 3, padding=1)
        self.down_out: nn.Module
        if halves:
            self.down_out = nn.ConvTranspose2d(latents + width, width, 3, stride=2, padding=1, output_padding=1)
        else:
            self.down_out = nn.Conv2d(latents + width, width, 3, padding=1)

    def up(self, h: Tensor) -> tuple[Tensor, Gaussian]:
        """Go up: return the features for the layer above, and what those from below say of the latents."""
        statistics, hidden = self.up_in(functional.elu(h)).tensor_split([2 * self.latents], dim=1)
        if self.up_out is not None:
            h = functional.avg_pool2d(h, 2) if self.halves else h
            h = h + RESIDUAL * self.up_out(functional.elu(hidden))
        return h, Gaussian(*statistics.float().chunk(2, dim=1))

    def down(self, h: Tensor, evidence: Gaussian | None) -> tuple[Tensor, Tensor]:
        """Go down, with latents from their posterior, or from their prior if there is no evidence.

        Args:
            h: features from the layer above, (N, width, H, W).
            evidence: what the way up said of the latents.

        Returns:
            Features for the layer below, and the latents' divergence by channel, (N, latents), in nats.
        """
        statistics, hidden = self.down_in(functional.elu(h)).tensor_split([4 * self.latents], dim=1)
        prior_mean, prior_log_std, mean, log_std = statistics.float().chunk(4, dim=1)
        prior = Gaussian(prior_mean, prior_log_std)
        posterior = prior if evidence is None else evidence.combined(Gaussian(mean, log_std))
        z = posterior.sample().to(hidden.dtype)
        branch = self.down_out(functional.elu(torch.cat([z, hidden], dim=1)))
        if self.halves:
            h = functional.interpolate(h, scale_factor=2)
        return h + RESIDUAL * branch, posterior.divergence(prior).sum((2, 3))


class LadderVAE(nn.Module):
    """A variational autoencoder of 32 x 32 colour images with several layers of latents.

    To train it, take the mean of ``reconstruction + divergence`` over the batch, and add the penalty, of ``objective``.

    Args:
        width: feature maps everywhere. Default 160 [I].
        latents: channels of each layer's map of latents. Default 32 [I].
        depths: layers of each level, the first nearest to the image; each level has half the height and width of the
            one before, and the first has 16 x 16. Default: two levels of two layers [I].
        free_bits: nats that the divergence of each layer's every channel, summed over positions and averaged over the
            batch, may have for free in training. Default 0.25 [I]; 0: the penalty is 0.

    Source: Salimans & Kingma 2016, section 5.2; Kingma et al. 2016 (IAF), appendix C.
    """

    def __init__(self, width: int = 160, latents: int = 32, depths: Sequence[int] = (2, 2), free_bits: float = 0.25):
        super().__init__()
        self.free_bits = free_bits
        self.input = nn.Conv2d(COLOURS, width, 5, stride=2, padding=2)
        halves = [level > 0 and i == 0 for level, depth in enumerate(depths) for i in range(depth)]
        topmost = len(halves) - 1
        self.layers = nn.ModuleList(Layer(width, latents, each, i == topmost) for i, each in enumerate(halves))
        side = SIZE >> len(depths)
        self.top = nn.Parameter(torch.randn(width, side, side))
        self.output = nn.ConvTranspose2d(width, COLOURS, 5, stride=2, padding=2, output_padding=1)
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return both parts of the negative bound on ``log p(x)``, in nats, from one sample of the latents each.

        Args:
            x: float (N, 3, 32, 32), integers from 0 to 255.

        Returns:
            ``−log p(x|z)``, and the divergence of the posterior from the prior; both (N,), float32.
        """
        reconstruction, divergence, _ = self.objective(x)
        return reconstruction, divergence

    def objective(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what ``forward`` does, and what free bits add to the mean of the two over the batch, a scalar.

        Where a divergence is below its free bits, the penalty is what it lacks, and their sum has no gradient.
        """
        locations, divergences = self._infer(x)
        reconstruction = -log_probability(x, locations, self.log_scale).sum((1, 2, 3))
        penalty = functional.relu(self.free_bits - divergences.mean(0)).sum()
        return reconstruction, divergences.sum(1), penalty

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Return the means of so many images whose latents are drawn from the prior, (count, 3, 32, 32), in [0, 1]."""
        locations, _ = self._generate([None] * len(self.layers), count)
        return _means(locations)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the means of images whose latents are drawn from the posterior of ``x``; its shape, in [0, 1]."""
        locations, _ = self._infer(x)
        return _means(locations)

    def _infer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.input((x + 0.5) / VALUES - 0.5)
        evidence: list[Gaussian | None] = []
        for layer in self.layers:
            h, said = layer.up(h)  # type: ignore[operator]
            evidence.append(said)
        return self._generate(evidence, len(x))

    def _generate(self, evidence: list[Gaussian | None], count: int) -> tuple[Tensor, Tensor]:
        """Return the locations of the pixels' logistics, and the divergences by channel of all layers, side by side."""
        h = self.top.expand(count, -1, -1, -1)
        divergences = []
        for layer, said in zip(reversed(self.layers), reversed(evidence), strict=True):
            h, divergence = layer.down(h, said)  # type: ignore[operator]
            divergences.append(divergence)
        return self.output(functional.elu(h)).float(), torch.cat(divergences, dim=1)


def _means(locations: Tensor) -> Tensor:
    return (locations + 0.5).clamp(0, 1)
