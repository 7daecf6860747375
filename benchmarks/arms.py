"""The ways to step that are compared: torch's plain AdamW, the same on torch's weight_norm parameters, and ours."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from shapes import Build
from timing import Arm
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import weightnorm as wn

OPTIONS = {"lr": 1e-4, "weight_decay": 0.01}  # of AdamW, in every arm; with "fused" in torch's
WARM_UP = 3  # calls before an arm is recorded or timed: state is made, kernels are compiled


class Case:
    """A model's weights on a device, and gradients for them that all arms share.

    Args:
        build: makes the model.
        device: where it lives.
        dtype: of its parameters.
        sets: how many sets of gradients; with two they are at another address every other step, as they may be in a
            training that frees them.
    """

    def __init__(self, build: Build, device: torch.device, dtype: torch.dtype = torch.float32, sets: int = 1):
        self._build, self._device, self._dtype = build, device, dtype
        model = self.model()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.gradients = [
            [torch.empty_like(parameter).normal_(std=1e-3) for parameter in model.parameters()] for _ in range(sets)
        ]
        entries = wn.param_groups(model).entries
        self.normalised = f"{sum(entry.axis is not None for entry in entries)} of {len(entries)}"

    def model(self) -> nn.Module:
        """Return the model, the same each time."""
        torch.manual_seed(0)
        with self._device:
            return self._build().to(self._dtype)


class Stepper:
    """An optimizer of a model of its own: a step of it, eager or recorded in a CUDA graph.

    Args:
        case: whose model and gradients.
        make_optimizer: takes the model.
    """

    def __init__(self, case: Case, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]):
        model = case.model()
        self._parameters, self._gradients = list(model.parameters()), case.gradients
        self._turn = 0
        self.optimizer = make_optimizer(model)

    def eager(self) -> Arm:
        """Return the step as it is called, warmed up."""
        for _ in range(WARM_UP):
            self._give_gradients()
            self.optimizer.step()
        return Arm(self.optimizer.step, self._give_gradients)

    def captured(self) -> Arm:
        """Return the replay of a recorded step."""
        self._turn = 0
        self._give_gradients()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # torch's optimizers ask for this flag while they are recorded; with fused=True it changes nothing that they do.
        self._set_capturable(True)
        with torch.cuda.graph(graph):
            self.optimizer.step()
        self._set_capturable(False)
        graph.replay()
        return Arm(graph.replay, on_device=True)

    def _give_gradients(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients[self._turn], strict=True):
            parameter.grad = gradient
        self._turn = (self._turn + 1) % len(self._gradients)

    def _set_capturable(self, value: bool) -> None:
        if type(self.optimizer) is torch.optim.AdamW:
            for group in self.optimizer.param_groups:
                group["capturable"] = value


class TorchWeightNorm:
    """torch's weight_norm: a step is the weights from (v, g), their gradients to (v, g), and fused AdamW on those.

    The forward and backward pass of a model between the first two are left out: every arm has the same.

    Args:
        case: whose model and gradients.
    """

    def __init__(self, case: Case):
        model = case.model()
        gradient_of = dict(zip(model.parameters(), case.gradients[0], strict=True))
        selected = [parameter for _, _, parameter in normalised(model)]
        self._of_weights = [gradient_of.pop(parameter) for parameter in selected]
        self._of_plain = gradient_of
        self._weights = Weights(use_torch_weight_norm(model))
        self._pairs = [p for p in model.parameters() if p not in self._of_plain]
        self.optimizer = torch_adamw(model)

    def eager(self, compiled: bool = False) -> Arm:
        """Return the step, warmed up."""
        compose = torch.compile(self._weights, fullgraph=True) if compiled else self._weights

        def step() -> None:
            torch.autograd.backward(compose(), self._of_weights)
            self.optimizer.step()

        for _ in range(WARM_UP):
            self._prepare()
            step()
        return Arm(step, self._prepare)

    def _prepare(self) -> None:
        for parameter in self._pairs:
            parameter.grad = None
        for parameter, gradient in self._of_plain.items():
            parameter.grad = gradient


class Weights(nn.Module):
    """All normalised weights at once."""

    def __init__(self, layers: Sequence[tuple[nn.Module, str]]):
        super().__init__()
        self._names = [name for _, name in layers]
        self.layers = nn.ModuleList(layer for layer, _ in layers)

    def forward(self) -> list[Tensor]:
        return [getattr(layer, name) for layer, name in zip(self.layers, self._names, strict=True)]


def normalised(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return the layers that our optimizer normalises: the layer, its parameter's name, and the parameter."""
    found = []
    for entry in wn.param_groups(model).entries:
        if entry.axis is not None:
            path, _, name = entry.name.rpartition(".")
            found.append((model.get_submodule(path), name, entry.parameter))
    return found


def use_torch_weight_norm(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Put torch's weight_norm on the same layers, along the axis that it takes by itself, for which it is fastest."""
    layers = [(layer, name) for layer, name, _ in normalised(model)]
    for layer, name in layers:
        weight_norm(layer, name)
    return layers


def torch_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS)


def our_adamw(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    """Return ours."""
    return wn.AdamW(model, **OPTIONS, **options)


def stepper(case: Case, **options: object) -> Stepper:
    """Return our optimizer on a model of its own."""
    return Stepper(case, partial(our_adamw, **options))


def bytes_moved(optimizer: torch.optim.Optimizer) -> int:
    """Return what a step must move: the gradient in, weight and whatever of its state is as large in and out.

    In float32 that is 7 x 4 bytes a weight, for AdamW and for ours. Not counted: what is kept once a row.
    """
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = [x for x in optimizer.state[parameter].values() if isinstance(x, Tensor)]
            large = [x for x in (parameter, *state) if x.shape == parameter.shape]
            total += sum(2 * nbytes(x) for x in large) + nbytes(parameter)
    return total


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all that an optimizer keeps between steps."""
    return sum(nbytes(x) for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def nbytes(tensor: Tensor) -> int:
    """Return a tensor's bytes."""
    return tensor.numel() * tensor.element_size()
