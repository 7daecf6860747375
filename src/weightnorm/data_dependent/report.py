"""What data-dependent initialisation did to a model, for a program to read and for a person to print."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from weightnorm.data_dependent.moments import Moments
from weightnorm.data_dependent.units import Units

Range = tuple[float, float]


@dataclass(frozen=True)
class LayerReport:
    """One layer, as its first call on the batch found and left its pre-activation; ranges run over its units.

    Attributes:
        name: the layer's name in the model; its type where the model is the layer.
        units: how many output units it has.
        mean_before: smallest and largest mean over units.
        std_before: smallest and largest standard deviation over units.
        mean_after: the same of the corrected output; far from 0 only in layers without a bias, before mean-only batch
            normalization, and in units left alone.
        std_after: the same; far from what was asked only in units left alone.
        lengths: smallest and largest ``|g| = ‖w‖`` afterwards.
        left_alone: indices of the units that do not vary on the batch.
    """

    name: str
    units: int
    mean_before: Range
    std_before: Range
    mean_after: Range
    std_after: Range
    lengths: Range
    left_alone: tuple[int, ...] = ()

    @classmethod
    def of(cls, units: Units, before: Moments, after: Moments) -> "LayerReport":
        """Return the report on units, from what was measured before and after they were set."""
        measured = map(_spread, (before.mean, before.std, after.mean, after.std, units.lengths()))
        left_alone = tuple(before.is_constant().nonzero().flatten().tolist())
        return cls(units.name, units.count, *measured, left_alone)  # type: ignore[call-arg, arg-type]


@dataclass(frozen=True)
class DataInitReport:
    """What ``data_init`` did; printing it gives a table, ``rich.print`` a prettier one.

    Attributes:
        layers: one report per layer that was set, in the order of execution.
        left_out: the layers that were not set, by name, and why.
    """

    layers: tuple[LayerReport, ...]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        table = [_HEAD, *map(_cells, self.layers)]
        widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in table]
        return "\n".join([*lines, *self._notes()])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(caption="\n".join(self._notes()) or None, caption_justify="left")
        for column, name in enumerate(_HEAD):
            table.add_column(name, justify="right" if column else "left")
        for layer in self.layers:
            table.add_row(*_cells(layer))
        return table

    def _notes(self) -> list[str]:
        return [f"{name} {reason}" for name, reason in self.left_out.items()]


_HEAD = ("layer", "units", "mean before", "std before", "mean after", "std after", "g after", "left alone")


def _cells(layer: LayerReport) -> tuple[str, ...]:
    ranges = (layer.mean_before, layer.std_before, layer.mean_after, layer.std_after, layer.lengths)
    return (layer.name, str(layer.units), *map(_range, ranges), listed(layer.left_alone) or "-")


def _range(ends: Range) -> str:
    low, high = (f"{end + 0.0:.3g}" for end in ends)  # −0 + 0 = 0
    return f"{low} to {high}"


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Pad a row's cells: names to the left, numbers to the right."""
    return [
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def listed(units: tuple[int, ...], most: int = 8) -> str:
    """Return indices for a person: the first few, and how many more."""
    more = f" and {len(units) - most} more" if len(units) > most else ""
    return ", ".join(map(str, units[:most])) + more


def _spread(values: Tensor) -> Range:
    """Return the smallest and the largest."""
    return float(values.min()), float(values.max())
