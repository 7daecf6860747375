"""The fused step in numba, for CPUs: a row at a time, its elements in the cache.

The tables are those that the Triton kernels read; the mathematics is in ``arithmetic``.
"""

from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from weightnorm.formula import length_floor
from weightnorm.kernels import arithmetic, columns, scalars

_PIECE = 1024  # elements summed in their own dtype before float64 takes over
_exact: Any = njit(error_model="numpy", fastmath={"contract"})
_sums: Any = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})  # in any order, or none is vectorised
_inline: Any = njit(error_model="numpy", fastmath={"contract"}, forceinline=True)
_parallel: Any = njit(error_model="numpy", fastmath={"contract"}, parallel=True)
_open_row, _close_row, _sgd_clock, _adam_clock = (
    _exact(arithmetic.bound_to(function, scalars))
    for function in (arithmetic.open_row, arithmetic.close_row, arithmetic.sgd_clock, arithmetic.adam_clock)
)
_pull_back = _inline(arithmetic.bound_to(arithmetic.pull_back, scalars))
_settle = _inline(arithmetic.bound_to(arithmetic.settle, scalars))
_RULES = {
    name: _inline(arithmetic.bound_to(getattr(arithmetic, name), scalars))
    for name in ("sgd", "adam", "amsgrad", "adamax")
}
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


@intrinsic
def _void_pointer(typing, address):
    """Return an address as a pointer, which ``carray`` makes an array of."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@_sums
def _dots(a, b):
    """Return ``Σ a·a`` and ``Σ a·b``: pieces in the arrays' dtype, their sum in float64."""
    squares, product = 0.0, 0.0
    for start in range(0, len(a), _PIECE):
        x, y = a[start : start + _PIECE], b[start : start + _PIECE]
        one = other = a.dtype.type(0)
        for j in range(len(x)):
            one += x[j] * x[j]
            other += x[j] * y[j]
        squares += one
        product += other
    return squares, product


@_exact
def clock(table, facts, options, moves, grads, grad_scale, found_inf, is_sgd):
    """Count the step of every tensor that has a gradient, and work out what moves its elements."""
    for tensor in range(len(table)):
        move, fact, option = moves[tensor], facts[tensor], options[table[tensor, columns.GROUP]]
        move[columns.MOVE_ON] = grads[tensor] != 0 and found_inf == 0.0
        if move[columns.MOVE_ON] == 0.0:
            continue
        step = 1.0
        for place in (columns.G_STEP, columns.STEP):
            if table[tensor, place] != 0:
                count = numba.carray(_void_pointer(table[tensor, place]), 1, np.float32)
                count[0] += np.float32(1)
                step = float(count[0])
        lr = option[columns.OPTION_RATE]
        keep1, keep2 = option[columns.OPTION_KEEP1], option[columns.OPTION_KEEP2]
        log1, log2 = option[columns.OPTION_LOG_KEEP1], option[columns.OPTION_LOG_KEEP2]
        nesterov = option[columns.OPTION_NESTEROV]
        if is_sgd:
            rate, mix1, keep2, mix2, root = _sgd_clock(step, lr, keep1, log1, keep2, log2, nesterov)
        else:
            rate, mix1, keep2, mix2, root = _adam_clock(step, lr, keep1, log1, keep2, log2, nesterov)
        v_decay, g_rate = fact[columns.FACT_V_DECAY], fact[columns.FACT_G_RATE]
        coupled, decoupled = option[columns.OPTION_COUPLED], option[columns.OPTION_DECOUPLED] * lr
        move[columns.MOVE_GRADIENT] = option[columns.OPTION_SIGN] / grad_scale
        move[columns.MOVE_RATE], move[columns.MOVE_G_RATE] = rate, rate * g_rate
        move[columns.MOVE_COUPLED], move[columns.MOVE_G_COUPLED] = coupled * v_decay, coupled
        move[columns.MOVE_DECOUPLED], move[columns.MOVE_G_DECOUPLED] = decoupled * v_decay, decoupled * g_rate
        move[columns.MOVE_MIX1], move[columns.MOVE_KEEP2], move[columns.MOVE_MIX2] = mix1, keep2, mix2
        move[columns.MOVE_ROOT], move[columns.MOVE_EPS] = root, option[columns.OPTION_EPS]
        move[columns.MOVE_V_LENGTH] = fact[columns.FACT_V_LENGTH]


