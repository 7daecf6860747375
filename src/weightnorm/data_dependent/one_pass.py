"""Data-dependent initialisation: one forward pass after which every unit's pre-activation is standardised (section 3).

On a batch, an output unit's pre-activation ``t = w·x + b`` has mean ``μ`` and standard deviation ``σ``. Setting

    w <- w std/σ      b <- (b − μ) std/σ                                                             (eq. 6)

makes it ``std (t − μ)/σ`` (eq. 5). Layers are set in the order in which they run, each on what the corrected layers
before it put out. The length of ``v`` plays no part in it: that belongs to the optimizer's ``v_std``.
"""

import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from weightnorm.data_dependent.report import DataInitReport, LayerReport, listed
from weightnorm.data_dependent.units import Layer, find_layers, is_constant, moments, rescale, spread
from weightnorm.preserve import as_found

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


def data_init(model: nn.Module, batch: Batch, *, std: float = 1.0, train: bool = True) -> DataInitReport:
    """Set weights and biases so that every pre-activation has mean 0 and standard deviation ``std`` on a batch.

    It changes the function that the model computes: call it on fresh weights, not after loading a checkpoint. Set are
    Linear, Bilinear, Conv1d-3d and ConvTranspose1d-3d, per output unit over the batch and all positions. A layer
    without a bias is only scaled. Where a layer runs several times, its first call decides.

    Only weights and biases change. Training flags, buffers (running statistics) and torch's random state are as
    before afterwards, so the next pass draws the same noise. If it fails, nothing has changed.

    Args:
        model: a plain feed-forward model.
        batch: what the model is called with: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments. The statistics hold for this batch; the authors took 500 examples.
        std: the standard deviation wanted. Default 1, the paper's.
        train: run in training mode, dropout and noise active, as the authors did; False: in eval mode.

    Returns:
        What was done to each layer, in order of execution; print it for a table.

    Raises:
        TypeError: if ``batch`` is none of these, or a layer puts out something else than a tensor.
        ValueError: if ``std`` is not positive, the model has lazy layers, the batch is empty, a layer puts out NaN or
            infinity, or no layer could be set.

    Warns:
        UserWarning: naming units left alone because they vary by no more than rounding (4 ulps), and layers that were
            not set: they never ran, are frozen, carry a parametrization or share a parameter.

    Source: Salimans & Kingma 2016, section 3.

    Example:
        >>> import weightnorm as wn
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(100, 4)
        >>> report = wn.data_init(model, x)
        >>> t = model(x)
        >>> bool(t.mean(0).abs().max() < 1e-4), bool((t.std(0, correction=0) - 1).abs().max() < 1e-3)
        (True, True)
    """
    if not 0 < std < math.inf:
        raise ValueError(f"std must be a positive number; got {std!r}")
    args, kwargs = _arguments(batch)
    one_pass = _Pass(model, std)
    with torch.no_grad(), as_found(model):
        model.train(train)
        one_pass.run(args, kwargs)
    report = one_pass.report()
    _warn(report)
    return report


class _Pass:
    """The one forward pass: each layer is set when it first runs, and hands on what it then puts out."""

    def __init__(self, model: nn.Module, std: float):
        self._model = model
        self._std = std
        self._layers, self._left_out = find_layers(model)
        self._reports: dict[nn.Module, LayerReport] = {}
        self._found: dict[Tensor, Tensor] = {}  # the parameters changed so far, and what they were

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model once. All or nothing: an exception puts every parameter back."""
        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.enter_context(layer.register_forward_hook(self._set, prepend=True, with_kwargs=True))
            try:
                self._model(*args, **kwargs)
            except BaseException:
                for parameter, before in self._found.items():
                    parameter.copy_(before)
                torch.clear_autocast_cache()
                raise

    def report(self) -> DataInitReport:
        """Return what was done; an error if that is nothing."""
        idle = {name: "never ran" for layer, name in self._layers.items() if layer not in self._reports}
        left_out = idle | self._left_out
        if not self._reports:
            why = ", ".join(f"{name} {reason}" for name, reason in left_out.items()) or "the model has none"
            raise ValueError(
                f"no Linear, Bilinear or convolution could be set: {why}. Pass a plain model, not compiled"
            )
        return DataInitReport(tuple(self._reports.values()), left_out)

    def _set(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: standardise the layer's units (eq. 6) and return what it now puts out (eq. 5)."""
        name = self._layers[layer]
        if layer in self._reports:
            return output
        own = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
        if any(parameter in self._found for parameter in own):
            self._left_out[name] = "shares a parameter with a layer that ran before"
            return output
        mean, std = moments(layer, name, output)
        constant = is_constant(mean, std, output.dtype)
        self._found |= {parameter: parameter.clone() for parameter in own}
        rescale(layer, torch.where(constant, 0, mean), torch.where(constant, 1, self._std / std))
        # Computed again rather than corrected: the bits that later passes will see, the weights' rounding included.
        output = layer.forward(*args, **kwargs)
        mean_after, std_after = moments(layer, name, output)
        self._reports[layer] = LayerReport(
            name=name,
            units=len(mean),
            mean_before=spread(mean),
            std_before=spread(std),
            mean_after=spread(mean_after),
            std_after=spread(std_after),
            left_alone=tuple(constant.nonzero().flatten().tolist()),
        )
        return output


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the batch as positional and keyword arguments."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple):
        return batch, {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise TypeError(
        "batch must be a tensor, a tuple of positional arguments or a dict of keyword arguments; got "
        f"{type(batch).__name__}. Of a loader's [inputs, labels] pass the inputs"
    )


def _warn(report: DataInitReport) -> None:
    for layer in report.layers:
        if layer.left_alone:
            which = f"{listed(layer.left_alone)} of {layer.units} in layer {layer.name}"
            warnings.warn(f"data_init left units {which} alone: they do not vary on this batch", stacklevel=3)
    if report.left_out:
        which = ", ".join(f"{name} {reason}" for name, reason in report.left_out.items())
        warnings.warn(f"data_init did not set every layer: {which}", stacklevel=3)
