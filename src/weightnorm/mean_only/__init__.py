"""Mean-only batch normalization (section 4): the layer, the way from batch normalization to it, and folding it away."""

from weightnorm.mean_only.folding import fold_mean
from weightnorm.mean_only.layer import MeanOnlyBatchNorm
from weightnorm.mean_only.replacing import ReplacementReport, replace_batch_norm

__all__ = ["MeanOnlyBatchNorm", "ReplacementReport", "fold_mean", "replace_batch_norm"]
