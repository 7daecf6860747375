"""The model that an arm begins with."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

import weightnorm as wn
from weightnorm.compare.arms import Arm
from weightnorm.tasks.task import Norm, Task

_NORMS: dict[str | None, Norm | None] = {None: None, "mean_only": wn.MeanOnlyBatchNorm, "batch": nn.BatchNorm2d}


def initial_model(task: Task, arm: Arm, seed: int) -> nn.Module:
    """Return the model that an arm starts from; sets torch's random state.

    Args:
        task: makes it, and draws its weights.
        arm: says with which norm layers and initialisation.
        seed: decides the draw.

    Returns:
        The model. From the same seed, all arms with ``init="data"`` compute the same function on the task's
        initialisation batch in training mode; on any, where the task has none and there are no norm layers.
    """
    torch.manual_seed(seed)
    model = task.model(_NORMS[arm.norm])
    if arm.init == "torch":
        return model
    torch.manual_seed(seed)  # again: layers with biases have drawn more than those without
    if arm.init == "released":
        _as_released(model, task)
        return model
    task.draw_weights(model)
    batch = task.init_batch()
    if arm.init == "data" and batch is not None:
        wn.data_init(model, batch, std=task.init_std)
    return model


def _as_released(model: nn.Module, task: Task) -> None:
    """Initialise as openai/weightnorm's ``no_norm``, whose optimizer steps on what a fixed scale multiplies."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    drawn = [layer.weight.detach().clone() for layer in layers]
    wn.data_init(model, task.init_batch(), std=task.init_std)
    for layer, weight in zip(layers, drawn, strict=True):
        scale = wn.formula.decompose(layer.weight.detach())[1] / wn.formula.decompose(weight)[1]
        with torch.no_grad():
            layer.weight.copy_(weight)
        register_parametrization(layer, "weight", _Scaled(scale))


class _Scaled(nn.Module):
    """A weight that is a parameter times a fixed scale, one an output unit."""

    scale: Tensor

    def __init__(self, scale: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight."""
        return self.scale * weight


def module_form(model: nn.Module, v_std: float | None, lr: float, g_lr: float | str) -> list[dict[str, Any]]:
    """Put weight normalization into a model's layers, and begin as the optimizer form does: ``‖v‖ = v_std sqrt(k)``.

    Args:
        model: the model; changed in place, the function that it computes is not.
        v_std: of the direction's elements; None: ``v`` is the weight.
        lr: learning rate.
        g_lr: multiplies it for lengths; "sqrt": by sqrt(k).

    Returns:
        Groups for the optimizer of lengths, and of the rest.
    """
    wn.weight_norm(model)
    groups: list[dict[str, Any]] = []
    for held in [module for module in model.modules() if isinstance(module, ParametrizationList)]:
        g: Tensor = held.original0  # type: ignore[assignment]
        v: Tensor = held.original1  # type: ignore[assignment]
        root = (v.numel() / g.numel()) ** 0.5
        if v_std is not None:
            reduced = [axis for axis, size in enumerate(g.shape) if size == 1]
            with torch.no_grad():
                v *= v_std * root / torch.linalg.vector_norm(v, dim=reduced, keepdim=True)
        groups.append({"params": [g], "lr": lr * (root if g_lr == "sqrt" else float(g_lr))})
    lengths = {group["params"][0] for group in groups}
    return [{"params": [p for p in model.parameters() if p not in lengths]}, *groups]
