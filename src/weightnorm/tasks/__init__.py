"""What the comparison can train, by name. A name costs nothing; its module, and torch, are imported when it is used."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from weightnorm.errors import UserError

if TYPE_CHECKING:
    from weightnorm.tasks.task import Task


@dataclass(frozen=True)
class Option:
    """What can be chosen of some tasks alone.

    Attributes:
        help: what it decides.
        default: of each task that has it, by the task's name: a number, a switch or a text.
        values: what it can be; empty: a number, a switch or any text.
        least: the smallest number that it can be.
    """

    help: str
    default: Mapping[str, int | bool | str]
    values: tuple[str, ...] = ()
    least: int = 0

    @property
    def kind(self) -> type:
        """Return the type of its values."""
        return type(next(iter(self.default.values())))


@dataclass(frozen=True)
class Entry:
    """A task, and how it is compared unless the user says otherwise.

    Attributes:
        home: where its class lives; None: it is no ``Task`` but a game, whose players ``compare.games`` compares.
        arms: in which ways.
        epochs: how long; None: another option says.
        lrs: learning rates that every arm tries; empty: each has the one of the task's experiment.
        seeds: how many.
        has_folder: whether its data lies in a folder of the user's, and can be limited.
        without: options of every comparison that mean nothing to it.
    """

    home: str | None
    arms: tuple[str, ...]
    epochs: int | None
    lrs: tuple[float, ...]
    seeds: int
    has_folder: bool = False
    without: tuple[str, ...] = ()


_DEMO = "plain", "plain_default_init", "weight_norm", "weight_norm_mean_only", "batch_norm"
_PAIR = "plain", "weight_norm"
_NO_DATA = "epochs", "form", "precision", "data", "holdout", "limit", "deterministic"
_PAPERS = "plain", "weight_norm", "weight_norm_mean_only", "batch_norm", "mean_only"

TASKS = {
    "fashion": Entry("weightnorm.tasks.fashion:Fashion", _DEMO, 8, (0.001, 0.003), 3),
    "cifar10": Entry("weightnorm.tasks.cifar10:Cifar10", _PAPERS, 200, (), 1, has_folder=True),
    "vae": Entry("weightnorm.tasks.vae.mnist:MnistVae", _PAIR, 300, (), 3, has_folder=True),
    "vae_cifar10": Entry("weightnorm.tasks.vae.cifar10:CifarVae", _PAIR, 450, (), 1, has_folder=True),
    "draw": Entry("weightnorm.tasks.draw.task:DrawMnist", _PAIR, 100, (), 1, has_folder=True),
    "dqn": Entry(None, _PAIR, None, (), 1, without=_NO_DATA),
}

OPTIONS = {
    "binarise": Option(
        "When images become black and white, each pixel by chance: anew at every step, or once for all.",
        {"vae": "dynamic", "draw": "fixed"},
        ("dynamic", "fixed"),
    ),
    "flows": Option("Steps of the inverse autoregressive flow.", {"vae": 2}),
    "width": Option("Feature maps of every layer.", {"vae_cifar10": 96}),
    "depth": Option("Layers of latents in each of two levels.", {"vae_cifar10": 2}),
    "glimpses": Option("How often the network looks and writes.", {"draw": 64}),
    "lengths": Option(
        "Lengths of initial weight vectors: as drawn, or 1 in both arms, as if g began there.",
        {"draw": "drawn"},
        ("drawn", "one"),
    ),
    "attention": Option("Look and write selectively.", {"draw": True}),
    "game": Option("What is played: SpaceInvaders, Breakout, Enduro, Seaquest or any other.", {"dqn": "SpaceInvaders"}),
    "budget": Option(
        "Steps of training, of four frames each, to which all schedules scale.", {"dqn": 50_000_000}, least=1_000
    ),
    "memory": Option(
        "Transitions that each agent keeps, 28 KB each; not given: fewer where the budget, or half of the free memory, "
        "has fewer.",
        {"dqn": 1_000_000},
        least=1_000,
    ),
    "episodes": Option("Games that score an agent at each of 20 or more evaluations.", {"dqn": 30}, least=1),
    "max_frames": Option(
        "A game that scores an agent is cut off after so many; 60 are a second.", {"dqn": 108_000}, least=240
    ),
}


def load_task(
    name: str,
    device: str = "cpu",
    folder: Path | None = None,
    limit: int | None = None,
    holdout: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> "Task":
    """Make a task by name, its data on a device.

    Args:
        name: one of ``TASKS``.
        device: where its data and models live, as torch spells it. Default "cpu".
        folder: where its data lies, if it does not come with the package; None: the task knows where to look.
        limit: how many examples it trains on; None: all.
        holdout: score it on training examples held out, in place of the test set.
        options: those of its ``OPTIONS`` that are not to have their defaults.

    Returns:
        The task.

    Raises:
        KeyError: if there is no ``Task`` of that name.
        weightnorm.errors.UserError: if its data is missing or damaged, or comes with the package and one is named; or
            the task has no such option.

    Example:
        >>> load_task("fashion").steps_per_epoch
        80
    """
    home = TASKS[name].home
    if home is None:
        raise KeyError(name)
    module, _, cls = home.partition(":")
    if not TASKS[name].has_folder and (folder or limit or holdout):
        raise UserError(f"the data of {name} comes with the package; leave --data, --limit and --holdout out")
    asked = {"folder": folder, "limit": limit, "holdout": holdout} if TASKS[name].has_folder else {}
    task: Task = getattr(import_module(module), cls)(device, **asked, **all_options(name, options))
    return task


def shown(value: object) -> str:
    """Return an option's value as people read it."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def all_options(task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's own options, those that are not given at their defaults.

    Args:
        task: its name.
        given: names of ``OPTIONS`` -> values.

    Raises:
        weightnorm.errors.UserError: if the task has no such option.
    """
    own = {name: option.default[task] for name, option in OPTIONS.items() if task in option.default}
    for name in given:
        if name not in own:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is an option of {' and '.join(OPTIONS[name].default)}, not of {task}; leave it out"
            )
    return own | dict(given)
