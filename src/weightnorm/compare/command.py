"""What ``weightnorm compare`` does once its options are read: train, report, show."""

import logging
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table

from weightnorm.compare.arms import Arm
from weightnorm.compare.loop import Comparison, Options
from weightnorm.compare.progress import ArmBars
from weightnorm.compare.report import write_report
from weightnorm.compare.results import results
from weightnorm.compare.run import Form
from weightnorm.compare.table import COLUMNS, Record, evidence, notes, rows
from weightnorm.errors import INTERRUPTED, UserError
from weightnorm.tasks import load_task


def compare_and_report(
    task: str,
    *,
    arms: Sequence[Arm],
    epochs: int,
    lrs: Sequence[float],
    g_lrs: Sequence[float | str],
    seeds: int,
    form: Form,
    device: str,
    data: Path | None,
    limit: int | None,
    folder: Path,
) -> int:
    """Run a comparison; leave its report in a folder and its table on the terminal.

    Args:
        task: the task's name.
        arms: the arms.
        epochs: how long each run trains.
        lrs: learning rates, tried in every arm; empty: each has the one of the task's experiment.
        g_lrs: factors on that of lengths, tried in arms with weight normalization.
        seeds: how many.
        form: where weight normalization is.
        device: as torch spells it, or "auto".
        data: where the task's data lies; None: the task knows where to look.
        limit: how many examples to train on; None: all.
        folder: for the report; made if it is not there.

    Returns:
        The exit code: 0, or 130 if it was interrupted.

    Raises:
        UserError: before any training, if the device, the data or the folder cannot be used.
    """
    loaded = load_task(task, usable_device(device), data, limit)
    unknown = [arm.name for arm in arms if arm.name not in loaded.rates]
    if unknown and not lrs:
        raise UserError(f"the experiment {task} has no learning rate for {', '.join(unknown)}; give one with --lr")
    comparison = Comparison(loaded, Options(arms, epochs, lrs, g_lrs, seeds, form, loaded.rates))
    make_writable(folder)
    finished = train(comparison)
    summary = results(comparison, shlex.join(["weightnorm", *sys.argv[1:]]))
    write_report(summary, folder)
    show(summary, folder)
    return 0 if finished else INTERRUPTED


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


def train(comparison: Comparison) -> bool:
    """Train, with live progress, until all is done or Ctrl-C is pressed; say whether all was done.

    From then on Ctrl-C is ignored, so that a second one (some shells send two) does not tear the report.
    """
    signal.signal(signal.SIGINT, _interrupt_once)
    try:
        with _unsaid(), ArmBars(Console(stderr=True), comparison.options) as bars:
            comparison.train(bars.tell)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        return False
    return True


def show(summary: Record, folder: Path) -> None:
    """Print table, notes and evidence."""
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width: let the table have its own
    table = Table(header_style="bold")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column == "arm")
    for row in rows(summary):
        table.add_row(*row)
    console.print(table)
    for line in notes(summary):
        console.print(line, highlight=False)
    console.print(evidence(summary), style="bold", highlight=False)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


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
