"""Which of an arm's settings speaks for it: the one with the lowest final training loss, averaged over seeds.

Or, where training examples are held out, the one that does best on them. Never what the test set says.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median_low

from weightnorm.compare.evidence import steps_to_reach, trailing_means
from weightnorm.compare.loop import Turn
from weightnorm.compare.run import Epoch, Run, Setting
from weightnorm.tasks.task import Split


@dataclass(frozen=True)
class Best:
    """An arm's runs at its best setting.

    Attributes:
        setting: that setting.
        histories: seed -> what was measured, epoch by epoch.
        window: steps an epoch; losses are averaged over so many.
    """

    setting: Setting
    histories: dict[int, list[Epoch]]
    window: int

    def step_losses(self) -> dict[int, list[float]]:
        """Return seed -> the loss at every step."""
        return {seed: step_losses(epochs) for seed, epochs in self.histories.items()}

    def final_losses(self) -> dict[int, float]:
        """Return seed -> mean training loss over the last epoch, of seeds where it is a finite number."""
        finals = {seed: trailing_means(losses, self.window)[-1] for seed, losses in self.step_losses().items()}
        return {seed: loss for seed, loss in finals.items() if math.isfinite(loss)}

    def steps_to(self, targets: dict[int, float]) -> dict[int, int | None]:
        """Return seed -> steps to that seed's target, for seeds that have one."""
        return {
            seed: steps_to_reach(targets[seed], losses, self.window)
            for seed, losses in self.step_losses().items()
            if seed in targets
        }

    def seconds_per_step(self) -> float | None:
        """Return the median over epochs of the training time per step; None before the first.

        Of two epochs the shorter one: kernels are compiled in the first.
        """
        times = [epoch.seconds / len(epoch.step_loss) for epochs in self.histories.values() for epoch in epochs]
        return median_low(times) if times else None


def best_of(
    runs: Sequence[Run], settings: Sequence[Setting], epochs: int, window: int, held_out: str | None = None
) -> Best:
    """Choose an arm's best setting.

    Args:
        runs: the arm's runs.
        settings: its grid, not empty.
        epochs: how many epochs to compare; later ones are left out.
        window: steps an epoch.
        held_out: choose by this measure on the data that is scored, since it is no test set; None: by training loss.

    Returns:
        The runs at that setting that have done an epoch. A setting that diverged loses to every one that did not.
    """
    candidates = [
        Best(setting, {r.seed: r.epochs[:epochs] for r in runs if r.setting == setting and r.epochs}, window)
        for setting in settings
    ]
    return min(candidates, key=partial(_final, held_out=held_out))


def compared_epochs(runs: Sequence[Turn]) -> int:
    """Return how many epochs all runs have done, those apart that diverged or have not begun."""
    return min((len(run.epochs) for run in runs if run.epochs and not run.diverged), default=0) or max(
        (len(run.epochs) for run in runs), default=0
    )


def curve(epochs: Sequence[Epoch], split: Split, measure: str) -> list[float]:
    """Return a measure epoch by epoch, during training or on what is scored."""
    return [getattr(epoch, split)[measure] for epoch in epochs]


def curves(epochs: Sequence[Epoch], measures: Iterable[str]) -> dict[str, list[float]]:
    """Return all of the task's: ``train_loss``, ``test_loss`` and so on."""
    splits: tuple[Split, ...] = ("train", "test")
    return {f"{split}_{name}": curve(epochs, split, name) for split in splits for name in measures}


def step_losses(epochs: Sequence[Epoch]) -> list[float]:
    """Return the loss at every step."""
    return [loss for epoch in epochs for loss in epoch.step_loss]


def _final(best: Best, held_out: str | None) -> float:
    """Return the mean over seeds of what the last epoch measured; infinity where a run diverged."""
    last = [epochs[-1] for epochs in best.histories.values()]
    scores = [epoch.test[held_out] if held_out else epoch.train["loss"] for epoch in last]
    return fmean(scores) if scores and all(map(math.isfinite, scores)) else math.inf
