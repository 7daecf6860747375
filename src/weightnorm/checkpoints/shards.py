"""Weights in several files under one index, as the Hugging Face hub keeps large models."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weightnorm.checkpoints.files import File, read, replacing, write
from weightnorm.checkpoints.spelling import Spelling, Stored, keys_of
from weightnorm.errors import UserError

INDEX = ".index.json"  # model.safetensors.index.json, pytorch_model.bin.index.json


@dataclass(frozen=True)
class Shards:
    """A state dict and the files that it is spread over.

    Attributes:
        content: the whole state dict.
        homes: in which file each tensor is.
        headers: the strings in the header of each file.
        index: the index file.
        rest: what the index holds beside the names.
    """

    content: dict[str, Tensor]
    homes: dict[str, str]
    headers: dict[str, dict[str, str]]
    index: Path
    rest: dict[str, Any]

    @property
    def metadata(self) -> dict[str, str]:
        """The headers of all files as one."""
        return {key: text for header in self.headers.values() for key, text in header.items()}

    def changed(self, content: dict[str, Tensor], weights: Sequence[Stored], to: Spelling) -> "Shards":
        """Return the same with weights respelled: each is where its direction was, or the weight itself."""
        homes = self.homes | {key: self.homes[w.keys[0]] for w in weights for key in keys_of(w.name, to)}
        return replace(self, content=content, homes={key: homes[key] for key in content})


def find_index(path: Path) -> Path | None:
    """Return the index that a path means: itself, or the one in a folder; None for any other file.

    Raises:
        UserError: if it is a folder with no index or several.
    """
    if path.name.endswith(INDEX):
        return path
    if not path.is_dir():
        return None
    indexes = sorted(path.glob(f"*{INDEX}"))
    if len(indexes) != 1:
        found = f"has {', '.join(index.name for index in indexes)}" if indexes else f"has no *{INDEX}"
        raise UserError(f"{path} is a folder and {found}; name the file to read")
    return indexes[0]


def read_shards(index: Path) -> Shards:
    """Read all files of an index.

    Args:
        index: the index file.

    Raises:
        UserError: if it or one of its files cannot be read, or they do not hold what it says.
    """
    content = _read_index(index)
    weight_map = content["weight_map"]
    tensors: dict[str, Tensor] = {}
    homes: dict[str, str] = {}
    headers = {}
    for name in sorted(set(weight_map.values())):
        file = read(index.parent / name)
        if not isinstance(file.content, Mapping) or not all(isinstance(x, Tensor) for x in file.content.values()):
            raise UserError(f"{index.parent / name} holds something else than tensors by name")
        if twice := homes.keys() & file.content.keys():
            raise UserError(f"{min(twice)} is in {name} and in {homes[min(twice)]}; one of them is not of {index}")
        tensors |= file.content
        homes |= dict.fromkeys(file.content, name)
        headers[name] = file.metadata
    if wrong := [key for key, name in weight_map.items() if homes.get(key) != name]:
        raise UserError(f"{index} says that {wrong[0]} is in {weight_map[wrong[0]]}, and it is not")
    return Shards(tensors, homes, headers, index, content)


def write_shards(index: Path, shards: Shards) -> None:
    """Write all files under names that are free, then the index, and then remove the files of an index it replaced.

    So whatever happens on the way the index that is there, the old one or the new one, names files that are whole.

    Args:
        index: where the new index goes; its folder is made if it is not there.
        shards: what to write; ``rest`` is brought up to date.

    Raises:
        UserError: if something cannot be written; then nothing has changed.
    """
    old = _named_by(index)
    used = sorted(set(shards.homes.values()))
    names = dict(zip(used, _free_names(index, used), strict=True))
    homes = {key: names[home] for key, home in shards.homes.items()}
    size = sum(tensor.nbytes for tensor in shards.content.values())
    details = {**shards.rest.get("metadata", {}), "total_size": size}
    with _all_or_nothing(index) as written:
        for home, name in names.items():
            tensors = {key: tensor for key, tensor in shards.content.items() if homes[key] == name}
            written.append(index.parent / name)
            write(written[-1], File(tensors, shards.headers[home]))
        with replacing(index) as temporary:
            temporary.write_text(json.dumps({**shards.rest, "metadata": details, "weight_map": homes}, indent=2))
    for name in old:
        with suppress(OSError):
            (index.parent / name).unlink()


@contextmanager
def _all_or_nothing(index: Path) -> Iterator[list[Path]]:
    """Give a list of files to be written; if something fails, remove those that the index does not name."""
    new = not index.parent.exists()
    written: list[Path] = []
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        yield written
    except BaseException as error:
        for path in written:
            if path.name not in _named_by(index):
                path.unlink(missing_ok=True)
        if new:
            with suppress(OSError):
                index.parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write to the folder {index.parent} ({error.strerror})") from error
        raise


def _named_by(index: Path) -> set[str]:
    """Return the names of an index's files; none if it is not there."""
    return set(_read_index(index)["weight_map"].values()) if index.exists() else set()


def _free_names(index: Path, used: list[str]) -> list[str]:
    """Return names for as many files, in the hub's way, that nothing in the index's folder has."""
    stem = index.name.removesuffix(INDEX).partition(".")[0]
    attempt = 0
    while True:
        base = f"{stem}-{attempt}" if attempt else stem
        names = [f"{base}-{i:05d}-of-{len(used):05d}{Path(name).suffix}" for i, name in enumerate(used, 1)]
        if not any((index.parent / name).exists() for name in names):
            return names
        attempt += 1


def _read_index(path: Path) -> dict[str, Any]:
    """Return the content of an index whose files are beside it."""
    try:
        content = json.loads(path.read_text())
        names = list(content["weight_map"].values())
        if not isinstance(content.get("metadata", {}), dict) or not all(Path(name).name == name for name in names):
            raise ValueError
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no index: it must map each tensor to the name of a file beside it") from error
    assert isinstance(content, dict)
    return content
