"""The settings against the paper's, and how they shrink with the budget."""

import pytest

from weightnorm.errors import UserError
from weightnorm.tasks.dqn import settings
from weightnorm.tasks.dqn.settings import FIGURE_5, PAPER, PAPER_BUDGET, Settings

THE_PAPERS = Settings(
    budget=50_000_000,
    learning_starts=50_000,
    exploration=1_000_000,
    target_interval=10_000,
    evaluation=250_000,
    memory=1_000_000,
)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (PAPER_BUDGET, THE_PAPERS),
        (100_000_000, THE_PAPERS.__class__(100_000_000, 50_000, 1_000_000, 10_000, 250_000, 1_000_000)),
        (10_000_000, Settings(10_000_000, 50_000, 1_000_000, 10_000, 250_000, 1_000_000)),
        (1_000_000, Settings(1_000_000, 50_000, 100_000, 10_000, 50_000, 1_000_000)),
        (100_000, Settings(100_000, 5_000, 10_000, 1_000, 5_000, 100_000)),
        (6_000, Settings(6_000, 300, 600, 60, 300, 6_000)),
        (1_000, Settings(1_000, 48, 100, 8, 48, 1_000)),
    ],
)
def test_they_scale_with_the_budget_up_to_the_papers(budget, expected):
    assert Settings.scaled(budget) == expected
    in_steps = vars(expected).items()
    assert all(value % settings.UPDATE_EVERY == 0 for name, value in in_steps if name != "budget")


def test_the_memory_may_be_less():
    assert Settings.scaled(memory=5_000).memory == 5_000


def test_a_budget_too_small_to_learn_in_is_refused():
    with pytest.raises(UserError, match=r"^a budget of 999 steps is too small; give 1,000 or more$"):
        Settings.scaled(999)


def test_the_papers_numbers_are_complete():
    assert PAPER.keys() == {"Breakout", "Enduro", "Seaquest", "SpaceInvaders"}
    assert PAPER["SpaceInvaders"] == (1_779, 2_179, 1_975)
    best = [max(arm) for arm in zip(*FIGURE_5.values(), strict=True)]
    assert best < list(PAPER["SpaceInvaders"][:2])  # the table has single epochs, the figure means of eleven
    assert settings.RATES.keys() == {"plain", "weight_norm"}
