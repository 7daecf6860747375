"""The output units of a layer: which layers have them, their moments on a batch, and how to shift and scale them."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from weightnorm.axes import output_axis
from weightnorm.formula import wide_dtype

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Linear | nn.Bilinear | Convolution


def find_layers(model: nn.Module) -> tuple[dict[nn.Module, str], dict[str, str]]:
    """Find the layers whose units can be set.

    Args:
        model: any model.

    Returns:
        The layers with their names, and the names of Linear, Bilinear and convolutions that must stay as they are,
        with the reason. Other kinds of layer (embeddings, recurrent ones, attention itself) are in neither.

    Raises:
        ValueError: if a parameter or buffer is not initialised yet (lazy layers).

    Example:
        >>> find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1).requires_grad_(False)))
        ({Linear(in_features=2, out_features=3, bias=True): '0'}, {'2': 'is frozen'})
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet; run one batch through the model before initialising it")
    others = {weight for module in model.modules() if not isinstance(module, Layer) for weight in _own(module)}
    layers: dict[nn.Module, str] = {}
    left_out: dict[str, str] = {}
    for path, layer in model.named_modules():
        # Attention's output projection is of this type; its weight is used without calling it.
        if isinstance(layer, Layer) and not isinstance(layer, NonDynamicallyQuantizableLinear):
            name = path or type(layer).__name__
            if reason := _obstacle(layer, others):
                left_out[name] = reason
            else:
                layers[layer] = name
    return layers, left_out


def moments(layer: Layer, name: str, t: Any) -> tuple[Tensor, Tensor]:
    """Measure ``μ[t]`` and ``σ[t]`` of each unit over the batch and all positions (eq. 5).

    Args:
        layer: whose output it is: convolutions have their units on the channel axis, the others on the last.
        name: what errors call it.
        t: its output, any floating dtype.

    Returns:
        ``(mean, std)``, one element a unit, float32 at least; ``std`` is the population's, with nothing added to it.

    Raises:
        TypeError: if ``t`` is not a tensor.
        ValueError: if ``t`` has no elements, or one that is NaN or infinite.

    Example:
        >>> moments(nn.Linear(1, 2), "head", torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        (tensor([2., 5.]), tensor([1., 0.]))
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"layer {name} puts out a {type(t).__name__}; only layers that put out a tensor can be set")
    if t.numel() == 0:
        raise ValueError(f"layer {name} puts out nothing, shape {tuple(t.shape)}. Pass a batch that is not empty")
    # Counted from the end, which is right with and without a batch axis.
    axis = -1 - len(layer.kernel_size) if isinstance(layer, Convolution) else -1
    units = t.movedim(axis, 0).reshape(t.shape[axis], -1).to(wide_dtype(t.dtype))
    variance, mean = torch.var_mean(units, dim=1, correction=0)
    if not (variance.isfinite() & mean.isfinite()).all():
        raise ValueError(f"layer {name} puts out NaN or infinity on this batch, so nothing was set. Look at the batch")
    return mean, variance.sqrt()


def is_constant(mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Say which units vary by no more than rounding does, so that dividing by ``σ`` would blow up noise.

    The floor is 4 ulps of the unit's mean in the dtype of the output, or of the layer's root mean square in the wide
    dtype, in which products are summed.

    Args:
        mean: mean per unit.
        std: standard deviation per unit.
        dtype: the dtype of the output that they were measured on.

    Returns:
        A mask, one element a unit.

    Example:
        >>> is_constant(torch.tensor([5.0, 5.0, 0.0]), torch.tensor([1e-3, 1e-7, 0.0]), torch.float32)
        tensor([False,  True,  True])
    """
    size = (mean.square() + std.square()).mean().sqrt()
    return std <= 4 * (torch.finfo(dtype).eps * mean.abs() + torch.finfo(std.dtype).eps * size)


@torch.no_grad()
def rescale(layer: Layer, mean: Tensor, factor: Tensor) -> None:
    """Make each unit put out ``(t − mean) factor`` instead of ``t`` (eq. 6); without a bias ``t factor``.

    Args:
        layer: whose weight and bias are changed.
        mean: one element a unit.
        factor: one element a unit.

    Example:
        >>> layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
        >>> rescale(layer, torch.zeros(6), torch.zeros(6))
        >>> layer.weight.count_nonzero()
        tensor(0)
    """
    axis = output_axis(layer)
    assert axis is not None
    split, kept = axis.split(layer.weight), axis.kept(layer.weight)
    split.mul_(factor.reshape([size if i in kept else 1 for i, size in enumerate(split.shape)]))
    if layer.bias is not None:
        layer.bias.copy_((layer.bias - mean) * factor)
    torch.clear_autocast_cache()  # it may hold casts of what was there before


def spread(values: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest."""
    return float(values.min()), float(values.max())


def _obstacle(layer: Layer, others: set[nn.Parameter]) -> str:
    """Return why a layer must stay as it is, if it must; ``others`` are the parameters of other kinds of layer."""
    if is_parametrized(layer) or not isinstance(layer.weight, nn.Parameter):
        return "carries a parametrization"
    if not all(parameter.requires_grad for parameter in _own(layer)):
        return "is frozen"
    if not others.isdisjoint(_own(layer)):
        return "shares a parameter with a layer of another kind"
    return ""


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)
