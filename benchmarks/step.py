"""What does an optimizer step cost? torch's plain fused AdamW, the same on torch's weight_norm, and ours, in one run.

    python benchmarks/step.py --out benchmarks/results            # a catalogue of models
    python benchmarks/step.py --rows --out benchmarks/results     # one large tensor for each length of row
    python benchmarks/step.py --bf16 --out benchmarks/results     # weights in bfloat16, and what each optimizer keeps

README.md beside this says how it is measured and how to read the tables.
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from arms import Case, Stepper, TorchWeightNorm, bytes_moved, state_bytes, stepper, torch_adamw
from report import (
    COPY,
    Report,
    Table,
    chosen,
    common_options,
    milliseconds,
    parsed_beside_copy,
    progress,
    ratio,
    spread,
)
from shapes import ROW_LENGTHS, STEPPED, Build, one_matrix
from timing import Arm, Failure, Stopwatch, Times, attempt, copy_arm, free_memory, time_in_turn

CAPTURED = ", captured"
PLAIN, WEIGHT_NORM, COMPILED, OURS = "plain", "weight_norm", "weight_norm, compiled", "ours"
DEFAULT_MODELS = "hifigan,hifigan-gan,dac,convpool,resnet50,gpt2-small,llama-layer,gpt2-xl"
Contender = Stepper | TorchWeightNorm
Makers = Mapping[str, Callable[[Case], Contender]]


class Measured:
    """What all arms did on one case, and the copy bandwidth measured among them; numbers only, no tensors.

    Args:
        case: the weights.
        makers: what makes each optimizer, by name.
        options: of the command line.
        until: when to stop measuring.
    """

    def __init__(self, case: Case, makers: Makers, options: argparse.Namespace, until: float):
        self.weights, self.normalised = case.parameters, case.normalised
        self.bytes: dict[str, int] = {}
        self.state: dict[str, int] = {}
        stopwatch = Stopwatch(options.device, options.flush)
        arms = {COPY: attempt(partial(copy_arm, options.device, options.copy_bytes))}
        for name, make in makers.items():
            made = attempt(partial(make, case))
            arms |= arms_of(name, made, options)
            if not isinstance(made, Failure):
                self.bytes[name], self.state[name] = bytes_moved(made.optimizer), state_bytes(made.optimizer)
            del made  # where its step has failed, the next needs the memory
            free_memory()
        self.times = time_in_turn(arms, stopwatch, options.repeats, until)
        copied = self.times.pop(COPY)
        self.bandwidth = 2 * options.copy_bytes / copied.median if isinstance(copied, Times) else float("nan")

    def time(self, name: str) -> str:
        """Return an arm's time, and its ratio to torch's plain AdamW, eager to eager and captured to captured."""
        base = PLAIN + (CAPTURED if name.endswith(CAPTURED) else "")
        if name not in self.times or base == name:
            return milliseconds(self.times.get(name))
        return f"{milliseconds(self.times[name])} ({ratio(self.times[name], self.times.get(base))})"

    def of_limit(self, name: str) -> str:
        """Return an arm's speed in per cent of what the copy bandwidth allows."""
        times, moved = self.times.get(name), self.bytes.get(name.removesuffix(CAPTURED).removesuffix(", compiled"))
        if not isinstance(times, Times) or moved is None:
            return "–"
        return f"{100 * moved / self.bandwidth / times.median:.0f} %"

    def copy_speed(self) -> str:
        """Return the copy bandwidth."""
        return f"{self.bandwidth / 1e9:,.0f}"


def arms_of(name: str, made: Contender | Failure, options: argparse.Namespace) -> dict[str, Arm | Failure]:
    """Return the arms of one optimizer: eager, and captured or compiled where that can be and is asked for."""
    arms = {name: made if isinstance(made, Failure) else attempt(made.eager)}
    if isinstance(arms[name], Arm):  # what a failed eager step leaves half done is not to be recorded
        if isinstance(made, TorchWeightNorm) and options.compile:
            arms[COMPILED] = attempt(partial(made.eager, compiled=True))
        if isinstance(made, Stepper) and options.device.type == "cuda":
            arms[name + CAPTURED] = attempt(made.captured)
    for arm, found in arms.items():
        if isinstance(found, Failure):
            progress(f"  {arm}: {found.reason}")
    return arms


def plain(case: Case) -> Stepper:
    """Return torch's plain fused AdamW."""
    return Stepper(case, torch_adamw)


def ours(options: argparse.Namespace) -> dict[str, Callable[[Case], Contender]]:
    """Return ours, once for each backend asked for."""
    names = {name: OURS if name == "auto" else f"{OURS}, {name} backend" for name in options.backends.split(",")}
    return {arm: partial(stepper, backend=backend) for backend, arm in names.items()}


def measure(
    what: str,
    builds: Mapping[str, Build],
    makers: Makers,
    options: argparse.Namespace,
    tables: Sequence[Table],
    enter: Callable[[str, Measured], None],
) -> None:
    """Measure case after case, as long as the time lasts, and write the report after each.

    Args:
        what: is measured; the report's name.
        builds: what makes each model, by title.
        makers: of the optimizers.
        options: of the command line.
        tables: to report, besides that of every measurement.
        enter: puts what was measured into the tables.
    """
    note = "Milliseconds; n measurements of each arm, in turn. By events: between the device's events, median."
    every = Table("Every measurement", note, ("case", "arm", "n", "median", "quartiles", "by events"))
    report = Report(what, options, [*tables, every])
    dtype, sets = torch.bfloat16 if options.bf16 else torch.float32, 2 if options.moving_gradients else 1
    with report.time_limit():
        for index, (title, build) in enumerate(builds.items()):
            progress(title)
            case = attempt(partial(Case, build, options.device, dtype, sets))
            if isinstance(case, Failure):
                report.remark(f"{title}: {case.reason}")
                continue
            measured = Measured(case, makers, options, report.share(len(builds) - index))
            enter(title, measured)
            every.rows += [[title, name, *spread(times)] for name, times in measured.times.items()]
            report.write()
            del case
            torch.compiler.reset()
            free_memory()


