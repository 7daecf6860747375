"""The optimizer form: a torch optimizer that steps on length and direction while the model keeps plain weights."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from weightnorm.formula import wide_dtype
from weightnorm.optim.backends import backend_of, kernel_rule, launcher_of
from weightnorm.optim.coordinates import LENGTH, SCALE, State
from weightnorm.optim.engine import Engine
from weightnorm.optim.foreign import FORMAT, VERSION, as_ours
from weightnorm.optim.fused import Fused
from weightnorm.optim.groups import Group, ModelOrParams, as_param_groups, is_normalized
from weightnorm.optim.options import (
    check_axes,
    check_backend,
    check_gradient,
    check_options,
    check_structure,
    members_of,
    structure_of,
)
from weightnorm.optim.rules import Rule, check_rule, default_options

_in_use: "WeakSet[torch.optim.Optimizer]" = WeakSet()


def is_trained(parameters: Iterable[Tensor]) -> bool:
    """Say whether an optimizer of ours that is in use has taken steps on any of some parameters."""
    return any(optimizer.state.get(parameter) for parameter in parameters for optimizer in _in_use)


class WeightNormOptimizer(torch.optim.Optimizer):
    """Any torch optimizer, stepping on ``(v, g)`` of each normalised weight ``w = g v/‖v‖`` (eq. 2).

    The parameters stay plain: forward, backward and ``model.state_dict()`` see ``w``. Per vector the optimizer keeps
    one number, ``scale = g/‖v‖``, and what its rule keeps for ``v`` and ``g``. A step pulls the gradient back (eq. 3),
    lets the rule step on ``(v, g)`` and moves ``w`` as they moved. Whatever changes ``w`` in between is respected.

    Its makers are ``weightnorm.SGD``, ``Adam``, ``AdamW``, ``Adamax`` and, for other rules, ``weightnorm.wrap``.

    Args:
        params: a model, a list of models, or what torch optimizers take; see ``weightnorm.param_groups``. Of bare
            tensors every matrix and more is normalised along axis 0, unless its group says ``weight_norm=``, ``dim=``
            (an axis; a tuple of axes, as (0, 1) for stacked matrices; or None for the whole tensor) or ``groups=`` (of
            a grouped transposed convolution, ``dim=1``).
        rule: makes a torch optimizer from groups: the one that steps on ``v``, ``g`` and plain parameters.
        g_rule: makes the one that steps on ``g`` and plain parameters instead. None: ``rule`` does.
        v_std: sets ``‖v‖`` at a vector's first step, as if ``v`` were drawn from N(0, v_std²); the paper's is 0.05.
            The larger, the less a step turns the direction. None: ``v = w``, as in torch's weight_norm.
        g_lr: multiplies the learning rate of ``g``; 0 freezes lengths; "sqrt" means sqrt(k), k the vector's length,
            since under Adam a plain weight's norm moves by up to lr·sqrt(k) a step and ``g`` only by lr.
        decay: weight decay acts on "both" v and g, or on "g". On v it changes no output, only ``‖v‖``.
        stochastic_rounding: keep no float32 master of bfloat16 weights, and round them up or down at random instead.
        backend: what steps: "torch", torch's own optimizers on ``(v, g)``; "triton" or "numba", kernels that take one
            pass over the weights, on a GPU or a CPU, for SGD, Adam, AdamW and Adamax; "auto", kernels where they fit.

    Raises:
        ValueError: if an option is out of its range, nothing among the parameters can be normalised, or a backend
            asked for by name cannot step on a weight.

    Source: Salimans & Kingma 2016, section 2.
    """

    def __init__(
        self,
        params: ModelOrParams,
        rule: Rule,
        g_rule: Rule | None = None,
        *,
        v_std: float | None = None,
        g_lr: float | str = 1.0,
        decay: str = "both",
        stochastic_rounding: bool = False,
        backend: str = "auto",
    ):
        check_rule(rule, g_rule)
        check_backend(backend)
        own = {"v_std": v_std, "g_lr": g_lr, "decay": decay, "stochastic_rounding": stochastic_rounding}
        self._rule, self._g_rule, self._backend, self._engines = rule, g_rule, backend, None
        defaults = default_options(rule) | own | {"weight_norm": None, "dim": 0, "groups": 1}
        super().__init__(as_param_groups(params), defaults)
        self._announce_scaling()
        self._engines = self._build_engines()
        self._say_what_is_normalized()
        _in_use.add(self)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group as in torch, with ``weight_norm=``, ``dim=``, ``groups=`` to say what of it is normalised.

        Args:
            param_group: a dict with ``params`` and any options that differ from the defaults.

        Raises:
            ValueError: if an option is out of its range; the group is not added then.
        """
        check_options({**self.defaults, **param_group})
        members = members_of(param_group["params"])
        tensors = [member[1] if isinstance(member, tuple) else member for member in members]
        if self._g_rule and not any(is_normalized({**self.defaults, **param_group}, tensor) for tensor in tensors):
            param_group = {**default_options(self._g_rule), **param_group}
        if len(tensors) != len(set(tensors)):
            raise ValueError("a parameter appears twice in a group; pass each once")
        super().add_param_group({**param_group, "params": members})
        group = self.param_groups[-1]
        if isinstance(group["lr"], Tensor) and group["lr"] is self.defaults["lr"]:
            group["lr"] = group["lr"].clone()  # schedulers change it in place, group by group
        try:
            check_axes(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss; called once.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: if a normalised weight has a sparse or complex gradient; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for engine in self._fitting_engines():  # GradScaler leaves these two where fused steps are announced
            engine.step(self.state, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, and the version of what is in it.

        Returns:
            ``state``, ``param_groups`` and ``weightnorm_format``. A normalised weight's state has ``scale``, what the
            rule keeps for ``v`` under torch's names, the same for ``g`` under ``g.`` and the name, and ``master``, the
            weight in float32, where its own dtype is narrower.
        """
        return super().state_dict() | {FORMAT: VERSION}

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = False) -> None:
        """Load what ``state_dict`` returned, to the last bit; or a plain torch optimizer's, as well as can be.

        Args:
            state_dict: the state of an optimizer built for the same groups. If it is of one that stepped on the weights
                themselves, its moments are projected onto ``v`` and ``g``, with a warning; load the weights before.
            strict: refuse the latter.

        Raises:
            ValueError: if the groups differ in number or size, or are normalised along other axes; the state is of
                other shapes, of another rule or a later version's; or a CUDA graph has recorded a step of this
                optimizer. Nothing has changed then.
        """
        self._check_not_recorded()
        before = [{name: group[name] for name in self.defaults if name in group} for group in self.param_groups]
        handed: dict[str, Any] = {}
        was_ours = True

        def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            nonlocal was_ours
            check_structure(self.param_groups, final["param_groups"])
            ours = as_ours(final, self.param_groups, self._rule, self._g_rule)
            was_ours = ours is final
            if strict and not was_ours:
                raise ValueError("the state is a plain torch optimizer's, and strict=True takes this library's only")
            handed.update(ours)
            return ours

        def restore(_: torch.optim.Optimizer) -> None:
            for ours, group in zip(before, self.param_groups, strict=True):
                group |= {name: value for name, value in ours.items() if name not in group} | structure_of(ours)
            self._undo_casts(handed)

        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        if not was_ours:
            warnings.warn(
                "the state is of a plain torch optimizer: its moments were projected into those of v and g, second "
                "moments as if gradients of different elements were uncorrelated. Pass strict=True to refuse it",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_rule", "_g_rule", "_backend")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._announce_scaling()
        self._engines = None  # built for other groups or another state

    def _announce_scaling(self) -> None:
        """Tell GradScaler that a step unscales and skips by itself; only for ``fused=True``, as in torch."""
        if self.defaults.get("fused") and self._g_rule is None:
            self._step_supports_amp_scaling = True

    def _fitting_engines(self) -> list[Engine | Fused]:
        """Return what steps on the parameters as they, their gradients and their state are now."""
        engines = self._engines
        fits = engines is not None and self._built_for == _shape_of(self.param_groups)
        if engines is None or not fits or any(engine.is_stale(self.state) for engine in engines):
            for group, parameter in self._members():
                check_gradient(parameter, group)
            engines = self._engines = self._build_engines()
            for engine in engines:
                engine.is_stale(self.state)
        return engines

    @torch.no_grad()
    def _build_engines(self) -> list[Engine | Fused]:
        """Build what steps on the parameters, backend by backend."""
        self._check_not_recorded()
        self._built_for = _shape_of(self.param_groups)
        found: dict[str, list[tuple[Any, int]]] = {}
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                name = backend_of(self._backend, self._rule, self._g_rule, group, parameter)
                if name != "torch" and group["g_lr"] != 0 and _counts_apart(self.state.get(parameter, {})):
                    name = "torch"  # kernels correct the bias of g's moments by v's count
                found.setdefault(name, []).append((parameter, index))
        engines: list[Engine | Fused] = []
        for name, parameters in found.items():
            if name == "torch":
                engines.append(Engine(self.param_groups, parameters, self._rule, self._g_rule, self.state))
            else:
                rule_of = partial(kernel_rule, self._rule)
                engines.append(Fused(self.param_groups, parameters, rule_of, launcher_of(name), self.state))
        return engines

    def _check_not_recorded(self) -> None:
        """Raise ValueError if a CUDA graph knows where weights and state are, since they are about to be others."""
        if any(isinstance(engine, Fused) and engine.is_recorded for engine in self._engines or ()):
            raise ValueError(
                "a CUDA graph has recorded this optimizer's step, and a replay would not see that weights, their state "
                "or their groups have changed since. Build a new optimizer, load the state_dict() into it and record "
                "again"
            )

    def _undo_casts(self, saved: dict[str, Any]) -> None:
        """Put back what torch rounded to the dtype of the weights while loading."""
        saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
        options = default_options(self._g_rule or self._rule)
        for (group, parameter), saved_id in zip(self._members(), saved_ids, strict=True):
            counts_on_device = any((options | group).get(name) for name in ("capturable", "fused"))
            for name, value in saved["state"].get(saved_id, {}).items():
                if not isinstance(value, Tensor) or name == "step":  # torch knows "step" and where it belongs
                    continue
                if value.ndim == 0:
                    device = parameter.device if counts_on_device else value.device
                    self.state[parameter][name] = value.to(device)
                elif is_normalized(group, parameter):
                    dtype = wide_dtype(parameter.dtype) if value.is_floating_point() else value.dtype
                    self.state[parameter][name] = value.to(parameter.device, dtype)

    def _members(self) -> list[tuple[Group, Tensor]]:
        return [(group, parameter) for group in self.param_groups for parameter in group["params"]]

    def _say_what_is_normalized(self) -> None:
        members = self._members()
        count = sum(is_normalized(group, parameter) for group, parameter in members)
        if count == 0:
            shapes = ", ".join(str(tuple(parameter.shape)) for _, parameter in members[:4])
            raise ValueError(
                f"nothing to normalise: no matrix among {len(members)} tensors ({shapes}...), or all were left plain. "
                "Flattened shards (FSDP1, DeepSpeed ZeRO) hide the rows: use FSDP2 (fully_shard). "
                "To train without weight normalization use torch.optim"
            )
        _tell(f"{count} of {len(members)} tensors normalised; print(weightnorm.param_groups(model)) for the list")


def _shape_of(groups: list[Group]) -> list[Any]:
    """Return who the groups' members are, and the options that decide how they are stepped on."""
    options = ("weight_norm", "dim", "groups", "g_lr", "decay", "v_std", "stochastic_rounding", "foreach", "fused")
    of_rules = ("amsgrad", "momentum")
    return [
        (
            list(map(id, group["params"])),
            [group.get(name) for name in options],
            [bool(group.get(name)) for name in of_rules],
        )
        for group in groups
    ]


def _counts_apart(state: State) -> bool:
    """Say whether v and g have taken different numbers of steps, as they may have in module form."""
    of_v, of_g = state.get("step"), state.get(f"{LENGTH}step", 0)
    return SCALE in state and of_v is not None and float(of_v) != float(of_g)


def _tell(line: str) -> None:
    """Log a line as information; where the program has not set up logging, say it on stderr."""
    logger = logging.getLogger("weightnorm")
    if logger.hasHandlers():
        logger.info(line)
    else:
        print(f"weightnorm: {line}", file=sys.stderr)
