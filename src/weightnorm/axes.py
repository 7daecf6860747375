"""Which axis of a layer's weight holds its outputs, so that there is one length per output unit.

The paper normalises one vector per neuron. For most layers that is axis 0 of the weight; transposed convolutions keep
their outputs on axis 1 and, with ``groups > 1``, partly on axis 0 as well; recurrent weights hold one row per gate
unit. ``register_axis`` teaches the library a further layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import Tensor, nn

from weightnorm.formula import Dim, kept_axes


@dataclass(frozen=True)
class Axis:
    """Where a weight's vectors lie: along ``dim``, in each of ``groups`` equal blocks of axis 0.

    Attributes:
        dim: the axis kept, non-negative or counted from the end, or a tuple of axes (0 and 1 of stacked matrices);
            None: the whole tensor is one vector.
        groups: 1, but for a grouped transposed convolution, whose weight ``(in, out/groups, ...)`` holds group ``i``'s
            input channels in block ``i`` of axis 0, so that an output channel is a block *and* an index along axis 1.

    Example:
        >>> import torch
        >>> Axis(1, groups=2).split(torch.zeros(6, 4, 3)).shape
        torch.Size([2, 3, 4, 3])
    """

    dim: Dim
    groups: int = 1

    def split(self, weight: Tensor) -> Tensor:
        """View ``weight`` so that ``kept(weight)`` are whole axes: blocks of axis 0 become an axis of their own."""
        return weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))

    def kept(self, weight: Tensor) -> tuple[int, ...]:
        """Return the axes of ``split(weight)`` that are kept; the ``dim`` that the formula takes."""
        axes = kept_axes(weight.ndim, self.dim)
        return axes if self.groups == 1 else (0, *(axis + 1 for axis in axes))

    def row_length(self, weight: Tensor) -> int:
        """Return the number of elements of a vector."""
        split, kept = self.split(weight), self.kept(weight)
        return prod(size for axis, size in enumerate(split.shape) if axis not in kept)

    def rows(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as a matrix, a vector a row; a view where its layout allows one."""
        split = self.split(weight)
        kept = self.kept(weight)
        return split.movedim(kept, tuple(range(len(kept)))).reshape(-1, self.row_length(weight))

    def from_rows(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Undo ``rows``: return the matrix as a tensor of the shape of ``weight``."""
        split, kept = self.split(weight), self.kept(weight)
        front = tuple(range(len(kept)))
        moved = split.movedim(kept, front).shape
        return rows.reshape(moved).movedim(front, kept).reshape(weight.shape)


def axes_of_lengths(v_shape: Sequence[int], g_shape: Sequence[int]) -> list[Axis]:
    """Return where the vectors of ``v`` can lie, given the shapes of ``v`` and of its lengths ``g`` alone.

    Args:
        v_shape: the direction's shape.
        g_shape: 0-D or all ones: one length for the whole tensor; as many axes as ``v``, reduced ones of size 1:
            torch's way; one more, ``(groups, 1, out/groups, 1, ...)``: a grouped transposed convolution; 1-D: Paddle's.

    Returns:
        The axes that fit: one, unless ``g`` is 1-D and several axes of ``v`` have its size; none, if it fits nowhere.

    Example:
        >>> axes_of_lengths((6, 4, 3), (1, 4, 1)), axes_of_lengths((4, 4), (4,))
        ([Axis(dim=1, groups=1)], [Axis(dim=0, groups=1), Axis(dim=1, groups=1)])
    """
    count = prod(g_shape)
    if len(g_shape) == len(v_shape):
        pairs = list(zip(g_shape, v_shape, strict=True))
        kept = tuple(axis for axis, (size, _) in enumerate(pairs) if size != 1)
        if any(size not in (1, of_v) for size, of_v in pairs):
            return []
        return [Axis(kept[0] if len(kept) == 1 else kept or _one_vector(v_shape))]
    if len(g_shape) == len(v_shape) + 1:
        groups = g_shape[0]
        split = (groups, 1, *v_shape[1:2], *[1] * (len(v_shape) - 2))
        return [Axis(1, groups)] if tuple(g_shape) == split and v_shape[0] % groups == 0 else []
    if count == 1:
        return [Axis(_one_vector(v_shape))]
    return [Axis(axis) for axis, size in enumerate(v_shape) if len(g_shape) == 1 and size == count]


def _one_vector(shape: Sequence[int]) -> Dim:
    """Return the axis that has the only vector: 0 where it has size 1, as for a layer with one output; else all."""
    return 0 if shape and shape[0] == 1 else None


Rule = Dim | Callable[[nn.Module], "Axis | Dim"]

_rules: dict[type | str, dict[str, Rule]] = {}  # layer type or dotted name -> parameter name pattern -> its axis


def register_axis(layer: type[nn.Module] | str, name: str = "weight", dim: Rule = 0) -> None:
    """Tell the library which axis of a layer's weight holds its outputs; subclasses inherit it.

    Args:
        layer: the layer's type, or its dotted name, so that a package need not be imported to name its layer.
        name: the parameter's name, or a pattern of names such as ``"weight_ih_l*"``.
        dim: the output axis, None for the whole tensor, or a function from the layer to either (or to an ``Axis``, for
            grouped weights). Default 0.

    Raises:
        TypeError: if ``layer`` is neither a type nor a dotted name, or ``dim`` none of these.

    Example:
        >>> import weightnorm as wn
        >>> class Transposed(nn.Module):
        ...     "Keeps its weight as (in, out)."
        >>> wn.register_axis(Transposed, "weight", dim=1)
    """
    if not isinstance(layer, str | type):
        raise TypeError(f"register_axis takes a layer's type or its dotted name; got {layer!r}. Pass type(layer).")
    if not (dim is None or isinstance(dim, int | tuple) or callable(dim)):
        raise TypeError(f"dim must be an axis, None, or a function from the layer to one; got {dim!r}")
    _rules.setdefault(layer, {})[name] = dim


def output_axis(module: nn.Module, name: str = "weight") -> Axis | None:
    """Return where the vectors of a layer's weight lie, one per output unit.

    Args:
        module: the layer.
        name: its parameter's name.

    Returns:
        The axis, or None where the layer or the parameter is not known to hold weight vectors.

    Example:
        >>> output_axis(nn.ConvTranspose1d(6, 4, 3)), output_axis(nn.LayerNorm(3))
        (Axis(dim=1, groups=1), None)
    """
    for kind in type(module).__mro__:
        rules = _rules.get(kind) or _rules.get(f"{kind.__module__}.{kind.__qualname__}") or {}
        for pattern, rule in rules.items():
            if fnmatchcase(name, pattern):
                axis = rule(module) if callable(rule) else rule
                return axis if isinstance(axis, Axis) else Axis(axis)
    return None


def _transposed(module: nn.Module) -> Axis:
    """Weight ``(in, out/groups, *kernel)``: the outputs are on axis 1 of each group's block."""
    groups = module.groups
    assert isinstance(groups, int)
    return Axis(1, groups)


for _layer in (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.EmbeddingBag):
    register_axis(_layer)
for _transposing in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_axis(_transposing, dim=_transposed)
for _pattern in ("weight_ih_l*", "weight_hh_l*", "weight_hr_l*"):  # hr: the projection of LSTM(proj_size=...)
    register_axis(nn.RNNBase, _pattern)
for _pattern in ("weight_ih", "weight_hh"):
    register_axis(nn.RNNCellBase, _pattern)
for _pattern in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
    register_axis(nn.MultiheadAttention, _pattern)
register_axis("transformers.pytorch_utils.Conv1D", dim=1)  # GPT-2's linear layer, weight (in, out)
