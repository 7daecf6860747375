"""Away with the module form: plain parameters again, in the original class, without a trace."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weightnorm.layers import loading
from weightnorm.layers.found import Found, find
from weightnorm.layers.parametrization import class_without

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def fold(model: nn.Module) -> int:
    """Replace every weight in module form by the plain parameter ``w = g v/‖v‖`` (eq. 2).

    Ours, torch's parametrization and torch's old hooks alike, in any grad mode. The layers get their original class
    back and lose every hook, so that they can be pickled. Optimizers hold on to ``g`` and ``v``: build a new one, or
    let ``from_module_form`` carry its state over.

    Args:
        model: a model or a layer; changed in place.

    Returns:
        How many weights were folded. Each is trainable if its ``g`` or ``v`` was; tied ones stay tied.

    Raises:
        ValueError: if another parametrization sits on top of one; nothing has changed then.

    Example:
        >>> import weightnorm as wn
        >>> layer = wn.weight_norm(nn.Linear(3, 2))
        >>> wn.fold(layer), wn.fold(layer), type(layer).__name__
        (1, 0, 'Linear')
    """
    return _fold(list(find(model)))


def remove_weight_norm(module: AnyModule, name: str | None = None) -> AnyModule:
    """Fold a layer or a whole model, and return it; ``fold`` says how. Nothing happens where there is nothing to fold.

    Args:
        module: a model or a layer; changed in place.
        name: only weights of this name; None: all.

    Returns:
        The module.

    Raises:
        ValueError: if another parametrization sits on top of a weight; nothing has changed then.

    Example:
        >>> import weightnorm as wn
        >>> wn.remove_weight_norm(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
        Linear(in_features=3, out_features=2, bias=True)
    """
    _fold([found for found in find(module) if name in (None, found.name)])
    return module


def _fold(found: list[Found]) -> int:
    # An inference tensor could never be trained, and a weight made under no_grad would not be a parameter.
    with torch.inference_mode(False), torch.no_grad():
        made: dict[tuple[int, int], Tensor] = {}
        for one in found:
            key = id(one.g), id(one.v)
            if key not in made:
                made[key] = _plain(one)
            _take_away(one)
            _put(one.module, one.name, made[key])
    return len(found)


def _plain(one: Found) -> Tensor:
    weight = one.weight()
    if not isinstance(one.v, nn.Parameter):
        return weight
    return nn.Parameter(weight, requires_grad=one.v.requires_grad or one.g.requires_grad)


def _take_away(one: Found) -> None:
    """Undo what holds a weight in module form, and leave the module without the weight."""
    module, name = one.module, one.name
    if one.hook is not None:
        hooks = module._forward_pre_hooks
        del hooks[next(key for key, hook in hooks.items() if hook is one.hook)]
        for attribute in (name, f"{name}_g", f"{name}_v"):
            delattr(module, attribute)
        return
    held: Any = module.parametrizations
    del held[name]
    if len(held):
        module.__class__ = class_without(type(module), name)
    else:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    loading.unregister(module, name)


def _put(module: nn.Module, name: str, weight: Tensor) -> None:
    """Give a module its weight back, before its biases as when it was made: optimizers count parameters."""
    if not isinstance(weight, nn.Parameter):
        module.register_buffer(name, weight)
        return
    module.register_parameter(name, weight)
    parameters = module._parameters
    order = list(getattr(module, "_flat_weights_names", ()))
    order += [other for other in parameters if other not in order and "weight" in other]
    for other in [*order, *(other for other in parameters if other not in order)]:
        if other in parameters:
            parameters[other] = parameters.pop(other)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()  # its list of weights still has the computed ones
