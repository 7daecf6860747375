"""The inner optimizers' param groups: what each coordinate and plain parameter steps with."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from weightnorm.optim.coordinates import Coordinates, State
from weightnorm.optim.groups import Group, g_lr_factor, is_normalized
from weightnorm.optim.rules import Rule, default_options

_OURS = ("params", "param_names", "v_std", "g_lr", "decay", "stochastic_rounding", "weight_norm", "dim", "groups")


@dataclass
class Bucket:
    """One param group of an inner optimizer: members of an outer group that share their options.

    Attributes:
        inner: the inner group.
        outer: the outer group; read at every step, since schedulers change it.
        fixed: options that do not follow the outer group.
        follows: whether the others do, or are ``fixed`` all but the learning rate.
        lr_factor: multiplies the outer group's learning rate.
    """

    inner: Group
    outer: Group
    fixed: State
    follows: bool
    lr_factor: float
    _synced: State = field(default_factory=dict)

    def sync(self) -> None:
        """Bring the inner group's options up to date."""
        self.inner |= self._options()
        self._synced = dict(self.inner)

    def check_untouched(self) -> None:
        """Raise ValueError if the rule has changed its options since: it keeps state there, which would go astray."""
        changed = [name for name, value in self.inner.items() if self._synced.get(name, self) is not value]
        if changed:
            raise ValueError(
                f"the optimizer keeps state in its param groups ({', '.join(changed)}), where v, g and plain "
                "parameters would each have their own; use a rule that keeps it per parameter"
            )

    def _options(self) -> State:
        followed = {name: value for name, value in self.outer.items() if name not in _OURS} if self.follows else {}
        options = followed | self.fixed
        if self.lr_factor != 1 or not self.follows:
            options["lr"] = self.outer["lr"] * self.lr_factor
        if not self.follows and self.outer.get("weight_decay") == 0 and "weight_decay" in options:
            options["weight_decay"] = 0  # no_decay holds under either rule
        return options


class Buckets:
    """All buckets of an optimizer: ``main`` for the rule that steps on ``v``, ``rest`` for that of everything else.

    Args:
        rule: makes the optimizer for ``v``.
        g_rule: makes the one for ``g`` and plain parameters; None: ``rule`` does, and ``rest`` is ``main``.
    """

    def __init__(self, rule: Rule, g_rule: Rule | None):
        self.main: list[Group] = []
        self.rest: list[Group] = [] if g_rule else self.main
        self._g_names = default_options(g_rule) if g_rule else None
        self._g_lr_share = _ratio(self._g_names["lr"], default_options(rule)["lr"]) if self._g_names else 1.0
        self._buckets: dict[tuple[int, bool, bool, float], Bucket] = {}

    def add_normalized(self, coordinates: Coordinates, group: Group) -> None:
        """Add the coordinates of one weight of a group."""
        factor = g_lr_factor(group, coordinates.row_length)
        self._bucket(group, is_v=True, decays=group["decay"] == "both")["params"].append(coordinates.v)
        self._bucket(group, is_v=False, lr_factor=factor)["params"].append(coordinates.g)

    def add_plain(self, parameter: nn.Parameter, group: Group) -> None:
        """Add a parameter that is stepped on as it is."""
        self._bucket(group, is_v=False)["params"].append(parameter)

    def sync(self) -> None:
        """Bring all inner groups' options up to date."""
        for bucket in self._buckets.values():
            bucket.sync()

    def check_untouched(self) -> None:
        """Raise ValueError if a rule keeps state in its param groups."""
        for bucket in self._buckets.values():
            bucket.check_untouched()

    def _bucket(self, group: Group, *, is_v: bool, decays: bool = True, lr_factor: float = 1.0) -> Group:
        """Return the inner group for members that differ in nothing named here."""
        foreign = self._g_names is not None and not is_v and any(is_normalized(group, p) for p in group["params"])
        fixed: State = {}
        if foreign and self._g_names is not None:
            # The group's options are the other rule's: this one keeps its own, and its learning rate in proportion.
            fixed = {name: value for name, value in self._g_names.items() if name not in ("lr", *_OURS)}
            fixed["maximize"] = group.get("maximize", False)
            lr_factor *= self._g_lr_share
        elif not decays and "weight_decay" in group:
            fixed = {"weight_decay": 0.0}
        target = self.main if is_v else self.rest
        key = (id(group), target is self.main, decays, lr_factor)
        if key not in self._buckets:
            self._buckets[key] = Bucket({"params": []}, group, fixed, not foreign, lr_factor)
            self._buckets[key].sync()
            target.append(self._buckets[key].inner)
        return self._buckets[key].inner


def _ratio(g_lr: float | Tensor, lr: float | Tensor) -> float:
    if not lr:
        raise ValueError("with g_class the learning rate must not be 0, since that of g keeps its proportion to it")
    return float(g_lr) / float(lr)