@lru_cache
def rows_kernel(rule: str, keeps_first: bool, contiguous: bool, dtype: torch.dtype, parallel: bool) -> Any:
    """Compile what steps the rows of tensors that have these things in common.

    Args:
        rule: ``sgd``, ``adam``, ``amsgrad`` or ``adamax``.
        keeps_first: whether the rule keeps its first array; all but SGD without momentum do.
        contiguous: whether rows lie one after the other.
        dtype: of the weight, its gradient and its state.
        parallel: whether threads share the work.

    Returns:
        A function of the table, the moves, the gradients' addresses and the programs (tensor, first row, row after).
    """
    kind = _NUMPY[dtype]
    floor, eps = length_floor(dtype), torch.finfo(dtype).eps
    step_of = _RULES[rule]
    keeps_second, keeps_third = rule != "sgd", rule == "amsgrad"

    @_exact
    def array(table, tensor, place, size):
        return numba.carray(_void_pointer(table[tensor, place]), size, kind)

    @_sums
    def step_elements(w, dw, first, second, third, t, move, turn, along, scale):
        """Step the rule on v, leave in ``t`` by how much the weight moves, and sum what its length is set by."""
        turn, along = kind(turn * move[columns.MOVE_GRADIENT]), kind(along)
        scale, inverse = kind(scale), kind(1.0 / scale)
        rate, eps_ = kind(move[columns.MOVE_RATE]), kind(move[columns.MOVE_EPS])
        coupled, decoupled = kind(move[columns.MOVE_COUPLED]), kind(move[columns.MOVE_DECOUPLED])
        mix1, keep2 = kind(move[columns.MOVE_MIX1]), kind(move[columns.MOVE_KEEP2])
        mix2, root = kind(move[columns.MOVE_MIX2]), kind(move[columns.MOVE_ROOT])
        zero = kind(0)
        squares = growth = zero
        for j in range(len(w)):
            a = first[j] if keeps_first else zero
            b = second[j] if keeps_second else zero
            c = third[j] if keeps_third else zero
            v, dv = w[j] * inverse, _pull_back(dw[j], w[j], scale, turn, along)
            step, a, b, c = step_of(v, dv, a, b, c, rate, coupled, decoupled, mix1, keep2, mix2, root, eps_)
            if keeps_first:
                first[j] = a
            if keeps_second:
                second[j] = b
            if keeps_third:
                third[j] = c
            t[j] = scale * step
            moved = w[j] + t[j]
            squares += moved * moved
            growth += t[j] * (w[j] + moved)
        return squares, growth

    @_exact
    def step_length(table, tensor, r, move, g, dg):
        """Step the rule on g."""
        rows = table[tensor, columns.ROWS]
        first = array(table, tensor, columns.G_FIRST, rows)
        second = array(table, tensor, columns.G_SECOND, rows)
        third = array(table, tensor, columns.G_THIRD, rows)
        a = float(first[r]) if keeps_first else 0.0
        b = float(second[r]) if keeps_second else 0.0
        c = float(third[r]) if keeps_third else 0.0
        rate, coupled = move[columns.MOVE_G_RATE], move[columns.MOVE_G_COUPLED]
        decoupled, root, eps_ = move[columns.MOVE_G_DECOUPLED], move[columns.MOVE_ROOT], move[columns.MOVE_EPS]
        mix1, keep2, mix2 = move[columns.MOVE_MIX1], move[columns.MOVE_KEEP2], move[columns.MOVE_MIX2]
        step, a, b, c = step_of(g, dg, a, b, c, rate, coupled, decoupled, mix1, keep2, mix2, root, eps_)
        if keeps_first:
            first[r] = a
        if keeps_second:
            second[r] = b
        if keeps_third:
            third[r] = c
        return step

    @_exact
    def step_row(table, tensor, r, move, w, dw, first, second, third, t):
        """Step one row, given as contiguous memory."""
        normalized = table[tensor, columns.NORMALIZED] != 0
        scales = array(table, tensor, columns.SCALE, table[tensor, columns.ROWS])
        squares, product = _dots(w, dw)
        product *= move[columns.MOVE_GRADIENT]
        stored = float(scales[r]) if normalized else 1.0
        single = table[tensor, columns.LENGTH] == 1
        alive, length, grad_length, turn, along, kept, scale = _open_row(
            squares, product, stored, move[columns.MOVE_V_LENGTH], single, normalized, floor
        )
        new_squares, growth = 0.0, 0.0
        for start in range(0, len(w), _PIECE):
            here = slice(start, start + _PIECE)
            one, other = step_elements(
                w[here], dw[here], first[here], second[here], third[here], t[here], move, turn, along, scale
            )
            new_squares += one
            growth += other
        small, excess, factor = True, 0.0, 1.0
        if normalized:
            sign = -1.0 if scale < 0.0 else 1.0
            step_g = step_length(table, tensor, r, move, sign * length if alive else 0.0, sign * grad_length)
            small, excess, factor = _close_row(alive, length, sign * step_g, new_squares, growth, floor, eps)
            scales[r] = kept + kept * excess if small else factor * kept  # one that is not set yet, 0, stays so
        excess_, factor_ = kind(excess), kind(factor)
        for j in range(len(w)):
            w[j] = _settle(w[j], t[j], small, excess_, factor_)

    @_exact
    def step_contiguous(table, move, grads, tensor, start, stop):
        """Step some rows of a tensor whose rows lie one after the other."""
        numel, length = table[tensor, columns.NUMEL], table[tensor, columns.LENGTH]
        weight = array(table, tensor, columns.WEIGHT, numel)
        gradient = numba.carray(_void_pointer(grads[tensor]), numel, kind)
        first = array(table, tensor, columns.FIRST, numel)
        second = array(table, tensor, columns.SECOND, numel)
        third = array(table, tensor, columns.THIRD, numel)
        t = np.empty(min(length, numel), kind)
        for r in range(start, stop):
            a, b = r * length, min(numel, r * length + length)
            step_row(
                table, tensor, r, move, weight[a:b], gradient[a:b], first[a:b], second[a:b], third[a:b], t[: b - a]
            )

    @_exact
    def begins(row, start, stop, places):
        """Return where rows begin, by the two strides at ``places``."""
        split, outer, inner = row[columns.ROW_SPLIT], row[places], row[places + 1]
        return np.array([(r // split) * outer + (r % split) * inner for r in range(start, stop)])

    @_exact
    def copy(to, source):
        for i in range(len(to)):  # a loop, which is vectorised; an assignment calls memmove, slow for short runs
            to[i] = source[i]

    @_exact
    def move_rows(tile, flat, at, row, places, inwards):
        """Copy rows that begin ``at`` into contiguous memory, or back, in the order in which memory has them."""
        split, outer_stride, inner_stride = row[columns.SPLIT], row[places], row[places + 1]
        run = split if inner_stride == 1 else 1
        for j in range(0, tile.shape[1], run):
            there = (j // split) * outer_stride + (j % split) * inner_stride
            for r in range(tile.shape[0]):
                here = at[r] + there
                if run == 1 and inwards:
                    tile[r, j] = flat[here]
                elif run == 1:
                    flat[here] = tile[r, j]
                elif inwards:
                    copy(tile[r, j : j + run], flat[here : here + run])
                else:
                    copy(flat[here : here + run], tile[r, j : j + run])

    @_exact
    def step_strided(table, move, grads, tensor, start, stop):
        """Step some rows of a tensor, by way of copies that stay in the cache."""
        row = table[tensor]
        numel = row[columns.NUMEL]
        gradient = numba.carray(_void_pointer(grads[tensor]), numel, kind)
        weight = array(table, tensor, columns.WEIGHT, numel)
        first = array(table, tensor, columns.FIRST, numel)
        second = array(table, tensor, columns.SECOND, numel)
        third = array(table, tensor, columns.THIRD, numel)
        w, dw, a, b, c = np.empty((5, stop - start, row[columns.LENGTH]), kind)
        t = np.empty(row[columns.LENGTH], kind)
        grad_at = begins(row, start, stop, columns.GRAD_ROW_OUTER)
        move_rows(dw, gradient, grad_at, row, columns.GRAD_COLUMN_OUTER, True)
        at = begins(row, start, stop, columns.ROW_OUTER)
        for inwards in (True, False):
            move_rows(w, weight, at, row, columns.COLUMN_OUTER, inwards)
            if keeps_first:
                move_rows(a, first, at, row, columns.COLUMN_OUTER, inwards)
            if keeps_second:
                move_rows(b, second, at, row, columns.COLUMN_OUTER, inwards)
            if keeps_third:
                move_rows(c, third, at, row, columns.COLUMN_OUTER, inwards)
            if inwards:
                for r in range(stop - start):
                    step_row(table, tensor, start + r, move, w[r], dw[r], a[r], b[r], c[r], t)

    step_some = step_contiguous if contiguous else step_strided

    @(_parallel if parallel else _exact)
    def step_rows(table, moves, grads, programs):
        for program in prange(len(programs)):
            tensor, start, stop = programs[program]
            if moves[tensor, columns.MOVE_ON] != 0.0:
                step_some(table, moves[tensor], grads, tensor, start, stop)

    return step_rows
