"""What a benchmark leaves behind: tables in Markdown, and with them all that is needed to believe and repeat them."""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Arm, Failure, Stopwatch, Times, attempt, copy_arm, time_in_turn

import weightnorm

COPY = "copy"  # the arm that measures the bandwidth

UNKNOWN = "unknown"


class OutOfTime(BaseException):
    """The time limit has passed; no Exception, so that no arm takes it for a failure of its own."""


@dataclass
class Table:
    """A table with a title and a line on how to read it."""

    title: str
    note: str
    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"## {self.title}\n\n{self.note}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Report:
    """The tables of one run, written anew after each row, under a name that no earlier run has used.

    Args:
        what: was measured; the file's name begins with it.
        options: of the command line: ``device``, ``out``, ``limit_seconds``.
        tables: empty as yet.
    """

    def __init__(self, what: str, options: argparse.Namespace, tables: Sequence[Table]):
        self._what, self._folder, self._limit = what, options.out, options.limit_seconds
        self._tables, self._remarks = tables, list[str]()
        # Asked for now: a device that has failed answers no more.
        self._facts, self._device_name = facts(options.device), device_name(options.device)
        self._begin = time.monotonic()
        self._path: Path | None = None

    def share(self, left: int) -> float:
        """Return until when, on the monotonic clock, one of ``left`` equal parts of the remaining time lasts.

        A tenth of each is held back, for the round that is then under way.
        """
        now = time.monotonic()
        return now + 0.9 * max(0.0, self._begin + self._limit - now) / left

    def remark(self, text: str) -> None:
        """Say something now, and below the tables."""
        progress(text)
        if text not in self._remarks:
            self._remarks.append(text)

    def write(self) -> None:
        """Write what there is so far."""
        if self._folder is None:
            return
        if self._path is None:
            self._path = new_file(self._folder, f"{self._what}_{slug(self._device_name)}_{time.strftime('%Y%m')}")
        self._path.write_text(f"{self}\n", encoding="utf-8")

    @contextmanager
    def time_limit(self) -> Iterator[None]:
        """Stop what runs inside when the time is over, say so, and finish the report in any case."""

        def stop(*_: object) -> None:
            raise OutOfTime

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self._limit, 5.0)  # and again: what runs may swallow the first
        try:
            yield
        except (OutOfTime, KeyboardInterrupt) as reason:
            signal.setitimer(signal.ITIMER_REAL, 0)
            what = f"the limit of {self._limit:g} s" if isinstance(reason, OutOfTime) else "hand"
            self.remark(f"Stopped by {what}: what is missing was not measured.")
        except Exception as error:
            self.remark(f"Ended by {type(error).__name__}: {error}")
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.finish()

    def finish(self) -> None:
        """Write and print everything."""
        self.write()
        print(self)
        if self._path:
            progress(f"written to {self._path}")

    def __str__(self) -> str:
        head = f"# {self._what.replace('_', ' ')}: {self._device_name}, {time.strftime('%B %Y')}"
        listed = "\n".join(f"- {name}: {value}" for name, value in self._facts.items())
        remarks = ["\n".join(f"- {text}" for text in self._remarks)] if self._remarks else []
        return "\n\n".join([head, listed, *(str(table) for table in self._tables if table.rows), *remarks])


def common_options(description: str, repeats: int) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark is asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default_device, help="cuda or cpu")
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each arm, at most")
    parser.add_argument("--limit-seconds", type=float, default=540, help="end then, with what has been measured")
    parser.add_argument("--out", type=Path, help="folder for the report; a file that is there is never overwritten")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few repeats, to try the script itself")
    return parser


