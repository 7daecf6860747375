"""The launches of ``triton_compose`` that do one weight."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from weightnorm.axes import Axis
from weightnorm.formula import length_floor, wide_dtype
from weightnorm.kernels import triton_compose
from weightnorm.kernels.compose_tiles import WARPS, Kind, chunks_of, described, tile_of
from weightnorm.kernels.layout import Layout


class Launch:
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
        """Launch."""
        if self._compiled is not None:
            self._compiled(*arguments, *self._fixed)
            return
        compiled = self._kernel(*arguments, *self._fixed, num_warps=WARPS)
        if compiled is not None:  # there is none in Triton's interpreter
            self._compiled = compiled[self._grid]


class Alone:
    """What composes one weight, and pulls its gradients back.

    Args:
        kind: of the weight, without a gradient.
    """

    def __init__(self, kind: Kind):
        self._kind, self._axis = kind, Axis(kind.dim, kind.groups)
        self._passes: dict[Any, Pass] = {}

    def forward(self, v: Tensor, g: Tensor) -> Tensor:
        """Return the weight."""
        w, at, g_at = torch.empty_like(v), v.data_ptr(), g.data_ptr()
        run = self._pass(at % 16 == 0, None, None)
        run(at, g_at, at, w.data_ptr(), g_at)  # the kernel reads no gradient and writes none
        return w

    def backward(self, grad: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients at v and g."""
        if v.stride() != self._kind.stride:  # autograd's hooks may bring back another layout than they were given
            v = torch.empty_strided(v.shape, self._kind.stride, dtype=v.dtype, device=v.device).copy_(v)
        grad, g = described(grad, v, self._axis), g.contiguous()
        grad_v, grad_g, at, grad_at = torch.empty_like(v), torch.empty_like(g), v.data_ptr(), grad.data_ptr()
        run = self._pass((at | grad_at) % 16 == 0, grad.stride(), grad.dtype)
        run(at, g.data_ptr(), grad_at, grad_v.data_ptr(), grad_g.data_ptr())
        return grad_v, grad_g

    def _pass(self, *key: Any) -> "Pass":
        """Return what does weights and gradients with these last fields of ``Kind``."""
        found = self._passes.get(key)
        if found is None:
            found = self._passes[key] = Pass(Kind(*self._kind[:-3], *key))
        return found


class Pass:
    """The launch that does one weight one way; or the two that do, where its rows are spread over programs."""

    def __init__(self, kind: Kind):
        at, tile = kind.at, tile_of(kind)
        chunks, steps = chunks_of(at, tile)
        programs = tile.programs(at) * chunks
        constants = constants_of(kind) | {name.upper(): value for name, value in tile._asdict().items()}
        self._device, self._wide = kind.device, wide_dtype(kind.dtype)
        self._partials, self._sums = (1 + constants["BACK"]) * chunks * at.rows, None
        if chunks == 1:
            self._last = Launch(triton_compose.one, programs, [numbers_of(at)], constants)
        else:
            fixed = numbers_of(at), chunks, steps
            self._sums = Launch(triton_compose.sums, programs, fixed, constants)
            self._last = Launch(triton_compose.close, programs, fixed, constants)

    def __call__(self, v: int, g: int, grad: int, out: int, grad_g: int) -> None:
        """Write the weight to ``out``, or the gradients to ``out`` and ``grad_g``: addresses all."""
        if not is_current(self._device):
            with torch.cuda.device(self._device):
                self(v, g, grad, out, grad_g)
        elif self._sums is None:
            self._last(v, g, grad, out, grad_g)
        else:
            partials = torch.empty(self._partials, dtype=self._wide, device=self._device)
            self._sums(v, grad, partials.data_ptr())
            self._last(v, g, grad, out, grad_g, partials.data_ptr())


def numbers_of(at: Layout) -> tuple[int, ...]:
    """Return a layout as kernels take it."""
    return at.rows, at.length, at.row_split, at.split, *at.row, *at.column, *at.grad_row, *at.grad_column


def constants_of(kind: Kind) -> dict[str, Any]:
    """Return what every kernel is compiled for."""
    dtypes = {"V": kind.dtype, "G": kind.g_dtype, "D": kind.grad_dtype or kind.dtype, "A": wide_dtype(kind.dtype)}
    named = {name: getattr(tl, str(dtype).removeprefix("torch.")) for name, dtype in dtypes.items()}
    return named | {"BACK": kind.grad_stride is not None, "FLOOR": length_floor(kind.dtype)}


def is_current(device: torch.device) -> bool:
    """Say whether Triton, which launches on the current device, launches on this."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()
