"""The output units of a model's layers: which can be standardised, and how they are shifted and scaled."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from weightnorm.axes import Axis, output_axis
from weightnorm.data_dependent.moments import Moments, moments_of, side_by_side
from weightnorm.scaling import scale_units, weight_in_module_form
from weightnorm.survey import name_of, refuse_lazy

PROJECTIONS = "q_proj_weight", "k_proj_weight", "v_proj_weight"  # of attention whose keys or values have another size

Key = tuple[int, int]  # where a parameter lies in memory, and where in it the units' part begins


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
        """Return what may be changed: the weight or its ``g`` and ``v``, and the bias."""
        form = weight_in_module_form(self.layer, self.weight)
        own: list[Any] = [getattr(self.layer, self.weight)] if form is None else [form.g, form.v]
        return own if self.bias is None else [*own, getattr(self.layer, self.bias)]

    def keys(self) -> set[Key]:
        """Return where ``parameters`` lie; several units may have parts of one bias."""
        *weights, last = self.parameters()
        return {(weight.data_ptr(), 0) for weight in weights} | {(last.data_ptr(), self.first if self.bias else 0)}

    def own_bias(self) -> Tensor | None:
        """Return the elements of the bias that belong to the units."""
        return None if self.bias is None else getattr(self.layer, self.bias)[self.first : self.first + self.count]

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

    def misfit(self, ts: list[Any]) -> str:
        """Return why units cannot be told apart in what their layer puts out, if they cannot."""
        for t in ts:
            if not isinstance(t, Tensor):
                return f"puts out a {type(t).__name__}, no tensor"
            if t.is_nested or not t.is_floating_point():
                return f"puts out {'a nested tensor' if t.is_nested else t.dtype}, which has no mean and spread here"
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
class Settable:
    """What of a model can be standardised, and what is left out.

    Attributes:
        layers: the units of each layer; several for attention, in the order in which it uses them.
        left_out: names of layers that stay as they are, and why.
        surprising: those of them of which nobody would think so.
    """

    layers: dict[nn.Module, list[Units]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    surprising: set[str] = field(default_factory=set)

    def units(self) -> list[Units]:
        """Return all units."""
        return list(chain.from_iterable(self.layers.values()))

    def leave(self, name: str, why: str, surprising: bool = True) -> None:
        """Leave a layer out."""
        self.left_out[name] = why
        if surprising:
            self.surprising.add(name)


def find_units(model: nn.Module) -> Settable:
    """Find the units that can be standardised: those of every layer whose output axis is known, but for embeddings.

    Args:
        model: any model.

    Raises:
        TypeError: if it is no module.
        ValueError: if a parameter or buffer has no shape yet (lazy layers), or no values (the meta device).

    Example:
        >>> find_units(nn.Sequential(nn.Linear(2, 3), nn.GRU(3, 1))).left_out
        {'1': 'is recurrent'}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"data_init takes a module; got {type(model).__name__}. Put several models in a ModuleList")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    refuse_lazy(tensors, "through the model before initialising it")
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(f"{name} has no values yet, being on the meta device; materialise the model first")
    lasts = {part.out_proj for part in model.modules() if isinstance(part, nn.MultiheadAttention)}
    found, others = Settable(), _parameters_of_others(model)
    for path, module in model.named_modules():
        name = name_of(path) or type(module).__name__.removeprefix("Parametrized")
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            found.leave(name, "is recurrent", surprising=False)
        elif isinstance(module, nn.MultiheadAttention):
            if type(module).forward is not nn.MultiheadAttention.forward:
                found.leave(name, "is attention with a forward of its own")
                continue
            _sort_out(found, module, _units_of_attention(module, name), others)
        elif _is_layer(module) and module not in lasts:
            kernel = getattr(module, "kernel_size", ()) if isinstance(module, nn.modules.conv._ConvNd) else ()
            own = Units(name, module, bias=_present(module, "bias"), axis=-1 - len(kernel))
            _sort_out(found, module, [own], others)
    return found


def _sort_out(found: Settable, module: nn.Module, several: list[Units], others: set[int]) -> None:
    for units in several:
        if why := _obstacle(units, others):
            found.leave(units.name, why)
        else:
            found.layers.setdefault(module, []).append(units)


def _units_of_attention(module: nn.MultiheadAttention, name: str) -> list[Units]:
    """Return the projections of query, key and value, stacked in one weight or apart; then the output's."""
    bias = _present(module, "in_proj_bias")
    last = Units(f"{name}.out_proj", module.out_proj, bias=_present(module.out_proj, "bias"))
    if module._qkv_same_embed_dim:
        return [Units(f"{name}.in_proj", module, "in_proj_weight", bias), last]
    apart = enumerate(PROJECTIONS)
    return [*(Units(f"{name}.{own[:6]}", module, own, bias, i * module.embed_dim) for i, own in apart), last]


def _present(module: nn.Module, name: str) -> str | None:
    """Return the name of a bias if the layer has one."""
    return name if is_parametrized(module, name) or getattr(module, name, None) is not None else None


def _is_layer(module: nn.Module) -> bool:
    return output_axis(module) is not None and not isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _parameters_of_others(model: nn.Module) -> set[int]:
    """Return where the parameters of layers lie that have no units to standardise."""
    layers = {part for part in model.modules() if _is_layer(part) or isinstance(part, nn.MultiheadAttention)}
    theirs = {part for layer in layers if is_parametrized(layer) for part in layer.parametrizations.modules()}  # type: ignore[union-attr]
    others = [part for part in model.modules() if part not in theirs | layers]
    return {parameter.data_ptr() for part in others for parameter in part.parameters(recurse=False)}


def _obstacle(units: Units, others: set[int]) -> str:
    """Return why units must stay as they are, if they must."""
    try:
        form = weight_in_module_form(units.layer, units.weight)
    except ValueError:  # and something else on top of it
        return "carries another parametrization"
    # Looked at first: reading what it computes may change it, as spectral norm's does.
    names = {units.weight, units.bias} if form is None else {units.bias}
    if any(name is not None and is_parametrized(units.layer, name) for name in names):
        return "carries another parametrization"
    own = units.parameters()
    if not all(isinstance(parameter, nn.Parameter) for parameter in own):
        return "has a weight that is computed, or no parameter"
    if any(not parameter.requires_grad for parameter in own if form is None or parameter is not form.v):
        return "is frozen"
    if not others.isdisjoint(parameter.data_ptr() for parameter in own):
        return "shares a parameter with a layer of another kind"
    return "" if own[0].numel() else "has no weights"
