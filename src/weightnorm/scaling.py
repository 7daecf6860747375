"""Multiply the output units of a layer, each by its own number: in a plain weight or in either half of ``(g, v)``."""

import torch
from torch import Tensor, nn

from weightnorm.axes import Axis, output_axis
from weightnorm.formula import row_lengths
from weightnorm.layers.found import Found, find_own


def weight_in_module_form(layer: nn.Module, name: str = "weight") -> Found | None:
    """Return where a layer's own weight is, if weight normalization in module form, ours or torch's, holds it."""
    return next((found for found in find_own(layer) if found.name == name), None)


@torch.no_grad()
def show_weight(found: Found) -> None:
    """Let torch's old hook show the weight of the ``g`` and ``v`` there are; it does so itself before each call."""
    if found.hook is not None:
        setattr(found.module, found.name, found.weight())


@torch.no_grad()
def scale_units(layer: nn.Module, factor: Tensor, name: str = "weight") -> None:
    """Multiply the weight vector of each output unit: ``w <- factor w``.

    In module form, ours or torch's, the lengths ``g`` take the factor and ``v`` stays. Where ``g`` does not hold one
    length per output unit (torch's axis 0 of a transposed convolution, a whole tensor), or cannot take the factor (a
    logarithm), directions turn and each ``‖v‖`` stays.

    Args:
        layer: whose weight is changed in place; its output axis is known.
        factor: one element per output unit, in the order of the layer's outputs; any sign.
        name: the weight's name.

    Example:
        >>> layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
        >>> scale_units(layer, torch.zeros(6))
        >>> layer.weight.count_nonzero()
        tensor(0)
    """
    axis = output_axis(layer, name)
    assert axis is not None
    found = weight_in_module_form(layer, name)
    if found is None:
        _scale(getattr(layer, name), factor, axis)
        return
    if found.axis == axis and not (found.log_g and bool((factor <= 0).any())):
        by = factor.reshape(found.g.shape).to(found.g.dtype)
        found.g.copy_(found.g + by.log() if found.log_g else found.g * by)
    else:
        _turn(found, factor, axis)
    show_weight(found)


def _scale(weight: Tensor, factor: Tensor, axis: Axis) -> None:
    split, kept = axis.split(weight), axis.kept(weight)
    split.mul_(factor.reshape([size if i in kept else 1 for i, size in enumerate(split.shape)]))


def _turn(found: Found, factor: Tensor, axis: Axis) -> None:
    """Set ``g`` and ``v`` to a scaled weight whose units are not the vectors of ``g``; each ``‖v‖`` stays."""
    w = found.weight().clone()
    _scale(w, factor, axis)
    split, before, kept = found.axis.split(w), found.axis.split(found.v), found.axis.kept(w)
    lengths, alive = row_lengths(split, kept)
    direction = split * (row_lengths(before, kept)[0] / lengths)
    found.v.copy_(torch.where(alive, direction, before).reshape(w.shape))
    g = lengths * alive
    found.g.copy_((g.log() if found.log_g else g).reshape(found.g.shape))
