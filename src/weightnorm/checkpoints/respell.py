"""One weight from the spelling it is in to the one that is asked for."""

from typing import Any

import torch
from torch import Tensor

from weightnorm.checkpoints.lengths import Lengths, read_off, same_vectors
from weightnorm.checkpoints.request import Request
from weightnorm.checkpoints.spelling import Spelling, Stored, keys_of
from weightnorm.formula import compose, decompose, sum_rows
from weightnorm.optim.groups import WEIGHT_DTYPES

Made = dict[Any, tuple[Tensor, ...]]  # what has been made of which tensors: tied ones are made once and stay tied

# The direction of a zero row, whose length 0 keeps it zero: torch would make NaN of 0 * 0/0. A constant, so that
# converting twice gives the same file; 0.05, so that ‖v‖ is what the paper's N(0, 0.05²) gives.
ZERO_ROW = 0.05


def respelled(stored: Stored, request: Request, made: Made) -> dict[str, Tensor]:
    """Return the entries of one weight in its new spelling."""
    try:
        tensors = _tensors(stored, request, made)
    except ValueError as error:
        raise ValueError(f"{stored.name}: {error}") from error
    return dict(zip(keys_of(stored.name, request.to), tensors, strict=True))


def _tensors(stored: Stored, request: Request, made: Made) -> tuple[Tensor, ...]:
    """Return g and v, or w, made once of the same tensors."""
    for tensor in (stored.v, stored.g):
        if tensor is not None:
            _check(tensor, stored.name)
    said = request.lengths(stored) if stored.v is not None else None
    here = said if stored.spelling == "plain" else read_off(stored, said)
    if here is None:
        raise ValueError("nothing says along which axis to normalise it; say it with dim=")
    there = said or here
    source = (*(_place(tensor) for tensor in (stored.v, stored.g)), stored.log, request.to, here, there)
    if source not in made:
        with torch.inference_mode(False), torch.no_grad():
            made[source] = _make(stored, request.to, here, there)
    return made[source]


def _make(stored: Stored, to: Spelling, here: Lengths, there: Lengths) -> tuple[Tensor, ...]:
    v = stored.v
    assert v is not None
    if stored.g is None:
        return _normalised(v, there)
    if to != "plain" and same_vectors(here, there):
        return stored.lengths.reshape(there.shape), v
    w = compose(here.axis.split(v), stored.lengths, here.axis.kept(v)).reshape(v.shape)
    return (w,) if to == "plain" else _normalised(w, there)


def _normalised(w: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """Return g, in the dtype of ``w`` as torch keeps it, and v, which is ``w`` itself if no row is zero."""
    split, kept = lengths.axis.split(w), lengths.axis.kept(w)
    _, g = decompose(split, kept)
    zero = (g == 0) & ~sum_rows(split, kept).isnan()  # NaN is for the user to see
    v = torch.where(zero, ZERO_ROW, split).reshape(w.shape) if w.is_meta or zero.any() else w
    return g.to(w.dtype).reshape(lengths.shape), v


def _place(tensor: Tensor | None) -> Any:
    """Return what tied tensors have in common and others have not: memory, shape and dtype."""
    if tensor is None:
        return None
    memory = tensor.data_ptr() or id(tensor)  # empty and meta tensors have none
    return memory, tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _check(tensor: Tensor, name: str) -> None:
    if hasattr(tensor, "full_tensor"):
        raise TypeError(f"{name} is sharded over devices; gather it first with .full_tensor()")
    if tensor.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{name} is of {tensor.dtype}, which cannot be normalised; convert it to floating point first")
