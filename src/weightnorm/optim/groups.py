"""What of a model is normalised, along which axis, and what stays plain and why: the optimizers' param groups."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from weightnorm.axes import Axis, output_axis

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]
ModelOrParams = nn.Module | Sequence[nn.Module] | Params
Choice = str | type[nn.Module]  # a pattern of parameter names, or a type of layer
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")  # torch's own, no part of a user's names
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # others stay plain: float8, integers

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
    """

    name: str
    parameter: nn.Parameter
    axis: Axis | None
    reason: str
    decays: bool = True

    def __str__(self) -> str:
        what = f"plain: {self.reason}"
        if self.axis:
            what = "normalised, whole tensor" if self.axis.dim is None else f"normalised along axis {self.axis.dim}"
            what += f" in {self.axis.groups} groups" if self.axis.groups > 1 else ""
        shape = "x".join(map(str, self.parameter.shape)) or "scalar"
        return f"{self.name:<40} {shape:>18}  {what}{'' if self.decays else ', no decay'}"


class ParamGroups(list[Group]):
    """Param groups for any of this library's optimizers; printing them lists every parameter and its treatment.

    Attributes:
        entries: one per parameter, in the model's order.
    """

    def __init__(self, entries: Sequence[Entry]):
        self.entries = list(entries)
        groups: dict[tuple[Axis | None, bool], Group] = {}
        for entry in entries:
            group = groups.setdefault((entry.axis, entry.decays), _options(entry))
            group["params"].append(entry.parameter)
        super().__init__(groups.values())

    def __str__(self) -> str:
        return "\n".join([*map(str, self.entries), self.summary()])

    def summary(self) -> str:
        """Return one line: how many tensors are normalised, of how many."""
        return f"{sum(entry.axis is not None for entry in self.entries)} of {len(self.entries)} tensors normalised"


def param_groups(
    model: nn.Module | Sequence[nn.Module],
    *,
    no_decay: Choice | Sequence[Choice] = (),
    skip: Choice | Sequence[Choice] = (),
    include: Choice | Sequence[Choice] = (),
) -> ParamGroups:
    """List what of a model is normalised, as param groups that every optimizer here takes.

    Normalised is every weight whose layer's output axis is known (``register_axis`` teaches more). Plain stay biases,
    norm layers, embeddings and weights tied to them, weights that carry another parametrization, and parameters of
    unknown meaning.

    Args:
        model: a model or several (a GAN's two discriminators); names of several begin with their index.
        no_decay: what gets no weight decay: patterns of parameter names (``"*.bias"``) and types of layers.
        skip: what stays plain although it could be normalised, likewise.
        include: which embeddings (and heads tied to them) are normalised all the same, likewise.

    Returns:
        The groups, a list of dicts with ``params``, ``weight_norm``, ``dim``, ``groups`` and, for ``no_decay``,
        ``weight_decay=0``. Print them to see every parameter.

    Raises:
        ValueError: if a parameter is not initialised yet (lazy layers), or a pattern matches none.

    Example:
        >>> import weightnorm as wn
        >>> print(wn.param_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), no_decay=["*.bias"]))
        0.weight                                            8x3x3x3  normalised along axis 0
        0.bias                                                    8  plain: a vector, no decay
        1.weight                                                  8  plain: a vector
        1.bias                                                    8  plain: a vector, no decay
        1 of 4 tensors normalised
    """
    owners: dict[nn.Parameter, list[Use]] = {}
    for prefix, part in _parts(model):
        for path, module in part.named_modules(prefix=prefix):
            for name, parameter in module.named_parameters(recurse=False):
                whole = f"{path}.{name}".lstrip(".")
                owners.setdefault(parameter, []).append((_WRAPPERS.sub("", whole), module))
    choices = {"no_decay": no_decay, "skip": skip, "include": include}
    checked = {what: _checked(what, chosen, owners.values()) for what, chosen in choices.items()}
    return ParamGroups([_entry(parameter, uses, **checked) for parameter, uses in owners.items()])


