"""The mathematics of weight normalization, written once, in plain torch.

An output unit's weight vector is a length times a direction, ``w = g v/‖v‖`` (Salimans & Kingma 2016, eq. 2).
Every form, kernel and recipe of this library calls these functions or is tested against them.

Conventions. ``dim`` is the axis (or the tuple of axes) of the weight that is *kept*: one vector per index along it,
reduced over all others; negative counts from the end; ``None`` treats the whole tensor as one vector. ``g`` has one
element per vector, shaped like the weight with every reduced axis of size 1, as in torch. Norms and sums are computed
in float32 at least (float64 for float64), whatever the weights are.

A vector shorter than ``length_floor`` has no direction: it is *dead*. It composes to zero and passes no gradient,
to any order of differentiation; nothing here divides by zero.
"""

import torch
from torch import Tensor

Dim = int | tuple[int, ...] | None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which norms, lengths and scales of weights of ``dtype`` are computed and kept.

    Args:
        dtype: a floating-point dtype.

    Returns:
        float64 for float64, float32 for everything narrower.

    Example:
        >>> wide_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.promote_types(dtype, torch.float32)


def length_floor(dtype: torch.dtype) -> float:
    """Return the length at or under which a vector has no direction: ``sqrt(tiny/eps)``.

    Below it the squares that matter to the sum leave the normal range and the norm loses its digits.

    Args:
        dtype: the dtype of the weights; the floor is that of ``wide_dtype(dtype)``.

    Returns:
        About 3.1e-16 for float32 and narrower, 1.0e-146 for float64.

    Example:
        >>> length_floor(torch.float32) < 1e-15
        True
    """
    limits = torch.finfo(wide_dtype(dtype))
    return float((limits.tiny / limits.eps) ** 0.5)


def sum_rows(x: Tensor, dim: Dim = 0) -> Tensor:
    """Sum each vector's elements: over every axis but ``dim``, keeping the axes (size 1)."""
    kept = kept_axes(x.ndim, dim)
    reduced = [axis for axis in range(x.ndim) if axis not in kept]
    return x.sum(reduced, keepdim=True) if reduced else x  # torch's sum over no axis means over all


def kept_axes(ndim: int, dim: Dim) -> tuple[int, ...]:
    """Return ``dim`` as non-negative axes of a tensor with ``ndim`` axes.

    Args:
        ndim: number of axes of the weight.
        dim: an axis, a tuple of axes, or None for none (the whole tensor is one vector).

    Returns:
        The kept axes; empty for ``None``.

    Raises:
        ValueError: if an axis is out of range.

    Example:
        >>> kept_axes(4, -1), kept_axes(4, None)
        ((3,), ())
    """
    axes = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"dim={dim} names no axis of a weight with {ndim} axes; use {-ndim} to {ndim - 1}, or None"
            )
    kept = tuple(axis % ndim for axis in axes)
    if len(set(kept)) != len(kept):
        raise ValueError(f"dim={dim} names an axis twice; name each once")
    return kept


def row_lengths(w: Tensor, dim: Dim = 0) -> tuple[Tensor, Tensor]:
    """Return each vector's Euclidean length, and which vectors are alive.

    Args:
        w: the weight, any floating dtype.
        dim: the axis kept.

    Returns:
        ``(length, alive)``, shaped like ``g``: the length in the wide dtype, with 1 standing in for that of dead
        vectors so that a division by it and its derivatives stay finite; and the mask ``length > length_floor``.

    Raises:
        TypeError: if ``w`` is not of a real floating-point dtype.

    Example:
        >>> length, alive = row_lengths(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> length.flatten().tolist(), alive.flatten().tolist()
        ([5.0, 1.0], [True, False])
    """
    if not w.is_floating_point():
        raise TypeError(f"weights must be real floating point numbers; got {w.dtype}. Convert them first")
    squares = sum_rows(w.to(wide_dtype(w.dtype)).square(), dim)
    alive = squares > length_floor(w.dtype) ** 2
    # The mask goes in before the root: sqrt has no derivative at zero, and 0 * inf would be NaN.
    return torch.where(alive, squares, 1).sqrt(), alive


def compose(v: Tensor, g: Tensor, dim: Dim = 0) -> Tensor:
    """Make the weight from direction and length: ``w = g v/‖v‖`` (eq. 2).

    Args:
        v: direction, any shape and floating dtype; its length does not matter.
        g: length per vector, shape of ``v`` with the reduced axes of size 1 (or 1-D with as many elements); signed.
        dim: the axis of ``v`` that ``g`` runs along.

    Returns:
        ``w``, shape, dtype and memory format of ``v``. A zero vector of ``v`` gives a zero vector, and no gradient.

    Raises:
        ValueError: if ``g`` does not have one element per vector.

    Example:
        >>> compose(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]))
        tensor([[6., 8.]])
    """
    length, alive = row_lengths(v, dim)
    scale = torch.where(alive, _as_rows(g, length) / length, 0)
    return (v * scale).to(v.dtype)


