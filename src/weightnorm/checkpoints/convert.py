"""State dicts from any spelling of normalised weights into any other."""

from collections.abc import MutableMapping, Sequence
from copy import copy
from typing import Any

from torch import Tensor, nn

from weightnorm.checkpoints.nested import StateDict
from weightnorm.checkpoints.request import Request, Said, refuse_nothing, request_of
from weightnorm.checkpoints.respell import Made, respelled
from weightnorm.checkpoints.spelling import Spelling, Stored, find


def convert_state_dict(
    sd: StateDict,
    to: Spelling = "plain",
    *,
    model: nn.Module | None = None,
    dim: Said = "auto",
    keys: str | Sequence[str] | None = None,
) -> StateDict:
    """Return a state dict with its normalised weights spelled another way; the rest is carried as it is.

    The axis is read off the shape of g. Between "gv" and "original" g and v are carried bit for bit, unless they are to
    lie along another axis: then ``v = w`` and ``g = ‖w‖``, as from plain weights. Wrappers' prefixes (``module.``,
    ``_orig_mod.``) stay where they are. Tensors are not written to, and those that share memory go on doing so.

    Args:
        sd: the state dict, in any spelling or a mixture of them: plain weights; ``weight_g`` and ``weight_v``;
            ``parametrizations.weight.original0`` and ``original1``, also where our module form keeps log g in it.
        to: "plain": what a model without weight normalization loads; "gv": what torch.nn.utils.weight_norm does;
            "original": what torch.nn.utils.parametrizations.weight_norm and this library's module form do.
        model: says which plain weights to normalise (those that it holds in module form; if there are none, those that
            ``param_groups`` would), and along which axis to write g.
        dim: the axis along which to write g, in every weight; None: the whole tensor. It also settles along which axis
            a 1-D g (Paddle's) runs that fits several. Default "auto": as the model has it, or else the state dict.
        keys: patterns of plain names (``"*conv*.weight"``): only these weights are touched. Without a model, plain
            weights with two axes or more are normalised where they match, along ``dim``.

    Returns:
        A new dict of the same kind and order, ``_metadata`` included.

    Raises:
        TypeError: if ``sd`` is no state dict, or a weight is not of a floating-point dtype or is sharded.
        ValueError: if half of a weight is missing, an axis cannot be told, or nothing says what to normalise.

    Example:
        >>> import torch
        >>> old = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)).state_dict()
        >>> list(old)
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
        >>> list(convert_state_dict(old, to="gv")), list(convert_state_dict(old))
        (['bias', 'weight_g', 'weight_v'], ['bias', 'weight'])
    """
    if not isinstance(sd, MutableMapping):
        raise TypeError(f"sd must be a state dict; got {type(sd).__name__}. Pass model.state_dict()")
    request = request_of(to, model, dim, keys)
    nested = [key for key, value in sd.items() if isinstance(value, MutableMapping)]
    if nested and not any(isinstance(value, Tensor) for value in sd.values()):
        raise ValueError(f"sd holds no tensors; pass one of the state dicts in it: sd[{nested[0]!r}], ...")
    converted, weights = convert(sd, request, {})
    if not weights:
        refuse_nothing(request)
    return converted


def convert(sd: StateDict, request: Request, made: Made) -> tuple[StateDict, list[Stored]]:
    """Convert one state dict.

    Args:
        sd: the state dict.
        request: what is wanted.
        made: what has been made so far of which tensors; added to.

    Returns:
        The new one, and the weights as they were found in the old one.
    """
    found = find(sd)
    weights = [stored for stored in found if request.means(stored.name)]
    if request.to != "plain":
        weights += _plain_ones(sd, request, {key for stored in found for key in stored.keys})
    owners = {key: stored for stored in weights for key in stored.keys}
    new: dict[str, Any] = {}
    written = set()
    for key, value in sd.items():
        stored = owners.get(key)
        if stored is None:
            _add(new, {key: value})
        elif stored not in written:
            _add(new, respelled(stored, request, made))
            written.add(stored)
    converted = copy(sd)  # of the same kind, with its attributes
    converted.clear()
    converted.update(new)
    return converted, weights


def _plain_ones(sd: StateDict, request: Request, taken: set[str]) -> list[Stored]:
    """Return the plain weights that are to be normalised: the model's, or else those that match ``keys``."""
    found = []
    for key, value in sd.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or key in taken or not request.means(key):
            continue
        if request.known is not None:
            wanted = request.known.normalises(key)
        else:
            wanted = request.keys is not None and value.ndim >= 2 and value.is_floating_point()
        if wanted:
            found.append(Stored(key, "plain", (key,), value))
    return found


def _add(new: StateDict, entries: StateDict) -> None:
    for key, value in entries.items():
        if key in new:
            raise ValueError(f"{key} would be there twice; the state dict holds this weight in two spellings")
        new[key] = value