def as_param_groups(params: ModelOrParams) -> Params:
    """Return what a torch optimizer takes: a model's groups, anything else as it came."""
    if isinstance(params, nn.ParameterList | nn.ParameterDict):
        return list(params.parameters())
    if isinstance(params, nn.Module):
        return param_groups(params)
    if isinstance(params, Tensor):
        raise TypeError("params must be a model or an iterable of tensors or groups; got one tensor. Pass [tensor].")
    items: list[Any] = list(params)
    modules = [isinstance(item, nn.Module) for item in items]
    if any(modules) and not all(modules):
        raise TypeError("a list of models must hold nothing else; pass the other parameters with add_param_group")
    return param_groups(items) if any(modules) else items


def is_normalized(group: Group, parameter: Tensor) -> bool:
    """Say whether a group's member is normalised: as its group says, or every matrix and more if it does not.

    Axes of size 1 do not count: a bias kept as ``(1, 64)`` is a vector.
    """
    if parameter.numel() == 0 or parameter.ndim == 0 or group["weight_norm"] is False:
        return False
    if not (parameter.dtype in WEIGHT_DTYPES or parameter.is_complex()):  # complex ones are refused at the step
        return False
    return group["weight_norm"] is True or sum(size != 1 for size in parameter.shape) >= 2


def group_axis(group: Group) -> Axis:
    """Return where the vectors of a group's normalised members lie."""
    return Axis(group["dim"], group["groups"])


def g_lr_factor(group: Group, row_length: int) -> float:
    """Return what multiplies the learning rate of the lengths of vectors of ``row_length`` elements."""
    return row_length**0.5 if group["g_lr"] == "sqrt" else float(group["g_lr"])


def _options(entry: Entry) -> Group:
    options: Group = {"params": [], "weight_norm": entry.axis is not None}
    if entry.axis:
        options |= {"dim": entry.axis.dim, "groups": entry.axis.groups}
    if not entry.decays:
        options["weight_decay"] = 0.0
    return options


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
    if nn.parameter.is_lazy(parameter):
        raise ValueError(f"{name} has no shape yet; run one batch through the model before building the optimizer")
    axis, reason = _treatment(parameter, uses, any(_chosen(use, include) for use in uses))
    if axis and any(_chosen(use, skip) for use in uses):
        axis, reason = None, "skipped"
    return Entry(name, parameter, axis, reason, decays=not any(_chosen(use, no_decay) for use in uses))


def _treatment(parameter: nn.Parameter, uses: list[Use], included: bool) -> tuple[Axis | None, str]:
    """Return the axis of a parameter with these uses, or None and why it stays plain."""
    axes = {output_axis(module, _last(name)) for name, module in uses}
    if parameter.numel() == 0:
        return None, "empty"
    if any(isinstance(module, ParametrizationList) for _, module in uses):
        return None, "carries another parametrization"
    if axes == {None}:
        known = " and ".join(sorted({f"{type(module).__name__}.{_last(name)}" for name, module in uses}))
        return None, "a vector" if parameter.ndim < 2 else f"no output axis known for {known} (register_axis)"
    if len(axes) > 1:
        return None, "shared by layers with different output axes"
    if not included and any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for _, module in uses):
        return None, "an embedding" if len(uses) == 1 else "tied to an embedding"
    return axes.pop(), ""


def _checked(what: str, choices: Choice | Sequence[Choice], owners: Iterable[list[Use]]) -> Sequence[Choice]:
    """Return choices as a sequence; refuse those that choose nothing, which are mistakes."""
    choices = [choices] if isinstance(choices, str | type) else list(choices)
    uses = [use for found in owners for use in found]
    for choice in choices:
        if isinstance(choice, str) and not any(_chosen(use, [choice]) for use in uses):
            names = ", ".join(name for name, _ in uses[:4])
            raise ValueError(
                f"{what}={choice!r} matches no parameter; names are {names}, ... and * stands for anything"
            )
    return choices


def _chosen(use: Use, choices: Sequence[Choice]) -> bool:
    """Say whether a use is meant by one of the choices: its name matches, or its layer is of the type."""
    name, module = use
    return any(fnmatchcase(name, c) if isinstance(c, str) else isinstance(module, c) for c in choices)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
