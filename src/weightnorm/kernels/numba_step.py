"""Which rows a call of the numba kernels takes: every tensor of a model in a call or two, cut into pieces of work."""

import os

import numba
import numpy as np
import torch
from torch import Tensor

from weightnorm.kernels import columns
from weightnorm.kernels.numba_kernels import clock, rows_kernel
from weightnorm.kernels.tables import Member, Tables

_HOME = os.getpid()
_WORK = 1 << 16  # elements of a program: enough to pay for its scratch, few enough to spread over cores


class NumbaStep:
    """The calls that step all tensors that are on the CPU.

    Args:
        members: the tensors, laid out, in the order of the tables.
        device: the CPU.
    """

    def __init__(self, members: list[Member], device: torch.device):
        groups: dict[tuple[str, bool, bool, torch.dtype], list[list[int]]] = {}
        for index, member in enumerate(members):
            at = member.layout
            key = (member.rule, columns.FIRST in member.parts, at.contiguous, member.weight.dtype)
            stride = max(1, _WORK // at.length)
            programs = [[index, start, min(start + stride, at.rows)] for start in range(0, at.rows, stride)]
            groups.setdefault(key, []).extend(programs)
        self._is_sgd = members[0].rule == "sgd"
        self._work = [(key, np.array(programs)) for key, programs in groups.items()]

    def __call__(self, tables: Tables, grads: Tensor, options: Tensor, grad_scale: Tensor, found_inf: Tensor) -> None:
        """Step every tensor whose address in ``grads`` is not 0."""
        parallel = os.getpid() == _HOME  # numba's threads do not live on in a forked child, and would end it
        if parallel:
            _share_threads()
        table, facts, moves = tables.addresses.numpy(), tables.facts.numpy(), tables.moves.numpy()
        scaling = float(grad_scale), float(found_inf)
        clock(table, facts, options.numpy(), moves, grads.numpy(), *scaling, self._is_sgd)
        for key, programs in self._work:
            rows_kernel(*key, parallel)(table, moves, grads.numpy(), programs)


def _share_threads() -> None:
    """Let numba use as many threads as torch does; starting its own, it would change torch's number."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, int(numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
