"""Where the rows of a weight lie in memory: what lets a kernel walk any dense layout without a copy."""

from dataclasses import dataclass

from torch import Tensor

from weightnorm.axes import Axis

Level = tuple[int, int, int]  # size, stride in the weight, stride in the gradient
Strides = tuple[int, int]  # of the outer and of the inner level

PLAIN_ROW = 1024  # elements of a plain parameter that are handled like one row


@dataclass(frozen=True)
class Layout:
    """Element ``j`` of row ``r`` lies at ``(r // row_split, r % row_split)·row + (j // split, j % split)·column``.

    Attributes:
        rows: number of rows.
        length: elements of a row; of a plain parameter the last row may have fewer.
        row_split: size of the inner level of rows.
        split: size of the inner level of a row's elements.
        row: the two levels' strides from row to row, in the weight and its state.
        column: the same from element to element.
        grad_row: from row to row in the gradient.
        grad_column: from element to element in the gradient.
    """

    rows: int
    length: int
    row_split: int
    split: int
    row: Strides
    column: Strides
    grad_row: Strides
    grad_column: Strides

    @property
    def contiguous(self) -> bool:
        """Say whether rows follow each other without gaps, element by element, in weight and gradient alike."""
        one_level = self.row_split == self.rows and self.split == self.length
        by_row = self.rows == 1 or (self.row[1], self.grad_row[1]) == (self.length, self.length)
        by_column = self.length == 1 or (self.column[1], self.grad_column[1]) == (1, 1)
        return one_level and by_row and by_column

    @property
    def across(self) -> bool:
        """Say whether neighbours in memory belong to different rows."""
        return self.rows > 1 and self.length > 1 and self.column[1] > self.row[1]


def is_dense(x: Tensor) -> bool:
    """Say whether a tensor's elements fill a block of memory, in any order, each once."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda axis: axis[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def rows_of(weight: Tensor, gradient: Tensor, axis: Axis | None) -> Layout | None:
    """Return where the rows of a dense weight lie, or None where two levels of strides cannot say.

    Args:
        weight: the weight, dense.
        gradient: its gradient, any strides.
        axis: where its vectors lie; None for a plain parameter, cut into rows of ``PLAIN_ROW`` elements.

    Returns:
        The layout, or None.

    Example:
        >>> import torch
        >>> x = torch.zeros(4, 6, 3)  # a transposed convolution's weight
        >>> layout = rows_of(x, x, Axis(1))
        >>> layout.rows, layout.length, layout.row, layout.column
        (6, 12, (0, 3), (18, 1))
    """
    if axis is None:
        if weight.stride() != gradient.stride():
            return None
        rows = -(-weight.numel() // PLAIN_ROW)
        return Layout(rows, PLAIN_ROW, rows, PLAIN_ROW, (0, PLAIN_ROW), (0, 1), (0, PLAIN_ROW), (0, 1))
    split, split_gradient, kept = axis.split(weight), axis.split(gradient), axis.kept(weight)
    levels = list(zip(split.shape, split.stride(), split_gradient.stride(), strict=True))
    # The order of rows is that of the lengths' elements; that of a row's elements is free, so memory's own.
    by_row = _merged([levels[i] for i in kept])
    by_column = _merged(sorted((levels[i] for i in range(len(levels)) if i not in kept), key=lambda level: -level[1]))
    if len(by_row) > 2 or len(by_column) > 2:
        return None
    (r0, r1), (c0, c1) = _padded(by_row), _padded(by_column)
    lengths = (r0[0] * r1[0], c0[0] * c1[0], r1[0], c1[0])
    return Layout(*lengths, (r0[1], r1[1]), (c0[1], c1[1]), (r0[2], r1[2]), (c0[2], c1[2]))


def _merged(levels: list[Level]) -> list[Level]:
    """Return the levels, outermost first, with neighbours made one where both strides allow it."""
    merged: list[Level] = []
    for size, *strides in levels:
        if size == 1:
            continue
        if merged and list(merged[-1][1:]) == [size * stride for stride in strides]:
            size *= merged.pop()[0]
        merged.append((size, strides[0], strides[1]))
    return merged


def _padded(levels: list[Level]) -> list[Level]:
    """Return exactly two levels."""
    return [(1, 0, 0)] * (2 - len(levels)) + levels
