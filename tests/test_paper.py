"""The table that stands beside the paper's, from made-up runs."""

import pytest

from test_compare import made_up, report
from weightnorm.compare.results import results
from weightnorm.tasks.cifar10 import PAPER
from weightnorm.tasks.task import Paper, PaperArm

SMALL = Paper(
    epochs=5,
    curve=("train", "error"),
    at=(0, 2, 4),
    levels=(12.0, 1.0),
    final=("test", "error"),
    arms={"plain": PaperArm({0: 40, 2: 9, 4: 3.5}, {12.0: 1}, 8.5)},
    notes=("A note.",),
)


@pytest.fixture
def record(monkeypatch):
    comparison = made_up(
        {("plain", 0.1, 0): [4, 3, 2], ("plain", 0.1, 1): [4, 3, 2], ("weight_norm", 0.1, 0): [1, 1, 1]}
    )
    monkeypatch.setattr(type(comparison.task), "paper", SMALL)
    return results(comparison, "weightnorm compare")


def test_epochs_are_those_at_the_same_place_in_the_schedule(record):
    columns = ["arm", "test error %", *(f"train error % at {epoch}" for epoch in (0, 1, 2))]
    assert record["paper"]["columns"] == [*columns, "first epoch at 12", "first epoch at 1", "seconds an epoch"]
    assert record["paper"]["rows"] == [
        [
            "plain",
            "20.00 ± 0.00 (8.5)",
            "10.00 ± 0.00 (40)",
            "10.00 ± 0.00 (9)",
            "10.00 ± 0.00 (3.5)",
            "0 (1)",
            "– (–)",
            "1.00, 1.00x",
        ],
        ["weight_norm", "20.00", "10.00", "10.00", "10.00", "0", "–", "0.50, 0.50x"],
    ]
    assert record["paper"]["notes"][2:] == [
        "The paper trained 5 epochs, this 3: epochs at the same place in the schedule.",
        "A note.",
    ]


def test_it_is_in_the_report(record, tmp_path):
    report(record, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "Beside the paper" in text
    assert "10.00 ± 0.00 (40)" in text


def test_where_there_is_no_paper_there_is_no_table():
    record = results(made_up({("plain", 0.1, 0): [4, 3, 2]}), "weightnorm compare")
    assert record["paper"] is None


def test_the_numbers_are_the_papers():
    """Figure 2, and what can be read off figure 1: errors fall, and the first epochs agree with them."""
    tests = {name: arm.final for name, arm in PAPER.arms.items()}
    expected = {
        "plain": 8.43,
        "plain_released": 8.43,
        "weight_norm": 8.46,
        "weight_norm_mean_only": 7.31,
        "batch_norm": 8.05,
        "mean_only": 8.52,
    }
    assert tests == expected
    for arm in PAPER.arms.values():
        errors = [arm.curve[epoch] for epoch in PAPER.at]
        assert errors == sorted(errors, reverse=True)
        for level, first in arm.first_epoch.items():
            for epoch, error in arm.curve.items():
                assert abs(epoch - first) < 3 or (error <= level) == (epoch > first), (level, first, epoch)
