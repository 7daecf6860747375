"""A comparison beside what the paper reports of the same experiment."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from weightnorm.compare.arms import PLAIN
from weightnorm.compare.best import Best
from weightnorm.compare.evidence import spread
from weightnorm.compare.table import NOTHING
from weightnorm.tasks.task import Paper, PaperArm


def beside_paper(paper: Paper, best: Mapping[str, Best], epochs: int) -> dict[str, Any]:
    """Return the table of a comparison's arms beside the paper's.

    Args:
        paper: what it reports.
        best: the runs of each arm at its best setting, by its name.
        epochs: how long the comparison's schedule is.

    Returns:
        ``columns``, ``rows`` of cells, and ``notes``, for people.
    """
    # An epoch of the paper's is that at the same place in the schedule of ours.
    at = {epoch: round(epoch * (epochs - 1) / (paper.epochs - 1)) for epoch in paper.train_epochs}
    columns = ["arm", "test error %", *(f"train error % at {there}" for there in at.values())]
    columns += [f"first epoch at {level:g} %" for level in paper.levels] + ["seconds an epoch"]
    plain = best.get(PLAIN)
    rows = [_row(name, arm, paper.arms.get(name), at, paper, plain) for name, arm in best.items()]
    notes = ["In brackets: the paper's. Training errors are those during the epoch, noise and dropout active."]
    if epochs != paper.epochs:
        notes.append(
            f"The paper trained {paper.epochs} epochs, this {epochs}: epochs at the same place in the schedule."
        )
    return {"columns": columns, "rows": rows, "notes": [*notes, *paper.notes]}


def _row(
    name: str, best: Best, theirs: PaperArm | None, at: Mapping[int, int], paper: Paper, plain: Best | None
) -> list[str]:
    histories = list(best.histories.values())
    ours = [_mean([epochs[-1].test_error for epochs in histories])]
    for here in at.values():
        ours.append(_mean([epochs[here].train_error for epochs in histories if here < len(epochs)]))
    for level in paper.levels:
        first = [_first(level, [epoch.train_error for epoch in epochs]) for epochs in histories]
        reached = [epoch for epoch in first if epoch is not None]
        ours.append(f"{fmean(reached):.0f}" if reached and reached == first else NOTHING)
    if theirs is not None:
        published = [theirs.test_error, *(theirs.train_error[epoch] for epoch in at)]
        published += [theirs.first_epoch[level] for level in paper.levels]
        ours = [f"{mine} ({other:g})" for mine, other in zip(ours, published, strict=True)]
    return [name, *ours, _seconds(best, plain)]


def _seconds(best: Best, plain: Best | None) -> str:
    step = best.seconds_per_step()
    if step is None:
        return NOTHING
    base = plain.seconds_per_step() if plain else None
    return f"{step * best.window:.2f}" + (f", {step / base:.2f}x" if base else "")


def _first(level: float, errors: Sequence[float]) -> int | None:
    return next((epoch for epoch, error in enumerate(errors) if error <= level), None)


def _mean(values: Sequence[float]) -> str:
    found = spread(values)
    if found is None:
        return NOTHING
    return f"{found.mean:.2f}" + ("" if found.standard_error is None else f" ± {found.standard_error:.2f}")
