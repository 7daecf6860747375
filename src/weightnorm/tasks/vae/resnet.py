"""The residual encoder and decoder, and the variational autoencoder that they make with the posterior.

[P] is the paper, [IP] the IAF paper (Kingma et al. 2016), appendix B, which describes a later model. Where they differ,
[P] is followed: two of the three sequences are followed by subsampling ([IP]: all three). Subsampling is the stride of
a sequence's last block. [P] states neither number nor width of the flow's steps: the defaults are [IP]'s smallest.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightnorm.tasks.vae.posterior import FlowPosterior

BLOCKS = [(1, 16, 1), (16, 16, 2), (16, 32, 1), (32, 32, 2), (32, 32, 1), (32, 32, 1)]  # channels in, out; stride [P]
UNITS = 450  # of the fully connected layer [P]
LATENTS = 32  # [IP]


class Block(nn.Module):
    """A residual block: ``x + conv2(elu(conv1(elu(x))))``, all 3 x 3; a convolution of x where the shape changes.

    Args:
        inputs: channels.
        outputs: channels.
        stride: divides height and width; a transposed block multiplies them.
        transposed: mirror it: transposed convolutions, and width and shape change in the second one, not the first.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, transposed: bool = False):
        super().__init__()
        if transposed:
            self.conv1, self.conv2 = _up(inputs, inputs, 1), _up(inputs, outputs, stride)
        else:
            self.conv1, self.conv2 = _down(inputs, outputs, stride), _down(outputs, outputs, 1)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else (_up if transposed else _down)(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        branch = self.conv2(functional.elu(self.conv1(functional.elu(x))))
        return self.skip(x) + branch


def _down(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def _up(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 3, stride, padding=1, output_padding=stride - 1)


def encoder() -> nn.Sequential:
    """Return the network from images (N, 1, 28, 28) to 450 features."""
    blocks = [Block(*block) for block in BLOCKS]
    return nn.Sequential(*blocks, nn.ELU(), nn.Flatten(), nn.Linear(32 * 7 * 7, UNITS), nn.ELU())


def decoder(latents: int = LATENTS) -> nn.Sequential:
    """Return the encoder's mirror image, from latents to logits (N, 1, 28, 28)."""
    blocks = [Block(outputs, inputs, stride, transposed=True) for inputs, outputs, stride in reversed(BLOCKS)]
    dense = [nn.Linear(latents, UNITS), nn.ELU(), nn.Linear(UNITS, 32 * 7 * 7), nn.Unflatten(1, (32, 7, 7))]
    return nn.Sequential(*dense, *blocks)


class ConvolutionalVAE(nn.Module):
    """A variational autoencoder of 28 x 28 images: N(0, I) prior, Bernoulli likelihood, flow posterior.

    Args:
        latents: size of z. Default 32 [IP].
        steps: of the inverse autoregressive flow; 0: a Gaussian posterior. Default 2 [IP].
        hidden: units in each step's network. Default 320 [IP].

    Source: Salimans & Kingma 2016, section 5.2; Kingma et al. 2016 (IAF), appendix B.
    """

    def __init__(self, latents: int = LATENTS, steps: int = 2, hidden: int = 320):
        super().__init__()
        self.latents = latents
        self.encoder = encoder()
        self.posterior = FlowPosterior(UNITS, latents, steps, hidden)
        self.decoder = decoder(latents)

    def forward(self, x: Tensor, samples: int = 1) -> tuple[Tensor, Tensor]:
        """Return both parts of the negative bound, in nats, from samples of z for each example.

        Args:
            x: (N, 1, 28, 28), in [0, 1].
            samples: how many. Default 1.

        Returns:
            ``−log p(x|z)``, and ``log q(z|x) − log p(z)``; both (N samples,), an example's side by side, float32.
        """
        z, divergence = self.posterior(self.encoder(x).repeat_interleave(samples, dim=0))
        logits, x = self.decoder(z).float(), x.repeat_interleave(samples, dim=0)
        losses = functional.binary_cross_entropy_with_logits(logits, x.float(), reduction="none")
        return losses.flatten(1).sum(1), divergence

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Return the means of so many images whose z is drawn from the prior, (count, 1, 28, 28), in [0, 1]."""
        z = torch.randn(count, self.latents, device=next(self.parameters()).device)
        return self.decoder(z).float().sigmoid()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the means of images whose z is drawn from the posterior of ``x``; the shape of ``x``, in [0, 1]."""
        z, _ = self.posterior(self.encoder(x))
        return self.decoder(z).float().sigmoid()
