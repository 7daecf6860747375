"""Which rows go into which tile of ``triton_compose``: a small table, no autotuner."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from weightnorm.axes import Axis
from weightnorm.formula import Dim, wide_dtype
from weightnorm.kernels.layout import Layout, is_dense, rows_of

# Elements are counted in float32. The numbers are reasoned: from the registers that the kernels take, at most half of
# what a thread can have, and from a first probe of the optimizer's step on an H100, where rows of 8192 did as well on
# chip as on a walk. None is timed on these kernels.
_ON_CHIP = 8192  # elements of a tile at most: longer rows are walked along
_STRIDE = 2048  # elements at a time, on the way
_SHARED = 2048  # elements of a tile that short rows share
_ACROSS = 32  # rows of a tile where neighbours in memory are rows
_WALKED = 1 << 15  # elements that one of few programs walks along at most: longer rows are spread over more
_FEW = 128  # programs, fewer than which do not fill a GPU
_FULL = 512  # programs that do
_MOST = 2**31 - 2**16  # rows, or elements of one, that 32 bits can count with some to spare
WARPS = 4 if torch.version.hip else 8  # of every program, so that a row's sum is the same alone and among others


class Kind(NamedTuple):
    """What of a weight, its lengths and its gradient the kernels depend on: all but the addresses."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    g_shape: torch.Size
    g_dtype: torch.dtype
    dim: Dim  # of the axis
    groups: int
    aligned: bool = True  # v and the gradient begin at multiples of 16 bytes
    grad_stride: tuple[int, ...] | None = None  # None: there is no gradient, the weight is to be composed
    grad_dtype: torch.dtype | None = None

    @property
    def at(self) -> Layout:
        """Where the rows lie."""
        at = layout_of(self.shape, self.stride, self.grad_stride or self.stride, Axis(self.dim, self.groups))
        assert at is not None
        return at


class Tile(NamedTuple):
    """The rows that a program takes: the last constants of the kernels, in their order."""

    split: bool
    across: bool
    vector: int
    rows: int
    block: int
    walk: bool

    def programs(self, at: Layout) -> int:
        """Return how many programs have all rows."""
        return -(-at.rows // self.rows)


@lru_cache(maxsize=4096)
def layout_of(shape: torch.Size, stride: tuple[int, ...], grad_stride: tuple[int, ...], axis: Axis) -> Layout | None:
    """Return where the rows of a weight and of its gradient lie, or None where the kernels cannot follow them."""
    v, grad = (torch.empty_strided(shape, strides, device="meta") for strides in (stride, grad_stride))
    at = rows_of(v, grad, axis) if v.numel() > 0 and is_dense(v) else None
    return at if at is not None and max(at.rows, at.length) <= _MOST else None


def described(grad: Tensor, v: Tensor, axis: Axis) -> Tensor:
    """Return a gradient in a layout that the kernels can follow: a copy in that of ``v``, if it must be."""
    stride, v_stride = grad.stride(), v.stride()
    if stride == v_stride or layout_of(v.shape, v_stride, stride, axis) is not None:
        return grad
    return torch.empty_like(v, dtype=grad.dtype).copy_(grad)


def tile_of(kind: Kind) -> Tile:
    """Choose the tile for a weight's rows."""
    at, words = kind.at, wide_dtype(kind.dtype).itemsize // 4
    across = at.across or at.length == 1
    vector = _vector(kind, across)
    block = _power_of_2(at.length)
    rows = min(max(_ACROSS if across else 1, _SHARED // words // block), _power_of_2(at.rows))
    room = _ON_CHIP if vector > 1 and not across else _ON_CHIP // 2  # addresses, or sums, take registers too
    walk = rows * block > room // words
    if walk:
        block = _STRIDE // words // rows
    split = (at.row_split, at.split) != (at.rows, at.length)
    return Tile(split, across, vector, rows, block, walk)


def _vector(kind: Kind, across: bool) -> int:
    """Return how many elements at a time lie side by side from a multiple of 16 bytes on in every array, or 1."""
    at, vector = kind.at, 16 // min(kind.dtype.itemsize, (kind.grad_dtype or kind.dtype).itemsize)
    rows, columns = (at.row_split, at.row, at.grad_row), (at.split, at.column, at.grad_column)
    (size, *fast), (_, *slow) = (rows, columns) if across else (columns, rows)
    side_by_side = all(inner == 1 for _, inner in fast)
    between = [size, *(outer for outer, _ in fast), *slow[0], *slow[1]]
    return vector if kind.aligned and side_by_side and not any(step % vector for step in between) else 1


def chunks_of(at: Layout, tile: Tile) -> tuple[int, int]:
    """Return over how many programs each tile's rows are spread, and how many blocks of them one has."""
    programs, blocks = tile.programs(at), -(-at.length // tile.block)
    if programs >= _FEW or tile.rows * at.length <= _WALKED or not tile.walk:
        return 1, blocks
    steps = -(-blocks // -(-_FULL // programs))
    return -(-blocks // steps), steps


def _power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()
