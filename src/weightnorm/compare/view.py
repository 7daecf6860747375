"""What a reader sees of a comparison, on a terminal and on a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from weightnorm.compare.curves import draw_curves
from weightnorm.compare.table import Record, columns, evidence, notes, rows


@dataclass(frozen=True)
class Table:
    """A table of cells, and what one needs to know to trust it, a sentence or two each."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


@dataclass(frozen=True)
class View:
    """What is shown.

    Attributes:
        title: what was compared.
        evidence: what was found, in a sentence.
        table: the arms.
        paper: the same beside what the paper reports, if it does.
        curves: the figure.
        caption: what it shows.
    """

    title: str
    evidence: str
    table: Table
    paper: Table | None
    curves: Figure
    caption: str


@dataclass(frozen=True)
class Summary:
    """What a comparison found: for machines, for people, and what its models draw (name of a PNG -> its content)."""

    record: Record
    view: View
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def view(record: Record) -> View:
    """Return what to show of ``results.results``."""
    return View(
        title=f"{record['task']}: {len(record['arms'])} arms compared",
        evidence=evidence(record),
        table=Table(columns(record), rows(record), notes(record)),
        paper=Table(**record["paper"]) if record["paper"] else None,
        curves=draw_curves(record),
        caption="Each arm at its best, the mean over seeds; the band is one standard error either side. Training loss "
        f"is averaged over the last {record['options']['steps_per_epoch']} steps.",
    )
