"""What ``weightnorm inspect``, ``convert`` and ``fold`` do once their options are read."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from weightnorm.checkpoints.convert import convert
from weightnorm.checkpoints.files import SAFETENSORS, TORCH_SUFFIXES, File, read, write
from weightnorm.checkpoints.nested import StateDict, change_state_dicts, holds_optimizer
from weightnorm.checkpoints.request import Said, refuse_nothing, request_of
from weightnorm.checkpoints.respell import Made
from weightnorm.checkpoints.shards import INDEX, Shards, find_index, read_shards, write_shards
from weightnorm.checkpoints.spelling import Spelling, Stored, find
from weightnorm.checkpoints.table import COLUMNS, counted, row, summary
from weightnorm.errors import UserError


@dataclass
class Found:
    """What a walk through a file found.

    Attributes:
        weights: the normalised weights, named after where they lie.
        others: how many other tensors are beside them.
    """

    weights: list[Stored] = field(default_factory=list)
    others: int = 0

    def add(self, path: str, sd: StateDict, weights: Sequence[Stored]) -> None:
        """Count a state dict in."""
        taken = {key for stored in weights for key in stored.keys}
        self.weights += [replace(stored, name=path + stored.name) for stored in weights]
        self.others += sum(isinstance(value, Tensor) for key, value in sd.items() if key not in taken)


def inspect_file(source: Path) -> None:
    """Print which weights of a file are normalised, along which axis, and what their lengths are.

    Args:
        source: the file, an index of several, or a folder with one.

    Raises:
        UserError: if it cannot be read, or holds no weights.
    """
    found = Found()

    def look(path: str, sd: StateDict) -> StateDict:
        found.add(path, sd, find(sd))
        return copy(sd)

    change_state_dicts(_read(source).content, look)
    _check(found, source)
    if found.weights:
        _print_table([row(stored) for stored in found.weights])
    click.echo(summary(found.weights, found.others))


def convert_file(source: Path, out: Path, to: Spelling, dim: Said = "auto", keys: Sequence[str] | None = None) -> None:
    """Write a file with its weights in another spelling, and say in a line what was done.

    Args:
        source: the file, an index of several, or a folder with one.
        out: where to; may be ``source``. The suffix says the format. Of an index, a folder (or an index in it) gets as
            many files as there were, and a name with a suffix one file with everything.
        to: the spelling.
        dim: as in ``convert_state_dict``.
        keys: likewise.

    Raises:
        UserError: if something cannot be read, told or written; then nothing is.
    """
    spread = find_index(source) is not None and (out.is_dir() or out.name.endswith(INDEX) or not out.suffix)
    if not spread and out.suffix not in (SAFETENSORS, *TORCH_SUFFIXES, source.suffix):
        known = ", ".join([SAFETENSORS, *filter(None, TORCH_SUFFIXES)])
        raise UserError(f"cannot tell the format of {out} by its suffix; use one of {known}")
    before = _read(source)
    content, found = _converted(before.content, source, to, dim, keys)
    if isinstance(before, Shards) and spread:
        write_shards(
            out if out.name.endswith(INDEX) else out / before.index.name, before.changed(content, found.weights, to)
        )
    else:
        write(out, File(content, before.metadata))
    done = f"{counted(found.weights)} -> {to}" if found.weights else "no normalised weights"
    click.echo(f"{done}; {found.others} other tensor{'s' * (found.others != 1)} carried; wrote {out}")
    for note in _notes(content, before.metadata, out):
        click.echo(note)


def _read(source: Path) -> File | Shards:
    index = find_index(source)
    return read_shards(index) if index else read(source)


def _converted(content: Any, source: Path, to: Spelling, dim: Said, keys: Sequence[str] | None) -> tuple[Any, Found]:
    """Convert every state dict of a file; say what was found."""
    found = Found()
    made: Made = {}

    def change(path: str, sd: StateDict) -> StateDict:
        new, weights = convert(sd, request, made)
        found.add(path, sd, weights)
        return new

    try:
        request = request_of(to, None, dim, keys)
        content = change_state_dicts(content, change)
        _check(found, source)
        if not found.weights:
            refuse_nothing(request)
    except (ValueError, TypeError) as error:
        raise UserError(_printable(str(error))) from error
    return content, found


def _check(found: Found, source: Path) -> None:
    if not found.weights and not found.others:
        raise UserError(f"{source} holds no state dict: no tensors by name")


def _notes(content: Any, metadata: Mapping[str, str], out: Path) -> Iterator[str]:
    """Say what a user may not expect of the file written."""
    if holds_optimizer(content):
        yield (
            "the optimizer's state is carried unchanged: it still belongs to g and v as they were; "
            "weightnorm.from_module_form carries it over to the optimizer form"
        )
    if set(metadata) - {"format"} and out.suffix in TORCH_SUFFIXES[1:]:
        names = ", ".join(map(_printable, sorted(metadata)))
        yield f"metadata left behind, which torch's format has no place for: {names}"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width: let the table have its own
    table = Table(header_style="bold")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, overflow="fold", justify="left" if index < 4 else "right")
    for cells in rows:
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    console.print(table)


def _printable(text: str) -> str:
    """Return text with what would steer a terminal spelled out: names in a file are anybody's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
