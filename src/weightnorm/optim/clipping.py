"""Clipping by the norm of the gradients that an optimizer steps on: those of ``v``, ``g`` and plain parameters."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from weightnorm.optim.coordinates import MASTER, SCALE, Coordinates
from weightnorm.optim.groups import group_axis, is_normalized
from weightnorm.optim.optimizer import WeightNormOptimizer
from weightnorm.optim.options import check_gradient


@torch.no_grad()
def clip_grad_norm_(
    optimizer: WeightNormOptimizer, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Clip the norm of all gradients that an optimizer of ours is about to step on, taken together.

    It is that of ``(∂v, ∂g)`` (eq. 3) for each normalised vector, and of plain gradients as they are: what
    ``torch.nn.utils.clip_grad_norm_`` sees of the same model in module form, where it is the function to call. Given a
    plain model torch's sees ``∂w``, whose norm is another wherever ``g/‖v‖`` is not 1. Every ``.grad`` is then
    multiplied in place by ``max_norm/(norm + 1e-6)``, at most 1, and with it ``∂v`` and ``∂g``. Neither weights nor the
    optimizer's state change.

    Args:
        optimizer: any of this library's, before its first step too.
        max_norm: the largest norm that is left as it is.
        norm_type: p of the p-norm, which may be ``inf``. Default 2.
        error_if_nonfinite: raise an error if the norm is NaN or infinite, at the price of waiting for the device.
            Default: gradients become NaN or 0, as with torch's function.

    Returns:
        The norm before clipping, a 0-D tensor. Lengths frozen by ``g_lr=0`` are left out, as a frozen ``g`` is.

    Raises:
        TypeError: if the optimizer is not of this library.
        ValueError: if a normalised weight has a sparse or complex gradient.
        RuntimeError: if the norm is not finite, and ``error_if_nonfinite``; no gradient has changed then.

    Source: Salimans & Kingma 2016, eq. 3.

    Example:
        >>> import weightnorm as wn
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.6, 0.8]]))
        >>> optimizer = wn.SGD([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> clip_grad_norm_(optimizer, max_norm=1.0)  # v = w to begin with, so ‖(∂v, ∂g)‖ = ‖∂w‖
        tensor(5.)
        >>> weight.grad
        tensor([[0.6000, 0.0000],
                [0.0000, 0.8000]])
    """
    if not isinstance(optimizer, WeightNormOptimizer):
        raise TypeError(
            f"clip_grad_norm_ takes an optimizer of weightnorm's own; got {type(optimizer).__name__}. For parameters, "
            "and with another optimizer, call torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)"
        )
    # Norms of norms, as torch takes them, one tensor at a time: not every ∂v is held at once.
    norms = [torch.linalg.vector_norm(p.grad, float(norm_type)) for p in _moved(optimizer) if p.grad is not None]
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    clip_grads_with_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm, total)
    return total


def _moved(optimizer: WeightNormOptimizer) -> Iterator[Tensor]:
    """Yield what the next step moves by its gradient: ``v`` and ``g`` of normalised weights, plain parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None or not is_normalized(group, parameter):
                yield parameter
                continue
            check_gradient(parameter, group)
            state = optimizer.state.get(parameter, {})
            coordinates = Coordinates(parameter, group_axis(group))
            # Of copies: opening gives vectors their starting scale, which is for the step to do.
            coordinates.open({name: state[name].clone() for name in (SCALE, MASTER) if name in state}, group)
            yield coordinates.v
            if group["g_lr"] != 0:
                yield coordinates.g
