"""What a comparison of agents measured, as a dict that goes to JSON as it is."""

import math
from collections.abc import Mapping
from importlib.metadata import version
from statistics import fmean
from typing import Any

from weightnorm.compare.arms import PLAIN, Arm
from weightnorm.compare.best import compared_epochs
from weightnorm.compare.evidence import mean_difference, spread
from weightnorm.compare.games.comparison import GamesComparison
from weightnorm.compare.games.run import GameRun
from weightnorm.compare.results import device_name, to_json, versions
from weightnorm.compare.table import Record
from weightnorm.tasks.dqn.playing import random_scores
from weightnorm.tasks.dqn.settings import FIGURE_5, PAPER

_LIBRARIES = "stable-baselines3", "ale-py", "gymnasium"


def games_record(comparison: GamesComparison, command: str) -> Record:
    """Sum up a comparison, finished or not.

    Args:
        comparison: the runs.
        command: what was typed.

    Returns:
        A dict of JSON's types; numbers that are not finite are None. Runs are compared over the epochs that all have
        done, those apart that diverged.
    """
    options = comparison.options
    epochs = compared_epochs(comparison.runs)
    runs = {arm: [run for run in comparison.runs if run.arm is arm] for arm in options.arms}
    plain = next((runs[arm] for arm in options.arms if arm.name == PLAIN), [])
    record = {
        "task": "dqn",
        "game": comparison.game,
        "command": command,
        "device": device_name(comparison.device),
        "versions": versions() | {name: version(name) for name in _LIBRARIES},
        "arms": {arm.name: _arm_record(arm, runs[arm], plain, epochs) for arm in options.arms},
        "random_play": spread(random_scores(comparison.game, comparison.max_frames)),
        "paper": PAPER.get(comparison.game),
        "figure_5": {str(at): points for at, points in FIGURE_5.items()} if comparison.game == "SpaceInvaders" else {},
        "finished": comparison.finished,
        "options": {
            **vars(comparison.settings),
            "seeds": options.seeds,
            "epochs": options.epochs,
            "epochs_compared": epochs,
            "last": last(epochs),
            "episodes": comparison.episodes,
            "max_frames": comparison.max_frames,
        },
    }
    return dict(to_json(record))


def last(epochs: int) -> int:
    """Return how many of so many epochs the score at the end is taken of: the last quarter."""
    return max(epochs // 4, 1)


def _arm_record(arm: Arm, runs: list[GameRun], plain: list[GameRun], epochs: int) -> Record:
    """Return where an arm ended, how it compares with plain, and every run."""
    ends, theirs = _ends(runs, epochs), _ends(plain, epochs)
    update, plain_update = _seconds_per_update(runs), _seconds_per_update(plain)
    return {
        "description": arm.description,
        "lr": runs[0].setting.lr if runs else None,
        "g_lr": runs[0].setting.g_lr if runs else None,
        "end": spread(list(ends.values())),
        "highest": spread([max(epoch.score for epoch in run.epochs[:epochs]) for run in runs if run.epochs[:epochs]]),
        "vs_plain": mean_difference([(end, theirs[seed]) for seed, end in ends.items() if seed in theirs]),
        "seconds_per_update": update,
        "update_time_vs_plain": update / plain_update if update and plain_update else None,
        "runs": [_run_record(run) for run in runs],
    }


def _ends(runs: list[GameRun], epochs: int) -> Mapping[int, float]:
    """Return seed -> mean score at the end, of runs that came so far; NaN of one that diverged."""
    came = [run for run in runs if epochs and (run.diverged or len(run.epochs) >= epochs)]
    return {
        run.seed: math.nan if run.diverged else fmean(epoch.score for epoch in run.epochs[:epochs][-last(epochs) :])
        for run in came
    }


def _seconds_per_update(runs: list[GameRun]) -> float | None:
    """Return what an update takes, over all epochs but each run's first with updates, in which kernels are compiled."""
    learned = [epoch for run in runs for epoch in [e for e in run.epochs if e.updates][1:]]
    updates = sum(epoch.updates for epoch in learned)
    return sum(epoch.seconds_of_updates for epoch in learned) / updates if updates else None


def _run_record(run: GameRun) -> dict[str, Any]:
    epochs = run.epochs
    return {
        "seed": run.seed,
        "diverged": run.diverged,
        "steps": [epoch.steps for epoch in epochs],
        "loss": [epoch.loss for epoch in epochs],
        "updates": [epoch.updates for epoch in epochs],
        "scores": [epoch.scores for epoch in epochs],
        "seconds": [epoch.seconds for epoch in epochs],
        "seconds_of_updates": [epoch.seconds_of_updates for epoch in epochs],
    }
