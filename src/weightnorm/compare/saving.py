"""A comparison on disk, between epochs: everything that it takes to go on as if it had never stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weightnorm.checkpoints.files import File, read, write
from weightnorm.compare.arms import ARMS
from weightnorm.compare.loop import Comparison, Options
from weightnorm.compare.run import Epoch
from weightnorm.errors import UserError
from weightnorm.tasks import all_options, load_task

NAME = "checkpoint.pt"
_FORMAT = 3


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


def save(folder: Path, request: Request, comparison: Comparison) -> None:
    """Leave a comparison in a folder; whoever kills the process meanwhile leaves the one before.

    Raises:
        UserError: if it cannot be written.
    """
    runs = [
        {"epochs": [asdict(epoch) for epoch in run.epochs], "finals": run.finals, "state": run.state_dict()}
        for run in comparison.runs
    ]
    # Plain lists and numbers, which torch reads without running anything.
    asked = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(request).items()}
    content = {"weightnorm_comparison": _FORMAT, "request": asked, "device": comparison.task.device.type, "runs": runs}
    write(folder / NAME, File(content))


def load(folder: Path, device: str) -> tuple[Request, list[Mapping[str, Any]]]:
    """Read what ``save`` has left: what was asked for, and the runs as they were.

    Args:
        folder: where.
        device: on which it goes on.

    Raises:
        UserError: if there is nothing, or something else, or what ran on another kind of device.
    """
    content = read(folder / NAME).content
    if not isinstance(content, Mapping) or content.get("weightnorm_comparison") != _FORMAT:
        raise UserError(f"{folder / NAME} is no checkpoint of a comparison, or one of another version")
    if (kind := device.partition(":")[0]) != content["device"]:
        raise UserError(f"the comparison ran on {content['device']} and cannot go on on {kind}: name it with --device")
    return Request(**content["request"]), content["runs"]


def restore(comparison: Comparison, runs: Sequence[Mapping[str, Any]]) -> None:
    """Bring a comparison that has not begun to where another was."""
    comparison.prepare()
    for run, saved in zip(comparison.runs, runs, strict=True):
        run.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]
        run.finals = dict(saved["finals"])
        run.load_state_dict(saved["state"])
