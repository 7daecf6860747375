"""A comparison on disk, between epochs: everything that it takes to go on as if it had never stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightnorm.checkpoints.files import File, read, write
from weightnorm.compare.asked import Asked, request_of
from weightnorm.compare.loop import Turns
from weightnorm.errors import UserError

NAME = "checkpoint.pt"
_FORMAT = 4


def save(folder: Path, request: Asked, comparison: Turns[Any]) -> None:
    """Leave a comparison in a folder; whoever kills the process meanwhile leaves the one before.

    Raises:
        UserError: if it cannot be written.
    """
    # Plain lists and numbers, which torch reads without running anything.
    asked = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(request).items()}
    content = {
        "weightnorm_comparison": _FORMAT,
        "kind": request.kind,
        "request": asked,
        "device": comparison.device.type,
        "runs": [run.saved() for run in comparison.runs],
    }
    write(folder / NAME, File(content))


def load(folder: Path, device: str) -> tuple[Asked, list[Mapping[str, Any]]]:
    """Read what ``save`` has left: what was asked for, and the runs as they were.

    Args:
        folder: where.
        device: on which it goes on.

    Raises:
        UserError: if there is nothing, or something else, or what ran on another kind of device.
    """
    content = read(folder / NAME).content
    if not isinstance(content, Mapping) or content.get("weightnorm_comparison") != _FORMAT:
        raise UserError(f"{folder / NAME} is no checkpoint of a comparison, or one of another version")
    if (kind := device.partition(":")[0]) != content["device"]:
        raise UserError(f"the comparison ran on {content['device']} and cannot go on on {kind}: name it with --device")
    return request_of(content["kind"], content["request"]), content["runs"]


def restore(comparison: Turns[Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """Bring a comparison that has not begun to where another was."""
    comparison.prepare()
    for run, saved in zip(comparison.runs, runs, strict=True):
        run.restore(saved)