def decompose(w: Tensor, dim: Dim = 0) -> tuple[Tensor, Tensor]:
    """Split a weight into direction and length, ``v = w`` and ``g = ‖w‖``, so that ``compose`` returns it.

    Args:
        w: the weight, any shape and floating dtype.
        dim: the axis kept.

    Returns:
        ``(v, g)``: a copy of ``w``, and the lengths in the wide dtype, 0 for zero vectors.

    Example:
        >>> v, g = decompose(torch.tensor([[3.0, 4.0]]))
        >>> g
        tensor([[5.]])
    """
    length, alive = row_lengths(w, dim)
    return w.clone(), torch.where(alive, length, 0)


def pull_back(grad_w: Tensor, v: Tensor, g: Tensor, dim: Dim = 0) -> tuple[Tensor, Tensor]:
    """Turn the gradient at ``w`` into those at direction and length (eq. 3; the first is eq. 4's projection).

    ``∂g = Σ(∂w·v)/‖v‖`` and ``∂v = (g/‖v‖)(∂w − (∂g/‖v‖) v)``, so ``∂v ⟂ v``. A vector of one element is all length:
    its ``∂v`` is zero exactly, where rounding would leave noise that Adam blows up.

    Args:
        grad_w: gradient at ``w``, shape of ``v``.
        v: direction.
        g: length per vector, as in ``compose``.
        dim: the axis kept.

    Returns:
        ``(grad_v, grad_g)`` with the shapes and dtypes of ``v`` and ``g``; zero for zero vectors of ``v``.

    Raises:
        ValueError: if ``grad_w`` does not have the shape of ``v``, or ``g`` one element per vector.

    Example:
        >>> v, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]])
        >>> pull_back(torch.tensor([[1.0, 0.0]]), v, g)
        (tensor([[ 0.6400, -0.4800]]), tensor([[0.6000]]))
    """
    if grad_w.shape != v.shape:
        raise ValueError(f"grad_w must have the shape of v, {tuple(v.shape)}; got {tuple(grad_w.shape)}")
    length, alive = row_lengths(v, dim)
    inverse = torch.where(alive, 1 / length, 0)
    grad_length = sum_rows(grad_w * v.to(length.dtype), dim) * inverse
    if v.numel() == length.numel():
        grad_v = torch.zeros_like(v)
    else:
        grad_v = (_as_rows(g, length) * inverse * (grad_w - grad_length * inverse * v)).to(v.dtype)
    return grad_v, grad_length.reshape(g.shape).to(g.dtype)


def advance(w: Tensor, scale: Tensor, step_v: Tensor, step_g: Tensor, dim: Dim = 0) -> tuple[Tensor, Tensor]:
    """Move the weight as steps on direction and length move it, without ever storing either.

    With ``scale = g/‖v‖``, so ``v = w/scale`` and ``g = sign(scale)‖w‖``, return ``w' = g' v'/‖v'‖`` and
    ``scale' = g'/‖v'‖`` for ``v' = v + Δv``, ``g' = g + Δg``, as increments:

        t = scale Δv      q = Σ t(2w + t)      n' = ‖w + t‖      e = (sign(scale) Δg − q/(n' + n))/n'
        w' = w + (t + e(w + t))                scale' = scale + scale e

    so zero steps change no bit, and float32 does not drift over many small ones. Where lengths change by half or more
    the increment would cancel, and ``w' = (1 + e)(w + t)`` is used. ``|1 + e|`` is kept at or above one ulp of the
    wide dtype: ``g`` may cross zero, but if it lands there the direction survives. A vector with no direction before
    or after the step moves by ``t`` alone. NaN stays where it is, in its own vector.

    Args:
        w: the weight, in the wide dtype.
        scale: ``g/‖v‖`` per vector, shaped like ``g``; signed, nonzero.
        step_v: ``Δv``, shape of ``w``.
        step_g: ``Δg``, shape of ``scale``.
        dim: the axis kept.

    Returns:
        ``(w', scale')``, new tensors.

    Example:
        >>> w, one = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]])
        >>> advance(w, one, torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]]))  # v doubles, g doubles
        (tensor([[6., 8.]]), tensor([[1.]]))
    """
    t = scale * step_v
    moved = w + t
    length, alive = row_lengths(w, dim)
    new_length, still_alive = row_lengths(moved, dim)
    directed = alive & still_alive

    growth = sum_rows(t * (2 * w + t), dim) / (new_length + length)  # n' − n, free of cancellation
    step_length = scale.sign() * step_g
    excess = torch.where(directed, (step_length - growth) / new_length, 0)

    factor = (length + step_length) / new_length
    floor = torch.full_like(factor, torch.finfo(factor.dtype).eps)
    factor = torch.where(factor.abs() < floor, torch.copysign(floor, factor), factor)

    small = excess.abs() < 0.5
    new_w = torch.where(small, w + (t + excess * moved), factor * moved)
    return new_w, torch.where(small, scale + scale * excess, factor * scale)


def _as_rows(g: Tensor, length: Tensor) -> Tensor:
    """Return ``g`` in the shape and dtype of the computed lengths."""
    if g.numel() != length.numel():
        raise ValueError(
            f"g must have one element per vector of v, shape {tuple(length.shape)}; got shape {tuple(g.shape)}. "
            "Was dim meant to be another axis?"
        )
    return g.reshape(length.shape).to(length.dtype)
