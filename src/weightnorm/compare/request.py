"""What was asked of the comparison of a task, and what becomes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from weightnorm.compare.arms import ARMS
from weightnorm.compare.loop import Comparison, Options
from weightnorm.compare.pictures import pictures
from weightnorm.compare.results import results
from weightnorm.compare.view import Summary, view
from weightnorm.errors import UserError
from weightnorm.tasks import all_options, load_task


@dataclass(frozen=True)
class Request:
    """What was asked for, in plain types.

    Attributes:
        task: the task's name.
        arms: those of the arms.
        epochs: how long each run trains.
        lrs: learning rates, tried in every arm; empty: each has the one of the task's experiment.
        g_lrs: factors on that of lengths, tried in arms with weight normalization.
        seeds: how many.
        form: where weight normalization is, in the "optimizer" or in the "module".
        precision: of forward and backward, "fp32" or "bf16".
        data: where the task's data lies; None: the task knows where to look.
        limit: how many examples to train on; None: all.
        holdout: score on training examples held out.
        options: those of the task's own that are not to have their defaults.
        deterministic: on a GPU, let cuDNN take none but its deterministic algorithms; else the fastest it finds.
    """

    kind: ClassVar[str] = "task"

    task: str
    arms: Sequence[str]
    epochs: int
    lrs: Sequence[float]
    g_lrs: Sequence[float | str]
    seeds: int
    form: Any = "optimizer"
    precision: Any = "fp32"
    data: str | None = None
    limit: int | None = None
    holdout: bool = False
    deterministic: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def needs(self, resumed: bool = False) -> str:
        """Say nothing: what a task takes of the machine is seen when it is made."""
        return ""

    def of_the_task(self) -> dict[str, Any]:
        """Return what was asked of the task itself, defaults included."""
        return {"limit": self.limit, **all_options(self.task, self.options)}

    def comparison(self, device: str) -> Comparison:
        """Return what is to be trained.

        Args:
            device: where, as torch spells it.

        Raises:
            UserError: if the data cannot be used, or an arm has no learning rate.
        """
        folder = Path(self.data) if self.data else None
        task = load_task(self.task, device, folder, self.limit, self.holdout, self.options)
        unknown = [name for name in self.arms if name not in task.rates]
        if task.rates and "plain_released" in unknown:
            raise UserError(f"the paper's released code does not train {self.task}; leave plain_released out")
        if unknown and not self.lrs:
            names = ", ".join(unknown)
            raise UserError(f"the experiment {self.task} has no learning rate for {names}; give one with --lr")
        arms = [ARMS[name] for name in self.arms]
        asked = arms, self.epochs, self.lrs, self.g_lrs, self.seeds, self.form, self.precision
        return Comparison(task, Options(*asked, task.rates))

    def summary(self, comparison: Comparison, command: str) -> Summary:
        """Sum up a comparison, finished or not.

        Args:
            comparison: that of this request.
            command: what was typed.
        """
        record = results(comparison, command, self.of_the_task())
        return Summary(record, view(record), pictures(comparison, record))
