"""What is known of the torch optimizers that can step on ``(v, g)``, and which cannot."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Rule = Callable[
    [Any], torch.optim.Optimizer
]  # from params or groups to a torch optimizer: a class, or a partial of one

_REFUSED = {
    "LBFGS": "it evaluates the model many times in a step, at points in between; use a first-order optimizer",
    "SparseAdam": "it steps on single rows of sparse gradients; give it the embedding alone, without weight norm",
}
_MATRIX_RULES = ("Muon",)  # rules for matrices only: they see v as one, a vector a row


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


def _class_names(rule: Rule | None) -> list[str]:
    kind = rule.func if isinstance(rule, partial) else rule
    return [base.__name__ for base in kind.__mro__] if inspect.isclass(kind) else []
