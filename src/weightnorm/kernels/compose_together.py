"""The launch of ``triton_compose`` that does several weights at once, and the tables that it reads."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from weightnorm.kernels import triton_compose
from weightnorm.kernels.compose_launches import Launch, constants_of, is_current, numbers_of
from weightnorm.kernels.compose_tiles import Kind, tile_of
from weightnorm.kernels.tables import Upload, is_recording

_GAP = 128  # bytes, at whose multiples results begin
_recorded: list["Together"] = []  # whose tables a CUDA graph reads: never to be freed


class Together:
    """The launch that does several weights of one device and the same dtypes.

    Args:
        kinds: of the weights.
    """

    def __init__(self, kinds: list[Kind]):
        first, layouts, tiles = kinds[0], [kind.at for kind in kinds], [tile_of(kind) for kind in kinds]
        if is_recording(first.device):
            raise ValueError(
                "a CUDA graph is being recorded, and these weights have not been composed together yet; "
                "run forward and backward once before"
            )
        self._device, self._back, self._count = first.device, first.grad_stride is not None, len(kinds)
        self._outs = _Room([(kind.shape, kind.stride) for kind in kinds], first.dtype, first.device)
        lengths = [(kind.g_shape, torch.empty(kind.g_shape, device="meta").stride()) for kind in kinds]
        self._grad_gs = _Room(lengths, first.g_dtype, first.device)
        begins = zip(self._outs.begins, self._grad_gs.begins, strict=True)
        table = [[*numbers_of(at), *begin] for at, begin in zip(layouts, begins, strict=True)]
        kept = sorted(set(tiles))
        # The longest rows first, so that none is left when the rest is done.
        order = sorted(range(len(kinds)), key=lambda i: -layouts[i].length)
        programs = torch.cat([_programs(i, layouts[i].rows, tiles[i].rows, kept.index(tiles[i])) for i in order])
        self._table, self._programs = torch.tensor(table).to(first.device), programs.to(first.device)
        self._addresses = Upload(first.device, torch.int64)
        constants = constants_of(first) | {"TILES": tuple(map(tuple, kept))}
        self._launch = Launch(triton_compose.many, len(programs), [len(kinds)], constants)

    def __call__(self, addresses: list[int]) -> tuple[list[Tensor], list[Any]]:
        """Return the weights; or, where the kinds have gradients, those at v and at g.

        Args:
            addresses: of every v, then of every g, then of every gradient at w, 0 where there is none.
        """
        if is_recording(self._device):
            _recorded.append(self)
        (out, outs), (grad_g, grad_gs) = self._outs(), self._grad_gs() if self._back else (0, [None] * self._count)
        with nullcontext() if is_current(self._device) else torch.cuda.device(self._device):
            self._launch(self._table, self._addresses(addresses), self._programs, out, grad_g)
        return outs, grad_gs


class _Room:
    """One piece of memory for several results of one dtype.

    Args:
        layouts: shape and strides of each.
        dtype: of all.
        device: of all.
    """

    def __init__(self, layouts: Sequence[tuple[torch.Size, tuple[int, ...]]], dtype: torch.dtype, device: torch.device):
        sizes = [-(-shape.numel() * dtype.itemsize // _GAP) * _GAP for shape, _ in layouts]
        self.begins = [0, *accumulate(sizes)]  # in bytes
        self._numel = self.begins.pop() // dtype.itemsize
        self._dtype, self._device = dtype, device
        self._views = [(*layout, begin // dtype.itemsize) for layout, begin in zip(layouts, self.begins, strict=True)]

    def __call__(self) -> tuple[int, list[Tensor]]:
        """Return where new memory is, and the tensors in it, not filled yet."""
        whole = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        # Below autograd's account of views: a write to one result is none to the others.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return whole.data_ptr(), [whole.as_strided(*view) for view in self._views]


def _programs(tensor: int, rows: int, at_a_time: int, tile: int) -> Tensor:
    """Return the programs that have a tensor's rows: tensor, first row, which tile."""
    first = torch.arange(0, rows, at_a_time, dtype=torch.int32)
    return torch.stack([torch.full_like(first, tensor), first, torch.full_like(first, tile)], dim=1)
