"""The arithmetic against the library's own arrays."""

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from weightnorm.errors import UserError
from weightnorm.tasks.dqn.memory import check_fits, fitting, free_memory, replay_bytes
from weightnorm.tasks.dqn.settings import MEMORY

GIGA = 10**9


@pytest.mark.parametrize(("size", "shape"), [(100, (4, 84, 84)), (1000, (4, 84, 84)), (64, (1, 36, 40))])
def test_it_takes_what_the_library_allocates(size, shape):
    pixels, actions = spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(6)
    memory = ReplayBuffer(size, pixels, actions, "cpu", optimize_memory_usage=True, handle_timeout_termination=False)
    allocated = [value.nbytes for value in vars(memory).values() if isinstance(value, np.ndarray)]
    assert len(allocated) == 5
    assert replay_bytes(size, shape) == sum(allocated)


def test_the_papers_takes_28_gigabytes():
    assert round(replay_bytes(MEMORY.paper) / GIGA, 1) == 28.2


@pytest.mark.parametrize(
    ("wanted", "players", "free", "size"),
    [(1_000_000, 1, 64 * GIGA, 1_000_000), (1_000_000, 2, 64 * GIGA, 566_491), (1_000, 6, GIGA, 1_000), (10, 1, 0, 0)],
)
def test_the_default_is_what_fits_in_half_of_what_is_free(wanted, players, free, size):
    assert fitting(wanted, players, free) == size
    if size < wanted:
        assert replay_bytes(size + 1) * players * 2 > free


def test_its_size_is_stated():
    stated = check_fits(100_000, 2, 16 * GIGA)
    assert stated == "replay memory: 100,000 transitions for each of 2 players take 5.65 GB of 16.00 GB free"


def test_one_that_does_not_fit_is_refused():
    most = GIGA // 2 // replay_bytes(1)
    check_fits(most, 2, GIGA)
    with pytest.raises(UserError, match=rf"^replay memory: .* take 1.00 GB, 1.00 GB are free; {most:,} fit$"):
        check_fits(most + 1, 2, GIGA)


@pytest.mark.parametrize(("limit", "free"), [(None, 2048), ("max", 2048), ("1500", 500), ("9999999", 2048)])
def test_free_is_what_the_system_and_the_container_leave(tmp_path, limit, free):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       4 kB\nMemFree:        1 kB\nMemAvailable:   2 kB\nHugePages_Total:       0\n")
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory(meminfo, tmp_path) == free


def test_elsewhere_it_is_half_of_all(tmp_path):
    assert 0 < free_memory(tmp_path / "none") < 2**50
    assert free_memory() > 0