def parsed_beside_copy(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the command line's options, with those of a benchmark that times a copy beside."""
    parser.add_argument("--copy-bytes", type=int, help="that measure the bandwidth; None: 1 GiB, on a CPU 256 MiB")
    parser.add_argument("--flush", action=argparse.BooleanOptionalAction, help="caches; None: on a GPU")
    options = parser.parse_args()
    on_gpu = options.device.type == "cuda"
    if options.flush is None:
        options.flush = on_gpu
    options.copy_bytes = options.copy_bytes or (1 << 24 if options.quick else 1 << 30 if on_gpu else 1 << 28)
    return options


def time_beside_copy(arms: dict[str, Arm | Failure], options: argparse.Namespace, until: float) -> dict[str, Any]:
    """Return the times of arms, and of a copy among them; say which failed."""
    arms = {COPY: attempt(partial(copy_arm, options.device, options.copy_bytes)), **arms}
    for name, arm in arms.items():
        if isinstance(arm, Failure):
            progress(f"  {name}: {arm.reason}")
    return time_in_turn(arms, Stopwatch(options.device, options.flush), options.repeats, until)


def share_of_copy(moved: float, taken: Times | Failure | None, copy: Times | Failure | None, copied: int) -> str:
    """Return the speed at which bytes were moved, in per cent of that of a copy of so many."""
    if not isinstance(taken, Times) or not isinstance(copy, Times):
        return "–"
    return f"{100 * moved * copy.median / (2 * copied) / taken.median:.0f} %"


def chosen(names: str, known: Sequence[str]) -> list[str]:
    """Return the names in a comma-separated list, all of them known, or end with what is."""
    asked = [name for name in names.split(",") if name]
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return asked


def progress(text: str) -> None:
    """Tell whoever is waiting."""
    print(text, file=sys.stderr, flush=True)


def milliseconds(times: Times | Failure | None) -> str:
    """Return a median as a cell."""
    return "–" if times is None else "failed" if isinstance(times, Failure) else f"{digits(times.median)} ms"


def digits(seconds: float) -> str:
    """Return milliseconds with four digits that say something, and no more than tenths of a microsecond."""
    value = seconds * 1e3
    return f"{value:,.{3 - min(3, math.floor(math.log10(max(value, 0.1))))}f}"


def ratio(times: Times | Failure | None, base: Times | Failure | None) -> str:
    """Return the ratio of two medians as a cell; a dash where one is missing."""
    return f"{times.median / base.median:.2f}" if isinstance(times, Times) and isinstance(base, Times) else "–"


def spread(times: Times | Failure) -> list[str]:
    """Return cells of a measurement: how many, median, quartiles, the median by events; or why there is none."""
    if isinstance(times, Failure):
        return ["0", "failed", times.reason.replace("|", "/"), "–"]
    quartiles = " to ".join(map(digits, times.quartiles))
    events = digits(Times(times.by_events).median) if times.by_events else "–"
    return [str(len(times.seconds)), digits(times.median), quartiles, events]


def facts(device: torch.device) -> dict[str, str]:
    """Return what a number is worth nothing without."""
    versions = {name: version(name) for name in ("triton", "numba", "numpy")}
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    host = f"{cpu_name()}, {platform.machine()}; {torch.get_num_threads()} threads, {load}"
    listed = {
        "command": shlex.join(["python", *sys.argv]),
        "device": device_name(device),
        "host": host,
        "torch": torch.__version__,
        **{name: found for name, found in versions.items() if found},
        "python": platform.python_version(),
        "weightnorm": f"{weightnorm.__version__}, commit {output_of('git', 'describe', '--always', '--dirty')}",
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
        listed["CUDA"] = f"{torch.version.cuda or torch.version.hip}, driver {driver}"
    return listed


def version(package: str) -> str:
    """Return the version of an installed package, or nothing."""
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else ""


def device_name(device: torch.device) -> str:
    """Return what the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({cpu_name()})"


def cpu_name() -> str:
    """Return the processor's name, where Linux tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or UNKNOWN
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{names[0]}, {len(names)} cores" if names else UNKNOWN


def output_of(*command: str) -> str:
    """Return what a program says, or that it is unknown."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return done.stdout.strip() or UNKNOWN


def slug(name: str) -> str:
    """Return a device's name as part of a file's: its first word, the maker's left out."""
    word = re.sub(r"^(NVIDIA|AMD|Intel)\s+", "", name).split()[0]
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")


def new_file(folder: Path, name: str) -> Path:
    """Return a path at which a file has just been made, numbered if the plain name is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / (f"{name}.md" if number == 1 else f"{name}_{number}.md")
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1
