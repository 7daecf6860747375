"""The command line. Options are read and checked without torch, so that help and mistakes answer at once."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightnorm._version import __version__
from weightnorm.cli_checkpoints import COMMANDS
from weightnorm.compare.arms import ARMS
from weightnorm.errors import INTERRUPTED, USER_ERROR, UserError
from weightnorm.extras import require
from weightnorm.tasks import OPTIONS, TASKS, all_options, shown

if TYPE_CHECKING:
    from weightnorm.compare.asked import Asked


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


def _by_task(option: str) -> str:
    """Return each task's default for the help."""
    values = {name: getattr(task, option) for name, task in TASKS.items()}
    values = {name: value for name, value in values.items() if value is not None}
    texts = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in values.items()}
    return "; ".join(f"{text or 'those of the paper'} ({name})" for name, text in texts.items())


def _own_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that some tasks alone have."""
    for name, option in reversed(OPTIONS.items()):
        defaults = "; ".join(f"{shown(value)} ({task})" for task, value in option.default.items())
        flag = name.replace("_", "-")
        kinds = {bool: None, int: click.IntRange(min=option.least), str: str}
        command = click.option(
            f"--{flag}/--no-{flag}" if option.kind is bool else f"--{flag}",
            type=click.Choice(option.values) if option.values else kinds[option.kind],
            default=None,
            help=f"{option.help}  [default: {defaults}]",
        )(command)
    return command


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="weightnorm")
@click.pass_context
def weightnorm(context: click.Context) -> None:
    """Weight normalization for PyTorch (Salimans & Kingma, 2016): see what it does to training, convert checkpoints."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@weightnorm.command(context_settings={"show_default": True})
@click.argument("task", type=click.Choice(list(TASKS)), default="fashion")
@click.option(
    "--arms",
    type=CommaList(_arm, f"an arm; there are {', '.join(ARMS)}", "NAMES"),
    help=f"In which ways, separated by commas, of: {', '.join(ARMS)}.  [default: {_by_task('arms')}]",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help=f"How long each run trains.  [default: {_by_task('epochs')}]"
)
@click.option(
    "--lr",
    "lrs",
    type=CommaList(_positive, "a positive number", "NUMBERS"),
    help="Learning rates, separated by commas. Every arm tries each and is reported at its best.  "
    f"[default: {_by_task('lrs')}]",
)
@click.option(
    "--g-lr",
    "g_lrs",
    type=CommaList(_g_lr, "'sqrt' or a number >= 0", "NUMBERS"),
    default="1",
    help="Factors on the learning rate of lengths, tried where weights are normalized; 'sqrt': the square root "
    "of each vector's number of elements.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help=f"How many seeds; 2 or more give a verdict.  [default: {_by_task('seeds')}]",
)
@click.option(
    "--form",
    type=click.Choice(["optimizer", "module"]),
    default="optimizer",
    help="Where weight normalization is: the optimizer steps on (v, g), or the layers hold them.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    help="Of forward and backward; bf16: under autocast, weights stay fp32.",
)
@click.option(
    "--data",
    metavar="PATH",
    help="Folder with the task's data in the Hub's layout; 'cifar10' alone: for vae, the deeper one on that data set.  "
    "[default: cifar10 or mnist in $WEIGHTNORM_DATA; else it is downloaded]",
)
@click.option(
    "--holdout",
    is_flag=True,
    help="Score on a fifth of the training examples, in place of the test set, and let it choose each arm's best "
    "setting.  [default: the test set, which chooses nothing]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Train on so many examples only.  [default: all]")
@_own_options
@click.option("--device", default="auto", help="'cpu', 'cuda', 'cuda:1', ...; 'auto': a GPU if there is one.")
@click.option(
    "--deterministic",
    is_flag=True,
    help="On a GPU, use cuDNN's deterministic algorithms, so that --resume goes on to the last bit there too.  "
    "[default: the fastest]",
)
@click.option(
    "--max-minutes", type=click.FloatRange(min=0), help="Pause after so many; go on with --resume.  [default: never]"
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=5,
    help="Leave a checkpoint in the folder whenever all runs have done so many more epochs.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    help="Go on with the comparison in this folder, to the last bit on a CPU.  [default: begin a new one]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for results.json, curves.png and report.html.  [default: runs/<time>]",
)
@click.pass_context
def compare(
    context: click.Context,
    /,
    task: str,
    device: str,
    out: Path | None,
    max_minutes: float | None,
    checkpoint_every: int,
    resume: Path | None,
    **options: Any,
) -> int:
    """Train one network in several arms side by side, and report what the evidence is.

    TASK is what is trained: fashion (a small net on images that come with the package, the default), or an experiment
    of the paper at its learning rates unless --lr says others: cifar10 (5.1), vae (5.2; --data cifar10 for the deeper
    one), draw (5.3) or dqn (5.4), which plays an Atari game and is scored by its points.

    All arms start from the same seeds and take turns, an epoch each. The report says how many steps and seconds each
    needs to reach the final training loss of the plain arm. Ctrl-C ends it early with a report of what has run;
    --resume goes on from there.
    """
    require("compare", "matplotlib", "jinja2")
    if resume:
        rule = "--resume goes on with all that was asked for then"
        _refuse(context, rule, lambda name: name not in {"resume", "device", "max_minutes", "checkpoint_every"})
        from weightnorm.compare.command import resume_and_report  # it imports torch, which help does without

        return resume_and_report(resume, device, max_minutes, checkpoint_every)
    from weightnorm.compare.command import compare_and_report

    _refuse(context, f"that means nothing to {task}", lambda name: name in TASKS[task].without)
    request = _request(task, options)
    folder = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    return compare_and_report(request, folder, device, max_minutes, checkpoint_every)


def _request(task: str, options: dict[str, Any]) -> "Asked":
    """Return what is asked for, with the task's defaults for what is not said."""
    task, options["data"] = _variant(task, options["data"])
    own = {name: options.pop(name) for name in OPTIONS}
    own = {name: value for name, value in own.items() if value is not None}
    for name in ("arms", "epochs", "lrs", "seeds"):
        options[name] = options[name] or getattr(TASKS[task], name)
    if TASKS[task].home is None:
        return _games_request(options, all_options(task, own) | {"memory": own.get("memory")})
    from weightnorm.compare.request import Request

    options["data"] = str(Path(options["data"]).absolute()) if options["data"] else None
    return Request(task, **options, options=own)


def _games_request(options: dict[str, Any], own: dict[str, Any]) -> "Asked":
    from weightnorm.compare.games.request import GamesRequest

    if len(options["lrs"]) > 1 or len(options["g_lrs"]) > 1:
        raise UserError("dqn compares arms at one learning rate each; give one --lr, one --g-lr, or none")
    lr = options["lrs"][0] if options["lrs"] else None
    return GamesRequest.settled(arms=options["arms"], seeds=options["seeds"], lr=lr, g_lr=options["g_lrs"][0], **own)


def _variant(task: str, data: str | None) -> tuple[str, str | None]:
    """Return the task, and where its data is; ``--data`` may name the data set of a variant of the task."""
    return (variant, None) if (variant := f"{task}_{data}") in TASKS else (task, data)


def _refuse(context: click.Context, rule: str, names: Callable[[str], bool]) -> None:
    """Refuse options that were given although a rule leaves them no meaning."""
    given = [
        param.opts[0]
        for param in context.command.params
        if names(str(param.name))
        and context.get_parameter_source(str(param.name)) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise UserError(f"{rule}; leave {', '.join(given)} out")


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
