"""What the comparison can train, by name. A name costs nothing; its module, and torch, are imported when it is used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightnorm.tasks.task import Task

TASKS = {"fashion": "weightnorm.tasks.fashion:Fashion"}  # name -> where its class lives


def load_task(name: str, device: str = "cpu") -> "Task":
    """Make a task by name, its data on a device.

    Args:
        name: one of ``TASKS``.
        device: where its data and models live, as torch spells it. Default "cpu".

    Returns:
        The task.

    Raises:
        KeyError: if there is no task of that name.
        weightnorm.errors.UserError: if its data is missing or damaged.

    Example:
        >>> load_task("fashion").steps_per_epoch
        80
    """
    module, _, cls = TASKS[name].partition(":")
    task: Task = getattr(import_module(module), cls)(device)
    return task
