"""Data-dependent initialisation: a forward pass after which every unit's pre-activation is standardised (section 3).

On a batch, an output unit's pre-activation ``t = w·x + b`` has mean ``μ`` and standard deviation ``σ``. Setting

    w <- w std/σ      b <- (b − μ) std/σ                                                             (eq. 6)

makes it ``std (t − μ)/σ`` (eq. 5). Layers are set in the order in which they run, each on what the corrected layers
before it put out. The length of ``v`` plays no part in it: that belongs to the optimizer's ``v_std``.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn

from weightnorm.data_dependent.arguments import Batch, call, check_batches, chosen_units, std_by_name
from weightnorm.data_dependent.checks import check_fresh, check_ranks_agree
from weightnorm.data_dependent.norms import NORMS, mark, watching
from weightnorm.data_dependent.passes import Passes
from weightnorm.data_dependent.report import DataInitReport, listed
from weightnorm.data_dependent.units import Settable, find_units
from weightnorm.layers.computed import writes_counted
from weightnorm.mean_only import MeanOnlyBatchNorm
from weightnorm.survey import Choice, name_of


def data_init(
    model: nn.Module,
    batch: Batch | list[Batch],
    *,
    std: float | Mapping[str, float] = 1.0,
    forward: Callable[[nn.Module, Any], object] | None = None,
    skip: Choice | Sequence[Choice] = (),
    train: bool = True,
    dry_run: bool = False,
    expect_fresh: bool = False,
    sync: bool = True,
    where: Literal["pre"] = "pre",
) -> DataInitReport:
    """Set weights and biases so that every pre-activation has mean 0 and standard deviation ``std`` on a batch.

    It changes the function that the model computes: call it on fresh weights, not after loading a checkpoint. Set are
    Linear, Bilinear, Conv1d-3d, ConvTranspose1d-3d, the projections of ``nn.MultiheadAttention``, and layers known by
    ``register_axis`` whose units lie on the last axis of their output; per output unit, over the batch and all
    positions. A layer without a bias is only scaled. Where a layer runs several times, its first call decides. Before
    ``MeanOnlyBatchNorm`` biases stay and its running mean is set; before batch normalization a layer stays as it is.

    In module form, ours and torch's, ``g`` is set and ``v`` stays. Besides weights, biases and those running means
    nothing changes: training flags, buffers and torch's random state are as before, so that the next pass draws the
    same noise. If it fails, nothing has changed. What is compiled runs uncompiled; DDP's module is set in place.

    Args:
        model: a feed-forward model, plain or in module form.
        batch: what the model is called with: a tensor, a tuple of positional arguments, a dict of keyword arguments; or
            a list of these, which count as one batch but take a pass over each of them for every layer. The
            statistics hold for this batch; the authors took 500 examples.
        std: the standard deviation wanted, 1 by default, the paper's; or one by pattern of layer names, the first that
            matches, and 1 for the rest: ``{"*.conv2": 0.1}`` lets residual branches start small.
        forward: runs the model, ``forward(model, batch)``, where calling it with the batch is not right. None: that.
        skip: layers that stay, by pattern of names or by type.
        train: run in training mode, dropout and noise active, as the authors did; False: in eval mode.
        dry_run: report what would be done, and change nothing.
        expect_fresh: refuse a model that shows signs of training: gradients, batches seen by a batch norm, or steps
            taken by an optimizer of this library, of which alone False warns.
        sync: where torch.distributed runs, take statistics over the batches of all ranks, of any sizes, and end with
            the same bits on each. All ranks must call it, and run the same layers.
        where: what is standardised: "pre", what goes into the nonlinearity, as in the paper; there is no other.

    Returns:
        What was done to each layer, in order of execution; print it for a table.

    Raises:
        TypeError: if ``batch`` is none of these.
        ValueError: if an option is out of its range or a pattern matches no layer; the model has lazy layers, or signs
            of training where none are expected; the batch is empty, a layer puts out NaN or infinity, ranks hold
            different weights, or no layer could be set.

    Warns:
        UserWarning: naming units left alone because they vary by no more than rounding (4 ulps), and layers that were
            not set without being meant: they never ran, are frozen, carry another parametrization, share a parameter.

    Source: Salimans & Kingma 2016, section 3; with mean-only batch normalization the authors' code.

    Example:
        >>> import weightnorm as wn
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(100, 4)
        >>> report = wn.data_init(model, x)
        >>> t = model(x)
        >>> bool(t.mean(0).abs().max() < 1e-4), bool((t.std(0, correction=0) - 1).abs().max() < 1e-3)
        (True, True)
    """
    if where != "pre":
        raise ValueError(f'where must be "pre", the pre-activation; got {where!r}')
    batches = batch if isinstance(batch, list) else [batch]
    check_batches(batches, forward)
    model = _unwrapped(model)
    found = find_units(model)
    std_of = std_by_name(std, found)
    for units in chosen_units(found, skip, "skip"):
        found.leave(units.name, "is skipped", surprising=False)
    check_fresh(model, expect_fresh)
    sync = sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    several = check_ranks_agree(found, len(batches) > 1) if sync else len(batches) > 1
    passes = Passes(model, found, forward or call, batches, std_of, train, sync)
    with _as_written(model, several):
        try:
            _look_for_norms(model, found, passes)
            passes.many() if several else passes.one()
            report = _report(found, passes)
            _warn(report, found)
        except BaseException:
            passes.undo()
            raise
        if dry_run:
            passes.undo()
        else:
            passes.keep_means()
    return report


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself: hooks on it never fire in what is compiled, and DDP would exchange buffers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def _as_written(model: nn.Module, several: bool) -> Iterator[None]:
    """Run what is compiled uncompiled, attention by its own forward, and writes counted, so that all can be followed.

    Where ranks may have different numbers of batches, mean-only batch norms do not wait for each other either.
    """
    norms = [part for part in model.modules() if several and isinstance(part, MeanOnlyBatchNorm) and part.sync]
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # nothing is compiled otherwise
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not any(parameter.is_inference() for parameter in model.parameters()):
            stack.enter_context(writes_counted())
        torch.backends.mha.set_fastpath_enabled(False)
        for norm in norms:
            norm.sync = False
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for norm in norms:
                norm.sync = True


def _look_for_norms(model: nn.Module, found: Settable, passes: Passes) -> None:
    """Find out in a pass of its own which layers feed a normalization that does part of the work."""
    names = {module: name_of(path) for path, module in model.named_modules()}
    if not any(isinstance(module, NORMS) for module in names):
        return
    with watching(model) as feeds:
        passes.look(mark)
    for units, norm in feeds.items():
        if isinstance(norm, MeanOnlyBatchNorm):
            passes.centred[units] = norm
        else:
            found.leave(units.name, f"feeds batch normalization, {names[norm]}", surprising=False)


def _report(found: Settable, passes: Passes) -> DataInitReport:
    """Return what was done; an error if that is nothing, and was not meant to be."""
    layers = passes.reports()
    done = {layer.name for layer in layers} | found.left_out.keys()
    for units in found.units():
        if units.name not in done:
            found.leave(units.name, "never ran")
    if not layers and not any(why.startswith(("feeds", "is skipped")) for why in found.left_out.values()):
        why = ", ".join(f"{name} {reason}" for name, reason in found.left_out.items()) or "the model has none"
        raise ValueError(f"no layer could be set: {why}. Pass a model with Linear, Bilinear, convolutions or attention")
    return DataInitReport(layers, found.left_out)


def _warn(report: DataInitReport, found: Settable) -> None:
    for layer in report.layers:
        if layer.left_alone:
            which = f"{listed(layer.left_alone)} of {layer.units} in layer {layer.name}"
            warnings.warn(f"data_init left units {which} alone: they do not vary on this batch", stacklevel=3)
    which = ", ".join(f"{name} {why}" for name, why in report.left_out.items() if name in found.surprising)
    if which:
        warnings.warn(f"data_init did not set every layer: {which}", stacklevel=3)
