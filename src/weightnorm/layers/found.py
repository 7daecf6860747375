"""Weight norm in module form, wherever it is in a model and whoever put it there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_form
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm as TorchHook

from weightnorm.axes import Axis
from weightnorm.layers.compose import compose
from weightnorm.layers.parametrization import WeightNorm


@dataclass(frozen=True)
class Found:
    """One weight in module form.

    Attributes:
        path: the layer's name in the model.
        module: the layer.
        name: the weight's name there.
        g: the lengths, or their logarithm.
        v: the direction.
        axis: where its vectors lie.
        log_g: whether ``g`` holds logarithms.
        hook: torch's old hook, which holds the weight; None: a parametrization does.
    """

    path: str
    module: nn.Module
    name: str
    g: Tensor
    v: Tensor
    axis: Axis
    log_g: bool = False
    hook: TorchHook | None = None

    @property
    def whole_name(self) -> str:
        """Return the weight's name in the model."""
        return f"{self.path}.{self.name}".lstrip(".")

    def lengths(self) -> Tensor:
        """Return the lengths themselves."""
        return self.g.exp() if self.log_g else self.g

    def weight(self) -> Tensor:
        """Return the weight."""
        return compose(self.v, self.lengths(), self.axis)


def find(model: nn.Module) -> Iterator[Found]:
    """Return every weight of a model in module form: ours, torch's parametrization, torch's hook.

    Args:
        model: a model or a layer.

    Raises:
        ValueError: if another parametrization sits on one of them.
    """
    for path, module in model.named_modules():
        yield from find_own(module, path)


def find_own(module: nn.Module, path: str = "") -> Iterator[Found]:
    """Return every weight of one layer, its parts left out; ``find`` says how."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, TorchHook):
            g, v = getattr(module, f"{hook.name}_g"), getattr(module, f"{hook.name}_v")
            yield Found(path, module, hook.name, g, v, _torch_axis(hook.dim), hook=hook)
    if parametrize.is_parametrized(module):
        for name, held in module.parametrizations.items():  # type: ignore[union-attr, operator]
            yield from _in_list(path, module, name, held)


def _in_list(path: str, module: nn.Module, name: str, held: Any) -> Iterator[Found]:
    ours = [part for part in held if isinstance(part, WeightNorm | torch_form._WeightNorm)]
    if not ours:
        return
    if len(held) > 1:
        others = ", ".join(type(part).__name__ for part in held if part not in ours)
        raise ValueError(
            f"{path}.{name} carries {others or 'weight norm twice'} beside weight norm, which cannot be told apart; "
            "undo that with torch.nn.utils.parametrize.remove_parametrizations first"
        )
    part: Any = ours[0]
    if isinstance(part, WeightNorm):
        axis, log_g = part.axis, part.log_g is not None
    else:
        axis, log_g = _torch_axis(part.dim), False
    yield Found(path, module, name, held.original0, held.original1, axis, log_g)


def _torch_axis(dim: int) -> Axis:
    """Return the axis that torch's ``dim`` means: -1 is the whole tensor there."""
    return Axis(None if dim == -1 else dim)
