"""Who feeds whom in a model: read off traces (``torch.fx``), without data and without a trace on the model.

What is traced is a copy whose parameters take no memory; in training and in eval mode, with optional arguments given
and at their defaults. Where a ``forward`` cannot be traced, the modules that it calls are, each on its own.
"""

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightnorm.mean_only.layer import MeanOnlyBatchNorm
from weightnorm.preserve import as_found
from weightnorm.survey import name_of

BatchNorm = _BatchNorm
Norm = BatchNorm | MeanOnlyBatchNorm
Dense = nn.Linear | nn.Bilinear
Layer = Dense | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
End = nn.Module | str  # of an edge between modules: a layer or a norm; anything else is described


class Flow:
    """What was seen of a model's layers and norms in all traces.

    Args:
        model: any model; it is left as it is.

    Attributes:
        names: of all modules, by module.
        feeders: what feeds each norm.
        takers: what takes each layer's output.
        read: parameters that a forward uses itself, without calling their layer.

    Example:
        >>> block = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
        >>> flow = Flow(block)
        >>> flow.told(flow.feeders[block[1]]), flow.told(flow.takers[block[0]])
        ('0', '1')
    """

    def __init__(self, model: nn.Module):
        self.names = {module: name_of(name) or type(module).__name__ for name, module in model.named_modules()}
        self.feeders = defaultdict[nn.Module, list[End]](list)
        self.takers = defaultdict[nn.Module, list[End]](list)
        self.read = set[Tensor]()
        self._memo = memo_of(model)
        self._traced = set[nn.Module]()
        self._failed = dict[nn.Module, str]()
        with as_found(model), warnings.catch_warnings(action="ignore"):
            for training in (False, True):
                self._look(model, training, set())
        for module, error in self._failed.items():
            if module not in self._traced:
                self._assume(module, error)

    def told(self, ends: Sequence[End]) -> str:
        """Return ends for a person."""
        return " and ".join(end if isinstance(end, str) else self.names[end] for end in ends)

    def _look(self, root: nn.Module, training: bool, seen: set[nn.Module]) -> None:
        """Trace a module, and then by itself each module that its trace does not look into."""
        seen.add(root)
        inside = list[nn.Module]()
        for options in _options(root):
            try:
                graph = _trace(lambda: twin(root, self._memo, training), options)
            except Exception as error:
                told = str(error).splitlines()[:1] or [""]
                self._failed[root] = f"{type(error).__name__}: {told[0].partition('. ')[0]}"
            else:
                self._traced.add(root)
                inside += self._note(root, graph)
        for module in inside if root in self._traced else root.children():
            if module not in seen and not isinstance(module, Layer | Norm) and any(module.children()):
                self._look(module, training, seen)

    def _note(self, root: nn.Module, graph: fx.Graph) -> Iterator[nn.Module]:
        """Note who feeds whom in a trace; yield what was called in it."""
        parameters = dict(root.named_parameters())
        for node in graph.nodes:
            if node.op == "get_attr" and node.users and node.target in parameters:
                self.read.add(parameters[node.target])
            if node.op != "call_module":
                continue
            module = root.get_submodule(node.target)
            if isinstance(module, Norm):
                _add(self.feeders[module], [self._end(root, source) for source in node.all_input_nodes])
            elif isinstance(module, Layer):
                _add(self.takers[module], [self._end(root, user) for user in node.users])
            yield module

    def _end(self, root: nn.Module, node: fx.Node) -> End:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            known = isinstance(module, Layer | Norm)
            return module if known else f"{self.names[module]} ({type(module).__name__})"
        if node.op in ("placeholder", "output"):
            return f"the {'input' if node.op == 'placeholder' else 'output'} of {self.names[root]}"
        return str(getattr(node.target, "__name__", node.target)).strip("_")

    def _assume(self, module: nn.Module, error: str) -> None:
        """Assume that a module which could not be traced calls the layers and norms that it holds."""
        unseen = f"{self.names[module]}, which cannot be traced ({error})"
        for child in module.children():
            if isinstance(child, Norm):
                _add(self.feeders[child], [unseen])
            elif isinstance(child, Layer):
                _add(self.takers[child], [unseen])


def _add(ends: list[End], more: Iterable[End]) -> None:
    ends.extend(end for end in dict.fromkeys(more) if end not in ends)


def exchange(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, under every name that these have."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]


def twin(module: nn.Module, memo: Mapping[int, Any], training: bool) -> nn.Module:
    """Return a copy to be traced: running a forward may change a module in any way.

    Args:
        module: what is copied.
        memo: ``memo_of`` the model.
        training: the mode of all of the copy.
    """
    copied = copy.deepcopy(module, dict(memo))
    exchange(copied, {part: _StandIn() for part in copied.modules() if isinstance(part, Norm)})
    for part in copied.modules():
        part.training = training
    return copied


def memo_of(model: nn.Module) -> dict[int, Any]:
    """Return what ``copy.deepcopy`` shall take for what need not or cannot be copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif name == "process_group":
                memo[id(value)] = value
    return memo


class _StandIn(nn.Module):
    """A norm's place in the copy: what calls the norm by another way than its name finds that it is not there."""


class _Closed(Exception):
    """Modules of this type cannot be traced through."""


class _Tracer(fx.Tracer):
    """Calls layers, norms, modules with hooks and those of closed types without looking inside."""

    def __init__(self, closed: set[type]):
        super().__init__()
        self._closed = closed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, Layer | _StandIn) or type(m) in self._closed
        return known or bool(m._forward_hooks or m._forward_pre_hooks) or super().is_leaf_module(m, "")

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Closed:
            raise
        except Exception as error:
            raise _Closed(type(m)) from error


def _trace(copied: Callable[[], nn.Module], options: dict[str, Any]) -> fx.Graph:
    """Trace a module, closing one more type of module in it after each failure that is not its own."""
    closed = set[type]()
    while True:
        try:
            return _Tracer(closed).trace(copied(), options)
        except _Closed as error:
            closed.add(error.args[0])


def _options(module: nn.Module) -> list[dict[str, Any]]:
    """Return how a forward may be called: all its arguments given; and the optional ones, if any, at their defaults."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return [{}, defaults] if defaults else [{}]
