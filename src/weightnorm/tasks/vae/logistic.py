"""The discretised logistic distribution: what a pixel, an integer from 0 to 255, is under a continuous logistic."""

import math
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

Number = TypeVar("Number", float, Tensor)

VALUES = 256  # of a pixel
PIXELS = 3 * 32 * 32  # of an image, colours counted


def log_probability(x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """Return the logarithm of a bin's probability, ``log(σ(b) − σ(a))``, where σ is the logistic function.

    The bin of x goes from ``x/256 − 1/2`` to ``(x + 1)/256 − 1/2``, and a and b are these less the location, over the
    scale. The bins of 0 and 255 also take the whole of their tail, so that 256 probabilities sum to 1.

    Args:
        x: integers from 0 to 255, of any dtype.
        location: the logistic's mean, where the values span [−1/2, 1/2]; of a shape that broadcasts with x.
        log_scale: the logarithm of its scale, likewise.

    Returns:
        In nats, float32, of the shape that they broadcast to.

    Source: Kingma et al. 2016 (IAF), appendix C.
    """
    x, location, log_scale = x.float(), location.float(), log_scale.float()
    a = (x / VALUES - 0.5 - location) * torch.exp(-log_scale)
    b = ((x + 1) / VALUES - 0.5 - location) * torch.exp(-log_scale)
    below, above = functional.logsigmoid(b), functional.logsigmoid(-a)
    # σ(b) − σ(a) = σ(b) σ(−a) (1 − exp(a − b)), of which no factor is a difference of near equals.
    inside = below + above + torch.log(-torch.expm1(-torch.exp(-log_scale) / VALUES))
    return torch.where(x == 0, below, torch.where(x == VALUES - 1, above, inside))


def bits_per_dimension(nats: Number, count: int = PIXELS) -> Number:
    """Convert a negative log-likelihood of ``count`` values, by default those of a CIFAR-10 image, to bits for each."""
    return nats / (count * math.log(2))
