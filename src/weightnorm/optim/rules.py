"""What is known of the torch optimizers that can step on ``(v, g)``, and which cannot."""

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

# From params or groups to a torch optimizer: a class, or a partial of one.
Rule = Callable[[Any], torch.optim.Optimizer]

_REFUSED = {
    "LBFGS": "it evaluates the model many times in a step, at points in between; use a first-order optimizer",
    "SparseAdam": "it steps on single rows of sparse gradients; give it the embedding alone, without weight norm",
}
_MATRIX_RULES = ("Muon",)  # rules for matrices only: they see v as one, a vector a row
_WHOLE_RULES = ("Muon", "Adafactor")  # rules that mix a tensor's elements, so that a shard of it is not enough


def default_options(rule: Rule) -> dict[str, Any]:
    """Return the options that a rule's optimizer gives to groups that do not set them."""
    return rule([torch.zeros(2, 2, requires_grad=True)]).defaults


def is_matrix_rule(rule: Rule) -> bool:
    """Say whether a rule takes matrices only."""
    return any(name in _MATRIX_RULES for name in _class_names(rule))


def check_rule(rule: Rule, g_rule: Rule | None) -> None:
    """Raise ValueError, with the reason, for rules that cannot step on ``(v, g)``."""
    for name in (*_class_names(rule), *_class_names(g_rule)):
        if name in _REFUSED:
            raise ValueError(f"{name} cannot step on (v, g): {_REFUSED[name]}")
    if g_rule is None and is_matrix_rule(rule):
        raise ValueError(
            f"{_class_names(rule)[0]} steps on matrices only; name an optimizer for lengths, biases and the rest: "
            "g_class=torch.optim.AdamW, or functools.partial(torch.optim.AdamW, lr=...)"
        )


def check_sharding(rule: Rule, weights: Iterable[Tensor]) -> None:
    """Raise ValueError where a rule that needs whole tensors would step on shards."""
    names = [name for name in _class_names(rule) if name in _WHOLE_RULES]
    distributed = sys.modules.get("torch.distributed.tensor")  # where nobody imported it, nothing is sharded
    if not names or distributed is None:
        return
    for weight in weights:
        if isinstance(weight, distributed.DTensor) and any(place.is_shard() for place in weight.placements):
            raise ValueError(
                f"{names[0]} mixes the elements of a tensor, and a weight of shape {tuple(weight.shape)} is sharded: "
                "no process has it whole. Use an elementwise rule such as AdamW for sharded weights, or replicate them"
            )


def class_of(rule: Rule) -> Any:
    """Return the class that a rule is, or is a partial of."""
    return rule.func if isinstance(rule, partial) else rule


def _class_names(rule: Rule | None) -> list[str]:
    kind = class_of(rule) if rule else None
    return [base.__name__ for base in kind.__mro__] if inspect.isclass(kind) else []
