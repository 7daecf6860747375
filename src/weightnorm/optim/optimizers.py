"""SGD, Adam, AdamW and Adamax on length and direction, and ``wrap`` for every other rule."""

import inspect
from functools import partial
from typing import Any, ClassVar

import torch

from weightnorm.optim.groups import ModelOrParams
from weightnorm.optim.optimizer import WeightNormOptimizer
from weightnorm.optim.rules import Rule

_OWN = ("v_std", "g_lr", "decay", "stochastic_rounding", "backend")


class _Named(WeightNormOptimizer):
    """An optimizer class of torch's on ``(v, g)``: torch's signature, then ``WeightNormOptimizer``'s."""

    rule: ClassVar[type[torch.optim.Optimizer]]

    def __init__(self, params: ModelOrParams, *args: Any, **kwargs: Any):
        own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
        options = inspect.signature(self.rule).bind(None, *args, **kwargs).arguments
        del options["params"]
        super().__init__(params, partial(self.rule, **options), **own)

    def __init_subclass__(cls) -> None:
        """Show the real signature, which ``*args`` would hide from help()."""
        if "rule" not in cls.__dict__:
            return  # a user's own subclass
        theirs = inspect.signature(cls.rule)
        ours = inspect.signature(WeightNormOptimizer.__init__).parameters
        parameters = [*theirs.parameters.values(), *(ours[name] for name in _OWN)]
        cls.__signature__ = theirs.replace(parameters=parameters)  # type: ignore[attr-defined]


class SGD(_Named):
    """``torch.optim.SGD`` on length and direction; without momentum ``‖v‖`` never shrinks (section 2.1).

    Args:
        params: a model, a list of models, or what torch optimizers take.
        args: as for ``torch.optim.SGD``, like ``kwargs``: ``lr=1e-3``, ``momentum=0``, ...
        kwargs: and ``v_std=None``, ``g_lr=1.0``, ``decay="both"``, ``stochastic_rounding=False``, ``backend="auto"`` of
            ``WeightNormOptimizer``.

    Raises:
        ValueError: if an option is out of its range, or nothing can be normalised.

    Source: Salimans & Kingma 2016, section 2.

    Example:
        >>> import torch, weightnorm as wn
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = wn.SGD(model, lr=0.1, momentum=0.9)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = torch.optim.SGD


class Adam(_Named):
    """``torch.optim.Adam`` on length and direction: the optimizer of the paper's CIFAR-10 experiment (5.1).

    Args:
        params: a model, a list of models, or what torch optimizers take.
        args: as for ``torch.optim.Adam``, like ``kwargs``: ``lr=1e-3``, ``betas=(0.9, 0.999)``, ``amsgrad=False``, ...
        kwargs: and ``v_std=None``, ``g_lr=1.0``, ``decay="both"``, ``stochastic_rounding=False``, ``backend="auto"`` of
            ``WeightNormOptimizer``.

    Raises:
        ValueError: if an option is out of its range, or nothing can be normalised.

    Source: Salimans & Kingma 2016, section 2; Kingma & Ba 2015.

    Example:
        >>> import torch, weightnorm as wn
        >>> model = torch.nn.Conv2d(3, 8, 3)
        >>> optimizer = wn.Adam(model, lr=0.003, v_std=0.05)
        >>> model(torch.ones(2, 3, 8, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = torch.optim.Adam


class AdamW(_Named):
    """``torch.optim.AdamW`` on length and direction; its decay acts on v and g as on two weights of their own.

    Args:
        params: a model, a list of models, or what torch optimizers take.
        args: as for ``torch.optim.AdamW``, like ``kwargs``: ``lr=1e-3``, ``weight_decay=0.01``, ``fused=None``, ...
        kwargs: and ``v_std=None``, ``g_lr=1.0``, ``decay="both"``, ``stochastic_rounding=False``, ``backend="auto"`` of
            ``WeightNormOptimizer``.

    Raises:
        ValueError: if an option is out of its range, or nothing can be normalised.

    Source: Salimans & Kingma 2016, section 2; Loshchilov & Hutter 2019.

    Example:
        >>> import torch, weightnorm as wn
        >>> model = torch.nn.Linear(8, 4)
        >>> groups = wn.param_groups(model, no_decay=["*bias"])
        >>> optimizer = wn.AdamW(groups, lr=1e-3, weight_decay=0.1, decay="g")
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = torch.optim.AdamW


class Adamax(_Named):
    """``torch.optim.Adamax`` on length and direction: the optimizer of the paper's VAE and DQN (5.2, 5.4).

    Args:
        params: a model, a list of models, or what torch optimizers take.
        args: as for ``torch.optim.Adamax``, like ``kwargs``: ``lr=2e-3``, ``betas=(0.9, 0.999)``, ...
        kwargs: and ``v_std=None``, ``g_lr=1.0``, ``decay="both"``, ``stochastic_rounding=False``, ``backend="auto"`` of
            ``WeightNormOptimizer``.

    Raises:
        ValueError: if an option is out of its range, or nothing can be normalised.

    Source: Salimans & Kingma 2016, section 2; Kingma & Ba 2015, section 7.1.

    Example:
        >>> import torch, weightnorm as wn
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = wn.Adamax(model, lr=0.002)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = torch.optim.Adamax


def wrap(
    optimizer_class: Rule,
    model_or_params: ModelOrParams,
    *,
    g_class: Rule | None = None,
    **kwargs: Any,
) -> WeightNormOptimizer:
    """Make a torch optimizer of any class step on length and direction.

    Any rule works that moves each parameter by its own gradient and state: it sees ``v`` (shaped like the weight) and
    ``g`` as parameters. Rules for matrices only (Muon) see ``v`` as a matrix, one vector a row, and need ``g_class``.

    Args:
        optimizer_class: the class.
        model_or_params: a model, a list of models, or what torch optimizers take.
        g_class: steps on ``g``, biases and whatever else is plain; None: ``optimizer_class`` does. Its options are its
            own defaults, or those of a ``functools.partial``. Its learning rate keeps its proportion to the other's
            when a schedule moves that.
        kwargs: options of ``optimizer_class``, and ``v_std=None``, ``g_lr=1.0``, ``decay="both"``,
            ``stochastic_rounding=False``, ``backend="auto"`` of ``WeightNormOptimizer``.

    Returns:
        The optimizer.

    Raises:
        ValueError: if the class cannot work (LBFGS, SparseAdam; Muon without ``g_class``), an option is out of its
            range, or nothing can be normalised.

    Source: Salimans & Kingma 2016, section 2: "any optimizer" steps on v and g.

    Example:
        >>> import torch, weightnorm as wn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 4))
        >>> optimizer = wn.wrap(torch.optim.Muon, model, lr=0.02, g_class=partial(torch.optim.AdamW, lr=3e-4))
        >>> model(torch.ones(2, 3, 4, 4)).square().mean().backward()
        >>> optimizer.step()
    """
    own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
    return WeightNormOptimizer(model_or_params, partial(optimizer_class, **kwargs), g_class, **own)
