"""What the curves prove: how soon a run reaches a loss, and whether arms differ by more than their seeds do."""

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean, stdev
from typing import NamedTuple

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; from 30 on the normal one is near enough (2 %).
_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


class Spread(NamedTuple):
    """A mean over seeds, its standard error (None for one seed) and the number of seeds."""

    mean: float
    standard_error: float | None
    n: int


class Interval(NamedTuple):
    """A mean over seeds (of ratios: geometric), its 95 % interval (None for one seed), and the number of seeds."""

    mean: float
    low: float | None
    high: float | None
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and standard error over seeds, or None of nothing; NaN where one of them is not finite."""
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return Spread(math.nan, None, len(values))
    return Spread(fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None, len(values))


def trailing_means(losses: Sequence[float], window: int) -> list[float]:
    """Return the mean over the last ``window`` steps, at each step that has so many before it (itself included)."""
    sums = [0.0, *accumulate(losses)]
    return [(after - before) / window for before, after in zip(sums, sums[window:], strict=False)]


def steps_to_reach(target: float, losses: Sequence[float], window: int) -> int | None:
    """Return after how many steps the mean loss over the last ``window`` steps is first at or under a target.

    Args:
        target: a loss.
        losses: the loss at every step.
        window: how many steps are averaged.

    Returns:
        The number of steps, at least ``window``; None if it is never reached.

    Example:
        >>> steps_to_reach(2.0, [4.0, 3.0, 2.0, 2.0, 1.0], window=2)
        4
    """
    means = trailing_means(losses, window)
    return next((window + i for i, mean in enumerate(means) if mean <= target), None)


def mean_difference(pairs: Sequence[tuple[float, float]]) -> Interval | None:
    """Return the mean of ``ours - theirs`` over seeds, with its t-interval.

    Args:
        pairs: ``(ours, theirs)``, a pair a seed.

    Returns:
        The difference; None of nothing, or where one is not finite.

    Example:
        >>> mean_difference([(5, 1), (6, 1), (7, 1)])
        Interval(mean=5..., low=2.51..., high=7.48..., n=3)
    """
    return _interval([ours - theirs for ours, theirs in pairs])


def mean_ratio(pairs: Sequence[tuple[float, float]]) -> Interval | None:
    """Return the mean of ``ours/theirs`` over seeds, with the t-interval of its logarithm.

    Args:
        pairs: ``(ours, theirs)``, a pair a seed, positive.

    Returns:
        The ratio, or None of nothing.

    Example:
        >>> mean_ratio([(5, 10), (6, 10), (7, 10)])
        Interval(mean=0.594..., low=0.391..., high=0.903..., n=3)
    """
    logs = _interval([math.log(ours / theirs) for ours, theirs in pairs])
    if logs is None:
        return None
    mean, low, high = (None if value is None else math.exp(value) for value in logs[:3])
    return Interval(mean or 0.0, low, high, logs.n)


def _interval(values: Sequence[float]) -> Interval | None:
    found = spread(values)
    if found is None or not math.isfinite(found.mean):
        return None
    if found.standard_error is None:
        return Interval(found.mean, None, None, found.n)
    half = _T[min(found.n - 1, len(_T)) - 1] * found.standard_error
    return Interval(found.mean, found.mean - half, found.mean + half, found.n)


def verdict(ratio: Interval | None, reached: int, seeds: int) -> str:
    """Say what the steps to plain's final loss, relative to plain's own, are evidence of.

    Args:
        ratio: over the seeds that reached it.
        reached: how many did.
        seeds: of how many.

    Returns:
        "fewer steps", "more steps" or "no difference" (the 95 % interval includes 1); or why there is no verdict.
    """
    if reached == 0 or ratio is None:
        return "never reached"
    if reached < seeds:
        return f"reached by {reached} of {seeds} seeds"
    if ratio.low is None or ratio.high is None:
        return "one seed: no verdict"
    if ratio.low <= 1 <= ratio.high:
        return "no difference"
    return "fewer steps" if ratio.mean < 1 else "more steps"
