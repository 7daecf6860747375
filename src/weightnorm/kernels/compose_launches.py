"""The launches of ``triton_compose``: for one weight, and for several at once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from weightnorm.formula import length_floor, wide_dtype
from weightnorm.kernels import triton_compose
from weightnorm.kernels.compose_tiles import WARPS, Kind, chunks_of, tile_of
from weightnorm.kernels.layout import Layout
from weightnorm.kernels.tables import Upload, is_recording

_GAP = 128  # bytes, at whose multiples the results of several weights begin
_recorded: list["Together"] = []  # whose tables a CUDA graph reads: never to be freed


class _Launch:
    """A kernel on its grid, with the arguments that stay the same.

    At every launch Triton looks at all arguments to find what it has compiled. It depends on nothing that may change
    here, so that from the second launch on the compiled kernel is called as it is.

    Args:
        kernel: the kernel.
        programs: how many.
        fixed: the arguments after those of a call and before the constants.
        constants: what the kernel is compiled for, by name.
    """

    def __init__(self, kernel: Any, programs: int, fixed: Sequence[Any], constants: dict[str, Any]):
        self._grid = (programs, 1, 1)
        self._kernel = kernel[self._grid]
        self._fixed = (*fixed, *(constants[name] for name in kernel.arg_names if name in constants))
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        if self._compiled is not None:
            self._compiled(*arguments, *self._fixed)
            return
        compiled = self._kernel(*arguments, *self._fixed, num_warps=WARPS)
        if compiled is not None:  # there is none in Triton's interpreter
            self._compiled = compiled[self._grid]


class Alone:
    """The launch that does one weight; or the two that do, where its rows are spread over programs."""

    def __init__(self, kind: Kind):
        at, tile = kind.at, tile_of(kind)
        chunks, steps = chunks_of(at, tile)
        programs = tile.programs(at) * chunks
        constants = constants_of(kind) | {name.upper(): value for name, value in tile._asdict().items()}
        self._kind, self._partials, self._sums = kind, (1 + kind.back) * chunks * at.rows, None
        if chunks == 1:
            self._last = _Launch(triton_compose.one, programs, [numbers_of(at)], constants)
        else:
            fixed = numbers_of(at), chunks, steps
            self._sums = _Launch(triton_compose.sums, programs, fixed, constants)
            self._last = _Launch(triton_compose.close, programs, fixed, constants)

    def __call__(self, v: int, g: int, grad: int, out: int, grad_g: int) -> None:
        """Write the weight to ``out``, or the gradients to ``out`` and ``grad_g``: addresses all."""
        kind = self._kind
        with _on(kind.device):
            if self._sums is None:
                self._last(v, g, grad, out, grad_g)
            else:
                partials = torch.empty(self._partials, dtype=wide_dtype(kind.dtype), device=kind.device)
                self._sums(v, grad, partials.data_ptr())
                self._last(v, g, grad, out, grad_g, partials.data_ptr())


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
        self._device, self._back = first.device, first.back
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
        self._launch = _Launch(triton_compose.many, len(programs), [len(kinds)], constants)

    def __call__(
        self, vs: Sequence[Tensor], gs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Any]]:
        """Return the weights; or, where the kinds are of a backward pass, the gradients at v and at g."""
        if is_recording(self._device):
            _recorded.append(self)
        at = [0 if x is None else x.data_ptr() for x in (*vs, *gs, *grads)]
        (out, outs), (grad_g, grad_gs) = self._outs(), self._grad_gs() if self._back else (0, [None] * len(vs))
        with _on(self._device):
            self._launch(self._table, self._addresses(at), self._programs, out, grad_g)
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


def numbers_of(at: Layout) -> tuple[int, ...]:
    """Return a layout as kernels take it."""
    return at.rows, at.length, at.row_split, at.split, *at.row, *at.column, *at.grad_row, *at.grad_column


def constants_of(kind: Kind) -> dict[str, Any]:
    """Return what every kernel is compiled for."""
    dtypes = {"V": kind.dtype, "G": kind.g_dtype, "D": kind.grad_dtype, "A": wide_dtype(kind.dtype)}
    named = {name: getattr(tl, str(dtype).removeprefix("torch.")) for name, dtype in dtypes.items()}
    return named | {"BACK": kind.back, "FLOOR": length_floor(kind.dtype)}


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, on which Triton launches, if it is not."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(device)
