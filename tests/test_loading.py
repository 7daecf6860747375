"""Checkpoints of every spelling load into a wrapped layer and compute the same weight."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import weightnorm as wn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


def transposed():
    return nn.ConvTranspose1d(6, 4, 3)


def moved(layer):
    """Return a layer whose g and v are unlike what wrapping made."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.mul_(1.5).add_(0.1 if "bias" not in name else 0.0)
    return layer


def paddle(state):
    return {key: value.flatten() if key == "weight_g" else value for key, value in state.items()}


SOURCES = {
    "ours": lambda layer: moved(wn.weight_norm(layer)).state_dict(),
    "ours, log g": lambda layer: moved(wn.weight_norm(layer, log_g=True)).state_dict(),
    "parametrization, our axis": lambda layer: moved(parametrizations.weight_norm(layer, dim=1)).state_dict(),
    "parametrization, axis 0": lambda layer: moved(parametrizations.weight_norm(layer)).state_dict(),
    "parametrization, last axis": lambda layer: moved(parametrizations.weight_norm(layer, dim=2)).state_dict(),
    "parametrization, whole": lambda layer: moved(parametrizations.weight_norm(layer, dim=None)).state_dict(),
    "hook, our axis": lambda layer: moved(nn.utils.weight_norm(layer, dim=1)).state_dict(),
    "hook, axis 0": lambda layer: moved(nn.utils.weight_norm(layer)).state_dict(),
    "1-D g, our axis": lambda layer: paddle(moved(nn.utils.weight_norm(layer, dim=1)).state_dict()),
    "1-D g, axis 0": lambda layer: paddle(moved(nn.utils.weight_norm(layer)).state_dict()),
    "plain": lambda layer: moved(layer).state_dict(),
}
TARGETS = {"g": {}, "log g": {"log_g": True}}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_spelling_loads_and_computes_the_same(source, target):
    origin = transposed()
    state = copy.deepcopy(SOURCES[source](origin))
    x = torch.randn(2, 6, 5)
    layer = wn.weight_norm(transposed(), **TARGETS[target])
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), origin(x))
    nested = nn.Sequential(wn.weight_norm(transposed(), **TARGETS[target]))
    nested.load_state_dict({f"0.{key}": value for key, value in state.items()})
    torch.testing.assert_close(nested(x), origin(x))


@pytest.mark.parametrize("source", ["ours", "parametrization, our axis", "hook, our axis", "1-D g, our axis"])
def test_g_and_v_along_our_axis_load_bit_for_bit(source):
    state = SOURCES[source](transposed())
    layer = wn.weight_norm(transposed())
    layer.load_state_dict(state)
    g, v = (value for key, value in state.items() if "bias" not in key)
    assert torch.equal(layer.parametrizations.weight.original0, g.reshape(1, 4, 1))
    assert torch.equal(layer.parametrizations.weight.original1, v)


def test_torch_loads_ours():
    ours = moved(wn.weight_norm(nn.Linear(4, 3)))
    theirs = parametrizations.weight_norm(nn.Linear(4, 3))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4)
    torch.testing.assert_close(theirs(x), ours(x))


def test_torch_does_not_take_logarithms_for_lengths():
    theirs = parametrizations.weight_norm(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="log_g"):
        theirs.load_state_dict(wn.weight_norm(nn.Linear(4, 3), log_g=True).state_dict())


def test_a_negative_length_loads_as_a_logarithm():
    state = wn.weight_norm(nn.Linear(4, 3)).state_dict()
    state["parametrizations.weight.original0"][1] *= -1
    one, other = wn.weight_norm(nn.Linear(4, 3)), wn.weight_norm(nn.Linear(4, 3), log_g=True)
    for layer in (one, other):
        layer.load_state_dict(state)
    torch.testing.assert_close(one.weight.detach(), other.weight.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"weight_g": torch.ones(4)}, "does not say along which axis"),
        (lambda s: s | {"weight_g": torch.ones(3, 1, 1)}, "does not say along which axis"),
        (lambda s: s | {"weight_v": torch.ones(5, 4, 3)}, "size mismatch"),
        (lambda s: {"weight": torch.ones(3, 1, 3), "bias": s["bias"]}, "size mismatch for weight"),
        (lambda s: {"weight": torch.ones(()), "bias": s["bias"]}, "size mismatch for weight"),
        (lambda s: {"weight_v": s["weight_v"], "bias": s["bias"]}, "Missing key"),
        (lambda s: {"weight_g": s["weight_g"], "bias": s["bias"]}, "Missing key"),
    ],
)
def test_what_cannot_be_told_is_refused(change, message):
    state = dict(nn.utils.weight_norm(nn.ConvTranspose1d(4, 4, 3), dim=1).state_dict())
    layer = wn.weight_norm(nn.ConvTranspose1d(4, 4, 3))
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(change(state))


def test_recurrent_layers_load_torchs_old_names():
    origin = nn.LSTM(4, 3)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        nn.utils.weight_norm(origin, name)
    layer = wn.weight_norm(nn.LSTM(4, 3))
    layer.load_state_dict(origin.state_dict())
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(layer(x)[0], origin(x)[0])


def test_a_deep_copy_loads_for_itself():
    layer = wn.weight_norm(transposed())
    other = copy.deepcopy(layer)
    before = layer.weight.detach().clone()
    other.load_state_dict(SOURCES["hook, axis 0"](transposed()))
    assert torch.equal(layer.weight, before)
    assert not torch.equal(other.weight, before)
