"""What one step does to a row and to an element, in arithmetic that two compilers read: Triton's and numba's.

The rules are torch's SGD, Adam, AdamW and Adamax; the rest is ``formula.pull_back`` and ``formula.advance``, by rows.
``lib`` is NumPy here, and for numba; for Triton ``bound_to`` makes it ``triton.language``, which has the same names.

A row is one weight vector: ``squares = Σw²``, ``product = Σ w ∂w``. A plain parameter is a row that has no direction.
In functions of elements literals only stand beside what is the same for all: numba would compute in float64.
"""

from types import FunctionType, ModuleType

import numpy as lib


def bound_to(function, library: ModuleType):
    """Return the same function with another library behind ``lib``."""
    return FunctionType(function.__code__, {**function.__globals__, "lib": library}, function.__name__)


def open_row(squares, product, stored, v_length, single, normalized, floor):
    """Pull a row's gradient back: return what ``∂v = scale (turn ∂w − along w)`` and g's rule need (eq. 3).

    ``stored`` is the row's scale as kept (0: not set yet), ``v_length`` the ``‖v‖`` that a fresh one sets (0: ‖w‖).
    """
    alive = (squares > floor * floor) & normalized
    length = lib.sqrt(lib.where(alive, squares, 1.0))
    inverse = lib.where(alive, 1.0 / length, 0.0)
    grad_length = lib.where(alive, product * inverse, 0.0)
    turn = lib.where(alive & single, 0.0, 1.0)  # a row of one element is all length
    along = turn * grad_length * inverse
    fresh = lib.where(v_length > 0.0, lib.where(alive, length, 0.0) / lib.where(v_length > 0.0, v_length, 1.0), 1.0)
    kept = lib.where(stored == 0.0, fresh, stored)
    scale = lib.where((kept == 0.0) | (normalized == 0), 1.0, kept)
    return alive, length, grad_length, turn, along, kept, scale


def pull_back(grad, w, scale, turn, along):
    """Return ``∂v`` of an element; where there is no direction, ``along = 0``, infinity may stand beside it."""
    return scale * lib.where(along == 0.0, turn * grad, turn * grad - along * w)


def settle(w, t, small, excess, factor):
    """Return where an element ends whose row has moved by ``t`` and gets its length; a NaN beside it is no matter."""
    moved = w + t
    return lib.where(small, w + lib.where(excess == 0.0, t, t + excess * moved), factor * moved)


def close_row(alive, length, step_length, new_squares, growth_sum, floor, eps):
    """Return how a row goes on from ``w + t``: whether in small steps, by which excess, else by which factor."""
    directed = alive & (new_squares > floor * floor)
    new_length = lib.sqrt(lib.where(directed, new_squares, 1.0))
    excess = lib.where(directed, (step_length - growth_sum / (new_length + length)) / new_length, 0.0)
    factor = (length + step_length) / new_length
    factor = lib.where(lib.abs(factor) < eps, lib.where(factor < 0.0, -eps, eps), factor)
    return lib.abs(excess) < 0.5, excess, factor


def sgd(x, grad, first, second, third, rate, coupled, decoupled, mix1, keep2, mix2, root, eps):
    """Return torch.optim.SGD's step and state: ``first`` is the momentum buffer, ``keep2`` the momentum."""
    grad = lib.where(coupled == 0.0, grad, grad + coupled * x)
    first = first * keep2 + grad * mix1
    return -(rate * (grad * mix2 + first * root)), first, second, third


def adam(x, grad, first, second, third, rate, coupled, decoupled, mix1, keep2, mix2, root, eps):
    """Return torch.optim.Adam's and AdamW's step and moments."""
    grad = lib.where(coupled == 0.0, grad, grad + coupled * x)
    first = first + (grad - first) * mix1
    second = second * keep2 + grad * grad * mix2
    step = rate * first / (lib.sqrt(second) * root + eps)
    return -lib.where(decoupled == 0.0, step, decoupled * x + step), first, second, third


def amsgrad(x, grad, first, second, third, rate, coupled, decoupled, mix1, keep2, mix2, root, eps):
    """Return Adam's step and moments with the largest second moment so far below the line."""
    grad = lib.where(coupled == 0.0, grad, grad + coupled * x)
    first = first + (grad - first) * mix1
    second = second * keep2 + grad * grad * mix2
    third = lib.where(third < second, second, lib.where(second != second, second, third))  # a NaN stays one
    step = rate * first / (lib.sqrt(third) * root + eps)
    return -lib.where(decoupled == 0.0, step, decoupled * x + step), first, second, third


def adamax(x, grad, first, second, third, rate, coupled, decoupled, mix1, keep2, mix2, root, eps):
    """Return torch.optim.Adamax's step and state: ``second`` is the infinity norm."""
    grad = lib.where(coupled == 0.0, grad, grad + coupled * x)
    first = first + (grad - first) * mix1
    second, new = second * keep2, lib.abs(grad) + eps
    second = lib.where(second < new, new, lib.where(new != new, new, second))  # a NaN stays one
    return -(rate * first / second), first, second, third


def sgd_clock(step, lr, keep1, log_keep1, keep2, log_keep2, nesterov):
    """Return ``rate, mix1, keep2, mix2, root`` of SGD: ``keep1`` is the dampening, ``keep2`` the momentum.

    The direction is ``mix2 grad + root buffer``: the buffer alone, or Nesterov's ``grad + momentum buffer``.
    """
    first_step = step <= 1.0
    return (
        lr,
        lib.where(first_step, 1.0, 1.0 - keep1),
        keep2,
        nesterov,
        lib.where(nesterov > 0.0, keep2, 1.0),
    )


def adam_clock(step, lr, keep1, log_keep1, keep2, log_keep2, nesterov):
    """Return ``rate, mix1, keep2, mix2, root`` of Adam and Adamax at a step: the bias corrections, in float64."""
    bias1 = 1.0 - lib.exp(step * log_keep1)
    bias2 = 1.0 - lib.exp(step * log_keep2)
    return lr / bias1, 1.0 - keep1, keep2, 1.0 - keep2, 1.0 / lib.sqrt(bias2)
