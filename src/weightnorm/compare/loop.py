"""The loop: all runs take turns, an epoch each, so that arms are timed side by side and stay equally far."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from weightnorm.compare.arms import Arm
from weightnorm.compare.run import Form, Precision, Run, Setting
from weightnorm.tasks.task import Task


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


@dataclass
class Comparison:
    """All runs of a comparison.

    Attributes:
        task: what is trained.
        options: in which arms and settings.
        runs: those made so far, in the order in which they take turns: arms side by side.
    """

    task: Task
    options: Options
    runs: list[Run] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Say whether every run has done all its epochs or diverged."""
        planned = sum(map(self.options.runs_of, self.options.arms))
        done = [run.diverged or len(run.epochs) == self.options.epochs for run in self.runs]
        return len(done) == planned and all(done)

    def prepare(self) -> None:
        """Make all runs, if there are none yet."""
        if not self.runs:
            asked = self.options.epochs, self.options.form, self.options.precision
            self.runs.extend(Run(self.task, *turn, *asked) for turn in self._turns())

    def train(self, tell: Callable[[Run], None] = lambda run: None, pause: Callable[[], bool] = lambda: False) -> None:
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
