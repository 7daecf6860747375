"""What steps on a parameter: torch's optimizers on ``(v, g)``, or the fused kernels. Chosen here and nowhere else."""

import importlib.util
import os
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightnorm.kernels.layout import is_dense, rows_of
from weightnorm.kernels.step import MakeLauncher
from weightnorm.kernels.trust import works
from weightnorm.optim.groups import WEIGHT_DTYPES, Group, group_axis, is_normalized
from weightnorm.optim.rules import Rule

AUTO = {"cuda": "triton", "cpu": "numba"}  # by type of device
BACKENDS = ("auto", "torch", "triton", "numba")
_KERNELS: dict[type, str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adam",
    torch.optim.Adamax: "adamax",
}


def kernel_rule(rule: Rule, group: Group) -> str | None:
    """Return the name of the kernels' version of a rule, or None where there is none."""
    kind = rule.func if isinstance(rule, partial) else rule
    name = _KERNELS.get(kind) if isinstance(kind, type) else None
    return "amsgrad" if name == "adam" and group.get("amsgrad") else name


def backend_of(asked: str, rule: Rule, g_rule: Rule | None, group: Group, parameter: Tensor) -> str:
    """Return the backend that steps on a parameter.

    ``auto`` takes the kernels wherever they can be taken: Triton's for parameters on a GPU, where they are tried once
    on something small, numba's on the CPU.

    Args:
        asked: ``auto``, ``torch``, ``triton`` or ``numba``.
        rule: the optimizer's rule for v.
        g_rule: its rule for g; None: the same.
        group: the parameter's param group.
        parameter: the parameter.

    Returns:
        ``torch``, ``triton`` or ``numba``.

    Raises:
        ValueError: if kernels were asked for by name and cannot step on a weight, with the reason.
    """
    if asked == "torch":
        return asked
    name = asked if asked != "auto" else AUTO.get(parameter.device.type, "torch")
    reason = _why_not(name, rule, g_rule, group, parameter)
    if not reason and (asked == name or _is_trusted(name, parameter.device)):
        return name
    if asked == name and is_normalized(group, parameter):
        raise ValueError(
            f"backend={asked!r} cannot step on a weight of shape {tuple(parameter.shape)}: {reason}. "
            'backend="auto" takes the kernels where they fit and torch elsewhere'
        )
    return "torch"


def _is_trusted(name: str, device: torch.device) -> bool:
    """Say whether kernels that nobody asked for by name may step: on a GPU they are tried first."""
    if device.type != "cuda":
        return True
    from weightnorm.optim.trial import steps_rightly  # it imports what imports this

    return works("the step", device, lambda device: steps_rightly(device, launcher_of(name)))


def launcher_of(backend: str) -> MakeLauncher:
    """Import a backend's kernels."""
    if backend == "triton":
        from weightnorm.kernels.triton_step import TritonStep

        return TritonStep
    from weightnorm.kernels.numba_step import NumbaStep

    return NumbaStep


def _why_not(name: str, rule: Rule, g_rule: Rule | None, group: Group, parameter: Tensor) -> str:
    """Return why kernels cannot step on a parameter; empty where they can."""
    if name == "torch":
        return f"there are none for the device {parameter.device}"
    if not _is_installed(name):
        return f"{name} is not installed (pip install {name})"
    if g_rule is not None:
        return "g_class needs torch's optimizers"
    if kernel_rule(rule, group) is None:
        return "only SGD, Adam, AdamW and Adamax have kernels"
    if group.get("foreach") or group.get("fused") is False:
        return "its group asks for torch's own step (foreach=True or fused=False)"
    if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
        return "betas are tensors"
    return _why_not_here(name, group, parameter)


@lru_cache
def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _why_not_here(name: str, group: Group, parameter: Tensor) -> str:
    """Return what about a parameter itself keeps kernels from it."""
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    home = "cuda" if name == "triton" else "cpu"
    dtypes = WEIGHT_DTYPES if name == "triton" else (torch.float32, torch.float64)
    if parameter.device.type != home and not (interpreted and parameter.device.type == "cpu"):
        return f"it is on {parameter.device}"
    if is_traceable_wrapper_subclass(parameter):
        return f"it is a {type(parameter).__name__}"
    if parameter.dtype not in dtypes or (name == "numba" and _other_dtype(parameter)):
        return f"its dtype is {parameter.dtype}, its gradient's {_grad_dtype(parameter)}"
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        return "its gradient is sparse"
    if parameter.numel() == 0 or not is_dense(parameter):
        return "its memory has gaps or overlaps"
    axis = group_axis(group) if is_normalized(group, parameter) else None
    if rows_of(parameter, parameter, axis) is None:
        return "its rows lie too scattered in memory"
    return ""


def _grad_dtype(parameter: Tensor) -> torch.dtype:
    return parameter.dtype if parameter.grad is None else parameter.grad.dtype


def _other_dtype(parameter: Tensor) -> bool:
    return _grad_dtype(parameter) != parameter.dtype
