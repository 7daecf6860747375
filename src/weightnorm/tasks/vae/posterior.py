"""An inverse autoregressive flow as the approximate posterior: a Gaussian, and steps that each reshape it."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightnorm.extras import require
from weightnorm.formula import wide_dtype

OPEN = 2.0  # added to the gate's logits, so that a step begins near the identity; +1 or +2 in the IAF paper


class AutoregressiveStep(nn.Module):
    """One step of the flow, ``z' = σ z + (1 − σ) m``, where ``σ_i = sigmoid(s_i)`` and ``m_i`` see ``z_<i`` and ``h``.

    Its network is a MADE of two masked layers. Masked elements of its weights are 0, and stay so: they get no gradient.

    Args:
        latents: size of z, two or more.
        context: size of the context h; 0: none.
        hidden: units between the layers.
        reverse: see ``z_>i`` in place of ``z_<i``.

    Source: Kingma et al. 2016 (IAF), algorithm 1 and the gate of section 4.
    """

    def __init__(self, latents: int, context: int, hidden: int, reverse: bool = False):
        super().__init__()
        require("vae", "zuko")
        from zuko.nn import MaskedMLP

        before = torch.ones(latents, latents, dtype=torch.bool).tril(-1)
        sees = torch.cat([before.T if reverse else before, torch.ones(latents, context, dtype=torch.bool)], dim=1)
        # Only zuko's network: its affine transform has no such gate, and bounds the scale.
        self.network = MaskedMLP(sees.repeat(2, 1), [hidden], activation=nn.ELU)
        mask_weights(self)

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take the step.

        Args:
            z: (N, latents).
            h: the context, (N, context).

        Returns:
            z', and the logarithm of the Jacobian's determinant, (N,).
        """
        m, s = self.network(torch.cat([z, h.to(z.dtype)], dim=1)).to(z.dtype).chunk(2, dim=1)
        return torch.lerp(m, z, torch.sigmoid(s + OPEN)), functional.logsigmoid(s + OPEN).sum(1)


class FlowPosterior(nn.Module):
    """``q(z|x)``: a diagonal Gaussian, then steps of an inverse autoregressive flow, each in the other order.

    Args:
        features: size of what the encoder says of x, from which mean and log standard deviation are computed, and
            which is the context of every step.
        latents: size of z.
        steps: how many; 0: the Gaussian alone.
        hidden: units in each step's network.

    Source: Kingma et al. 2016 (IAF), algorithm 1.
    """

    def __init__(self, features: int, latents: int, steps: int, hidden: int):
        super().__init__()
        self.gaussian = nn.Linear(features, 2 * latents)
        self.steps = nn.ModuleList(AutoregressiveStep(latents, features, hidden, i % 2 == 1) for i in range(steps))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a z for each example.

        Args:
            features: (N, features).

        Returns:
            z, (N, latents), and ``log q(z|x) − log p(z)`` in nats, (N,), with p = N(0, I); both in float32 at least.
        """
        parameters = self.gaussian(features)
        mean, log_std = parameters.to(wide_dtype(parameters.dtype)).chunk(2, dim=1)
        noise = torch.randn_like(mean)
        z = mean + log_std.exp() * noise
        log_q = -(noise.square() / 2 + log_std).sum(1)  # the factors 1/√2π of q and p cancel
        for step in self.steps:
            z, log_det = step(z, features)
            log_q = log_q - log_det
        return z, log_q + z.square().sum(1) / 2


@torch.no_grad()
def mask_weights(model: nn.Module) -> None:
    """Zero the masked elements of weights again, after weights were drawn, so that lengths count only what is used.

    Args:
        model: any, plain or in module form.
    """
    for layer in model.modules():
        if isinstance(mask := getattr(layer, "mask", None), Tensor):
            layer.weight.mul_(mask)  # type: ignore[operator]
