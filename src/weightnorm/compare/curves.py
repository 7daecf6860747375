"""The curves: training loss against steps and seconds, what people look at against epochs, an arm a colour."""

import math
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from weightnorm.compare.arms import ARMS
from weightnorm.compare.evidence import spread, trailing_means
from weightnorm.compare.table import Record

COLOURS = dict(zip(ARMS, matplotlib.color_sequences["tab10"], strict=False))


def draw_curves(results: Record) -> Figure:
    """Draw each arm at its best: its mean over seeds, and a band of one standard error either side.

    Args:
        results: what ``results.results`` returned.

    Returns:
        A figure of three panels.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_step, by_second, by_epoch = figure.subplots(1, 3)
    by_step.set(title="training loss", xlabel="steps", yscale="log")
    by_second.set(title="training loss", xlabel="seconds of training", yscale="log")
    headline = results["headline"]
    label = results["measures"][headline]["label"]
    by_epoch.set(title=f"{label} (solid: test, dotted: training)", xlabel="epochs")
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (by_step, by_second):
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    window = results["options"]["steps_per_epoch"]
    for name, arm in results["arms"].items():
        losses = [trailing_means(run, window) for run in _of_best(arm, "step_loss")]
        steps = range(window, window + min(map(len, losses), default=0))
        draw_mean(by_step, steps, losses, name)
        draw_mean(by_second, [step * arm["seconds_per_step"] for step in steps], losses, name)
        for part, line in (("test", "-"), ("train", ":")):
            curve = f"{part}_{headline}"
            draw_mean(by_epoch, range(1, 1 + len(arm[curve])), _of_best(arm, curve), name, line)
    by_step.legend(fontsize="small")
    return figure


def _of_best(arm: Record, measure: str) -> list[list[float]]:
    """Return a measure of the runs at an arm's best setting, with NaN for None."""
    runs = [run for run in arm["runs"] if (run["lr"], run["g_lr"]) == (arm["lr"], arm["g_lr"]) and run[measure]]
    return [[math.nan if value is None else value for value in run[measure]] for run in runs]


def draw_mean(axes: Axes, x: Sequence[float], curves: list[list[float]], name: str, linestyle: str = "-") -> None:
    """Draw the mean of several curves over the points that all have, and a band of one standard error either side.

    Args:
        axes: where.
        x: the points.
        curves: what to average at each.
        name: of the arm, which decides the colour.
        linestyle: as matplotlib has it.
    """
    spreads = [spread(values) for values in zip(*curves, strict=False)][: len(x)]
    points = [(at, s.mean, s.standard_error or 0.0) for at, s in zip(x, spreads, strict=False) if s]
    if not points:
        axes.plot([], [], color=COLOURS[name], label=name)
        return
    at, mean, band = (list(column) for column in zip(*points, strict=True))
    axes.plot(at, mean, linestyle, color=COLOURS[name], label=name, linewidth=1.2)
    low, high = ([m + sign * b for m, b in zip(mean, band, strict=True)] for sign in (-1, 1))
    axes.fill_between(at, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
