"""One file of weights: read without running anything that is in it, written whole or not at all."""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from weightnorm.errors import UserError
from weightnorm.extras import require

SAFETENSORS = ".safetensors"
TORCH_SUFFIXES = ("", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".th")  # written; read is whatever torch can read


@dataclass(frozen=True)
class File:
    """What is in a file.

    Attributes:
        content: a state dict, or whatever lies around one or several in a torch file.
        metadata: the strings in the header of a safetensors file.
    """

    content: Any
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> File:
    """Read a safetensors or torch file onto the CPU.

    Args:
        path: the file; by its suffix a safetensors file, or else one of torch's.

    Raises:
        UserError: if it cannot be read, is damaged, or holds more than data.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {path} ({_reason(error)})") from error
    kind, reader = ("safetensors", _read_safetensors) if path.suffix == SAFETENSORS else ("torch", _read_torch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's age and format
            return reader(path)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file may lead its reader anywhere
        raise UserError(f"{path} is no {kind} file, or a damaged one ({_reason(error)})") from error


def write(path: Path, file: File) -> None:
    """Write a file in the format of its suffix, so that at any moment the path holds the old file or the new one.

    Args:
        path: where to.
        file: what.

    Raises:
        UserError: if it cannot be written, or the format cannot hold it; then nothing has changed.
    """
    tensors = _flat(file.content, path) if path.suffix == SAFETENSORS else None
    library = _safetensors() if tensors is not None else None
    try:
        with replacing(path) as temporary:
            if library:
                library.save_file(tensors, temporary, metadata=file.metadata or {"format": "pt"})
            else:
                with temporary.open("wb") as stream:  # to a path it would write the path's name into the file
                    torch.save(file.content, stream)
    except Exception as error:  # OSError, or the libraries' own for a full disk
        raise UserError(f"cannot write {path} ({_reason(error)})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; what was written takes its place at the end, at once and for good.

    If the writing fails nothing is left behind; if the process is killed, the file as it was and perhaps a hidden one
    ending in ``.tmp``.

    Args:
        path: the file to be written or replaced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.open("wb").close()  # says at once what is wrong with the folder
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that are their owner's alone
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
    return text or type(error).__name__


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_torch(path: Path) -> File:
    try:
        return File(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds {refused[1]}, which is code and is not run; if you trust the file, load it with "
                "torch.load(..., weights_only=False) and save its state dict"
            ) from error
        if inner := re.search(r"WeightsUnpickler error: (.*)", str(error)):
            raise ValueError(inner[1]) from error
        raise


def _read_safetensors(path: Path) -> File:
    _safetensors()
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return File({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _safetensors() -> ModuleType:
    require("checkpoints", "safetensors")
    import safetensors.torch

    return safetensors.torch


def _flat(content: Any, path: Path) -> dict[str, Tensor]:
    """Return content as safetensors can hold it: tensors by name, each with memory of its own."""
    rule = f"{path}: a safetensors file holds tensors by name and nothing else"
    if not isinstance(content, Mapping):
        raise UserError(f"{rule}; this is a {type(content).__name__}. Write a .pt file")
    tensors: dict[str, Tensor] = {}
    taken = set()
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise UserError(f"{rule}; {key!r} is a {type(value).__name__}. Write a .pt file")
        memory = value.untyped_storage().data_ptr()
        tensors[key] = value.clone(memory_format=torch.contiguous_format) if memory in taken else value.contiguous()
        taken.add(memory)
    return tensors
