"""Which layers feed a batch normalization: what it takes away need not be set."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from weightnorm.data_dependent.calls import Call
from weightnorm.data_dependent.units import Units
from weightnorm.layers.computed import writes_to
from weightnorm.mean_only import MeanOnlyBatchNorm

NORMS = nn.modules.batchnorm._BatchNorm | MeanOnlyBatchNorm
_MARK = "_weightnorm_units"  # on a tensor: whose output it is, and how often it had been written to then


def mark(units: Units, call: Call) -> None:
    """Mark what units put out as theirs, for ``watching``."""
    for t in call.put_out(units):
        if isinstance(t, Tensor):
            setattr(t, _MARK, (units, writes_to(t)))


@contextmanager
def watching(model: nn.Module) -> Iterator[dict[Units, nn.Module]]:
    """Note which normalization takes in, as it is, what units put out that were marked inside."""
    feeds = dict[Units, nn.Module]()
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, NORMS):
                hooks.enter_context(module.register_forward_pre_hook(partial(_take_in, feeds)))
        yield feeds


def _take_in(feeds: dict[Units, nn.Module], norm: nn.Module, args: tuple[Any, ...]) -> None:
    units, writes = getattr(args[0], _MARK, (None, None)) if args else (None, None)
    if units is not None and writes_to(args[0]) == writes:
        feeds.setdefault(units, norm)
