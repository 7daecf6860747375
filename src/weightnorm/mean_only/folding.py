"""Away with mean-only batch normalization: the running mean goes into the layer in front."""

import torch
from torch import Tensor, nn

from weightnorm.formula import wide_dtype
from weightnorm.mean_only.feeding import Pair, find_pairs, warn_of
from weightnorm.mean_only.layer import MeanOnlyBatchNorm
from weightnorm.mean_only.tracing import exchange


def fold_mean(model: nn.Module) -> int:
    """Take ``t~ = t − μ + b`` (eq. 7) into the bias of the layer that puts out ``t``, with the running mean for ``μ``.

    For inference: eval-mode outputs stay, to rounding, and so they are in training mode from then on, where batch means
    are subtracted no more. A layer without a bias gets one, trainable if the norm's was. In the norm's place is
    ``nn.Identity()``, so that the other modules keep their names. Build optimizers afterwards.

    A norm is folded if its layer can be told without data: ``docs/mean_only.md`` says when.

    Args:
        model: a model, plain or in module form; changed in place.

    Returns:
        How many norms were folded.

    Raises:
        ValueError: if a parameter is not initialised yet (lazy layers), or DistributedDataParallel or the like holds on
            to the parameters; nothing has changed then.

    Warns:
        UserWarning: naming the norms that stay, and why.

    Source: Salimans & Kingma 2016, section 4.

    Example:
        >>> import weightnorm as wn
        >>> model = nn.Sequential(nn.Linear(3, 2, bias=False), wn.MeanOnlyBatchNorm(2), nn.ReLU())
        >>> wn.fold_mean(model), model
        (1, Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): Identity()
          (2): ReLU()
        ))
    """
    found, left = find_pairs(model, MeanOnlyBatchNorm)
    pairs = [pair for pair in found if pair.norm.running_mean is not None]
    left |= {pair.name: "keeps no running mean" for pair in found if pair.norm.running_mean is None}
    warn_of(left, len(left) + len(pairs), "fold_mean")  # before any change: it may be an error to somebody
    # An inference tensor could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        biases = [_bias(pair) for pair in pairs]
        for pair, bias in zip(pairs, biases, strict=True):
            pair.layer.bias = bias
        exchange(model, {pair.norm: nn.Identity().train(pair.norm.training) for pair in pairs})
    return len(pairs)


def _bias(pair: Pair) -> nn.Parameter:
    """Return the layer's bias with the norm in it, a new parameter: ``b + b_norm − μ``."""
    norm, weight = pair.norm, pair.layer.weight
    own = [bias for bias in (pair.layer.bias, norm.bias) if bias is not None]
    wide = wide_dtype(weight.dtype)
    total: Tensor = sum((bias.to(weight.device, wide) for bias in own), -norm.running_mean.to(weight.device, wide))
    return nn.Parameter(total.to(weight.dtype), any(tensor.requires_grad for tensor in own or [weight]))
