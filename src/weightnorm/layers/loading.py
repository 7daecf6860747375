"""Checkpoints of every spelling load into the module form: torch's two, other axes, plain weights, logarithms of g."""

from typing import Any

import torch
from torch import Tensor, nn

from weightnorm.axes import axes_of_lengths
from weightnorm.layers.compose import by_formula
from weightnorm.layers.parametrization import WeightNorm


def register(module: nn.Module) -> None:
    """Let a layer's ``load_state_dict`` understand other spellings."""
    if not any(_is_ours(hook) for hook in module._load_state_dict_pre_hooks.values()):
        module._register_load_state_dict_pre_hook(_respell, with_module=True)


def unregister(module: nn.Module, name: str) -> None:
    """Take away the hooks, ours and torch's, that would look for a weight's ``g`` and ``v``."""
    held = getattr(module, "parametrizations", {})
    needs_ours = any(isinstance(part, WeightNorm) for parts in held.values() for part in parts)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if (_is_ours(hook) and not needs_ours) or _is_torchs(hook, name):
            del module._load_state_dict_pre_hooks[key]


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", hook) is _respell


def _is_torchs(hook: Any, name: str) -> bool:
    inner = getattr(hook, "hook", hook)
    cells = [cell.cell_contents for cell in getattr(inner, "__closure__", None) or ()]
    return getattr(inner, "__name__", "") == "_weight_norm_compat_hook" and name in cells


def _respell(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, *reports: list[str]
) -> None:
    """Rewrite a checkpoint's entries for the weights of one layer as the layer has them."""
    errors = reports[-1]
    # Torch's remove_parametrizations leaves this hook behind.
    for name, parts in getattr(module, "parametrizations", {}).items():
        if not isinstance(parts[0], WeightNorm):
            continue
        inside = f"{prefix}parametrizations.{name}."
        keys = f"{inside}original0", f"{inside}original1"
        legacy = f"{prefix}{name}_g", f"{prefix}{name}_v"
        if all(key in state for key in legacy):
            for key, old in zip(keys, legacy, strict=True):
                state[key] = state.pop(old)
        plain = state.get(prefix + name)
        if plain is not None and plain.shape != parts.original1.shape:
            errors.append(
                f"size mismatch for {prefix}{name}: {tuple(plain.shape)} in the checkpoint, "
                f"{tuple(parts.original1.shape)} in the model"
            )
        elif plain is not None:
            state[keys[0]], state[keys[1]] = parts[0].right_inverse(state.pop(prefix + name))
        elif all(key in state for key in keys):
            is_log = state.pop(f"{inside}0.log_g", None) is not None
            try:
                state[keys[0]], state[keys[1]] = _as_held(parts, state[keys[0]], state[keys[1]], is_log)
            except ValueError as error:
                errors.append(f"{prefix}{name}: {error}")
        if parts[0].log_g is not None and keys[0] in state:
            state[f"{inside}0.log_g"] = torch.ones((), dtype=torch.bool)


def _as_held(parts: Any, g: Tensor, v: Tensor, is_log: bool) -> tuple[Tensor, Tensor]:
    """Return ``g`` and ``v`` of a checkpoint along the layer's own axis, and as logarithms where it has them."""
    ours: WeightNorm = parts[0]
    holds_log = ours.log_g is not None
    if v.shape != parts.original1.shape or (g.shape == parts.original0.shape and is_log == holds_log):
        return g, v  # bit for bit; or of another size, which torch reports
    g = g.exp() if is_log else g
    axes = axes_of_lengths(v.shape, g.shape)
    if g.numel() == parts.original0.numel() and (g.shape == parts.original0.shape or axes == [ours.axis]):
        if not holds_log:
            return g.reshape(parts.original0.shape), v
        sign = torch.where(g < 0, -1.0, 1.0).reshape(parts.original0.shape).to(v.dtype)
        split = ours.axis.split(v) * sign
        return g.abs().log().reshape(parts.original0.shape), split.reshape(v.shape)
    if len(axes) != 1:
        fit = ", ".join(str(axis.dim) for axis in axes) or "none"
        raise ValueError(
            f"g of shape {tuple(g.shape)} does not say along which axis of v, {tuple(v.shape)}, it runs (fitting: "
            f"{fit}); respell the checkpoint with weightnorm.convert_state_dict(..., dim=)"
        )
    return ours.right_inverse(by_formula(v, g, axes[0]))
