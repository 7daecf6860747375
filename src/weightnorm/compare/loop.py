"""The loop: all runs take turns, an epoch each, so that arms are timed side by side and stay equally far."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Generic, Protocol, TypeVar

import torch

from weightnorm.compare.arms import Arm
from weightnorm.compare.run import Form, Precision, Run, Setting
from weightnorm.tasks.task import Task


class Turn(Protocol):
    """What a run must have to take turns: its arm, whole epochs, and a state to be saved in between."""

    arm: Arm

    @property
    def epochs(self) -> Sized:
        """Return what was measured so far, an item an epoch."""

    @property
    def diverged(self) -> bool:
        """Say whether it is not going to do another epoch."""

    @property
    def latest(self) -> str:
        """Return how well it does, for a progress bar."""

    def train_epoch(self) -> None:
        """Train and measure one more epoch; interrupted, the run is as it was before."""

    def saved(self) -> dict[str, Any]:
        """Return the run in plain types and tensors."""

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``saved`` returned."""


R = TypeVar("R", bound=Turn)


@dataclass(frozen=True)
class Options:
    """What to compare, and how thoroughly.

    Attributes:
        arms: the arms.
        epochs: how long each run trains.
        lrs: the learning rates tried in every arm; empty: in each the one that the task knows for it.
        g_lrs: factors on that of lengths, tried in arms with weight normalization.
        seeds: how many seeds, from 0.
        form: where weight normalization is, in the "optimizer" or in the "module".
        precision: "fp32", or "bf16": forward and backward under autocast.
        rates: the rates that the task knows, by the arm's name.
    """

    arms: Sequence[Arm]
    epochs: int
    lrs: Sequence[float]
    g_lrs: Sequence[float | str] = (1.0,)
    seeds: int = 1
    form: Form = "optimizer"
    precision: Precision = "fp32"
    rates: Mapping[str, float] = field(default_factory=dict)

    def settings(self, arm: Arm) -> list[Setting]:
        """Return the grid of an arm."""
        lrs = self.lrs or (self.rates[arm.name],)
        return [Setting(lr, g_lr) for lr, g_lr in product(lrs, self.g_lrs if arm.weight_norm else (None,))]

    def runs_of(self, arm: Arm) -> int:
        """Return how many runs an arm has."""
        return len(self.settings(arm)) * self.seeds


class Turns(ABC, Generic[R]):
    """Runs that take turns.

    Attributes:
        options: arms, learning rates and seeds.
        runs: those made so far, in the order in which they take turns: arms side by side.
        device: where they train.
    """

    options: Options
    runs: list[R]
    device: torch.device

    @abstractmethod
    def make(self, arm: Arm, setting: Setting, seed: int) -> R:
        """Return a new run."""

    @property
    def finished(self) -> bool:
        """Say whether every run has done all its epochs or diverged."""
        planned = sum(map(self.options.runs_of, self.options.arms))
        done = [run.diverged or len(run.epochs) == self.options.epochs for run in self.runs]
        return len(done) == planned and all(done)

    def prepare(self) -> None:
        """Make all runs, if there are none yet."""
        if not self.runs:
            self.runs.extend(self.make(*turn) for turn in self._turns())

    def train(self, tell: Callable[[R], None] = lambda run: None, pause: Callable[[], bool] = lambda: False) -> None:
        """Train everything that is not trained yet; interrupted at any point, ``runs`` holds whole epochs.

        Args:
            tell: is told of a run when it has done an epoch, or is not going to because it diverged.
            pause: is asked before each epoch, and ends the training if it says so.
        """
        self.prepare()
        for epoch in range(self.options.epochs):
            for run in self.runs:
                if len(run.epochs) <= epoch and not run.diverged:
                    if pause():
                        return
                    run.train_epoch()
                tell(run)

    def _turns(self) -> Iterator[tuple[Arm, Setting, int]]:
        """Yield the runs to make: seed by seed, setting by setting, each in every arm that has one."""
        grids = [(arm, self.options.settings(arm)) for arm in self.options.arms]
        for seed, index in product(range(self.options.seeds), range(max(len(grid) for _, grid in grids))):
            yield from ((arm, grid[index], seed) for arm, grid in grids if index < len(grid))


@dataclass
class Comparison(Turns[Run]):
    """All runs of a task's comparison.

    Attributes:
        task: what is trained.
        options: in which arms and settings.
        runs: those made so far.
    """

    task: Task
    options: Options
    runs: list[Run] = field(default_factory=list)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Return where the task's data and models are."""
        return self.task.device

    def make(self, arm: Arm, setting: Setting, seed: int) -> Run:
        """Return a new run."""
        return Run(self.task, arm, setting, seed, self.options.epochs, self.options.form, self.options.precision)
