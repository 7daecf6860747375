"""``weight_norm`` on containers, its options, its refusals; and ``cached``."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import weightnorm as wn


def net():
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 6), nn.Linear(6, 2))


def wrapped(model):
    return sorted(name for name, p in model.named_parameters() if name.endswith("original0"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["0", "3", "4"]),
        ({"skip": "4.*"}, ["0", "3"]),
        ({"skip": nn.Linear}, ["0"]),
        ({"skip": [nn.Conv1d, "3.weight"]}, ["4"]),
        ({"dim": 1}, ["0", "3", "4"]),
    ],
)
def test_a_container_has_every_known_weight_wrapped(options, expected):
    model = wn.weight_norm(net(), **options)
    assert wrapped(model) == [f"{path}.parametrizations.weight.original0" for path in expected]
    assert model[int(expected[0])].parametrizations.weight[0].axis.dim == options.get("dim", 0)


def test_a_name_picks_one_of_a_layer_or_of_every_layer_in_a_container():
    assert wrapped(wn.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")) == ["parametrizations.weight_hh_l0.original0"]
    model = wn.weight_norm(nn.ModuleList([nn.LSTM(3, 4), nn.GRU(3, 4)]), "weight_hh_l0")
    assert len(wrapped(model)) == 2


def test_embeddings_are_wrapped_when_given_and_left_in_containers():
    model = wn.weight_norm(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)))
    assert wrapped(model) == ["1.parametrizations.weight.original0"]
    assert wrapped(wn.weight_norm(nn.Embedding(5, 4)))


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    wn.weight_norm(model)
    assert len(wrapped(model)) == 2
    assert model[2].parametrizations.weight.original1 is model[0].parametrizations.weight.original1
    nn.init.normal_(model[2].weight)
    torch.testing.assert_close(model[0].weight, model[2].weight)
    assert wn.fold(model) == 3
    assert model[0].weight is model[2].weight


def test_one_weight_along_two_axes_is_refused():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="shared by layers with different output axes"):
        wn.weight_norm(model)
    assert wrapped(model) == []


def test_lengths_can_be_frozen():
    layer = wn.weight_norm(nn.Linear(3, 2), train_g=False)
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.parametrizations.weight.original0.grad is None
    assert layer.parametrizations.weight.original1.grad is not None
    assert wn.remove_weight_norm(layer).weight.requires_grad


def test_frozen_weights_stay_frozen():
    layer = nn.Linear(3, 2).requires_grad_(False)
    assert not any(p.requires_grad for p in wn.weight_norm(layer).parameters())
    assert not wn.remove_weight_norm(layer).weight.requires_grad


def test_lengths_as_logarithms_train_and_stay_positive():
    plain = nn.Linear(3, 2)
    layer = wn.weight_norm(copy.deepcopy(plain), log_g=True)
    torch.testing.assert_close(layer.weight.detach(), plain.weight.detach())
    layer.weight.square().sum().backward()
    held = layer.parametrizations.weight
    torch.testing.assert_close(held.original0.grad, 2 * held.original0.detach().exp() ** 2)  # ∂L/∂s = g ∂L/∂g, L = Σg²
    with pytest.raises(ValueError, match="vectors are zero"):
        nn.init.zeros_(layer.weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wn.weight_norm(nn.Linear(3, 2), "kernel"), "no parameter named 'kernel'"),
        (lambda: wn.weight_norm(nn.ReLU()), "no weight whose output axis is known"),
        (lambda: wn.weight_norm(nn.LayerNorm([2, 3]), "gain"), "no parameter named 'gain'"),
        (lambda: wn.weight_norm(wn.weight_norm(nn.Linear(3, 2))), "already"),
        (lambda: wn.weight_norm(parametrizations.spectral_norm(nn.Linear(3, 2))), "SpectralNorm"),
        (lambda: wn.weight_norm(nn.LazyLinear(3)), "no shape yet"),
        (lambda: wn.weight_norm(nn.Linear(3, 2), dim=2), "dim=2 names no axis"),
        (lambda: wn.weight_norm(nn.Linear(3, 2), dim="input"), "dim must be"),
        (lambda: wn.weight_norm(net(), skip="nothing.*"), "matches no parameter"),
    ],
)
def test_refusals_name_the_rule_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_container_is_left_as_it_was():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="dim=2"):
        wn.weight_norm(model, dim=2)
    assert wrapped(model) == []


def test_minus_one_is_the_whole_tensor_as_in_torch_and_says_so():
    with pytest.warns(UserWarning, match="whole tensor"):
        ours = wn.weight_norm(nn.Linear(3, 2), dim=-1)
    theirs = parametrizations.weight_norm(nn.Linear(3, 2), dim=-1)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs.weight, ours.weight.detach().as_subclass(torch.Tensor))


def test_cached_gathers_gradients_of_several_passes():
    model, x = wn.weight_norm(net()).eval(), torch.randn(2, 3, 7)
    other = copy.deepcopy(model)
    for batch in (x, 2 * x):
        other(batch).square().sum().backward()
    with wn.cached(model):
        for batch in (x, 2 * x):
            model(batch).square().sum().backward()
        with wn.cached(model):  # nothing left to do
            assert model[3].weight is model[3].weight
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, expected.grad)
    assert model[3].weight is not model[3].weight


def test_cached_refuses_a_step_inside():
    model = wn.weight_norm(nn.Linear(3, 2))

    def step_inside():
        with wn.cached(model), torch.no_grad():
            model.parametrizations.weight.original1.add_(1)

    with pytest.raises(ValueError, match="changed inside"):
        step_inside()
    assert model.weight is not model.weight


def test_cached_notices_tensors_that_were_replaced():
    model = wn.weight_norm(nn.Linear(3, 2))
    state = copy.deepcopy(model.state_dict())

    def load_inside():
        with wn.cached(model):
            model.load_state_dict(state, assign=True)

    with pytest.raises(ValueError, match="changed inside"):
        load_inside()


def test_a_copy_made_inside_cached_lives_on():
    model = wn.weight_norm(nn.Linear(3, 2))
    with wn.cached(model):
        other = copy.deepcopy(model)
    other(torch.ones(1, 3)).sum().backward()
    assert other.parametrizations.weight.original0.grad is not None
    nn.init.ones_(other.weight)
    assert (other(torch.ones(1, 3)) - other.bias == 3).all()


def test_several_threads_may_cache_one_model():
    model = wn.weight_norm(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    x, expected = torch.ones(1, 8), model(torch.ones(1, 8)).detach()

    def stream(_):
        with torch.no_grad(), wn.cached(model):
            return model(x)

    with ThreadPoolExecutor(8) as pool:
        for out in pool.map(stream, range(400)):
            torch.testing.assert_close(out, expected)
    assert model[0].weight is not model[0].weight


def test_cached_lets_errors_through():
    model = wn.weight_norm(nn.Linear(3, 2))
    with pytest.raises(KeyError), wn.cached(model):
        raise KeyError
    assert model.weight is not model.weight


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made_in", [nullcontext, torch.inference_mode])
def test_cached_without_gradients(mode, made_in):
    with made_in():
        model = wn.weight_norm(net()).eval()
    x = torch.randn(2, 3, 7)
    with mode():
        expected = model(x)
        with wn.cached(model):
            torch.testing.assert_close(model(x), expected)
            assert model[3].weight is model[3].weight
            assert not model[3].weight.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_write_inside_cached_is_refused_not_lost(mode):
    model = wn.weight_norm(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="changed inside"), mode(), wn.cached(model):
        nn.init.ones_(model.weight)
    torch.testing.assert_close(model(torch.eye(3)) - model.bias, torch.ones(3, 2))
