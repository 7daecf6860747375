"""The command line for checkpoints: inspect, convert, fold. Read and checked without torch, like the rest of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

SPELLINGS = ("plain", "gv", "original")  # as in checkpoints/spelling.py, which imports torch


def _axis(context: click.Context, parameter: click.Parameter, text: str) -> int | str | None:
    try:
        return None if text == "none" else text if text == "auto" else int(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not an axis, 'none' or 'auto'.") from error


_source = click.argument("source", metavar="IN", type=click.Path(path_type=Path))
_out = click.argument("out", type=click.Path(path_type=Path))


@click.command()
@_source
def inspect(source: Path) -> None:
    """Show which weights of the checkpoint IN are normalised, and their lengths.

    IN is a .safetensors file, one of torch's, an index of several, or a folder with one. Nothing in it is run.
    """
    from weightnorm.checkpoints.command import inspect_file  # it imports torch, which help does without

    inspect_file(source)


@click.command(context_settings={"show_default": True})
@_source
@_out
@click.option(
    "--to",
    type=click.Choice(SPELLINGS),
    required=True,
    help="plain: weight; gv: weight_g and weight_v, as torch.nn.utils.weight_norm has them; original: "
    "parametrizations.weight.original0 and 1, as torch.nn.utils.parametrizations and this library have them.",
)
@click.option(
    "--dim",
    callback=_axis,
    metavar="AXIS",
    default="auto",
    help="The axis along which to write lengths; 'none': one for the whole tensor; 'auto': as they are. It also "
    "settles along which axis one-dimensional lengths run that fit several.",
)
@click.option(
    "--keys",
    multiple=True,
    metavar="PATTERN",
    help="Touch only weights of such names, as '*conv*.weight'; may be repeated. With --dim, plain weights of such "
    "names are normalised.",
)
def convert(source: Path, out: Path, keys: Sequence[str], **options: Any) -> None:
    """Write the checkpoint IN to OUT with its normalised weights spelled another way.

    Everything else is carried as it is. OUT's suffix says its format. It may be IN: it is replaced whole or not at all.
    """
    from weightnorm.checkpoints.command import convert_file

    convert_file(source, out, keys=keys or None, **options)


@click.command()
@_source
@_out
def fold(source: Path, out: Path) -> None:
    """Write the checkpoint IN to OUT with plain weights: convert --to plain."""
    from weightnorm.checkpoints.command import convert_file

    convert_file(source, out, to="plain")


COMMANDS = (inspect, convert, fold)
