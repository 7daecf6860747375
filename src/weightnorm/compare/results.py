"""What a comparison measured, as a dict that goes to JSON as it is: every run's numbers, and each arm at its best."""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from weightnorm._version import __version__
from weightnorm.compare.arms import PLAIN, Arm
from weightnorm.compare.best import Best, best_of, compared_epochs, curves, step_losses
from weightnorm.compare.evidence import mean_ratio, spread, verdict
from weightnorm.compare.loop import Comparison
from weightnorm.compare.paper import beside_paper
from weightnorm.compare.run import Run
from weightnorm.compare.table import Record


def results(comparison: Comparison, command: str, of_the_task: Mapping[str, Any] = MappingProxyType({})) -> Record:
    """Sum up a comparison, finished or not.

    Args:
        comparison: the runs.
        command: what was typed.
        of_the_task: what was asked of the task itself, for the reader.

    Returns:
        A dict of JSON's types; numbers that are not finite are None. An interrupted comparison is summed up at the
        number of epochs that all its runs have done.
    """
    options, task = comparison.options, comparison.task
    epochs = compared_epochs(comparison.runs)
    runs = {arm: [run for run in comparison.runs if run.arm is arm] for arm in options.arms}
    asked = epochs, task.steps_per_epoch, task.headline if task.holdout else None
    best = {arm: best_of(runs[arm], options.settings(arm), *asked) for arm in options.arms}
    plain = next((best[arm] for arm in options.arms if arm.name == PLAIN), None)
    record = {
        "task": task.name,
        "command": command,
        "device": device_name(task.device),
        "versions": versions(),
        "seeds": sorted({run.seed for run in comparison.runs if run.epochs}),
        "measures": task.measures,
        "headline": task.headline,
        "finals": task.finals,
        "arms": {arm.name: _arm_record(arm, best[arm], runs[arm], plain, task.measures) for arm in options.arms},
        "paper": beside_paper(task, {arm.name: best[arm] for arm in options.arms}, options.epochs),
        "finished": comparison.finished,
        "options": {
            "seeds": options.seeds,
            "epochs": options.epochs,
            "epochs_compared": epochs,
            "steps_per_epoch": task.steps_per_epoch,
            "lr": list(options.lrs),
            "g_lr": list(options.g_lrs),
            "form": options.form,
            "precision": options.precision,
            "holdout": task.holdout,
            "of_the_task": of_the_task,
        },
    }
    return dict(to_json(record))


def device_name(device: torch.device) -> str:
    """Return what ran, for a reader of the numbers."""
    if device.type == "cuda":
        cudnn = torch.backends.cudnn
        how = ["TF32 convolutions"] * cudnn.allow_tf32 + ["deterministic"] * cudnn.deterministic
        return f"{device} ({', '.join([torch.cuda.get_device_name(device), *how])})"
    threads = torch.get_num_threads()
    return f"{device} ({platform.machine()}, {threads} thread{'s' * (threads > 1)})"


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    return {
        "weightnorm": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _arm_record(arm: Arm, best: Best, runs: list[Run], plain: Best | None, measures: Iterable[str]) -> Record:
    """Return an arm at its best: means over seeds per epoch, where it ended, how it compares with plain, every run."""
    histories = [curves(epochs, measures) for epochs in best.histories.values()]
    finished = [run.finals for run in runs if run.setting == best.setting]
    return {
        "description": arm.description,
        "lr": best.setting.lr,
        "g_lr": best.setting.g_lr,
        **{name: _mean_curve([history[name] for history in histories]) for name in curves((), measures)},
        "final": {name: spread([history[name][-1] for history in histories]) for name in curves((), measures)},
        "finals": {name: spread([finals[name] for finals in finished]) for name in finished[0]}
        if finished and all(finished)
        else {},
        "seconds_per_step": best.seconds_per_step(),
        **(_against_plain(best, plain) if plain else _NO_PLAIN),
        "runs": [_run_record(run, measures) for run in runs],
    }


_NO_PLAIN: Record = {
    "steps_to_plain": None,
    "seconds_to_plain": None,
    "steps_vs_plain": None,
    "step_time_vs_plain": None,
    "verdict": "plain was not run",
}


def _against_plain(best: Best, plain: Best) -> Record:
    """Return how soon an arm reaches plain's final training loss, seed by seed, and what that is evidence of."""
    targets = plain.final_losses()
    steps, plain_steps = best.steps_to(targets), plain.steps_to(targets)
    reached = {seed: count for seed, count in steps.items() if count is not None}
    ratio = mean_ratio([(count, plain_steps[seed] or math.nan) for seed, count in reached.items()])
    seconds, plain_seconds = best.seconds_per_step(), plain.seconds_per_step()
    all_reached = len(reached) == len(steps) > 0
    mean_steps = fmean(reached.values()) if all_reached else None
    return {
        "steps_to_plain": mean_steps,
        "seconds_to_plain": mean_steps * seconds if mean_steps and seconds else None,
        "steps_vs_plain": ratio,
        "step_time_vs_plain": seconds / plain_seconds if seconds and plain_seconds else None,
        "verdict": "reference" if best is plain else verdict(ratio, len(reached), len(steps)),
    }


def _run_record(run: Run, measures: Iterable[str]) -> Record:
    return {
        "lr": run.setting.lr,
        "g_lr": run.setting.g_lr,
        "seed": run.seed,
        "diverged": run.diverged,
        **curves(run.epochs, measures),
        "finals": run.finals,
        "seconds": [epoch.seconds for epoch in run.epochs],
        "step_loss": step_losses(run.epochs),
    }


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over seeds, per epoch, as far as every seed has come."""
    return [fmean(values) for values in zip(*curves, strict=False)]


def to_json(value: Any) -> Any:
    """Return a value in JSON's types: named tuples become objects, numbers that are not finite None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value
