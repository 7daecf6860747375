"""DRAW (Gregor et al. 2015): an encoder looks at an image, a decoder paints it, glimpse by glimpse.

As in [D], jbornschein/draw, to which the weight-norm paper added weight norm and nothing else; but for the peephole
vectors, from cell to gates, of Blocks' LSTM, which torch's has not.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from weightnorm.tasks.draw.attention import AttentionReader, AttentionWriter

IMAGE = 28  # height and width in pixels
UNITS = 256  # of the encoder and of the decoder [D]
LATENTS = 100  # of each glimpse [D]
READ, WRITE = 2, 5  # height and width of the patches that attention reads and writes [D]
WEIGHTS_STD = 0.01  # of initial weights [D]

State = tuple[Tensor, Tensor]  # an LSTM's output and cell, (N, UNITS) each


class Draw(nn.Module):
    """DRAW for 28 x 28 images of one channel; both LSTMs and the canvas start at zero.

    Args:
        glimpses: steps of the recurrence; each has latent variables of its own.
        attention: read patches of 2 x 2 and write patches of 5 x 5; False: read and write whole images.

    Source: Gregor et al. 2015, sections 2 and 3; sizes and defaults: [D].
    """

    def __init__(self, glimpses: int = 64, attention: bool = True):
        super().__init__()
        self.glimpses = glimpses
        read = READ if attention else IMAGE
        self.reader = AttentionReader(UNITS, IMAGE, READ) if attention else None
        self.encoder = _lstm(2 * read**2 + UNITS)
        self.posterior = nn.Linear(UNITS, 2 * LATENTS)
        self.decoder = _lstm(LATENTS)
        self.writer = AttentionWriter(UNITS, IMAGE, WRITE) if attention else nn.Linear(UNITS, IMAGE**2)

    def draw_weights(self) -> None:
        """Draw the initial weights of [D]: N(0, 0.01²), biases 0; before any parametrization."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=WEIGHTS_STD)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the bound on −log p(x) is the sum of, in nats, with one sample of the latents.

        Args:
            x: (N, 1, 28, 28), in [0, 1].

        Returns:
            float32 (N,): −log p(x|z), Bernoulli; float32 (N,): the sum over glimpses of KL(q(z_t|x, z_<t) ‖ N(0, I)),
            exact given earlier glimpses (equations 9-12).
        """
        logits, means, log_stds = self._infer(x)
        reconstruction = binary_cross_entropy_with_logits(logits, x.float(), reduction="none").sum((1, 2, 3))
        divergence = (means.square() + (2 * log_stds).exp() - 2 * log_stds - 1).sum((0, 2)) / 2
        return reconstruction, divergence

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return means of p(x|z) with one sample of q(z|x): (N, 1, 28, 28), in [0, 1]."""
        return self._infer(x)[0].sigmoid()

    def sample(self, count: int) -> Tensor:
        """Return means of p(x|z) with z from the prior: (count, 1, 28, 28), in [0, 1]."""
        return self.unfold(count)[-1]

    @torch.no_grad()
    def unfold(self, count: int) -> Tensor:
        """Return samples after each glimpse, the last their final state: (glimpses, count, 1, 28, 28), in [0, 1]."""
        canvas, decoder, noise = self._start(count, self.posterior.bias.device)
        canvases = []
        for z in noise:
            canvas, decoder = self._paint(z, canvas, decoder)
            canvases.append(canvas)
        return torch.stack(canvases).sigmoid().unsqueeze(2)

    def _infer(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the final canvas (N, 1, 28, 28), and the posteriors' means and log stds (glimpses, N, LATENTS)."""
        image = x.squeeze(1)
        canvas, decoder, noise = self._start(len(x), x.device)
        encoder, posteriors = decoder, []
        for step in noise:
            seen = torch.stack([image, image - canvas.sigmoid()], 2)
            read = self.reader(seen, decoder[0]) if self.reader else seen
            encoder = self.encoder(torch.cat([read.flatten(1), decoder[0]], 1), encoder)
            posteriors.append(self.posterior(encoder[0]).float())
            mean, log_std = posteriors[-1].chunk(2, 1)
            canvas, decoder = self._paint(torch.addcmul(mean, log_std.exp(), step), canvas, decoder)
        means, log_stds = torch.stack(posteriors).chunk(2, 2)
        return canvas.unsqueeze(1), means, log_stds

    def _paint(self, z: Tensor, canvas: Tensor, decoder: State) -> tuple[Tensor, State]:
        decoder = self.decoder(z, decoder)
        return canvas + self.writer(decoder[0]).view_as(canvas), decoder

    def _start(self, count: int, device: torch.device) -> tuple[Tensor, State, Tensor]:
        """Return an empty canvas, the state both LSTMs start from, and the noise of all glimpses, in one call."""
        zeros = torch.zeros(count, UNITS, device=device)
        noise = torch.randn(self.glimpses, count, LATENTS, device=device)
        return torch.zeros(count, IMAGE, IMAGE, device=device), (zeros, zeros), noise


def _lstm(inputs: int) -> nn.LSTMCell:
    cell = nn.LSTMCell(inputs, UNITS)
    # [D] has one bias; of two that are added, Adam would move the sum twice as fast.
    nn.init.zeros_(cell.bias_hh).requires_grad_(False)
    return cell
