"""How much memory a replay memory takes, and how much of it there is."""

import math
import os
from pathlib import Path

from weightnorm.errors import UserError

FRAMES = (4, 84, 84)  # uint8, kept once: the next step's are those of the transition after it
_GIGA = 1e9


def replay_bytes(size: int, shape: tuple[int, ...] = FRAMES) -> int:
    """Return the bytes of stable-baselines3's replay memory with its ``optimize_memory_usage``.

    Args:
        size: transitions.
        shape: of an observation, uint8.
    """
    return size * (math.prod(shape) + 8 + 3 * 4)  # an action; reward, end and cut-off


def free_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that a process can still have: what Linux, or its container, says; elsewhere half of all."""
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int((group / "memory.current").read_text()))
    return free


def fitting(wanted: int, players: int, free: int | None = None) -> int:
    """Return how many transitions each of some players may keep: so many, or what fits in half of the free memory.

    Args:
        wanted: at most.
        players: how many replay memories there will be at a time.
        free: bytes; None: ``free_memory()``.
    """
    free = free_memory() if free is None else free
    return min(wanted, free // 2 // players // replay_bytes(1))


def check_fits(size: int, players: int, free: int | None = None) -> str:
    """Say in a line how much memory the replay memories will take.

    Args:
        size: transitions in each.
        players: how many replay memories there will be at a time.
        free: bytes; None: ``free_memory()``.

    Raises:
        UserError: if that is more than there is.
    """
    free = free_memory() if free is None else free
    needed = replay_bytes(size) * players
    line = f"{size:,} transitions for each of {players} players take {needed / _GIGA:.2f} GB"
    if needed > free:
        most = max(free, 0) // players // replay_bytes(1)
        raise UserError(f"replay memory: {line}, {free / _GIGA:.2f} GB are free; {most:,} fit")
    return f"replay memory: {line} of {free / _GIGA:.2f} GB free"
