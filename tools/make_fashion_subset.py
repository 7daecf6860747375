"""Make the Fashion-MNIST subset that `weightnorm.tasks.fashion` carries, from Debian's package of the whole set.

    apt-get install dataset-fashion-mnist
    python tools/make_fashion_subset.py

It keeps the first 800 images of each class of the training set and the first 200 of each class of the test set, in
their original order, as unsigned bytes. Nothing is drawn at random, so the arrays come out the same everywhere; their
hash is in `fashion.py`.
"""

import gzip
from pathlib import Path

import numpy as np

SOURCE = Path("/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).parents[1] / "src/weightnorm/tasks/data/fashion.npz"
CLASSES = 10
PER_CLASS = {"train": 800, "t10k": 200}


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes: two zeros, a type, the number of axes, their sizes (big-endian), the data."""
    data = gzip.decompress(path.read_bytes())
    magic, axes = data[:3], data[3]
    assert magic == b"\0\0\x08", f"{path} is no IDX file of unsigned bytes"
    shape = np.frombuffer(data, ">i4", count=axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def subset(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels kept of a split."""
    images = read_idx(SOURCE / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(SOURCE / f"{split}-labels-idx1-ubyte.gz")
    firsts = [np.flatnonzero(labels == label)[: PER_CLASS[split]] for label in range(CLASSES)]
    kept = np.sort(np.concatenate(firsts))
    return images[kept], labels[kept]


if __name__ == "__main__":
    train_images, train_labels = subset("train")
    test_images, test_labels = subset("t10k")
    np.savez_compressed(
        TARGET,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
