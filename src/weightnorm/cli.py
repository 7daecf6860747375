"""The command line. Options are read and checked without torch, so that help and mistakes answer at once."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from weightnorm._version import __version__
from weightnorm.cli_checkpoints import COMMANDS
from weightnorm.compare.arms import ARMS, DEFAULT_ARMS
from weightnorm.errors import INTERRUPTED, USER_ERROR, UserError
from weightnorm.extras import require
from weightnorm.tasks import TASKS


class CommaList(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """Several values in one option, separated by commas; repeated ones count once.

    Args:
        read: turns each into what it stands for, or raises ValueError.
        wanted: says what each must be.
        name: stands for the values in the help.
    """

    def __init__(self, read: Callable[[str], Any], wanted: str, name: str):
        self.read, self.wanted, self.name = read, wanted, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of values."""
        if not isinstance(value, str):
            return value
        values = []
        for part in value.split(","):
            try:
                values.append(self.read(part.strip()))
            except ValueError:
                self.fail(f"{part.strip()!r} is not {self.wanted}.", param, ctx)
        return tuple(dict.fromkeys(values))


def _arm(text: str) -> str:
    if text not in ARMS:
        raise ValueError
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _g_lr(text: str) -> float | str:
    if text == "sqrt":
        return text
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="weightnorm")
@click.pass_context
def weightnorm(context: click.Context) -> None:
    """Weight normalization for PyTorch (Salimans & Kingma, 2016): see what it does to training, convert checkpoints."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@weightnorm.command(context_settings={"show_default": True})
@click.option("--task", type=click.Choice(list(TASKS)), default="fashion", help="What is trained.")
@click.option(
    "--arms",
    type=CommaList(_arm, f"an arm; there are {', '.join(ARMS)}", "NAMES"),
    default=",".join(DEFAULT_ARMS),
    help=f"In which ways, separated by commas, of: {', '.join(ARMS)}.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=8, help="How long each run trains.")
@click.option(
    "--lr",
    "lrs",
    type=CommaList(_positive, "a positive number", "NUMBERS"),
    default="0.001,0.003",
    help="Learning rates, separated by commas. Every arm tries each and is reported at its best.",
)
@click.option(
    "--g-lr",
    "g_lrs",
    type=CommaList(_g_lr, "'sqrt' or a number >= 0", "NUMBERS"),
    default="1",
    help="Factors on the learning rate of lengths, tried where weights are normalized; 'sqrt': the square root "
    "of each vector's number of elements.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="How many seeds; 2 or more give a verdict.")
@click.option("--device", default="auto", help="'cpu', 'cuda', 'cuda:1', ...; 'auto': a GPU if there is one.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for results.json, curves.png and report.html.  [default: runs/<time>]",
)
def compare(task: str, arms: Sequence[str], out: Path | None, **options: Any) -> int:
    """Train one network in several arms side by side, and report what the evidence is.

    All arms start from the same seeds and take turns, an epoch each. The report says how many steps and seconds each
    needs to reach the final training loss of the plain arm. Ctrl-C ends it early with a report of what has run.
    """
    require("compare", "matplotlib", "jinja2")
    from weightnorm.compare.command import compare_and_report  # it imports torch, which help does without

    folder = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    return compare_and_report(task, arms=[ARMS[name] for name in arms], folder=folder, **options)


for _command in COMMANDS:
    weightnorm.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: what was typed after ``weightnorm``.

    Returns:
        The exit code: 0; 2 if something is the user's to put right, told in one line on stderr; 130 after Ctrl-C.
    """
    try:
        return weightnorm.main(list(arguments), prog_name="weightnorm", standalone_mode=False) or 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except UserError as error:
        line = str(error)
    except click.UsageError as error:
        line = f"{error.format_message()} See {error.ctx.command_path if error.ctx else 'weightnorm'} --help."
    except click.ClickException as error:
        line = error.format_message()
    click.echo(f"weightnorm: {' '.join(line.split())}", err=True)
    return USER_ERROR
