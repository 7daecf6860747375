"""Mean-only batch normalization (section 4): the layer."""

from weightnorm.mean_only.layer import MeanOnlyBatchNorm

__all__ = ["MeanOnlyBatchNorm"]
