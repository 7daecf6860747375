"""From batch normalization to weights with its gain in their lengths, and mean-only batch normalization after them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightnorm.formula import wide_dtype
from weightnorm.mean_only.feeding import Pair, find_pairs, warn_of
from weightnorm.mean_only.layer import MeanOnlyBatchNorm
from weightnorm.mean_only.tracing import BatchNorm, exchange
from weightnorm.scaling import scale_units


@dataclass(frozen=True)
class ReplacementReport:
    """What ``replace_batch_norm`` did; print it for a list.

    Attributes:
        replaced: the names of the norms that were replaced, and of the layers that took their gains.
        left: the names of those that stay, and why.
    """

    replaced: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{name}: mean-only, after {layer}" for name, layer in self.replaced.items()]
        lines += [f"{name}: stays; it {reason}" for name, reason in self.left.items()]
        return "\n".join([*lines, f"{len(self.replaced)} of {len(lines)} batch norms replaced"])


def replace_batch_norm(model: nn.Module, *, keep_gain: bool = True) -> ReplacementReport:
    """Replace batch normalizations by ``MeanOnlyBatchNorm``, their scales going into the lengths of the weights.

    In eval mode, behind a layer that puts out ``t = w·x + a``, batch norm is ``γ (t − μ)/sqrt(σ² + ε) + b``, with ``μ``
    and ``σ²`` the running statistics. With ``c = γ/sqrt(σ² + ε)``,

        w <- c w  (so g <- c g)      a <- c a      μ <- c μ

    it is ``t − μ + b`` (eq. 7): eval-mode outputs stay, to rounding. In training mode they do not: batch norm divided
    by the batch's deviation, and now only ``g`` sets the scale. ``b`` stays the parameter that it was; the gains are
    parameters no more. Where a gain is 0 the unit's weights become 0. What comes of SyncBatchNorm is synchronised.

    A norm is replaced if its layer can be told without data: ``docs/mean_only.md`` says when.

    Args:
        model: a model, plain or in module form, with BatchNorm1d-3d or SyncBatchNorm; changed in place. Build
            optimizers afterwards.
        keep_gain: False for fresh models: weights stay as they are, gain and running variance are dropped; then
            initialise with ``data_init``.

    Returns:
        What was replaced, and what was not and why; print it for a list.

    Raises:
        ValueError: if a parameter is not initialised yet (lazy layers), or DistributedDataParallel or the like holds on
            to the parameters. On any error nothing has changed.

    Warns:
        UserWarning: naming the norms that stay, and why.

    Source: Salimans & Kingma 2016, section 4.

    Example:
        >>> import weightnorm as wn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(wn.replace_batch_norm(model))
        1: mean-only, after 0
        1 of 1 batch norms replaced
        >>> optimizer = wn.AdamW(model)
    """
    found, left = find_pairs(model, BatchNorm)
    pairs = [pair for pair in found if pair.norm.running_var is not None or not keep_gain]
    left |= {pair.name: "keeps no running variance" for pair in found if pair not in pairs}
    warn_of(left, len(left) + len(pairs), "replace_batch_norm")  # before any change: it may be an error to somebody
    # An inference tensor could never be trained.
    with torch.inference_mode(False), torch.no_grad(), _all_or_nothing(pair.layer for pair in pairs):
        new = {}
        for pair in pairs:
            factor = _scale(pair) if keep_gain else None
            new[pair.norm] = _mean_only(pair.norm, factor)
        exchange(model, new)
    return ReplacementReport({pair.name: pair.layer_name for pair in pairs}, left)


def _scale(pair: Pair) -> Tensor:
    """Multiply the weight and the bias of a pair's layer by ``c = γ/sqrt(σ² + ε)``; return it."""
    norm, layer = pair.norm, pair.layer
    wide = wide_dtype(norm.running_var.dtype)
    deviation = (norm.running_var.to(wide) + norm.eps).sqrt()
    factor: Tensor = (1 if norm.weight is None else norm.weight.to(wide)) / deviation
    by = factor.to(layer.weight.device)
    scale_units(layer, by)
    if layer.bias is not None:
        layer.bias.mul_(by)
    return factor


def _mean_only(norm: BatchNorm, factor: Tensor | None) -> MeanOnlyBatchNorm:
    """Return what takes a norm's place, with its statistics, scaled, and its bias, the same parameter."""
    mean = norm.running_mean
    new = MeanOnlyBatchNorm(
        norm.num_features,
        norm.momentum,
        affine=False,
        track_running_stats=mean is not None,
        sync=isinstance(norm, nn.SyncBatchNorm),
        process_group=getattr(norm, "process_group", None),
        device=None if mean is None else mean.device,
    )
    new.affine, new.bias = norm.bias is not None, norm.bias
    if mean is not None:
        new.running_mean = (mean if factor is None else mean * factor).to(mean.dtype, copy=True)
        if norm.num_batches_tracked is not None:  # pickles of torch before 0.4.1 have none
            new.num_batches_tracked = norm.num_batches_tracked.clone()
    return new.train(norm.training)


@contextmanager
def _all_or_nothing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Put the parameters of layers back if there is an error."""
    before = {parameter: parameter.clone() for layer in layers for parameter in layer.parameters()}
    try:
        yield
    except BaseException:
        for parameter, found in before.items():
            parameter.copy_(found)
        raise
