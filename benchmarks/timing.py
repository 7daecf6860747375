"""Times arms side by side: one call of each in turn, round after round, so that whatever drifts hits all alike."""

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch

FLUSH_BYTES = 256 << 20  # several times the second-level cache of any GPU
Made = TypeVar("Made")
FEWEST = 5  # rounds that are run even when time is short


@dataclass(frozen=True)
class Arm:
    """What is timed.

    Attributes:
        step: the call.
        prepare: runs before each call, outside the clock.
        on_device: only the device's own time counts: the call is a single launch, of a recorded graph or a copy.
        calls: how often ``step`` is called a measurement, the host free to run ahead; the time is that of one.
    """

    step: Callable[[], object]
    prepare: Callable[[], None] = lambda: None
    on_device: bool = False
    calls: int = 1


@dataclass
class Times:
    """The seconds that an arm took, round by round, and those between the device's events (on a GPU)."""

    seconds: list[float] = field(default_factory=list)
    by_events: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)


@dataclass(frozen=True)
class Failure:
    """What kept an arm from being measured, in one line."""

    reason: str


def attempt(make: Callable[[], Made]) -> Made | Failure:
    """Return what ``make`` makes, or why it could not: an arm that fails must not take the others with it."""
    try:
        return make()
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        failure = Failure(f"{type(error).__name__}: {first_line[:200]}")
    free_memory()  # only now: until here the error's traceback held what the arm had allocated
    return failure


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    with suppress(RuntimeError):  # a device that has failed answers with what it failed of
        torch.cuda.empty_cache()


class Stopwatch:
    """Times one call on a device.

    On a GPU there are two honest clocks, for two questions.

    An eager step is timed on the wall, from an idle device until the device has finished: the host's time to launch it
    counts, as it does wherever the device waits for the host. The events' time is kept beside it; it lacks only the way
    to and from the device, so the wall's, the larger, is what is reported.

    A recorded graph is timed by events, queued behind the writing of the flush buffer: the host has launched it before
    the device gets there, so the time is that of its kernels and the gaps between them, and nothing of the host's.

    Args:
        device: where the work runs.
        flush: write a large buffer before each measurement, so that weights and state come from memory. Between the
            optimizer steps of a real training a whole forward and backward pass through the caches.
    """

    def __init__(self, device: torch.device, flush: bool):
        self._is_cuda = device.type == "cuda"
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if flush else None

    def measure(self, arm: Arm, times: Times) -> None:
        """Add one measurement of an arm to its times."""
        arm.prepare()
        if self._buffer is not None:
            self._buffer.zero_()
        if not self._is_cuda:
            times.seconds.append(self._wall(arm) / arm.calls)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if not arm.on_device:
            torch.cuda.synchronize()
        wall = self._wall(arm, start, end)
        by_events = start.elapsed_time(end) / 1e3
        times.by_events.append(by_events / arm.calls)
        times.seconds.append((by_events if arm.on_device else max(wall, by_events)) / arm.calls)

    def _wall(self, arm: Arm, start: torch.cuda.Event | None = None, end: torch.cuda.Event | None = None) -> float:
        begin = time.perf_counter()
        if start:
            start.record()
        for _ in range(arm.calls):
            arm.step()
        if end:
            end.record()
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def time_in_turn(
    arms: dict[str, Arm | Failure], stopwatch: Stopwatch, repeats: int, until: float
) -> dict[str, Times | Failure]:
    """Measure arms in rounds, each round beginning with the next of them.

    Args:
        arms: by name; a failure is handed on.
        stopwatch: of their device.
        repeats: rounds at most.
        until: when to stop, on the monotonic clock, once there are ``FEWEST`` rounds.

    Returns:
        The times by name, or what stopped an arm.
    """
    running = {name: arm for name, arm in arms.items() if isinstance(arm, Arm)}
    results: dict[str, Times | Failure] = {name: Times() if name in running else arms[name] for name in arms}
    for turn in range(repeats):
        if turn >= FEWEST and time.monotonic() > until:
            break
        names = list(running)
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            failed = attempt(partial(stopwatch.measure, running[name], results[name]))
            if isinstance(failed, Failure):
                results[name] = failed
                del running[name]
    return results


def copy_arm(device: torch.device, size: int) -> Arm:
    """Return a copy of so many bytes: the yardstick, run among the arms and measured like them.

    It moves twice as many: each is read once and written once. Not zeros, which some memories move faster.
    """
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return Arm(lambda: target.copy_(source), on_device=True)
