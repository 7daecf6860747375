"""What does mean-only batch normalization cost? torch's BatchNorm2d and our MeanOnlyBatchNorm, in one run.

    python benchmarks/mean_only.py --out benchmarks/results

README.md beside this says how it is measured and how to read the tables.
"""

import argparse
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from compose import CAPTURED, Form
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
    share_of_copy,
    spread,
    time_beside_copy,
)
from timing import Arm, Failure, Times, attempt, free_memory
from torch import Tensor, nn

import weightnorm as wn

BATCH_NORM, OURS = "BatchNorm2d", "ours"
LAYERS = {BATCH_NORM: nn.BatchNorm2d, OURS: wn.MeanOnlyBatchNorm}
# Over the activations, read or written: a mean needs t, a shift t and t~, and so it is backward. Batch normalization
# needs as much forward; backward it takes two sums, of ∂t~ and of ∂t~ t, and reads both again to write ∂t.
PASSES = {BATCH_NORM: 8, OURS: 6}

SHAPES = {"convpool": (100, 96, 32, 32), "resnet50": (64, 256, 56, 56), "tiny": (4, 8, 8, 8)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """What is normalised: names of the tables above."""

    shape: str
    dtype: str
    layout: str

    @property
    def cells(self) -> list[str]:
        return [str(SHAPES[self.shape]), self.dtype, self.layout]

    @property
    def nbytes(self) -> int:
        """Bytes of the activations, which one pass moves."""
        return prod(SHAPES[self.shape]) * DTYPES[self.dtype].itemsize

    def drawn(self, device: torch.device) -> Tensor:
        """Return activations, or gradients for them."""
        drawn = torch.randn(SHAPES[self.shape], device=device)
        return drawn.to(DTYPES[self.dtype], memory_format=LAYOUTS[self.layout])


class Pass(Form):
    """A layer's forward and backward pass in training; its own parameters and statistics are float32.

    Args:
        layer: normalises.
        t: the activations, which get a gradient too.
        grad: the gradient that comes back.
    """

    def __init__(self, layer: nn.Module, t: Tensor, grad: Tensor):
        self._layer, self._t, self._grad = layer, t.detach().requires_grad_(), grad
        self._parameters = [self._t, *layer.parameters()]

    def run(self) -> None:
        """Normalise, and take the gradient back."""
        self._layer(self._t).backward(self._grad)


def times_of(case: Case, options: argparse.Namespace, until: float) -> dict[str, Times | Failure]:
    """Return the times of both layers, eager and on a GPU captured, and of a copy among them."""
    arms = dict[str, Arm | Failure]()
    t, grad = case.drawn(options.device), case.drawn(options.device)
    for name, make in LAYERS.items():
        done = Pass(make(t.shape[1], device=options.device), t, grad)
        arms[name] = attempt(done.eager)
        if options.device.type == "cuda":
            arms[name + CAPTURED] = attempt(done.captured)
    return time_beside_copy(arms, options, until)


def cell(name: str, times: dict[str, Times | Failure]) -> str:
    """Return an arm's time; of ours, with the ratio to BatchNorm2d's."""
    end = CAPTURED if name.endswith(CAPTURED) else ""
    taken, base = times.get(name), times.get(BATCH_NORM + end)
    return milliseconds(taken) if taken is base else f"{milliseconds(taken)} ({ratio(taken, base)})"


def of_limit(name: str, case: Case, times: dict[str, Times | Failure], copied: int) -> str:
    """Return an arm's speed in per cent of what its passes take at the copy bandwidth."""
    moved = PASSES[name.removesuffix(CAPTURED)] * case.nbytes
    return share_of_copy(moved, times.get(name), times.get(COPY), copied)


def measure(options: argparse.Namespace) -> None:
    """Fill the tables, case by case."""
    names = [*LAYERS, *([name + CAPTURED for name in LAYERS] if options.device.type == "cuda" else [])]
    columns = ["activations", "dtype", "layout"]
    note = "A layer in training, from t to t~ and from ∂t~ to ∂t. In brackets the ratio to BatchNorm2d."
    passes = Table("Forward and backward", note, [*columns, *names])
    note = (
        "Passes over the activations, 8 of BatchNorm2d and 6 of ours, over the copy bandwidth, as a share of the time."
    )
    limits = Table("Against the copy bandwidth", note, [*columns, *names])
    note = "Milliseconds; n measurements of each arm, in turn. By events: between the device's events, median."
    every = Table("Every measurement", note, [*columns, "arm", "n", "median", "quartiles", "by events"])
    shapes, dtypes = chosen(options.models, list(SHAPES)), chosen(options.precision, list(DTYPES))
    cases = [Case(*kind) for kind in product(shapes, dtypes, LAYOUTS)]
    report = Report("mean_only", options, [passes, limits, every])
    with report.time_limit():
        for index, case in enumerate(cases):
            progress(", ".join(case.cells))
            times = times_of(case, options, report.share(len(cases) - index))
            passes.rows.append([*case.cells, *(cell(name, times) for name in names)])
            limits.rows.append([*case.cells, *(of_limit(name, case, times, options.copy_bytes) for name in names)])
            every.rows += [[*case.cells, name, *spread(taken)] for name, taken in times.items()]
            report.write()
            free_memory()


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = common_options(__doc__.splitlines()[0], repeats=50)
    parser.add_argument("--models", default="convpool,resnet50", help=f"whose activations, of {', '.join(SHAPES)}")
    parser.add_argument("--precision", default="fp32,bf16", help=f"of the activations: {', '.join(DTYPES)}")
    options = parsed_beside_copy(parser)
    if options.quick:
        options.models, options.repeats = "tiny", 5
    return options


if __name__ == "__main__":
    measure(parsed())
