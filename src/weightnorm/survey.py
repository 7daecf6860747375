"""What of a model is normalised, along which axis, and what stays plain and why."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm as TorchHook

from weightnorm.axes import Axis, output_axis

Choice = str | type[nn.Module]  # a pattern of parameter names, or a type of layer
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)(\.|$)")  # torch's own, no part of a user's names

Use = tuple[str, nn.Module]  # a parameter's name in the model, and the layer that holds it there


@dataclass(frozen=True)
class Entry:
    """One parameter of a model and what the optimizer does with it.

    Attributes:
        name: its name in the model.
        parameter: the parameter.
        axis: where its vectors lie; None: it stays plain.
        reason: why it stays plain; empty where it is normalised.
        decays: whether weight decay acts on it.
        uses: its names in the model, and the layers that hold it there; several where it is tied.
    """

    name: str
    parameter: nn.Parameter
    axis: Axis | None
    reason: str
    decays: bool = True
    uses: tuple[Use, ...] = ()

    def __str__(self) -> str:
        what = f"plain: {self.reason}"
        if self.axis:
            what = "normalised, whole tensor" if self.axis.dim is None else f"normalised along axis {self.axis.dim}"
            what += f" in {self.axis.groups} groups" if self.axis.groups > 1 else ""
        shape = "x".join(map(str, self.parameter.shape)) or "scalar"
        return f"{self.name:<40} {shape:>18}  {what}{'' if self.decays else ', no decay'}"


def survey(
    model: nn.Module | Sequence[nn.Module],
    *,
    no_decay: Choice | Sequence[Choice] = (),
    skip: Choice | Sequence[Choice] = (),
    include: Choice | Sequence[Choice] = (),
) -> list[Entry]:
    """Return an entry for every parameter of a model, or of several; the arguments are those of ``param_groups``."""
    owners: dict[nn.Parameter, list[Use]] = {}
    for prefix, part in _parts(model):
        for path, module in part.named_modules(prefix=prefix):
            for name, parameter in module.named_parameters(recurse=False):
                whole = f"{path}.{name}".lstrip(".")
                owners.setdefault(parameter, []).append((name_of(whole), module))
    choices = {"no_decay": no_decay, "skip": skip, "include": include}
    checked = {what: _checked(what, chosen, owners.values()) for what, chosen in choices.items()}
    return [_entry(parameter, uses, **checked) for parameter, uses in owners.items()]


def _parts(model: nn.Module | Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        yield "", model
    else:
        yield from ((str(index), part) for index, part in enumerate(model))


def _entry(
    parameter: nn.Parameter,
    uses: list[Use],
    no_decay: Sequence[Choice],
    skip: Sequence[Choice],
    include: Sequence[Choice],
) -> Entry:
    name = uses[0][0]
    refuse_lazy([(name, parameter)], "through the model before building the optimizer")
    axis, reason = _treatment(parameter, uses, any(is_chosen(use, include) for use in uses))
    if axis and any(is_chosen(use, skip) for use in uses):
        axis, reason = None, "skipped"
    decays = not any(is_chosen(use, no_decay) for use in uses)
    return Entry(name, parameter, axis, reason, decays, tuple(uses))


def _treatment(parameter: nn.Parameter, uses: list[Use], included: bool) -> tuple[Axis | None, str]:
    """Return the axis of a parameter with these uses, or None and why it stays plain."""
    axes = {output_axis(module, last_part(name)) for name, module in uses}
    if parameter.numel() == 0:
        return None, "empty"
    if any(_is_parametrized(module, last_part(name)) for name, module in uses):
        return None, "carries another parametrization"
    if axes == {None}:
        known = " and ".join(sorted({f"{type(module).__name__}.{last_part(name)}" for name, module in uses}))
        return None, "a vector" if parameter.ndim < 2 else f"no output axis known for {known} (register_axis)"
    if len(axes) > 1:
        return None, "shared by layers with different output axes"
    if not included and any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for _, module in uses):
        return None, "an embedding" if len(uses) == 1 else "tied to an embedding"
    return axes.pop(), ""


def _is_parametrized(module: nn.Module, name: str) -> bool:
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, TorchHook)]
    return isinstance(module, ParametrizationList) or any(name in (f"{h.name}_g", f"{h.name}_v") for h in hooks)


def _checked(what: str, choices: Choice | Sequence[Choice], owners: Iterable[list[Use]]) -> Sequence[Choice]:
    """Return choices as a sequence; refuse those that choose nothing, which are mistakes."""
    choices = [choices] if isinstance(choices, str | type) else list(choices)
    uses = [use for found in owners for use in found]
    for choice in choices:
        if isinstance(choice, str) and not any(is_chosen(use, [choice]) for use in uses):
            names = ", ".join(name for name, _ in uses[:4])
            raise ValueError(
                f"{what}={choice!r} matches no parameter; names are {names}, ... and * stands for anything"
            )
    return choices


def is_chosen(use: Use, choices: Sequence[Choice]) -> bool:
    """Say whether a use is meant by one of the choices: its name matches, or its layer is of the type."""
    name, module = use
    return any(fnmatchcase(name, c) if isinstance(c, str) else isinstance(module, c) for c in choices)


def refuse_lazy(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise ValueError if a named tensor has no shape yet, as in lazy layers; say where a batch is to run."""
    for name, tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet; run one batch {where}")


def name_of(path: str) -> str:
    """Return a path in a model as its user knows it, without what torch's wrappers add."""
    return _WRAPPERS.sub("", path).rstrip(".")


def last_part(name: str) -> str:
    """Return a parameter's name in its layer."""
    return name.rpartition(".")[2]