def measure_models(options: argparse.Namespace) -> None:
    """Report on models."""
    # Torch's weight_norm comes last: it needs the most memory, and may fail where the others do not.
    makers = {PLAIN: plain, **ours(options), WEIGHT_NORM: TorchWeightNorm}
    names = [PLAIN, WEIGHT_NORM, *([COMPILED] if options.compile else []), *ours(options)]
    if options.device.type == "cuda":
        names += [name + CAPTURED for name in makers if name != WEIGHT_NORM]
    note = "In brackets the ratio to torch's plain fused AdamW, eager to eager and captured to captured."
    steps = Table("A step", note, ["model", "weights", "normalised tensors", *names])
    note = "Bytes to be moved, 7 x 4 a weight, over the copy bandwidth, as a share of the time taken."
    limits = Table("Against the copy bandwidth", note, ["model", "copy GB/s", *names])

    def enter(title: str, measured: Measured) -> None:
        steps.rows.append([title, f"{measured.weights:,}", measured.normalised, *map(measured.time, names)])
        limits.rows.append([title, measured.copy_speed(), *map(measured.of_limit, names)])

    measure("step", models_of(options), makers, options, [steps, limits], enter)


def models_of(options: argparse.Namespace) -> dict[str, Build]:
    """Return the models asked for, by title."""
    return dict(STEPPED[name] for name in chosen(options.models, list(STEPPED)))


def measure_rows(options: argparse.Namespace) -> None:
    """Report on row lengths, one tensor each."""
    kind, suffix = ("a recorded graph", CAPTURED) if options.device.type == "cuda" else ("an eager step", "")
    makers = {PLAIN: plain, **ours(options)}
    note = f"One tensor of about {options.weights:,} weights; times of {kind}, in brackets the ratio to torch's plain "
    note += "fused AdamW. Limit: 7 x 4 bytes a weight over the copy bandwidth."
    columns = [cell for name in makers for cell in (name, f"{name}, of the limit")]
    table = Table("Rows of one length", note, ["case", "weights", "copy GB/s", *columns])
    builds = {f"rows of {length:,}": partial(one_matrix, length, options.weights) for length in options.row_lengths}

    def enter(title: str, measured: Measured) -> None:
        arms = [name + suffix for name in makers]
        cells = [cell for arm in arms for cell in (measured.time(arm), measured.of_limit(arm))]
        table.rows.append([title, f"{measured.weights:,}", measured.copy_speed(), *cells])

    measure("step_rows", builds, makers, options, [table], enter)


def measure_bf16(options: argparse.Namespace) -> None:
    """Report on models in bfloat16."""
    makers: dict[str, Callable[[Case], Contender]] = {PLAIN: plain}
    for name, make in ours(options).items():
        makers |= {f"{name}, master": make, f"{name}, no master": partial(make, stochastic_rounding=True)}
    note = "Weights and gradients in bfloat16. Plain keeps its moments in bfloat16. Ours keeps those of normalised "
    note += (
        "weights in float32, with a float32 master of each, or none with stochastic_rounding=True. The limit is that "
    )
    note += "of each arm's own bytes."
    header = ["model", "arm", "state bytes a weight", "with weight and gradient", "eager", "captured", "of the limit"]
    table = Table("Training state in bfloat16", note, header)

    def enter(title: str, measured: Measured) -> None:
        table.rows.extend([title, name, *bf16_cells(name, measured)] for name in makers)

    measure("step_bf16", models_of(options), makers, options, [table], enter)


def bf16_cells(name: str, measured: Measured) -> list[str]:
    """Return one arm's cells."""
    state = measured.state.get(name)
    kept = ["–", "–"] if state is None else [f"{state / measured.weights + more:.2f}" for more in (0, 4)]
    fastest = name + CAPTURED if name + CAPTURED in measured.times else name
    return [*kept, measured.time(name), measured.time(name + CAPTURED), measured.of_limit(fastest)]


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = common_options(__doc__.splitlines()[0], repeats=50)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--rows", action="store_true", help="one tensor for each length of row, in place of models")
    mode.add_argument("--bf16", action="store_true", help="models in bfloat16, and the bytes that are kept")
    parser.add_argument("--models", default=DEFAULT_MODELS, help=f"of {', '.join(STEPPED)}")
    parser.add_argument("--backends", default="auto", help="of ours, one arm each: auto, torch, triton, numba")
    parser.add_argument("--compile", action="store_true", help="also torch's weight_norm compiled; takes minutes")
    parser.add_argument("--weights", type=int, default=160_000_000, help="of the tensor in --rows, about")
    parser.add_argument("--row-lengths", default=",".join(map(str, ROW_LENGTHS)), help="in --rows")
    parser.add_argument("--moving-gradients", action="store_true", help="eager: elsewhere in memory every other step")
    options = parsed_beside_copy(parser)
    if options.quick:
        options.models, options.repeats, options.weights, options.row_lengths = "tiny", 5, 100_000, "96,4096"
    options.row_lengths = [int(length) for length in options.row_lengths.split(",")]
    return options


def main() -> None:
    """Measure what the command line asks for."""
    logging.getLogger("weightnorm").addHandler(logging.NullHandler())  # it would say how many tensors are normalised
    options = parsed()
    if options.rows:
        measure_rows(options)
    elif options.bf16:
        measure_bf16(options)
    else:
        measure_models(options)


if __name__ == "__main__":
    main()
