"""The axis of every layer kind, checked on what it means: scaling one vector scales one output and no other."""

import pytest
import torch
from torch import nn

import weightnorm as wn
from weightnorm.axes import Axis, output_axis

# layer, input, the axis of the output that holds the units
LAYERS = [
    (nn.Linear(5, 4, bias=False), torch.randn(3, 5), -1),
    (nn.Conv1d(4, 6, 3, bias=False), torch.randn(2, 4, 9), 1),
    (nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 9, 9), 1),
    (nn.Conv3d(2, 6, 3, bias=False), torch.randn(2, 2, 5, 5, 5), 1),
    (nn.ConvTranspose1d(4, 6, 3, bias=False), torch.randn(2, 4, 9), 1),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 5, 5), 1),
    (nn.ConvTranspose3d(6, 9, 2, groups=3, bias=False), torch.randn(2, 6, 3, 3, 3), 1),
    (nn.Bilinear(3, 4, 5, bias=False), (torch.randn(2, 3), torch.randn(2, 4)), -1),
]


@pytest.mark.parametrize(("layer", "x", "unit_axis"), LAYERS, ids=lambda value: type(value).__name__)
def test_one_vector_is_one_output_unit(layer, x, unit_axis):
    x = x if isinstance(x, tuple) else (x,)
    axis = output_axis(layer)
    before = layer(*x)
    units = before.shape[unit_axis]
    split = axis.split(layer.weight)
    lengths = split.square().sum([a for a in range(split.ndim) if a not in axis.kept(layer.weight)])
    assert lengths.numel() == units

    for unit in range(units):
        with torch.no_grad():
            rows = axis.rows(layer.weight).clone()
            rows[unit] *= 3
            scaled = axis.from_rows(rows, layer.weight)
        after = torch.func.functional_call(layer, {"weight": scaled}, x)
        ratio = torch.ones(units)
        ratio[unit] = 3
        shape = [1] * before.ndim
        shape[unit_axis] = units
        torch.testing.assert_close(after, before * ratio.reshape(shape))


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2), ["weight_ih_l1_reverse", "weight_hr_l0"]),
        (nn.GRU(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.RNNCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(8, 2), ["in_proj_weight"]),
        (nn.MultiheadAttention(8, 2, kdim=3, vdim=5), ["q_proj_weight", "k_proj_weight", "v_proj_weight"]),
        (nn.Embedding(5, 3), ["weight"]),
        (nn.EmbeddingBag(5, 3), ["weight"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_of_gates_projections_and_tables(layer, names):
    for name in names:
        assert output_axis(layer, name) == Axis(0), name
    assert output_axis(layer, "bias") is None


def test_unknown_layers_have_no_axis_and_one_call_teaches_them():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 4))

    class Child(Unknown):
        pass

    assert output_axis(Unknown(), "kernel") is None
    wn.register_axis(Unknown, "ker*", dim=1)
    assert output_axis(Unknown(), "kernel") == output_axis(Child(), "kernel") == Axis(1)
    assert output_axis(nn.BatchNorm2d(3)) is None


def test_a_layer_can_be_named_without_importing_its_package():
    class Conv1D(nn.Module):
        pass

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    assert output_axis(Conv1D()) == Axis(1)


def test_only_a_type_or_a_name_can_be_registered():
    with pytest.raises(TypeError, match="takes a layer's type or its dotted name; got Linear"):
        wn.register_axis(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 3, 5), Axis(0)), ((4, 3, 5), Axis(1)), ((4, 3, 5), Axis(None)), ((6, 4, 5), Axis(1, 3))]
)
def test_rows_are_undone(shape, axis):
    weight = torch.randn(shape)
    rows = axis.rows(weight)
    assert rows.ndim == 2
    assert torch.equal(axis.from_rows(rows, weight), weight)


def test_a_rule_may_be_an_axis_none_or_a_function_and_nothing_else():
    class Gated(nn.Module):
        pass

    for rule, expected in ((None, Axis(None)), (lambda module: 1, Axis(1)), (lambda module: Axis(1, 2), Axis(1, 2))):
        wn.register_axis(Gated, "weight", dim=rule)
        assert output_axis(Gated()) == expected
    with pytest.raises(TypeError, match="dim must be an axis, None, or a function"):
        wn.register_axis(Gated, "weight", dim="output")

    def another():
        class Gated(nn.Module):
            pass

        return Gated

    assert output_axis(another()()) is None
