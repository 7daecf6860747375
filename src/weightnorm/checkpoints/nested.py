"""The state dicts within a file's content, whatever lies around them: several models, counters, an optimizer."""

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from typing import Any

from torch import Tensor

from weightnorm.errors import UserError

StateDict = MutableMapping[str, Any]
Change = Callable[[str, StateDict], StateDict]


def is_optimizer(content: Any) -> bool:
    """Say whether this is what an optimizer's ``state_dict`` returns.

    Example:
        >>> import torch
        >>> is_optimizer(torch.optim.SGD([torch.ones(2)]).state_dict())
        True
    """
    return isinstance(content, Mapping) and {"state", "param_groups"} <= content.keys()


def holds_optimizer(content: Any) -> bool:
    """Say whether an optimizer's state lies anywhere in a file's content."""
    children = content.values() if isinstance(content, Mapping) else content if type(content) in (list, tuple) else ()
    return is_optimizer(content) or any(map(holds_optimizer, children))


def change_state_dicts(content: Any, change: Change, path: str = "") -> Any:
    """Return a file's content with every state dict in it changed.

    Args:
        content: dicts, lists and tuples in each other, with anything in them.
        change: takes where a dict lies and the dict, and returns the new one. It is called for every dict that holds a
            tensor, but for those of an optimizer: its numbers belong to its parameters whatever these are called.
        path: where ``content`` lies: the keys that lead to it, each followed by a slash.

    Returns:
        The new content; what is no state dict is carried as it is.

    Raises:
        UserError: if it is nested too deeply to be a checkpoint.

    Example:
        >>> import torch
        >>> content = {"generator": {"w": torch.ones(1)}, "steps": 5}
        >>> change_state_dicts(content, lambda path, sd: {f"{path}{key}": 0 for key in sd})
        {'generator': {'generator/w': 0}, 'steps': 5}
    """
    try:
        return _changed(content, change, path)
    except RecursionError as error:
        raise UserError("dicts lie in each other without end; this is no checkpoint") from error


def _changed(content: Any, change: Change, path: str) -> Any:
    if type(content) in (list, tuple):
        return type(content)(_changed(item, change, f"{path}{index}/") for index, item in enumerate(content))
    if not isinstance(content, MutableMapping) or is_optimizer(content):
        return content
    holds_tensors = any(isinstance(value, Tensor) for value in content.values())
    new = change(path, content) if holds_tensors else copy(content)
    for key, value in new.items():
        if not isinstance(value, Tensor):
            new[key] = _changed(value, change, f"{path}{key}/")
    return new
