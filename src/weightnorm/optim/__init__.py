"""The optimizer form: torch optimizers that step on length and direction; the model's weights stay plain."""

from weightnorm.optim.adopt import from_module_form
from weightnorm.optim.clipping import clip_grad_norm_
from weightnorm.optim.groups import ParamGroups, param_groups
from weightnorm.optim.optimizer import WeightNormOptimizer
from weightnorm.optim.optimizers import SGD, Adam, Adamax, AdamW, wrap

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Adamax",
    "ParamGroups",
    "WeightNormOptimizer",
    "clip_grad_norm_",
    "from_module_form",
    "param_groups",
    "wrap",
]
