"""What do weights from (v, g), and their gradients to (v, g), cost? torch's weight_norm and ours, in one run.

    python benchmarks/compose.py --out benchmarks/results            # single layers, and whole models
    python benchmarks/compose.py --models hifigan --bf16 --out benchmarks/results

README.md beside this says how it is measured and how to read the tables.
"""

import argparse
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from arms import WARM_UP, Case, normalised
from report import (
    COPY,
    Report,
    Table,
    chosen,
    common_options,
    milliseconds,
    parsed_beside_copy,
    progress,
    share_of_copy,
    spread,
    time_beside_copy,
)
from shapes import STEPPED, Build
from timing import Arm, Failure, Times, attempt, free_memory
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import weightnorm as wn

PLAIN, TORCH, OURS, CACHED = "plain", "weight_norm", "ours", "ours, cached"
CAPTURED = ", captured"
Wrap = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Subject:
    """What is composed.

    Attributes:
        title: for the report.
        build: makes the layer or the model.
        dim: the axis of its vectors, the same for torch and for ours; None: the axis that each takes by itself.
    """

    title: str
    build: Build
    dim: int | None = None


LAYERS = {
    "linear": Subject("Linear 768 to 3072", partial(nn.Linear, 768, 3072), 0),
    "conv": Subject("Conv2d 512 to 512, 3x3", partial(nn.Conv2d, 512, 512, 3), 0),
    "conv1d": Subject("Conv1d 256 to 256, 7", partial(nn.Conv1d, 256, 256, 7), 0),
    "transposed": Subject("ConvTranspose1d 512 to 256, 16, dim 1", partial(nn.ConvTranspose1d, 512, 256, 16), 1),
    "wav2vec2": Subject("wav2vec2's Conv1d, dim 2", partial(nn.Conv1d, 768, 768, 128, groups=16), 2),
    "small": Subject("Linear 8 to 6", partial(nn.Linear, 8, 6), 0),
}
MODELS = {name: Subject(title, build) for name, (title, build) in STEPPED.items()}
SUBJECTS = LAYERS | MODELS


class Probe:
    """An input that gets a layer's weight for its output: the weight is read as the layer's own forward reads it."""

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: tuple[Tensor, ...], kwargs: object = None) -> Tensor:
        return args[1]


class Use(torch.autograd.Function):
    """Stands for what a model does with its weights: takes them, and gives gradients for them; nothing is computed."""

    @staticmethod
    def forward(ctx, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.empty((), device=gradients[0].device)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor | None, ...]:
        # Each a tensor of its own, as a layer's would be: what autograd is to keep it then need not copy.
        return None, *(gradient.detach() for gradient in ctx.gradients)


