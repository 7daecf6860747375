"""Image data sets in the Hub's layout: parquet files with an image and a label in each row; decoded once, then cached.

A folder that holds ``train-*.parquet`` and ``test-*.parquet`` at any depth will do: what ``huggingface_hub`` downloads,
or ``datasets`` writes. Where none is named, the data set is downloaded.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weightnorm.checkpoints.files import replacing
from weightnorm.errors import UserError
from weightnorm.extras import require

SPLITS = ("train", "test")


@dataclass(frozen=True)
class HubData:
    """A data set of images.

    Attributes:
        name: what it is called, and its folder in ``$WEIGHTNORM_DATA``.
        repository: where it is on the Hub.
        image: the name of the images' column.
        label: the name of the labels'.
        shape: of an image: height, width, and channels unless there is one.
        sizes: how many images there are, by split.
        classes: how many classes, all equally large in each split; None: not equally.
    """

    name: str
    repository: str
    image: str
    label: str
    shape: tuple[int, ...]
    sizes: dict[str, int]
    classes: int | None

    def load(self, folder: Path | None = None) -> dict[str, Tensor]:
        """Read the images and labels.

        Args:
            folder: where the data set lies. None: ``$WEIGHTNORM_DATA/<name>`` if that is set; else it is downloaded.

        Returns:
            ``train_images`` and ``test_images``, uint8 (N, C, H, W); ``train_labels`` and ``test_labels``, int64 (N,).

        Raises:
            UserError: if it is missing, cannot be downloaded, or is not what it should be.
        """
        require("data", "pyarrow", "PIL")
        files = {split: self._files(split, folder) for split in SPLITS}
        key = _hash([path for split in SPLITS for path in files[split]])
        arrays = cached(f"{self.name}-{key}", lambda: self._decoded(files))
        self._check(arrays)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _files(self, split: str, folder: Path | None) -> list[Path]:
        root = folder or self._from_environment() or self._downloaded()
        files = sorted(root.rglob(f"{split}-*.parquet"))
        if not files:
            raise UserError(
                f"{self.name}: no {split}-*.parquet under {root}; name the folder that has {self.repository} in the "
                "Hub's layout with --data, or set WEIGHTNORM_DATA to the folder above it"
            )
        return files

    def _from_environment(self) -> Path | None:
        above = os.environ.get("WEIGHTNORM_DATA")
        return Path(above) / self.name if above else None

    def _downloaded(self) -> Path:
        require("data", "huggingface_hub")
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.repository, repo_type="dataset", allow_patterns="*.parquet"))
        except Exception as error:  # of the network, the Hub, the disk: all are the user's to see in a line
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(
                f"{self.repository} cannot be downloaded ({type(error).__name__}: {reason}); name a folder that has it "
                "with --data"
            ) from error

    def _decoded(self, files: dict[str, list[Path]]) -> dict[str, np.ndarray]:
        arrays = {}
        for split, paths in files.items():
            images, labels = zip(*(row for path in paths for row in self._rows(path)), strict=True)
            arrays[f"{split}_images"] = np.ascontiguousarray(np.stack(images))
            arrays[f"{split}_labels"] = np.array(labels, dtype=np.int64)
        return arrays

    def _rows(self, path: Path) -> Iterator[tuple[np.ndarray, int]]:
        """Yield each row's image, channels first, and its label."""
        import PIL.Image
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path, columns=[self.image, self.label])
            for image, label in zip(table[self.image].to_pylist(), table[self.label].to_pylist(), strict=True):
                pixels = np.asarray(PIL.Image.open(io.BytesIO(image["bytes"])))
                if pixels.shape != self.shape:
                    raise UserError(f"{path} is damaged: an image of shape {pixels.shape} in place of {self.shape}")
                yield pixels.reshape(*self.shape[:2], -1).transpose(2, 0, 1), label
        except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:  # what the two libraries raise
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(f"{path} is damaged or not a parquet file of {self.repository} ({reason})") from error

    def _check(self, arrays: dict[str, np.ndarray]) -> None:
        for split, size in self.sizes.items():
            labels = arrays[f"{split}_labels"]
            counts = np.bincount(labels, minlength=self.classes or 0).tolist() if (labels >= 0).all() else []
            if len(labels) != size or (self.classes and counts != [size // self.classes] * self.classes):
                raise UserError(
                    f"{self.name}: the {split} split should have {size:,} images"
                    + (f", {size // self.classes:,} of each of {self.classes} classes" if self.classes else "")
                    + f"; got {len(labels):,}, by class {counts}. Download it again"
                )


def cached(name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return named arrays from the cache, or make them and leave them there; a cache that cannot be used is left out.

    Args:
        name: that of the file, with what the arrays depend on in it.
        make: makes them.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weightnorm" / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError):  # there is none, or it was cut short
        arrays = dict(make())
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    return arrays


def _hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
