"""What data-dependent initialisation did to a model, for a program to read and for a person to print."""

from collections.abc import Mapping
from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True)
class LayerReport:
    """One layer, as its first call on the batch found and left its pre-activation; ranges run over its units.

    Attributes:
        name: the layer's name in the model; its type where the model is the layer.
        units: how many output units it has.
        mean_before: smallest and largest mean over units.
        std_before: smallest and largest standard deviation over units.
        mean_after: the same of the corrected output; far from 0 only in layers without a bias and in units left alone.
        std_after: the same; far from what was asked only in units left alone.
        left_alone: indices of the units that do not vary on the batch.
    """

    name: str
    units: int
    mean_before: Range
    std_before: Range
    mean_after: Range
    std_after: Range
    left_alone: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataInitReport:
    """What ``data_init`` did; printing it gives a table.

    Attributes:
        layers: one report per layer that was set, in the order of execution.
        left_out: the layers that were not set, by name, and why.
    """

    layers: tuple[LayerReport, ...]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        head = ("layer", "units", "mean before", "std before", "mean after", "std after", "left alone")
        table = [head, *map(_cells, self.layers)]
        widths = [max(len(row[column]) for row in table) for column in range(len(head))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in table]
        return "\n".join([*lines, *(f"{name} {reason}" for name, reason in self.left_out.items())])


def _cells(layer: LayerReport) -> tuple[str, ...]:
    ranges = (layer.mean_before, layer.std_before, layer.mean_after, layer.std_after)
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
