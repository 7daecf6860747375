"""Mean-only batch normalization: take the batch's mean away and leave the scale to the weights (section 4).

Weight normalization keeps the scale of a unit's pre-activation about independent of ``v``, but not its mean. This layer
completes it: it subtracts the mean and divides by nothing, so its noise is gentle and a batch of one is allowed.
"""

import copy
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from weightnorm.mean_only.centre import centre, shift_of, shifted


class MeanOnlyBatchNorm(nn.Module):
    """Subtract the mean over the batch and its positions, then add a bias: ``t~ = t − μ[t] + b`` (eq. 7).

    Differentiating through the mean centres the gradient: ``∂t = ∂t~ − μ[∂t~]`` (eq. 8). In eval mode a running average
    of the batch means stands in for ``μ[t]``. Put it between a bias-free layer and its nonlinearity; a bias before it
    cancels. Means are taken in float32 at least (float64 for float64), under autocast too. Nothing is kept for the
    backward pass.

    In training over several processes (``torch.distributed``) the mean is that of all their batches, each example
    counting once, as in torch's SyncBatchNorm: one all-reduce of C + 1 numbers forward, one of C backward. Every
    process must take part; one without examples calls the layer on an empty batch. The bias's gradient is the process's
    own, for DistributedDataParallel to average. There ``torch.compile`` breaks its graph at the layer, and
    ``torch.func`` and forward-mode differentiation need ``sync=False``.

    Args:
        num_features: number of channels C, the size of axis 1.
        momentum: weight of the newest mean, ``running <- (1 − momentum) running + momentum μ``; None: the running mean
            is the plain average of all batch means so far. Default 0.1, the authors'.
        affine: learn the bias ``b``, one per channel, starting at 0. Default True.
        track_running_stats: keep the running mean; False: eval mode takes the batch's mean as training does.
        sync: take the mean over all processes, where there are several. Default True; False: each its own.
        process_group: the processes that share a mean; None: all. Copies of the layer share the group, and it cannot be
            pickled.
        device: where parameter and buffers live.
        dtype: their dtype.

    Attributes:
        bias: ``b``, shape (C,), or None.
        running_mean: shape (C,), starting at 0, or None.
        num_batches_tracked: how many batches the running mean has seen, or None.

    Raises:
        ValueError: if ``momentum`` is neither None nor between 0 and 1.

    Source: Salimans & Kingma 2016, section 4.

    Example:
        >>> layer = MeanOnlyBatchNorm(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach()
        tensor([[ -1., -10.],
                [  1.,  10.]])
        >>> layer.running_mean
        tensor([0.2000, 2.0000])
    """

    bias: nn.Parameter | None
    running_mean: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        sync: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1, or None for a plain average; got {momentum!r}")
        self.num_features = num_features
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.sync = sync
        self.process_group = process_group
        bias = torch.empty(num_features, device=device, dtype=dtype) if affine else None
        mean = torch.empty(num_features, device=device, dtype=dtype) if track_running_stats else None
        count = torch.empty((), device=device, dtype=torch.long) if track_running_stats else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.register_buffer("running_mean", mean)
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget the batches seen: running mean and count become 0."""
        for buffer in (self.running_mean, self.num_batches_tracked):
            if buffer is not None:
                buffer.zero_()

    def reset_parameters(self) -> None:
        """Set bias, running mean and count to 0."""
        self.reset_running_stats()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Centre each channel.

        Args:
            input: the pre-activation ``t``, shape (N, C) or (N, C, *), any floating dtype.

        Returns:
            ``t~``, shape, dtype and memory format of ``input``.

        Raises:
            TypeError: if ``input`` is not of a floating-point dtype.
            ValueError: if axis 1 does not have C channels, or the batch, of all processes, is empty where its mean is
                needed.
        """
        self._check(input)
        if self.training or self.running_mean is None:
            group = self._group()
            out, mean = centre(input, self.bias) if group is None else _centre_together(input, self.bias, group)
            self._track(mean)
            return out
        return shifted(input, shift_of(self.bias, self.running_mean))

    def extra_repr(self) -> str:
        """Return the arguments, for printing."""
        return (
            f"{self.num_features}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}" + ("" if self.sync else ", sync=False")
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy all but the process group, which is nothing to copy: both layers have it."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _group(self) -> "dist.ProcessGroup | None":
        """Return the processes whose batches share a mean; None: this one alone."""
        if not (self.sync and self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    @torch.no_grad()
    def _track(self, mean: Tensor) -> None:
        """Move the running mean, if there is one, towards the batch's."""
        if self.running_mean is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        # The count stays on its device: reading it would make the host wait, and a CUDA graph would freeze it.
        share = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        self.running_mean.copy_(self.running_mean.to(mean.dtype).lerp_(mean, share))  # wide enough: itself, not copied

    def _check(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"input must have {self.num_features} channels on axis 1, shape (N, C) or (N, C, *); got shape "
                f"{tuple(input.shape)}. Move the channels there, or set num_features"
            )
        if not input.is_floating_point():
            raise TypeError(f"input must be floating point; got {input.dtype}. Convert it first, to float32 say")


# Some versions of torch trace the all-reduce into a graph with wrong results, and without a word. (This is what
# torch.compiler.disable does, without importing the compiler.)
_centre_together = _disable_dynamo(centre)
