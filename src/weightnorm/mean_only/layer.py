"""Mean-only batch normalization: take the batch's mean away and leave the scale to the weights (section 4).

Weight normalization keeps the scale of a unit's pre-activation about independent of ``v``, but not its mean. This layer
completes it: it subtracts the mean and divides by nothing, so its noise is gentle and a batch of one is allowed.
"""

import torch
from torch import Tensor, nn

from weightnorm.formula import wide_dtype


class MeanOnlyBatchNorm(nn.Module):
    """Subtract the mean over the batch and its positions, then add a bias: ``t~ = t − μ[t] + b`` (eq. 7).

    Differentiating through the mean centres the gradient: ``∂t = ∂t~ − μ[∂t~]`` (eq. 8). In eval mode a running average
    of the batch means stands in for ``μ[t]``. Put it between a bias-free layer and its nonlinearity; a bias before it
    cancels. Means are taken in float32 at least (float64 for float64), under autocast too.

    Args:
        num_features: number of channels C, the size of axis 1.
        momentum: weight of the newest mean, ``running <- (1 − momentum) running + momentum μ``; None: the running mean
            is the plain average of all batch means so far. Default 0.1, the authors'.
        affine: learn the bias ``b``, one per channel, starting at 0. Default True.
        track_running_stats: keep the running mean; False: eval mode takes the batch's mean as training does.
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
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[ -1., -10.],
                [  1.,  10.]], grad_fn=<AddBackward0>)
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
            ValueError: if axis 1 does not have C channels, or the batch is empty where its mean is needed.
        """
        self._check(input)
        t = input.to(wide_dtype(input.dtype))
        if self.training or self.running_mean is None:
            mean = self._batch_mean(t)
            self._track(mean)
        else:
            mean = self.running_mean
        # One number per channel, so that the activations are read and written once.
        shift = -mean if self.bias is None else self.bias - mean
        return (t + shift.reshape(-1, *[1] * (t.ndim - 2))).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the arguments, for printing."""
        return (
            f"{self.num_features}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )

    def _batch_mean(self, t: Tensor) -> Tensor:
        """Return ``μ[t]``, shape (C,): the mean over every axis but 1."""
        if t.numel() == 0:
            raise ValueError(
                f"an empty batch has no mean; got shape {tuple(t.shape)}. Skip it, or use the running mean: call eval()"
            )
        return t.mean([axis for axis in range(t.ndim) if axis != 1])

    @torch.no_grad()
    def _track(self, mean: Tensor) -> None:
        """Move the running mean, if there is one, towards the batch's."""
        if self.running_mean is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        # The count stays on its device: reading it would make the host wait, and a CUDA graph would freeze it.
        share = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        self.running_mean.copy_((1 - share) * self.running_mean.to(mean.dtype) + share * mean)

    def _check(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"input must have {self.num_features} channels on axis 1, shape (N, C) or (N, C, *); got shape "
                f"{tuple(input.shape)}. Move the channels there, or set num_features"
            )
        if not input.is_floating_point():
            raise TypeError(f"input must be floating point; got {input.dtype}. Convert it first, to float32 say")
