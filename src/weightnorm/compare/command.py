"""What ``weightnorm compare`` does once its options are read: train, report, show."""

import logging
import math
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table

from weightnorm.compare.loop import Comparison
from weightnorm.compare.pictures import pictures
from weightnorm.compare.progress import ArmBars
from weightnorm.compare.report import write_report
from weightnorm.compare.results import results
from weightnorm.compare.saving import NAME, Request, load, restore, save
from weightnorm.compare.table import Record, columns, evidence, notes, rows
from weightnorm.errors import INTERRUPTED, UserError


def compare_and_report(request: Request, folder: Path, device: str, minutes: float | None, every: int) -> int:
    """Run a comparison; leave its report in a folder and its table on the terminal.

    Args:
        request: what to compare.
        folder: for the report and checkpoints; made if it is not there.
        device: as torch spells it, or "auto".
        minutes: pause after so many; None: never.
        every: leave a checkpoint whenever all runs have done so many more epochs.

    Returns:
        The exit code: 0, or 130 if it was interrupted.

    Raises:
        UserError: before any training, if the device, the data or the folder cannot be used.
    """
    comparison = request.comparison(usable_device(device))
    return _finish(request, comparison, folder, minutes, every)


def resume_and_report(folder: Path, device: str, minutes: float | None, every: int) -> int:
    """Go on with a comparison that was paused, interrupted or killed; ``compare_and_report`` says how.

    Raises:
        UserError: if there is none in the folder, or the device or the data cannot be used.
    """
    device = usable_device(device)
    request, runs = load(folder, device)
    comparison = request.comparison(device)
    restore(comparison, runs)
    return _finish(request, comparison, folder, minutes, every)


def _finish(request: Request, comparison: Comparison, folder: Path, minutes: float | None, every: int) -> int:
    comparison.prepare()  # what cannot be made is told before anything is written
    make_writable(folder)
    torch.backends.cudnn.deterministic = request.deterministic
    torch.backends.cudnn.benchmark = not request.deterministic  # batches keep their shape
    interrupted = not train(comparison, Keeper(folder, request, comparison, every, minutes))
    save(folder, request, comparison)  # a report that fails costs no training
    summary = results(comparison, shlex.join(["weightnorm", *sys.argv[1:]]), request.of_the_task())
    write_report(summary, folder, pictures(comparison, summary))
    show(summary, folder)
    if comparison.finished:
        (folder / NAME).unlink()
    if not comparison.finished:
        Console(stderr=True).print(f"Go on with: weightnorm compare --resume {folder}", highlight=False, soft_wrap=True)
    return INTERRUPTED if interrupted else 0


class Keeper:
    """Keeps time and checkpoints while a comparison trains.

    Args:
        folder: for the checkpoints.
        request: what was asked for.
        comparison: what trains.
        every: a checkpoint after so many epochs of all runs.
        minutes: how long; None: to the end.
    """

    def __init__(self, folder: Path, request: Request, comparison: Comparison, every: int, minutes: float | None):
        self._folder, self._request, self._comparison, self._every = folder, request, comparison, every
        self._until = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._saved = self._done()

    def pause(self) -> bool:
        """Leave a checkpoint if it is time for one; say whether the time is up."""
        if self._done() >= self._saved + self._every:
            save(self._folder, self._request, self._comparison)
            self._saved = self._done()
        return time.monotonic() > self._until

    def _done(self) -> int:
        """Return how many epochs all runs have done."""
        return min((len(run.epochs) for run in self._comparison.runs if not run.diverged), default=0)


def usable_device(name: str) -> str:
    """Return a device's name if tensors can live there; of "auto", a GPU's if there is one.

    Raises:
        UserError: if they cannot.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"--device {name} cannot be used ({reason}); use cpu, auto, or a GPU that is there") from error
    return name


def make_writable(folder: Path) -> None:
    """Make a folder if it is not there, and make sure that files can be written in it.

    Raises:
        UserError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder} ({error.strerror}); name another with --out") from error


def train(comparison: Comparison, keeper: Keeper) -> bool:
    """Train, with live progress, until all is done, the time is up or Ctrl-C is pressed; say whether it was not.

    From then on Ctrl-C is ignored, so that a second one (some shells send two) does not tear the report.
    """
    signal.signal(signal.SIGINT, _interrupt_once)
    try:
        with _unsaid(), ArmBars(Console(stderr=True), comparison.options) as bars:
            comparison.train(bars.tell, keeper.pause)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        return False
    return True


def show(summary: Record, folder: Path) -> None:
    """Print table, notes and evidence."""
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width: let the table have its own
    console.print(_table(columns(summary), rows(summary)))
    for line in notes(summary):
        console.print(line, highlight=False)
    if paper := summary["paper"]:
        console.print(_table(paper["columns"], paper["rows"]))
        for line in paper["notes"]:
            console.print(line, highlight=False)
    console.print(evidence(summary), style="bold", highlight=False)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    table = Table(header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column == "arm")
    for row in cells:
        table.add_row(*row)
    return table


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keep every single run's optimizer from saying what it normalises."""
    logger, nowhere = logging.getLogger("weightnorm"), logging.NullHandler()
    logger.addHandler(nowhere)
    try:
        yield
    finally:
        logger.removeHandler(nowhere)


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
