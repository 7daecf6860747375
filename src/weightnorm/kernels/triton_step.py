"""Which Triton kernel takes which rows, in tiles of which size: a small table, no autotuner."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightnorm.formula import length_floor, wide_dtype
from weightnorm.kernels import columns, triton_kernels
from weightnorm.kernels.tables import Member, Tables

_DTYPE = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# The numbers are those that did best for a first probe on an H100, or were reasoned; none is timed on these kernels.
_ON_CHIP = 4096  # elements of a tile at most: longer rows are walked along
_STRIDE = 8192  # elements at a time, on the way
_WALKED = 32768  # longer rows, or long ones of a tensor with few, are split over programs
_FEW = 64
_SHARED = 512  # elements of a tile that short rows share
_ACROSS = 8  # rows of a tile, where neighbours in memory belong to different rows
_WARPS = {512: 4, 1024: 2, 2048: 8, 4096: 16, 8192: 32}  # by elements of a tile
_OWN_LAUNCH = 1 << 18  # elements that are worth a launch of their own
_CLOCK = 128  # tensors a program of the clock


@dataclass(frozen=True)
class Shape:
    """What the rows of one launch have in common."""

    rule: str
    first: bool
    weight: torch.dtype
    gradient: torch.dtype
    state: torch.dtype
    master: bool
    stochastic: bool
    strided: bool
    across: bool
    vector: int
    path: str  # tiles, walk or split
    rows: int
    block: int

    def constants(self, kernel: Any) -> dict[str, Any]:
        """Return what the kernel is compiled for."""
        wide = wide_dtype(self.weight)
        values = {
            "W": _DTYPE[self.weight],
            "G": _DTYPE[self.gradient],
            "S": _DTYPE[self.state],
            "A": _DTYPE[wide],
            "RULE": self.rule,
            "FIRST": self.first,
            "MASTER": self.master,
            "STOCHASTIC": self.stochastic,
            "STRIDED": self.strided,
            "ACROSS": self.across,
            "VECTOR": self.vector,
            "FLOOR": length_floor(self.weight),
            "EPS": torch.finfo(wide).eps,
            "ROWS": self.rows,
            "BLOCK": self.block,
        }
        return {name: value for name, value in values.items() if name in kernel.arg_names}


def warps_of(shape: Shape, is_amd: bool = torch.version.hip is not None) -> int:
    """Return how many warps share a tile."""
    words = shape.rows * shape.block * wide_dtype(shape.weight).itemsize // 4
    warps = _WARPS[max(words, _SHARED)]
    return warps // 2 if is_amd else warps  # which are twice as wide there


def shape_of(member: Member) -> Shape:
    """Choose the kernel and the tile for a tensor's rows."""
    at, weight = member.layout, member.weight
    state = member.parts.get(columns.FIRST)
    strided, across = not at.contiguous, at.across
    narrow = 1 if weight.dtype != torch.float64 else 2
    path, block = "tiles", max(triton.next_power_of_2(at.length), 4)
    rows = _ACROSS if across else max(1, _SHARED // block)
    if rows * block > _ON_CHIP // narrow:
        path, block = "walk", _STRIDE // narrow // (4 * rows if strided else rows)  # addresses take registers too
        if at.length > _WALKED or at.rows < _FEW:
            path, rows, block = "split", 1, _STRIDE // narrow
    return Shape(
        rule=member.rule,
        first=state is not None,
        weight=weight.dtype,
        gradient=member.grad_dtype,
        state=state.dtype if state is not None else wide_dtype(weight.dtype),
        master=columns.MASTER in member.parts,
        stochastic=member.stochastic,
        strided=strided,
        across=across and path != "split",
        vector=1 if strided else _vector(member),
        path=path,
        rows=rows,
        block=block,
    )


def _vector(member: Member) -> int:
    """Return how many elements at a time begin at 16-byte boundaries in every array of a tensor, or 1."""
    arrays = [member.weight, *(part for part in member.parts.values() if part.shape == member.weight.shape)]
    narrowest = min(array.element_size() for array in (*arrays, torch.empty(0, dtype=member.grad_dtype)))
    vector = 16 // narrowest
    sizes = (member.layout.length if member.layout.rows > 1 else vector, member.weight.numel())
    aligned = member.grad_aligned and all(array.data_ptr() % 16 == 0 for array in arrays)
    aligned = aligned and not any(size % vector for size in sizes)
    return vector if aligned else 1


def _merged(groups: dict[Shape, list[int]], members: list[Member]) -> dict[Shape, list[int]]:
    """Let shapes with too few elements for a launch of their own join a wider one; the lanes left empty cost little."""
    merged: dict[Shape, list[int]] = {}
    for shape in sorted(groups, key=lambda shape: shape.block):
        indices = merged.pop(shape, []) + groups[shape]
        wider = [
            other
            for other in groups
            if shape.path == other.path == "tiles"
            and shape.block < other.block <= 4 * shape.block
            and replace(other, rows=shape.rows, block=shape.block) == shape
        ]
        few = sum(members[index].weight.numel() for index in indices) < _OWN_LAUNCH
        merged[min(wider, key=lambda other: other.block) if few and wider else shape] = indices
    return merged


class TritonStep:
    """The launches that step all tensors of one device.

    Args:
        members: the tensors, laid out, in the order of the tables.
        device: where they are.
    """

    def __init__(self, members: list[Member], device: torch.device):
        self._device = device
        groups: dict[Shape, list[int]] = {}
        for index, member in enumerate(members):
            groups.setdefault(shape_of(member), []).append(index)
        groups = _merged(groups, members)
        self._rule = members[0].rule
        self._count = len(members)
        self._seeds = any(shape.stochastic for shape in groups)
        self._no_seed = torch.zeros(2, dtype=torch.int64, device=device)
        self._launches = [self._launch(shape, indices, members) for shape, indices in groups.items()]

    def __call__(self, tables: Tables, grads: Tensor, options: Tensor, grad_scale: Tensor, found_inf: Tensor) -> None:
        """Step every tensor whose address in ``grads`` is not 0."""
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            triton_kernels.clock[(triton.cdiv(self._count, _CLOCK),)](
                tables.addresses, tables.facts, options, tables.moves, grads, grad_scale, found_inf, self._count,
                RULE=self._rule, BLOCK=_CLOCK,
            )  # fmt: skip
            # From torch's generator of the device, which CUDA graphs know: every replay draws anew.
            seed = torch.randint(2**31, (2,), device=self._device) if self._seeds else self._no_seed
            for launch in self._launches:
                launch(tables, grads, seed)

    def _launch(
        self, shape: Shape, indices: list[int], members: list[Member]
    ) -> Callable[[Tables, Tensor, Tensor], None]:
        if shape.path == "split":
            return self._split(shape, indices, members)
        kernel = getattr(triton_kernels, shape.path)
        constants = shape.constants(kernel) | {"num_warps": warps_of(shape)}
        firsts = [torch.arange(0, members[index].layout.rows, shape.rows) for index in indices]
        owners = torch.tensor(indices).repeat_interleave(torch.tensor([len(first) for first in firsts]))
        programs = torch.stack([owners, torch.cat(firsts)], dim=1).to(self._device, torch.int32)

        on_grid = kernel[(len(programs),)]

        def launch(tables: Tables, grads: Tensor, seed: Tensor) -> None:
            on_grid(tables.addresses, grads, tables.moves, programs, seed, **constants)

        return launch

    def _split(
        self, shape: Shape, indices: list[int], members: list[Member]
    ) -> Callable[[Tables, Tensor, Tensor], None]:
        chunks = [
            (index, row, chunk)
            for index in indices
            for row in range(members[index].layout.rows)
            for chunk in range(triton.cdiv(members[index].layout.length, shape.block))
        ]
        counts = [triton.cdiv(members[index].layout.length, shape.block) for index, _, _ in chunks]
        rows = [(*key, place - key[2], count) for place, (key, count) in enumerate(zip(chunks, counts, strict=True))]
        programs = torch.tensor(rows, dtype=torch.int32).to(self._device)
        before, after = torch.zeros(2, len(rows), 2, dtype=wide_dtype(shape.weight), device=self._device)
        kernels = triton_kernels.split_sums, triton_kernels.split_steps, triton_kernels.split_lengths
        sums, steps, lengths = (shape.constants(kernel) | {"num_warps": warps_of(shape)} for kernel in kernels)

        def launch(tables: Tables, grads: Tensor, seed: Tensor) -> None:
            given = tables.addresses, grads, tables.moves, programs, before
            grid = (len(programs),)
            triton_kernels.split_sums[grid](*given, **sums)
            triton_kernels.split_steps[grid](*given, after, seed, **steps)
            for last in (False, True):
                triton_kernels.split_lengths[grid](*given, after, seed, **lengths, LAST=last)

        return launch
