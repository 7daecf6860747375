"""The table and the sentence: what a comparison found, in words that a terminal and a page share."""

from typing import Any

from weightnorm.compare.arms import PLAIN
from weightnorm.tasks import shown

Record = dict[str, Any]
NOTHING = "–"


def columns(results: Record) -> list[str]:
    """Return the names of the table's columns."""
    fixed = [
        "arm",
        "lr",
        "steps",
        "of plain's",
        "seconds",
        "step time",
        f"train {results['measures']['loss']['label']}",
    ]
    tests = [f"test {measure['label']}" for measure in results["measures"].values()]
    return [*fixed, *tests, *(measure["label"] for measure in results["finals"].values()), "verdict"]


def rows(results: Record) -> list[list[str]]:
    """Return the table's rows, a list of cells per arm, in the order of ``columns``."""
    return [_row(name, arm, results) for name, arm in results["arms"].items()]


def notes(results: Record) -> list[str]:
    """Return what a reader needs to know to trust the table, a sentence or two each."""
    options, seeds = results["options"], len(results["seeds"])
    lines = [
        f"{results['task']}, {options['epochs_compared']} epochs of {options['steps_per_epoch']} steps, "
        f"{counted(seeds, 'seed')}, on {results['device']}, torch {results['versions']['torch']}, "
        f"{options['precision']}. "
        "± is the standard error over seeds.",
        _choice(results),
        "Steps and seconds are those to plain's mean training loss over its last epoch, seed by seed: until an arm's "
        "own mean over an epoch's worth of steps is no higher. In brackets: 95 % interval. Step time is in plain's.",
    ]
    if options["holdout"]:
        lines.append(f"What is here called test is {options['holdout']:,} training examples held out.")
    if asked := {name: value for name, value in options["of_the_task"].items() if value is not None}:
        lines.append("Of the task: " + ", ".join(f"{name} {shown(value)}" for name, value in asked.items()) + ".")
    if len(options["g_lr"]) > 1:
        lines.append(
            f"Arms with weight normalization tried {_list(options['g_lr'])} as factors on the learning rate of lengths "
            "with each, so they had more settings to be best at."
        )
    if not results["finished"]:
        lines.append(f"It was interrupted: {options['epochs']} epochs and {options['seeds']} seeds were asked for.")
    return lines


def _choice(results: Record) -> str:
    """Say how each arm came by its learning rate."""
    options = results["options"]
    if not options["lr"]:
        return "Every arm ran at the learning rate that it has in the experiment."
    by = "the lowest training loss in the last epoch"
    if options["holdout"]:
        by = f"the lowest {results['measures'][results['headline']]['label']} on the held-out examples at the end"
    tried = _list(options["lr"])
    return f"Every arm tried the learning rates {tried} and is shown at its best: {by}, averaged over seeds."


def evidence(results: Record) -> str:
    """Say in one sentence what the evidence is."""
    arms, seeds = results["arms"], len(results["seeds"])
    if results["options"]["epochs_compared"] == 0:
        return "No evidence: no epoch was finished."
    if PLAIN not in arms:
        return "No evidence: the plain arm, which the others are measured against, was not run."
    others = [_finding(name, arm) for name, arm in arms.items() if name != PLAIN]
    if not others:
        return "No evidence: only the plain arm was run."
    return f"To plain's final training loss ({counted(seeds, 'seed')}): " + "; ".join(others) + "."


def _finding(name: str, arm: Record) -> str:
    ratio = arm["steps_vs_plain"]
    if ratio is None or arm["steps_to_plain"] is None:
        return f"{name} {arm['verdict']}"
    time = ratio["mean"] * arm["step_time_vs_plain"]
    return f"{name} took {ratio['mean']:.0%} of plain's steps and {time:.0%} of its time ({arm['verdict']})"


def _row(name: str, arm: Record, results: Record) -> list[str]:
    measures, final = results["measures"], arm["final"]
    return [
        name,
        rates_text(arm["lr"], arm["g_lr"]),
        number_text(arm["steps_to_plain"], ".0f"),
        _ratio(arm["steps_vs_plain"]),
        number_text(arm["seconds_to_plain"], ".1f"),
        number_text(arm["step_time_vs_plain"], ".2f", "x"),
        spread_text(final["train_loss"], measures["loss"]["digits"]),
        *(spread_text(final[f"test_{measured}"], measure["digits"]) for measured, measure in measures.items()),
        *(
            spread_text(arm["finals"].get(measured), measure["digits"])
            for measured, measure in results["finals"].items()
        ),
        arm["verdict"],
    ]


def number_text(value: float | None, form: str, unit: str = "") -> str:
    """Return a number for people, or a dash."""
    return NOTHING if value is None else f"{value:{form}}{unit}"


def spread_text(value: Record | None, digits: int) -> str:
    """Return a mean and its standard error for people."""
    if value is None:
        return NOTHING
    if value["mean"] is None:
        return "diverged"
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def rates_text(lr: float, g_lr: float | str | None) -> str:
    """Return an arm's learning rate for people, with the factor on that of lengths if it is not 1."""
    return f"{lr:g}" + ("" if g_lr in (None, 1.0) else f", g x {g_lr}")


def counted(count: int, thing: str) -> str:
    """Return ``3 seeds``, or ``1 seed``."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _ratio(value: Record | None) -> str:
    if value is None or value["mean"] is None:
        return NOTHING
    return f"{value['mean']:.0%}" + ("" if value["low"] is None else f" ({value['low']:.0%}-{value['high']:.0%})")


def _list(values: list[Any]) -> str:
    return ", ".join(map(str, values))
