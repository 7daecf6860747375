"""What ``arithmetic`` asks of its library, for numba and one number at a time, where NumPy would make arrays."""

from math import exp, sqrt

from numba import njit

__all__ = ["abs", "exp", "sqrt", "where"]

abs = abs


@njit(inline="always")
def where(condition, one, other):
    """Return one value or the other."""
    return one if condition else other
