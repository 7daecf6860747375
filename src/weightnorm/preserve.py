"""Run a model without a trace: whatever a forward pass changes besides its output is put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Leave a model's training flags and buffers, and torch's random state, as they are now, whatever happens inside.

    Random state is that of the CPU and of the CUDA devices the model lies on, so what is drawn next is what would have
    been drawn without the pass.

    Args:
        model: the model that is going to be run.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with as_found(norm):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    flags = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        with torch.random.fork_rng(cuda_devices(model)):
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer  # a forward may have put another tensor in its place
            if buffer is None or before is None:
                continue
            with torch.no_grad():
                if buffer.shape != before.shape:
                    buffer.resize_(before.shape)
                # Expanded buffers cannot be written to, and need not be; sparse ones cannot be compared.
                if buffer.layout != torch.strided or not torch.equal(buffer, before):
                    buffer.copy_(before)


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """Return the CUDA devices that a model lies on."""
    devices = dict.fromkeys(tensor.device for tensor in chain(model.parameters(), model.buffers()))
    return [device for device in devices if device.type == "cuda"]
