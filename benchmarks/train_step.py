"""What does a whole training step cost, and how much memory? The three ways to train, on real models, in one run.

    python benchmarks/train_step.py --out benchmarks/results
    python benchmarks/train_step.py --precision tf32,autocast --compile --models gpt2-small,hifigan

README.md beside this says how it is measured and how to read the tables.
"""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from arms import our_adamw, torch_adamw, use_torch_weight_norm
from report import Report, Table, chosen, common_options, milliseconds, progress, ratio, spread
from shapes import TRAINED, Training
from timing import Arm, Failure, Stopwatch, Times, attempt, free_memory, time_in_turn
from torch import nn

import weightnorm as wn

PLAIN, WEIGHT_NORM, OURS, NO_MASTER = "plain", "weight_norm", "ours", "ours, no master"
MODULE, CACHED = "ours, module form", "module form, cached"
PRECISIONS = {
    "fp32": "float32 throughout",
    "tf32": "float32, matrix products in TensorFloat32",
    "autocast": "float32 weights, bfloat16 autocast",
    "bf16": "weights, gradients and all in bfloat16",
}
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """A model to train, and in which precision.

    Attributes:
        training: the model, its batch and loss.
        size: examples of a batch.
        precision: one of ``PRECISIONS``.
        compiled: whether the model goes through torch.compile.
        device: where it is trained.
        module_form: whether our module form is among the arms.
    """

    training: Training
    size: int
    precision: str
    compiled: bool
    device: torch.device
    module_form: bool = False

    def title(self) -> list[str]:
        """Return its cells in a table."""
        return [self.training.title.format(self.size), self.precision, "compiled" if self.compiled else "eager"]


class Trainer:
    """A model with its optimizer, on one batch that stays the same.

    Args:
        case: what is trained.
        prepare: takes the fresh model and returns its optimizer.
        cached: compute weights from (v, g) once for the whole step.
    """

    def __init__(self, case: Case, prepare: Callable[[nn.Module], torch.optim.Optimizer], cached: bool = False):
        dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
        torch.manual_seed(0)
        with case.device:
            model = case.training.build().to(dtype)
            self._inputs, self._targets = case.training.batch(case.size)
        if self._inputs.is_floating_point():
            self._inputs = self._inputs.to(dtype)
        self._optimizer = prepare(model)
        self._model = torch.compile(model, fullgraph=True) if case.compiled else model
        self._loss = case.training.loss
        autocast = partial(torch.autocast, case.device.type, torch.bfloat16)
        self._around = partial(wn.cached, model) if cached else nullcontext
        self._cast = autocast if case.precision == "autocast" else nullcontext

    def step(self) -> None:
        """Take one training step; no gradients are left, which would only take memory from the other arms."""
        with self._around():
            with self._cast():
                loss = self._loss(self._model(self._inputs).float(), self._targets)
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def warmed_up(self) -> "Trainer":
        """Return it with kernels compiled and state made."""
        for _ in range(WARM_UP):
            self.step()
        return self


def with_torch_weight_norm(model: nn.Module) -> torch.optim.Optimizer:
    """Put torch's weight_norm on the model; return torch's fused AdamW on (v, g) and what is plain."""
    use_torch_weight_norm(model)
    return torch_adamw(model)


def with_module_form(model: nn.Module) -> torch.optim.Optimizer:
    """Put our module form on the model; return torch's fused AdamW on (v, g) and what is plain."""
    wn.weight_norm(model)
    return torch_adamw(model)


def contenders(case: Case) -> dict[str, Callable[[], Trainer]]:
    """Return what makes each arm's trainer; the module forms last, which need the most memory and may fail."""
    prepare = {PLAIN: torch_adamw, OURS: our_adamw}
    if case.precision == "bf16":
        prepare[NO_MASTER] = partial(our_adamw, stochastic_rounding=True)
    prepare[WEIGHT_NORM] = with_torch_weight_norm
    trainers = {name: partial(Trainer, case, make) for name, make in prepare.items()}
    if case.module_form:
        trainers |= {MODULE: partial(Trainer, case, with_module_form)}
        trainers |= {CACHED: partial(Trainer, case, with_module_form, cached=True)}
    return trainers


def peak_memory(make: Callable[[], Trainer], device: torch.device) -> int:
    """Return the most that one training step holds, in bytes, while nothing else is on the device."""
    free_memory()
    before = torch.cuda.memory_allocated(device)
    trainer = make().warmed_up()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    trainer.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peaks(case: Case) -> dict[str, int | Failure]:
    """Return the peak memory of each arm, each from a fresh start."""
    if case.device.type != "cuda":
        return {}
    made = contenders(case)
    # The matrix libraries take their workspace once and keep it: an eager step more, so that no arm is charged for it.
    attempt(partial(peak_memory, contenders(replace(case, compiled=False))[PLAIN], case.device))
    found = {name: attempt(partial(peak_memory, make, case.device)) for name, make in made.items()}
    free_memory()
    return found