class Form:
    """Weight normalization as a form of the module, on a model of its own.

    A pass reads every normalised weight, and takes gradients, the same for all forms, back to what is trained: v and g,
    or in a plain model the weights themselves.

    Args:
        case: whose model and gradients.
        wrap: normalises a layer's weight, which is all that the layer has to normalise.
        context: in which a pass runs, made from the model.
    """

    def __init__(
        self, case: Case, wrap: Wrap, context: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext
    ):
        model = case.model()
        gradient_of = dict(zip(model.parameters(), case.gradients[0], strict=True))
        found = normalised(model)
        self._layers = [layer for layer, _, _ in found]
        self._gradients = [gradient_of[parameter] for _, _, parameter in found]
        for layer in self._layers:
            wrap(layer)
        self._parameters = list(model.parameters())
        self._context = partial(context, model)
        self._probe, self._one = Probe(), torch.ones((), device=self._gradients[0].device)

    def run(self) -> None:
        """Make all weights and pull their gradients back."""
        with self._context():
            Use.apply(self._gradients, *(layer.forward(self._probe) for layer in self._layers)).backward(self._one)

    def forget(self) -> None:
        """Drop the gradients of the pass before."""
        for parameter in self._parameters:
            parameter.grad = None

    def eager(self) -> Arm:
        """Return the pass as it is called, warmed up."""
        self._warm_up()
        return Arm(self.run, self.forget)

    def captured(self) -> Arm:
        """Return the replay of a recorded pass."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._warm_up()
        torch.cuda.current_stream().wait_stream(side)
        self.forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        graph.replay()
        return Arm(graph.replay, on_device=True)

    def _warm_up(self) -> None:
        for _ in range(WARM_UP):
            self.forget()
            self.run()


def forms_of(subject: Subject) -> dict[str, Callable[[Case], Form]]:
    """Return what makes each form."""
    given = {} if subject.dim is None else {"dim": subject.dim}
    ours = partial(wn.weight_norm, **given)
    return {
        PLAIN: partial(Form, wrap=lambda layer: layer),
        TORCH: partial(Form, wrap=partial(parametrizations.weight_norm, **given)),
        OURS: partial(Form, wrap=ours),
        CACHED: partial(Form, wrap=ours, context=wn.cached),
    }


def times_of(subject: Subject, case: Case, options: argparse.Namespace, until: float) -> dict[str, Times | Failure]:
    """Return the times of all forms, eager and on a GPU captured, and of a copy among them."""
    arms = dict[str, Arm | Failure]()
    for name, make in forms_of(subject).items():
        form = attempt(partial(make, case))
        arms[name] = form if isinstance(form, Failure) else attempt(form.eager)
        if isinstance(form, Form) and options.device.type == "cuda" and name != PLAIN:  # in which is no kernel
            arms[name + CAPTURED] = attempt(form.captured)
    return time_beside_copy(arms, options, until)


def cell(name: str, times: dict[str, Times | Failure]) -> str:
    """Return an arm's time, and its ratio to torch's: eager, of what each takes more than plain; captured, of all."""
    end = CAPTURED if name.endswith(CAPTURED) else ""
    taken, base, plain = times.get(name), times.get(TORCH + end), times.get(PLAIN + end)
    if name in (PLAIN, TORCH + end) or not isinstance(taken, Times) or not isinstance(base, Times):
        return milliseconds(taken)
    floor = plain.median if isinstance(plain, Times) else 0.0
    return f"{milliseconds(taken)} ({(taken.median - floor) / (base.median - floor):.2f})"


def of_limit(name: str, case: Case, weights: int, times: dict[str, Times | Failure], copied: int) -> str:
    """Return an arm's speed in per cent of what the copy bandwidth allows: v in, w out; v and ∂w in, ∂v out."""
    moved = 5 * weights * case.gradients[0][0].element_size()
    return share_of_copy(moved, times.get(name), times.get(COPY), copied)


def measure(options: argparse.Namespace) -> None:
    """Fill the tables, subject by subject."""
    forms = [TORCH, OURS, CACHED]
    names = forms + ([name + CAPTURED for name in forms] if options.device.type == "cuda" else [])
    note = "All weights from (v, g), and their gradients to (v, g); plain: neither, only what all have in common. In "
    note += "brackets the ratio to torch's weight_norm: eager, of what each takes more than plain; captured, of all."
    passes = Table("Forward and backward", note, ["case", "weights", PLAIN, *names])
    note = "Bytes to be moved, 5 times those of the weights, over the copy bandwidth, as a share of the time taken."
    limits = Table("Against the copy bandwidth", note, ["case", *names])
    note = "Milliseconds; n measurements of each arm, in turn. By events: between the device's events, median."
    every = Table("Every measurement", note, ("case", "arm", "n", "median", "quartiles", "by events"))
    subjects = [SUBJECTS[name] for name in chosen(options.models, list(SUBJECTS))]
    report = Report("compose_bf16" if options.bf16 else "compose", options, [passes, limits, every])
    with report.time_limit():
        for index, subject in enumerate(subjects):
            progress(subject.title)
            case = attempt(
                partial(Case, subject.build, options.device, torch.bfloat16 if options.bf16 else torch.float32)
            )
            if isinstance(case, Failure):
                report.remark(f"{subject.title}: {case.reason}")
                continue
            times = times_of(subject, case, options, report.share(len(subjects) - index))
            weights = sum(parameter.numel() for _, _, parameter in normalised(case.model()))
            passes.rows.append([subject.title, f"{weights:,}", *(cell(name, times) for name in (PLAIN, *names))])
            limits.rows.append(
                [subject.title, *(of_limit(name, case, weights, times, options.copy_bytes) for name in names)]
            )
            every.rows += [[subject.title, name, *spread(taken)] for name, taken in times.items()]
            report.write()
            free_memory()


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = common_options(__doc__.splitlines()[0], repeats=50)
    default = "linear,conv,conv1d,transposed,wav2vec2,hifigan,hifigan-gan,dac,convpool"
    parser.add_argument("--models", default=default, help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--bf16", action="store_true", help="weights and gradients in bfloat16")
    options = parsed_beside_copy(parser)
    if options.quick:
        options.models, options.repeats = "small,tiny", 5
    return options


if __name__ == "__main__":
    logging.getLogger("weightnorm").addHandler(logging.NullHandler())  # it would say how many tensors are normalised
    measure(parsed())
