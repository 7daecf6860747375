"""A comparison of agents as people see it: a table, the paper's beside it, a sentence and curves."""

import math
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weightnorm.compare.arms import PLAIN
from weightnorm.compare.curves import COLOURS, draw_mean
from weightnorm.compare.table import NOTHING, Record, counted, number_text, rates_text, spread_text
from weightnorm.compare.view import Table, View
from weightnorm.tasks.dqn import settings

_PAPERS_EPOCH = 250_000  # steps


def games_view(record: Record) -> View:
    """Return what to show of ``games_record``."""
    return View(
        title=f"dqn: {record['game']}",
        evidence=_evidence(record),
        table=_table(record),
        paper=_beside_paper(record),
        curves=draw_scores(record),
        caption=f"Mean score of {counted(record['options']['episodes'], 'game')} after each epoch, and mean loss of "
        f"its updates; the band is one standard error either side, over {_over(record)}.",
    )


def _evidence(record: Record) -> str:
    """Say in one sentence what the evidence is."""
    options = record["options"]
    if not options["epochs_compared"]:
        return "No evidence: no epoch was finished."
    found = [f"{name} {spread_text(arm['end'], 1)} ({_verdict(name, arm)})" for name, arm in record["arms"].items()]
    steps = max(max(run["steps"], default=0) for arm in record["arms"].values() for run in arm["runs"])
    return (
        f"{record['game']} after {steps:,} steps, {counted(options['seeds'], 'seed')}: {'; '.join(found)}; "
        f"random play scores {spread_text(record['random_play'], 1)}."
    )


def _verdict(name: str, arm: Record) -> str:
    """Say what the difference to plain's score is evidence of."""
    against = arm["vs_plain"]
    if name == PLAIN:
        return "reference"
    if arm["end"] and arm["end"]["mean"] is None:
        return "diverged"
    if against is None:
        return "nothing to compare"
    if against["low"] is None:
        return "one seed: no verdict"
    if against["low"] <= 0 <= against["high"]:
        return "no difference"
    return "higher" if against["mean"] > 0 else "lower"


def _table(record: Record) -> Table:
    columns = ["arm", "lr", "score at the end", "minus plain's", "highest score", "time of an update", "verdict"]
    rows = [
        [
            name,
            rates_text(arm["lr"], arm["g_lr"]),
            spread_text(arm["end"], 1),
            _difference(arm["vs_plain"]) if name != PLAIN else NOTHING,
            spread_text(arm["highest"], 1),
            number_text(arm["update_time_vs_plain"], ".2f", "x"),
            _verdict(name, arm),
        ]
        for name, arm in record["arms"].items()
    ]
    return Table(columns, rows, _notes(record))


def _notes(record: Record) -> list[str]:
    options, versions = record["options"], record["versions"]
    lines = [
        f"{record['game']}, {options['budget']:,} steps of four frames, {counted(options['seeds'], 'seed')}, on "
        f"{record['device']}, torch {versions['torch']}, stable-baselines3 {versions['stable-baselines3']}, "
        f"ale-py {versions['ale-py']}.",
        f"A score is the mean of the points of {counted(options['episodes'], 'game')}, apart from training, with "
        f"{settings.TEST_EPSILON:.0%} of the actions random, up to {settings.NO_OPS} no-ops at the start and at most "
        f"{options['max_frames']:,} frames. It is taken every {options['evaluation']:,} steps; at the end: mean of the "
        f"last {options['last']} of {options['epochs_compared']}. ± is the standard error over seeds; in "
        "brackets: 95 % interval. The time of an update, play apart, is in plain's.",
        f"For this budget: random play for {options['learning_starts']:,} steps, ε falls over "
        f"{options['exploration']:,}, the target network is renewed every {options['target_interval']:,}, the last "
        f"{options['memory']:,} transitions are kept.",
    ]
    if not record["finished"]:
        lines.append(f"It was interrupted after {options['epochs_compared']} of {options['epochs']} epochs.")
    return lines


def _beside_paper(record: Record) -> Table | None:
    if record["paper"] is None:
        return None
    theirs = record["paper"]
    rows = [[name, spread_text(arm["highest"], 1), f"{theirs[name]:,}"] for name, arm in record["arms"].items()]
    notes = [
        f"The paper trained {settings.PAPER_BUDGET:,} steps once, scored 200 epochs and reports the highest; Mnih et "
        f"al. 2015: {theirs['mnih']:,}. Random play here: {spread_text(record['random_play'], 1)}.",
    ]
    if record["options"]["budget"] < settings.PAPER_BUDGET:
        notes.append(f"This trained for {record['options']['budget']:,}: the columns are not to be compared.")
    return Table(["arm", "highest score here", "highest score in the paper"], rows, notes)


def draw_scores(record: Record) -> Figure:
    """Draw score and loss against steps, and the paper's Figure 5 as far as it goes.

    Args:
        record: what ``games_record`` returned.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_score, by_loss = figure.subplots(1, 2)
    by_score.set(title=f"{record['game']}: mean score", xlabel="steps")
    by_loss.set(title="mean loss of an epoch's updates", xlabel="steps")
    for name, arm in record["arms"].items():
        runs = [run for run in arm["runs"] if run["steps"]]
        steps: list[int] = max((run["steps"] for run in runs), key=len, default=[])
        draw_mean(by_score, steps, _score_curves(runs), name)
        draw_mean(by_loss, steps, [[math.nan if x is None else x for x in run["loss"]] for run in runs], name)
    _draw_figure_5(by_score, record)
    if record["random_play"]:
        by_score.axhline(record["random_play"]["mean"], color="grey", linestyle=":", label="random play")
    by_score.legend(fontsize="small")
    return figure


def _score_curves(runs: list[Record]) -> list[list[float]]:
    """Return curves to average: of the seeds or, if there is but one, of its games."""
    if len(runs) == 1:
        return [list(game) for game in zip(*runs[0]["scores"], strict=True)]
    return [[fmean(scores) for scores in run["scores"]] for run in runs]


def _draw_figure_5(axes: Axes, record: Record) -> None:
    """Draw the paper's means as far as the budget goes, in the arms' colours."""
    points: dict[int, list[int]] = {int(at) * _PAPERS_EPOCH: pair for at, pair in record["figure_5"].items()}
    steps = [at for at in points if at <= record["options"]["budget"]]
    for index, name in enumerate((PLAIN, "weight_norm")):
        if steps:
            axes.plot(
                steps, [points[at][index] for at in steps], "--", color=COLOURS[name], label=f"{name}, the paper's"
            )


def _over(record: Record) -> str:
    return "seeds" if record["options"]["seeds"] > 1 else "games"


def _difference(value: Record | None) -> str:
    if value is None:
        return NOTHING
    interval = "" if value["low"] is None else f" ({value['low']:+.1f} to {value['high']:+.1f})"
    return f"{value['mean']:+.1f}{interval}"