def times_of(case: Case, options: argparse.Namespace, until: float) -> dict[str, Times | Failure]:
    """Return the time of a training step of each arm, all arms in turn."""
    arms: dict[str, Arm | Failure] = {}
    for name, make in contenders(case).items():
        trainer = attempt(lambda make=make: make().warmed_up())
        arms[name] = trainer if isinstance(trainer, Failure) else Arm(trainer.step, calls=options.in_a_row)
        if isinstance(trainer, Failure):
            progress(f"  {name}: {trainer.reason}")
    return time_in_turn(arms, Stopwatch(case.device, flush=False), options.repeats, until)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Let matrix products use TensorFloat32, or not; by itself torch lets convolutions use it."""
    is_fast = name != "fp32"
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_fast
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return what the command line asks for, model by model."""
    names = chosen(options.models, list(TRAINED))
    precisions = chosen(options.precision, list(PRECISIONS))
    return [
        Case(TRAINED[name], options.batch or TRAINED[name].size, kind, compiled, options.device, options.module_form)
        for name in names
        for kind in precisions
        for compiled in ((False, True) if options.compile else (False,))
    ]


def tables_of(cases: list[Case], options: argparse.Namespace) -> list[Table]:
    """Return the three tables, empty."""
    names = [PLAIN, WEIGHT_NORM, OURS, *([NO_MASTER] if any(case.precision == "bf16" for case in cases) else [])]
    names += [MODULE, CACHED] if options.module_form else []
    used = [f"{name}: {PRECISIONS[name]}" for name in dict.fromkeys(case.precision for case in cases)]
    note = f"Forward, backward and optimizer step, {options.in_a_row} in a row without waiting; the time of one, in "
    note += f"brackets the ratio to plain's. {'; '.join(used)}."
    columns = ["model", "precision", "mode"]
    memory = (
        "The most that a step holds, in MiB, each arm on an otherwise empty device, in brackets the ratio to plain's."
    )
    if options.device.type != "cuda":
        memory += " Not measured on a CPU."
    details = "Milliseconds of one step; n measurements of each arm, in turn."
    return [
        Table("A training step", note, [*columns, *names]),
        Table("Peak memory", memory, [*columns, *names]),
        Table("Every measurement", details, [*columns, "arm", "n", "median", "quartiles", "by events"]),
    ]


def time_cell(name: str, times: dict[str, Times | Failure]) -> str:
    """Return an arm's time, with its ratio to plain's."""
    if name == PLAIN or name not in times:
        return milliseconds(times.get(name))
    return f"{milliseconds(times[name])} ({ratio(times[name], times[PLAIN])})"


def memory_cell(name: str, found: dict[str, int | Failure]) -> str:
    """Return an arm's peak memory, with its ratio to plain's."""
    peak, base = found.get(name), found.get(PLAIN)
    if not isinstance(peak, int):
        return "not measured" if not found else "–" if peak is None else f"failed: {peak.reason.partition(':')[0]}"
    size = f"{peak / 2**20:,.0f}"
    return size if name == PLAIN or not isinstance(base, int) else f"{size} ({peak / base:.3f})"


def measure(options: argparse.Namespace) -> None:
    """Fill the tables, case by case."""
    cases = cases_of(options)
    steps, memory, every = tables = tables_of(cases, options)
    report = Report("train_step", options, tables)
    with report.time_limit():
        for index, case in enumerate(cases):
            progress(", ".join(case.title()))
            with precision(case.precision):
                found = peaks(case)
                times = times_of(case, options, report.share(len(cases) - index))
            names = steps.header[3:]
            steps.rows.append([*case.title(), *(time_cell(name, times) for name in names)])
            memory.rows.append([*case.title(), *(memory_cell(name, found) for name in names)])
            every.rows += [[*case.title(), name, *spread(taken)] for name, taken in times.items()]
            report.write()
            torch.compiler.reset()
            free_memory()


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = common_options(__doc__.splitlines()[0], repeats=30)
    parser.add_argument("--models", default="convpool,hifigan,gpt2-small,resnet50", help=f"of {', '.join(TRAINED)}")
    parser.add_argument("--precision", default="fp32", help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--compile", action="store_true", help="also with the model compiled; takes minutes")
    parser.add_argument("--module-form", action="store_true", help="also our module form, alone and in wn.cached")
    parser.add_argument("--batch", type=int, help="examples of a batch; None: the model's own")
    parser.add_argument("--in-a-row", type=int, default=3, help="steps of one measurement")
    options = parser.parse_args()
    if options.quick:
        options.models, options.repeats = "tiny", 5
    return options


if __name__ == "__main__":
    logging.getLogger("weightnorm").addHandler(logging.NullHandler())  # it would say how many tensors are normalised
    measure(parsed())
