"""A comparison beside what the paper reports of the same experiment."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from weightnorm.compare.arms import PLAIN
from weightnorm.compare.best import Best, curve
from weightnorm.compare.evidence import spread
from weightnorm.compare.table import NOTHING
from weightnorm.tasks.task import Paper, Task


def beside_paper(task: Task, best: Mapping[str, Best], epochs: int) -> dict[str, Any] | None:
    """Return the table of a comparison's arms beside the paper's.

    Args:
        task: knows what the paper reports, and what its measures are called.
        best: the runs of each arm at its best setting, by its name.
        epochs: how long the comparison's schedule is.

    Returns:
        ``columns``, ``rows`` of cells, and ``notes``, for people; None, if there is no paper.
    """
    paper = task.paper
    if paper is None:
        return None
    last, theirs = epochs - 1, paper.epochs - 1
    at = {epoch: round(epoch * last / theirs) if paper.scaled else epoch for epoch in paper.at}
    at = {there: here for there, here in at.items() if here <= last}
    along, final = (f"{part} {task.measures[name].label}" for part, name in (paper.curve, paper.final))
    columns = ["arm", final, *(f"{along} at {here}" for here in at.values())]
    columns += [f"first epoch at {level:g}" for level in paper.levels] + ["seconds an epoch"]
    plain = best.get(PLAIN)
    digits = max(2, task.measures[paper.final[1]].digits)
    rows = [_row(name, arm, paper, at, plain, digits) for name, arm in best.items()]
    notes = ["In brackets: the paper's. Epochs are counted from 0."]
    if paper.curve[0] == "train":
        notes.append("Training errors are those during the epoch, noise and dropout active.")
    if epochs != paper.epochs:
        how = "at the same place in the schedule" if paper.scaled else "of the same number"
        notes.append(f"The paper trained {paper.epochs} epochs, this {epochs}: epochs {how}.")
    return {"columns": columns, "rows": rows, "notes": [*notes, *paper.notes]}


def _row(name: str, best: Best, paper: Paper, at: Mapping[int, int], plain: Best | None, digits: int) -> list[str]:
    histories = list(best.histories.values())
    curves = [curve(epochs, *paper.curve) for epochs in histories]
    ours = [_mean([curve(epochs, *paper.final)[-1] for epochs in histories], digits)]
    for here in at.values():
        ours.append(_mean([values[here] for values in curves if here < len(values)], digits))
    for level in paper.levels:
        first = [_first(level, values) for values in curves]
        reached = [epoch for epoch in first if epoch is not None]
        ours.append(f"{fmean(reached):.0f}" if reached and reached == first else NOTHING)
    theirs = paper.arms.get(name)
    if theirs is not None:
        published = [theirs.final, *map(theirs.curve.get, at), *map(theirs.first_epoch.get, paper.levels)]
        shown = [NOTHING if value is None else f"{value:.4g}" for value in published]
        ours = [f"{mine} ({other})" for mine, other in zip(ours, shown, strict=True)]
    return [name, *ours, _seconds(best, plain)]


def _seconds(best: Best, plain: Best | None) -> str:
    step = best.seconds_per_step()
    if step is None:
        return NOTHING
    base = plain.seconds_per_step() if plain else None
    return f"{step * best.window:.2f}" + (f", {step / base:.2f}x" if base else "")


def _first(level: float, errors: Sequence[float]) -> int | None:
    return next((epoch for epoch, error in enumerate(errors) if error <= level), None)


def _mean(values: Sequence[float], digits: int) -> str:
    found = spread(values)
    if found is None:
        return NOTHING
    error = "" if found.standard_error is None else f" ± {found.standard_error:.{digits}f}"
    return f"{found.mean:.{digits}f}{error}"
