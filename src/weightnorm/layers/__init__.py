"""Module form: weight norm as a parametrization of layers, on torch's own keys."""

from weightnorm.layers.caching import cached
from weightnorm.layers.folding import fold, remove_weight_norm
from weightnorm.layers.wrap import weight_norm

__all__ = ["cached", "fold", "remove_weight_norm", "weight_norm"]
