"""The optimizers' param groups: made of a model, or taken as they come."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightnorm.axes import Axis
from weightnorm.layers.found import find
from weightnorm.survey import Choice, Entry, survey

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]
ModelOrParams = nn.Module | Sequence[nn.Module] | Params
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # others stay plain: float8, integers


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
    return ParamGroups(survey(model, no_decay=no_decay, skip=skip, include=include))


def as_param_groups(params: ModelOrParams) -> Params:
    """Return what a torch optimizer takes: a model's groups, anything else as it came."""
    if isinstance(params, nn.ParameterList | nn.ParameterDict):
        return list(params.parameters())
    if isinstance(params, nn.Module):
        return _groups_of([params])
    if isinstance(params, Tensor):
        raise TypeError("params must be a model or an iterable of tensors or groups; got one tensor. Pass [tensor].")
    items: list[Any] = list(params)
    modules = [isinstance(item, nn.Module) for item in items]
    if any(modules) and not all(modules):
        raise TypeError("a list of models must hold nothing else; pass the other parameters with add_param_group")
    return _groups_of(items) if any(modules) else items


def _groups_of(models: list[nn.Module]) -> ParamGroups:
    """Return the groups of models, which are taken to be plain: weight norm twice is never meant."""
    held = [found.whole_name for model in models for found in find(model)]
    if held:
        raise ValueError(
            f"{', '.join(held[:3])}{', ...' if len(held) > 3 else ''} hold weight norm as modules already: fold them "
            "with weightnorm.from_module_form(model), or train g and v as they are with torch.optim. To normalise the "
            "other weights only, pass weightnorm.param_groups(model)"
        )
    return param_groups(models[0] if len(models) == 1 else models)


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
