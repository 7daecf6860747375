"""The output units of a model's layers: which can be standardised, and how they are shifted and scaled."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from weightnorm.axes import Axis, output_axis
from weightnorm.data_dependent.moments import Moments, moments_of, side_by_side
from weightnorm.survey import name_of
from weightnorm.units import scale_units, weight_in_module_form

Key = tuple[nn.Parameter, int]  # a parameter, and where in it the units' part begins


@dataclass(eq=False)
class Units:
    """The output units of one weight.

    Attributes:
        name: the layer's name in the model; for one of attention's weights, with the weight's own name behind it.
        layer: what holds the weight.
        weight: the weight's name there.
        bias: the name of the bias, or None.
        first: which element of the bias belongs to the first unit.
        axis: where the units lie in what the layer puts out, counted from the end, which is right with and without a
            batch axis.
    """

    name: str
    layer: nn.Module
    weight: str = "weight"
    bias: str | None = "bias"
    first: int = 0
    axis: int = -1

    @cached_property
    def count(self) -> int:
        """Return how many there are."""
        weight, where = getattr(self.layer, self.weight), self._where()
        return prod(where.split(weight).shape[i] for i in where.kept(weight))

    def parameters(self) -> list[nn.Parameter]:
        """Return what is changed: the weight or its ``g`` and ``v``, and the bias."""
        found = weight_in_module_form(self.layer, self.weight)
        own: list[Any] = [getattr(self.layer, self.weight)] if found is None else [found.g, found.v]
        return own if self.bias is None else [*own, getattr(self.layer, self.bias)]

    def keys(self) -> list[Key]:
        """Return ``parameters``, told apart where several units have parts of one bias."""
        own = self.parameters()
        return [(parameter, self.first if self.bias and parameter is own[-1] else 0) for parameter in own]

    @torch.no_grad()
    def standardise(self, mean: Tensor | None, factor: Tensor) -> None:
        """Make each unit put out ``(t − mean) factor`` instead of ``t`` (eq. 6); without a bias ``t factor``.

        Args:
            mean: one element a unit; None: the bias stays, what follows takes the mean away.
            factor: one element a unit.
        """
        scale_units(self.layer, factor, self.weight)
        bias = self.own_bias()
        if bias is not None and mean is not None:
            bias.copy_((bias - mean) * factor)
        torch.clear_autocast_cache()  # it may hold casts of what was there before

    def own_bias(self) -> Tensor | None:
        """Return the elements of the bias that belong to the units."""
        return None if self.bias is None else getattr(self.layer, self.bias)[self.first : self.first + self.count]

    def misfit(self, ts: list[Any]) -> str:
        """Return why units cannot be told apart in what their layer puts out, if they cannot."""
        others = [t for t in ts if not isinstance(t, Tensor)]
        if others:
            return f"puts out a {type(others[0]).__name__}, no tensor"
        found = sum(t.shape[self.axis] if t.ndim >= -self.axis else 0 for t in ts)
        if found != self.count:
            return f"puts out shape {tuple(ts[0].shape)}, where {self.count} units are expected on axis {self.axis}"
        return ""

    def moments(self, ts: list[Tensor]) -> Moments:
        """Measure pre-activations; of several, one after the other."""
        return side_by_side([moments_of(t, self.axis) for t in ts])

    def lengths(self) -> Tensor:
        """Return ``‖w‖`` of each unit, which is ``|g|``."""
        return torch.linalg.vector_norm(self._where().rows(getattr(self.layer, self.weight).detach()), dim=1)

    def _where(self) -> Axis:
        axis = output_axis(self.layer, self.weight)
        assert axis is not None
        return axis


@dataclass
class Found:
    """What of a model can be standardised.

    Attributes:
        layers: the units of each layer; several for attention, in the order in which it uses them.
        left_out: names of layers that must stay as they are, and why.
    """

    layers: dict[nn.Module, list[Units]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def find_units(model: nn.Module) -> Found:
    """Find the units that can be standardised: those of every layer whose output axis is known, but for embeddings.

    Args:
        model: any model.

    Raises:
        ValueError: if a parameter or buffer is not initialised yet (lazy layers).

    Example:
        >>> find_units(nn.Sequential(nn.Linear(2, 3), nn.GRU(3, 1))).left_out
        {'1': 'is recurrent'}
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet; run one batch through the model before initialising it")
    found, others = Found(), _parameters_of_others(model)
    for path, module in model.named_modules():
        name = name_of(path) or type(module).__name__.removeprefix("Parametrized")
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            found.left_out[name] = "is recurrent"
        for units in _units_of(module, name):
            if reason := _obstacle(units, others):
                found.left_out[units.name] = reason
            else:
                found.layers.setdefault(module, []).append(units)
    return found


def _units_of(module: nn.Module, name: str) -> Iterator[Units]:
    if isinstance(module, nn.MultiheadAttention):
        yield from _units_of_attention(module, name)
    elif _is_layer(module):
        kernel = getattr(module, "kernel_size", ()) if isinstance(module, nn.modules.conv._ConvNd) else ()
        yield Units(name, module, bias=_present(module, "bias"), axis=-1 - len(kernel))


def _units_of_attention(module: nn.MultiheadAttention, name: str) -> Iterator[Units]:
    """Find the projections of query, key and value, stacked in one weight or apart; then the output's."""
    bias = _present(module, "in_proj_bias")
    if module._qkv_same_embed_dim:
        yield Units(f"{name}.in_proj", module, "in_proj_weight", bias)
    else:
        for i, own in enumerate(("q_proj", "k_proj", "v_proj")):
            yield Units(f"{name}.{own}", module, f"{own}_weight", bias, i * module.embed_dim)
    yield Units(f"{name}.out_proj", module.out_proj, bias=_present(module.out_proj, "bias"))


def _present(module: nn.Module, name: str) -> str | None:
    """Return the name of a bias if the layer has one."""
    return name if is_parametrized(module, name) or getattr(module, name, None) is not None else None


def _is_layer(module: nn.Module) -> bool:
    """Say whether a module is a layer with units of its own. The last kind is attention's, which never calls it."""
    others = nn.Embedding | nn.EmbeddingBag | NonDynamicallyQuantizableLinear
    return output_axis(module) is not None and not isinstance(module, others)


def _parameters_of_others(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of layers that have no units to standardise."""
    kinds = nn.MultiheadAttention | NonDynamicallyQuantizableLinear
    layers = {module for module in model.modules() if _is_layer(module) or isinstance(module, kinds)}
    theirs = {part for layer in layers if is_parametrized(layer) for part in layer.parametrizations.modules()}  # type: ignore[union-attr]
    others = [module for module in model.modules() if module not in theirs | layers]
    return {parameter for module in others for parameter in module.parameters(recurse=False)}


def _obstacle(units: Units, others: set[nn.Parameter]) -> str:
    """Return why units must stay as they are, if they must."""
    try:
        form = weight_in_module_form(units.layer, units.weight)
    except ValueError:  # and something else on top of it
        return "carries another parametrization"
    # Looked at first: reading what it computes may change it, as spectral norm's does.
    if is_parametrized(units.layer, units.bias) or (form is None and is_parametrized(units.layer, units.weight)):
        return "carries another parametrization"
    own = units.parameters()
    if not all(isinstance(parameter, nn.Parameter) for parameter in own):
        return "carries another parametrization"
    if not all(parameter.requires_grad for parameter in own):
        return "is frozen"
    if not others.isdisjoint(own):
        return "shares a parameter with a layer of another kind"
    return ""
