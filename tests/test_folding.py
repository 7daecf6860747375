"""Folding: every kind of weight norm, in any mode, to plain parameters of the original class."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import weightnorm as wn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")

KINDS = {
    "ours": wn.weight_norm,
    "ours, log g": lambda layer: wn.weight_norm(layer, log_g=True),
    "ours, frozen g": lambda layer: wn.weight_norm(layer, train_g=False),
    "parametrization": parametrizations.weight_norm,
    "parametrization, whole tensor": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "hook": nn.utils.weight_norm,
    "hook, last axis": lambda layer: nn.utils.weight_norm(layer, dim=1),
}
MODES = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def move(model):
    """Give every tensor a value that wrapping alone would not have, lengths positive."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_fold_leaves_plain_trainable_layers(kind, mode):
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model = copy.deepcopy(plain)
    for layer in (model[0], model[2]):
        KINDS[kind](layer)
    move(model)
    x = torch.randn(5, 4)
    before = model(x).detach()
    with MODES[mode]():
        assert wn.fold(model) == 2
        assert wn.fold(model) == 0
    torch.testing.assert_close(model(x), before)
    assert [type(layer) for layer in model] == [type(layer) for layer in plain]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n, _ in plain.named_parameters()]
    for layer in (model[0], model[2]):
        hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._load_state_dict_pre_hooks)
        assert not any(hooks)
        assert "parametrizations" not in dict(layer.named_children())
    file = io.BytesIO()
    torch.save(model, file)  # the whole module
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), before)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_folding_a_copy_leaves_the_model_as_it_is():
    model, x = wn.weight_norm(nn.Linear(4, 3)), torch.randn(2, 4)
    average = copy.deepcopy(model)
    wn.fold(average)
    assert type(model) is not nn.Linear
    torch.testing.assert_close(model(x), average(x))


def test_one_of_two_weights_can_be_folded():
    layer, x = wn.weight_norm(nn.LSTM(4, 3)), torch.randn(5, 2, 4)
    other = copy.deepcopy(layer)
    before = layer(x)[0].detach()
    wn.remove_weight_norm(layer, "weight_hh_l0")
    assert isinstance(layer.weight_hh_l0, nn.Parameter)
    assert not isinstance(layer.weight_ih_l0, nn.Parameter)
    torch.testing.assert_close(layer(x)[0], before)
    torch.testing.assert_close(other(x)[0], before)
    wn.fold(layer)
    assert type(layer) is nn.LSTM
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in nn.LSTM(4, 3).named_parameters()]
    assert layer._flat_weights[0] is layer.weight_ih_l0


def test_a_second_weight_wrapped_in_a_copy_leaves_the_model_as_it_is():
    layer = wn.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")
    other = wn.weight_norm(copy.deepcopy(layer), "weight_ih_l0")
    assert isinstance(layer.weight_ih_l0, nn.Parameter)
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(layer(x)[0], other(x)[0])


def test_zero_rows_of_torch_fold_to_zero():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    parametrizations.weight_norm(layer)
    assert layer.weight.isnan().all()
    assert (wn.remove_weight_norm(layer).weight == 0).all()


def test_another_parametrization_on_top_is_refused_and_kept():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    model = nn.Sequential(wn.weight_norm(nn.Linear(4, 3)), wn.weight_norm(nn.Linear(3, 2)))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Twice())
    before = model(torch.ones(1, 4))
    with pytest.raises(ValueError, match="carries Twice beside weight norm"):
        wn.fold(model)
    torch.testing.assert_close(model(torch.ones(1, 4)), before)


def test_spectral_norm_is_none_of_our_business():
    layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    assert wn.fold(layer) == 0
    assert wn.remove_weight_norm(layer) is layer
    assert "parametrizations" in dict(layer.named_children())


def test_a_buffer_stays_a_buffer():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.randn(3, 4))

    module = wn.weight_norm(Fixed(), "kernel")
    before = module.kernel.clone()
    torch.testing.assert_close(wn.remove_weight_norm(module).kernel, before)
    assert list(dict(module.named_buffers())) == ["kernel"]
