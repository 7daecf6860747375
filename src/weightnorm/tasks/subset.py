"""Which part of a data set is trained on, and which one is scored."""

from collections.abc import Mapping
from typing import NamedTuple

from weightnorm.errors import UserError


class Subset(NamedTuple):
    """A choice of examples.

    Attributes:
        train: of the training split, those to train on.
        scored: the split that is scored.
        where: which of its examples.
        held_out: how many training examples are scored in place of the test set.
    """

    train: slice
    scored: str
    where: slice
    held_out: int


def subset(sizes: Mapping[str, int], limit: int | None, holdout: bool, batch_size: int) -> Subset:
    """Choose the first training examples, and a fifth as many to score on.

    Args:
        sizes: of the splits "train" and "test".
        limit: how many training examples; None: all.
        holdout: score on the last fifth of these, and train on the others; else on test examples.
        batch_size: both parts must be whole batches.

    Raises:
        UserError: if they are not.

    Example:
        >>> subset({"train": 60_000, "test": 10_000}, 1_000, False, 100)
        Subset(train=slice(None, 1000, None), scored='test', where=slice(None, 200, None), held_out=0)
    """
    every, step = sizes["train"], 5 * batch_size
    size = every if limit is None else limit
    if not (step <= size <= every and size % step == 0) and limit is not None:
        raise UserError(f"the limit must be a multiple of {step} up to {every:,}; got {limit:,}")
    fifth = size // 5
    if holdout:
        return Subset(slice(size - fifth), "train", slice(size - fifth, size), fifth)
    return Subset(slice(size), "test", slice(fifth), 0)
