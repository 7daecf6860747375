"""One weight as the optimizer sees it: direction and length while a step runs, a plain tensor otherwise.

This file alone owns the scale ``s = g/‖v‖``, the pull-back of the gradient and the increment of the weight.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightnorm.axes import Axis
from weightnorm.formula import advance, pull_back, row_lengths, sum_rows, wide_dtype

State = dict[str, Any]

SCALE = "scale"  # s = g/‖v‖ per vector; 0: not set yet, the vector had no direction so far
MASTER = "master"  # the weight in the wide dtype, where the weight's own is narrower
LENGTH = "g."  # prefix of what the rule keeps for g; what it keeps for v has torch's own names


class Coordinates:
    """The coordinates ``(v, g)`` of one normalised weight.

    ``v`` and ``g`` are what the inner optimizer steps on. They hold tensors only between ``open`` and ``close``: at
    rest the weight and its scale are all there is, so nothing goes stale when somebody else changes the weight.

    Args:
        weight: the parameter, floating point, at least one element.
        axis: where its vectors lie.
        as_matrix: show ``v`` to the inner optimizer as a matrix, a vector a row; else shaped like the weight.
    """

    def __init__(self, weight: nn.Parameter, axis: Axis, *, as_matrix: bool = False):
        self.weight = weight
        self._axis = axis
        self._dim = axis.kept(weight)
        self._as_matrix = as_matrix
        # Some optimizers make state in their constructor, so v and g start with their shapes and dtypes. In the wide
        # dtype an expanded number stands for the weight: copies of a whole model, frozen parts too, would be large.
        dtype = wide_dtype(weight.dtype)
        whole = weight.detach()
        if weight.dtype != dtype and is_traceable_wrapper_subclass(whole):
            whole = whole.to(dtype)
        elif weight.dtype != dtype:
            whole = whole.new_zeros((), dtype=dtype).expand_as(whole)
        lengths = sum_rows(axis.split(whole), self._dim)
        self._w = self._length = self._scale = torch.empty(0)  # the weight, ‖w‖ and the scale while a step runs
        self.v = nn.Parameter(self._pack(axis.split(whole)), requires_grad=False)
        self.g = nn.Parameter(torch.zeros_like(lengths), requires_grad=False)

    @property
    def row_length(self) -> int:
        """Return the number of elements of a vector."""
        return self._axis.row_length(self.weight)

    def open(self, state: State, options: Mapping[str, Any]) -> None:
        """Fill ``v``, ``g`` and their gradients from the weight, its gradient and its scale.

        ``pull_back`` at ``v = w``, ``g = ‖w‖`` gives the gradients for scale 1; another scale ``s`` multiplies ∂v by
        ``s`` and ∂g by its sign. A vector with no direction has ``g = 0``, ``∂g = 0`` and takes a plain step in ``v``.
        """
        self._w = self._axis.split(self._wide_weight(state, keeps_master=not options["stochastic_rounding"]))
        gradient = self._axis.split(self._wide_gradient())
        length, alive = row_lengths(self._w, self._dim)
        self._length = torch.where(alive, length, 0)
        self._set_scale(state, options["v_std"])

        grad_v, grad_g = pull_back(gradient, self._w, self._length, self._dim)
        grad_v = torch.where(alive, grad_v, gradient)
        _put(self.v, self._pack(self._start_v()))
        _put(self.g, self._start_g())
        self.v.grad, self.g.grad = self._pack(self._scale * grad_v), self._scale.sign() * grad_g

    def apply(self, state: State, options: Mapping[str, Any]) -> None:
        """Move the weight and its scale as the inner optimizer moved ``v`` and ``g`` since ``open``."""
        step_v = self._unpack(self.v) - self._start_v()
        step_g = self.g - self._start_g()
        weight, scale = advance(self._w, self._scale, step_v, step_g, self._dim)
        # In place: a CUDA graph replays these addresses. A scale that is not set yet stays so.
        state[SCALE].copy_(torch.where(state[SCALE] == 0, 0, scale))
        weight = weight.reshape(self.weight.shape)
        if MASTER in state:
            state[MASTER].copy_(weight)
        elif options["stochastic_rounding"] and self.weight.dtype == torch.bfloat16:
            weight = round_stochastically(weight)
        self.weight.copy_(weight)

    def close(self) -> None:
        """Drop the tensors of the step, or of the constructor."""
        if self.v.numel() == 0:
            return  # at rest already
        for coordinate in (self.v, self.g):
            coordinate.grad = None
            _put(coordinate, coordinate.detach().new_empty(0))
        self._w = self._length = self._scale = torch.empty(0)

    def _start_v(self) -> Tensor:
        # Computed again rather than kept: the same bits, and one copy of the weights less while the step runs.
        return self._w / self._scale

    def _start_g(self) -> Tensor:
        return self._scale.sign() * self._length

    def _set_scale(self, state: State, v_std: float | None) -> None:
        """Give vectors without a scale the one that sets their ``‖v‖``, at the first step they have a direction."""
        if SCALE not in state:
            state[SCALE] = torch.zeros_like(self._length)
        if v_std is None:
            initial = torch.ones_like(self._length)  # v = w
        else:
            initial = self._length / (v_std * self.row_length**0.5)  # ‖v‖ as if v were drawn N(0, v_std²)
        state[SCALE].copy_(torch.where(state[SCALE] == 0, initial, state[SCALE]))
        self._scale = torch.where(state[SCALE] == 0, 1, state[SCALE])

    def _wide_weight(self, state: State, keeps_master: bool) -> Tensor:
        """Return the weight in the wide dtype: the master where it still rounds to the weight, else the weight."""
        weight = self.weight.detach()
        wide = weight.to(wide_dtype(weight.dtype))
        if wide.dtype == weight.dtype or not keeps_master:
            state.pop(MASTER, None)  # of a narrower past, or of one that rounded to the nearest
            return wide
        if MASTER not in state:
            state[MASTER] = wide.clone()
        master: Tensor = state[MASTER]
        return torch.where(master.to(weight.dtype) == weight, master, wide)

    def _wide_gradient(self) -> Tensor:
        """Return the gradient in the wide dtype and in the weight's memory layout, which fused rules rely on."""
        gradient = self.weight.grad
        assert gradient is not None
        dtype = wide_dtype(self.weight.dtype)
        if gradient.dtype == dtype and gradient.stride() == self.weight.stride():
            return gradient
        return torch.empty_like(self.weight, dtype=dtype).copy_(gradient)

    def _pack(self, x: Tensor) -> Tensor:
        """Return a split tensor as ``v`` is shown to the inner optimizer."""
        whole = x.reshape(self.weight.shape)
        return self._axis.rows(whole) if self._as_matrix else whole

    def _unpack(self, x: Tensor) -> Tensor:
        """Undo ``_pack``."""
        return self._axis.split(self._axis.from_rows(x, self.weight) if self._as_matrix else x)


def round_stochastically(x: Tensor) -> Tensor:
    """Round float32 numbers to bfloat16 ones, up or down at random, so that they are right on average.

    Where each step is far smaller than a weight's last bit, rounding to the nearest would lose every one of them.
    """
    bits = x.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _put(coordinate: nn.Parameter, value: Tensor) -> None:
    """Give a coordinate another tensor; ``.data =`` would leave the inside of a DTensor as it was."""
    swap_tensors(coordinate, nn.Parameter(value, requires_grad=False))
