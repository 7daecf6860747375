"""Kernels are tried before they are trusted: once a process and device, on something small, against plain torch."""

import warnings
from collections.abc import Callable

import torch

from weightnorm.kernels.tables import is_recording

_found: dict[tuple[str, torch.device], bool] = {}


def works(what: str, device: torch.device, trial: Callable[[torch.device], bool]) -> bool:
    """Say whether kernels do on a device what plain torch does; warn once where they do not.

    Args:
        what: the kernels, for the warning.
        device: the device.
        trial: runs them on it and says whether the result is right.

    Returns:
        What the trial found; False while a CUDA graph is being recorded and nothing has been tried yet.
    """
    key = what, device
    if key not in _found:
        if is_recording(device):
            return False
        try:
            _found[key], reason = trial(device), "their results are wrong"
        except Exception as error:  # a compiler, a driver: whatever it is, plain torch does it too
            _found[key], reason = False, f"{type(error).__name__}: {error}".partition("\n")[0]
        if not _found[key]:
            warnings.warn(
                f"weightnorm: the Triton kernels for {what} fail on {device} ({reason}); plain torch does the work, "
                "more slowly. Please report it",
                stacklevel=2,
            )
    return _found[key]
