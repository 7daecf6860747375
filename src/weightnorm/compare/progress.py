"""Live progress: a bar per arm, with its latest loss and the time left."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from weightnorm.compare.loop import Options, Turn


class ArmBars:
    """Bars on a terminal; where the output is none, rich shows their end state once. Use it in a ``with`` block.

    Args:
        console: where.
        options: the arms, and how much each has to do.
    """

    def __init__(self, console: Console, options: Options):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} epochs  {task.fields[latest]:<12}"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=600,  # arms take turns: a short window would see bursts
        )
        self._bars = {
            arm.name: self._progress.add_task(arm.name, total=options.runs_of(arm) * options.epochs, latest="-")
            for arm in options.arms
        }

    def __enter__(self) -> "ArmBars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def tell(self, run: Turn) -> None:
        """Move the bar of a run's arm on by an epoch."""
        latest = "diverged" if run.diverged else run.latest
        self._progress.update(self._bars[run.arm.name], advance=1, latest=latest)
