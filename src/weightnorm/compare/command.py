"""What ``weightnorm compare`` does once its options are read: train, report, show."""

import logging
import math
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table as RichTable

from weightnorm.compare.asked import Asked
from weightnorm.compare.loop import Turns
from weightnorm.compare.progress import ArmBars
from weightnorm.compare.report import write_report
from weightnorm.compare.saving import NAME, load, restore, save
from weightnorm.compare.view import Table, View
from weightnorm.errors import INTERRUPTED, UserError


def compare_and_report(request: Asked, folder: Path, device: str, minutes: float | None, every: int) -> int:
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
    device = usable_device(device)
    _say(request.needs())
    with _unsaid():
        comparison = request.comparison(device)
        return _finish(request, comparison, folder, minutes, every)


def resume_and_report(folder: Path, device: str, minutes: float | None, every: int) -> int:
    """Go on with a comparison that was paused, interrupted or killed; ``compare_and_report`` says how.

    Raises:
        UserError: if there is none in the folder, or the device or the data cannot be used.
    """
    device = usable_device(device)
    request, runs = load(folder, device)
    _say(request.needs(resumed=True))
    with _unsaid():
        comparison = request.comparison(device)
        restore(comparison, runs)
        return _finish(request, comparison, folder, minutes, every)


def _finish(request: Asked, comparison: Turns[Any], folder: Path, minutes: float | None, every: int) -> int:
    comparison.prepare()  # what cannot be made is told before anything is written
    make_writable(folder)
    torch.backends.cudnn.deterministic = request.deterministic
    torch.backends.cudnn.benchmark = not request.deterministic  # batches keep their shape
    interrupted = not train(comparison, Keeper(folder, request, comparison, every, minutes))
    save(folder, request, comparison)  # a report that fails costs no training
    summary = request.summary(comparison, shlex.join(["weightnorm", *sys.argv[1:]]))
    write_report(summary, folder)
    show(summary.view, folder)
    if comparison.finished:
        (folder / NAME).unlink()
    if not comparison.finished:
        _say(f"Go on with: weightnorm compare --resume {folder}")
    return INTERRUPTED if interrupted else 0


def _say(line: str) -> None:
    if line:
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)


class Keeper:
    """Keeps time and checkpoints while a comparison trains.

    Args:
        folder: for the checkpoints.
        request: what was asked for.
        comparison: what trains.
        every: a checkpoint after so many epochs of all runs.
        minutes: how long; None: to the end.
    """

    def __init__(self, folder: Path, request: Asked, comparison: Turns[Any], every: int, minutes: float | None):
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


def train(comparison: Turns[Any], keeper: Keeper) -> bool:
    """Train, with live progress, until all is done, the time is up or Ctrl-C is pressed; say whether it was not.

    From then on Ctrl-C is ignored, so that a second one (some shells send two) does not tear the report.
    """
    signal.signal(signal.SIGINT, _interrupt_once)
    try:
        with ArmBars(Console(stderr=True), comparison.options) as bars:
            comparison.train(bars.tell, keeper.pause)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        return False
    return True


def show(view: View, folder: Path) -> None:
    """Print tables, notes and evidence."""
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width: let the table have its own
    for table in filter(None, (view.table, view.paper)):
        console.print(_printable(table))
        for line in table.notes:
            console.print(line, highlight=False)
    console.print(view.evidence, style="bold", highlight=False)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _printable(table: Table) -> RichTable:
    printable = RichTable(header_style="bold")
    for column in table.columns:
        printable.add_column(column, no_wrap=column == "arm")
    for row in table.rows:
        printable.add_row(*row)
    return printable


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
