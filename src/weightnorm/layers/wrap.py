"""Weight norm in module form: one call for a layer or a whole model, with torch's keys."""

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightnorm.axes import Axis, output_axis
from weightnorm.formula import Dim
from weightnorm.layers import loading
from weightnorm.layers.parametrization import WeightNorm, attach
from weightnorm.survey import Choice, Use, last_part, refuse_lazy, survey

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def weight_norm(
    module: AnyModule,
    name: str = "weight",
    dim: Dim | str = "output",
    *,
    skip: Choice | Sequence[Choice] = (),
    train_g: bool = True,
    log_g: bool = False,
) -> AnyModule:
    """Train a layer's weight, or every weight of a model, as length and direction: ``w = g v/‖v‖`` (eq. 2).

    Replaces ``torch.nn.utils.weight_norm`` and ``torch.nn.utils.parametrizations.weight_norm``, with the latter's
    checkpoint keys: ``parametrizations.weight.original0`` is ``g``, ``original1`` is ``v``. The output stays as it is.
    Checkpoints of both, with other axes too, and plain ones load into it. Initialise before or after: what is written
    to ``layer.weight`` in place, ``.data`` included, or assigned to it goes into ``g`` and ``v``.

    Args:
        module: a layer that has the parameter ``name``; or a container, in which every weight is normalised whose
            output axis is known (``register_axis`` teaches more), but for those of embeddings and tied to them. Tied
            weights stay tied.
        name: the parameter's name. In a container the default stands for every known name.
        dim: the axis kept, one length per index along it; a tuple of axes; None: the whole tensor has one length;
            "output": the layer's output axis, and 0 where it is unknown. -1 is the whole tensor, as in torch.
        skip: what stays plain in a container: patterns of parameter names (``"*.proj.weight"``) and types of layers.
        train_g: False freezes the lengths, as DoRA's and DINO's variants do.
        log_g: keep ``g = exp(s)`` and train ``s`` (section 2); lengths stay positive. Not for zero vectors.

    Returns:
        The module, changed in place. New are the parameters ``g``, in float32 at least, and ``v``: build the optimizer
        after this. A zero vector gets ``g = 0`` and ``v`` drawn from N(0, 0.05²), so that it can learn.

    Raises:
        ValueError: if the module has no such parameter, or it is weight-normalised already; if nothing in a container
            can be normalised, or layers with different output axes share a weight.

    Source: Salimans & Kingma 2016, section 2.

    Example:
        >>> import weightnorm as wn
        >>> layer = wn.weight_norm(nn.Linear(20, 40))
        >>> {key: tuple(value.shape) for key, value in layer.state_dict().items() if "original" in key}
        {'parametrizations.weight.original0': (40, 1), 'parametrizations.weight.original1': (40, 20)}
    """
    if dim == -1:
        warnings.warn(
            "dim=-1 means the whole tensor here, as in torch.nn.utils.weight_norm; say dim=None for that, or count the "
            "last axis from the front",
            stacklevel=2,
        )
        dim = None
    shared: Sequence[Sequence[Use]] = [[(name, module)]] if _has(module, name) else _weights_of(module, name, skip)
    planned = [
        [(layer, last_part(path), _plan(layer, last_part(path), dim, log_g)) for path, layer in uses] for uses in shared
    ]
    for tied in planned:
        first = None
        for layer, own_name, parametrization in tied:
            attach(layer, own_name, parametrization)
            loading.register(layer)
            held: Any = layer.parametrizations[own_name]  # type: ignore[index]
            held.original0.requires_grad_(held.original0.requires_grad and train_g)
            first = first or held
            held.original0, held.original1 = first.original0, first.original1
    return module


def _plan(layer: nn.Module, name: str, dim: Dim | str, log_g: bool) -> WeightNorm:
    """Return the parametrization of one weight, or refuse it before anything has changed."""
    weight: Tensor = getattr(layer, name)
    if dim == "output":
        axis = output_axis(layer, name) or Axis(0)
    elif isinstance(dim, str):
        raise ValueError(f'dim must be an axis, a tuple of axes, None or "output"; got {dim!r}')
    else:
        axis = Axis(dim)
    parametrization = WeightNorm(axis, weight, log_g)
    axis.kept(weight)  # is there such an axis?
    if log_g:
        parametrization.right_inverse(weight)  # has every vector a logarithm?
    return parametrization


def _has(module: nn.Module, name: str) -> bool:
    """Say whether a module itself has the parameter; refuse one that cannot be wrapped."""
    if parametrize.is_parametrized(module, name):
        kind = type(module.parametrizations[name][0]).__name__.lstrip("_")  # type: ignore[index]
        raise ValueError(
            f"{name} carries a parametrization already ({kind}); take that away first "
            "(weightnorm.remove_weight_norm, torch.nn.utils.parametrize.remove_parametrizations)"
        )
    weight = module._parameters.get(name, module._buffers.get(name))
    if weight is None:
        return False
    refuse_lazy([(name, weight)], "through the layer first")
    return True


def _weights_of(model: nn.Module, name: str, skip: Choice | Sequence[Choice]) -> Sequence[Sequence[Use]]:
    """Return the uses of each weight in a container that is to be normalised."""
    entries = [entry for entry in survey(model, skip=skip) if name == "weight" or last_part(entry.name) == name]
    torn = [entry.name for entry in entries if entry.reason.startswith("shared by layers")]
    if torn:
        raise ValueError(
            f"{torn[0]} is shared by layers with different output axes, and a weight has its vectors along one; "
            "untie it, or leave it plain with skip="
        )
    found = [entry.uses for entry in entries if entry.axis is not None]
    if not found:
        wanted = "no weight whose output axis is known" if name == "weight" else f"no parameter named {name!r}"
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in entries[:3])
        raise ValueError(
            f"there is {wanted} in this {type(model).__name__}{f' ({reasons})' if reasons else ''}; name the "
            "parameter, or teach its layer with weightnorm.register_axis"
        )
    return found
