"""The weights of a model as leaves: gradients stop and gather there until they are taken back to ``(v, g)``."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from weightnorm.axes import Axis
from weightnorm.kernels import compose as kernels
from weightnorm.layers.compose import compose, is_watched, kernel_of


def compose_apart(
    vs: Sequence[Tensor], gs: Sequence[Tensor], axes: Sequence[Axis]
) -> tuple[list[Tensor], Callable[[], None]]:
    """Make the weights of a model as leaves (eq. 2); where kernels take them, by one launch.

    Args:
        vs: the directions.
        gs: their lengths.
        axes: where the vectors lie.

    Returns:
        The weights; and what takes the gradients gathered at them back to directions and lengths, for kernels by one
        launch again.
    """
    leaves = list[Any]([None] * len(vs))
    roots = list[tuple[Tensor, Tensor | None]]()  # weights in the graph and their leaves; what stands for several
    members = list(zip(vs, gs, axes, strict=True))
    together = [] if is_watched() else [i for i, member in enumerate(members) if kernel_of(*member)]
    if len(together) > 1:
        found = kernels.forward(*zip(*(members[i] for i in together), strict=True))
        for i, leaf in zip(together, found, strict=True):
            leaves[i] = leaf.requires_grad_(torch.is_grad_enabled() and (vs[i].requires_grad or gs[i].requires_grad))
        pairs = [tensor for i in together for tensor in members[i][:2]]
        roots.append((_PullBack.apply(found, [axes[i] for i in together], *pairs), None))
    for i, member in enumerate(members):
        if leaves[i] is None:
            weight = compose(*member)
            leaves[i] = weight.detach().requires_grad_(weight.requires_grad)
            roots.append((weight, leaves[i]))
    return leaves, partial(_pull_back, roots)


def _pull_back(roots: list[tuple[Tensor, Tensor | None]]) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        ends = [(root, root.detach() if leaf is None else leaf.grad) for root, leaf in roots if root.requires_grad]
        used = [(root, grad) for root, grad in ends if grad is not None]
        if used:
            torch.autograd.backward([root for root, _ in used], [grad for _, grad in used])


class _PullBack(torch.autograd.Function):
    """Stands in the graph for many weights at once, whose gradients it finds at the leaves made of them."""

    @staticmethod
    def forward(ctx: Any, leaves: list[Tensor], axes: list[Axis], *pairs: Tensor) -> Tensor:
        ctx.leaves, ctx.axes = leaves, axes
        ctx.save_for_backward(*pairs)
        return torch.empty((), device=pairs[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        vs, gs = ctx.saved_tensors[::2], ctx.saved_tensors[1::2]
        grads = [leaf.grad for leaf in ctx.leaves]
        if all(grad is None for grad in grads):
            return None, None, *[None] * (2 * len(grads))
        grad_vs, grad_gs = kernels.backward(grads, vs, gs, ctx.axes)
        return None, None, *chain.from_iterable(zip(grad_vs, grad_gs, strict=True))
