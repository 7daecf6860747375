"""Data-dependent initialisation: afterwards the same batch finds every unit standardised, and nothing else changed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import weightnorm as wn
from feedforward import CASES, LAYERS, assert_unchanged, called, chain, deviation, made, pre_activations, snapshot, x_of
from weightnorm.data_dependent import DataInitReport, LayerReport


@pytest.mark.parametrize("name", CASES)
def test_every_unit_is_standardised(name):
    net, batch = made(name)
    assert max(deviation(net, batch)) > 0.1  # there was something to do
    wn.data_init(net, batch)
    mean, std = deviation(net, batch)
    assert mean < 1e-4
    assert std < 1e-3


@pytest.mark.parametrize("name", ["conv net, noise and dropout", "mlp", "residual"])
def test_statistics_of_a_pass_that_hands_on_uncorrected_outputs_fail_the_check(name):
    """openai/pixel-cnn#36: each layer's correction is right, and for an input that it will never see again."""
    net, batch = made(name)
    for layer, t in pre_activations(net, batch).items():
        factor, mean = torch.from_numpy(1 / t.std(1)), torch.from_numpy(t.mean(1))
        layer.weight.data *= factor.reshape(-1, *[1] * (layer.weight.ndim - 1))
        layer.bias.data = ((layer.bias.data - mean) * factor).float()
    mean, std = deviation(net, batch)
    assert mean > 1e-2
    assert std > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_it_changes_nothing_but_weights_and_biases_and_the_pass_saw_what_the_next_one_sees(name):
    net, batch = made(name)
    net.train()
    next(net.children(), net).eval()  # flags differ between modules
    layers = [path for path, module in net.named_modules() if isinstance(module, LAYERS)]
    names = {f"{path}.{own}".lstrip(".") for path in layers for own in ("weight", "bias")}
    before = snapshot(net)
    outputs = []
    with net.register_forward_hook(lambda net, args, output: outputs.append(output.clone())):
        wn.data_init(net, batch)
    assert_unchanged(net, before, names)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(called(net.train(), batch), outputs[0])


def test_directions_are_kept_and_each_output_channel_of_a_grouped_transposed_convolution_has_its_own_factor():
    layer = nn.ConvTranspose1d(6, 9, 4, groups=3)
    before = layer.weight.detach().clone()
    wn.data_init(layer, x_of(8, 6, 7))
    ratio = (layer.weight.detach() / before).reshape(3, 2, 3, 4)  # group, its inputs, its outputs, kernel
    torch.testing.assert_close(ratio, ratio[:, :1, :, :1].expand_as(ratio))
    assert len(ratio[:, 0, :, 0].unique()) == 9


def test_a_linear_layer_is_set_by_equation_6():
    layer, x = nn.Linear(5, 3).double(), x_of(20, 5).double()
    w, b = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    t = x.numpy() @ w.T + b
    mean = t.sum(0) / 20
    std = np.sqrt(((t - mean) ** 2).sum(0) / 20)  # the population's, nothing added
    wn.data_init(layer, x, std=0.1)
    np.testing.assert_allclose(layer.weight.detach().numpy(), w * (0.1 / std)[:, None], rtol=1e-13)
    np.testing.assert_allclose(layer.bias.detach().numpy(), (b - mean) * 0.1 / std, rtol=1e-12)


def test_another_standard_deviation():
    net, batch = made("conv net, noise and dropout")
    wn.data_init(net, batch, std=0.1)
    mean, std = deviation(net, batch, std=0.1)
    assert mean < 1e-5
    assert std < 1e-4


def test_a_layer_without_a_bias_is_only_scaled_and_the_bias_behind_it_stays():
    net, batch = made("mean-only batch norm")
    before = pre_activations(net, batch)[net[0]]
    running = net[1].running_mean.clone()
    wn.data_init(net, batch)
    assert not net[1].bias.any()
    assert torch.equal(net[1].running_mean, running)
    after = pre_activations(net, batch)[net[0]]
    np.testing.assert_allclose(after, before / before.std(1, keepdims=True), rtol=1e-4, atol=1e-5)


def test_dropout_and_noise_are_active_unless_train_is_false():
    net, batch = made("conv net, noise and dropout")
    wn.data_init(net, batch, train=False)
    assert max(deviation(net.eval(), batch)) < 1e-3
    assert max(deviation(net.train(), batch)) > 1e-2


def test_the_same_seed_gives_the_same_bits():
    net, batch = made("conv net, noise and dropout")
    twin = copy.deepcopy(net)
    wn.data_init(net, batch)
    wn.data_init(twin, batch)
    torch.rand(1)
    other = copy.deepcopy(twin)
    assert_unchanged(twin, snapshot(net))
    wn.data_init(other, batch)  # other noise, other statistics
    assert not torch.equal(other[1].weight, twin[1].weight)


def test_hooks_of_the_users_see_what_the_corrected_layer_puts_out():
    net, batch = made("mlp")
    seen = []
    net[0].register_forward_hook(lambda layer, args, t: seen.append(t))
    wn.data_init(net, batch)
    assert torch.equal(seen[0], net[0](batch))


def test_a_second_call_finds_nothing_to_do():
    net, batch = made("u-net, a tuple")
    wn.data_init(net, batch)
    before = copy.deepcopy(net.state_dict())
    wn.data_init(net, batch)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights in bf16", "autocast"])
def test_low_precision(autocast):
    """Statistics are float32's, and what later layers see has the weights' own rounding in it: errors do not add up."""
    net, batch = chain(nn.Linear(7, 64), nn.Linear(64, 64), nn.Linear(64, 4))(), x_of(512, 7)
    if not autocast:
        net, batch = net.bfloat16(), batch.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        net(batch)  # fills autocast's cache of cast weights, which must not outlive the change
        wn.data_init(net, batch)
        mean, std = deviation(net, batch)
    assert net[0].weight.dtype == (torch.float32 if autocast else torch.bfloat16)
    assert mean < 2e-2  # biases of size 1 to 4 are rounded to 8 bits: 2^-9 of each
    assert std < 5e-3


def test_the_report_tells_what_was_measured():
    net, batch = made("conv net, noise and dropout")
    before = next(iter(pre_activations(net, batch).values()))
    report = wn.data_init(net, batch)
    assert [(layer.name, layer.units) for layer in report.layers] == [("1", 8), ("3", 12), ("9", 10)]
    first = report.layers[0]
    np.testing.assert_allclose(first.mean_before, [before.mean(1).min(), before.mean(1).max()], rtol=1e-4)
    np.testing.assert_allclose(first.std_before, [before.std(1).min(), before.std(1).max()], rtol=1e-4)
    for layer in report.layers:
        np.testing.assert_allclose([*layer.mean_after, *layer.std_after], [0, 0, 1, 1], atol=1e-4)


def test_the_report_prints_as_a_table():
    first = LayerReport("features.0", 64, (-0.25, 0.5), (0.125, 0.75), (0.0, 0.0), (1.0, 1.0))
    second = LayerReport("head", 10, (-1.5, 12.0), (0.0, 3.0), (0.0, 7.0), (0.0, 1.0), tuple(range(9)))
    assert str(DataInitReport((first, second), {"idle": "never ran"})).splitlines() == [
        "layer       units   mean before     std before  mean after  std after                         left alone",
        "features.0     64  -0.25 to 0.5  0.125 to 0.75      0 to 0     1 to 1                                  -",
        "head           10    -1.5 to 12         0 to 3      0 to 7     0 to 1  0, 1, 2, 3, 4, 5, 6, 7 and 1 more",
        "idle never ran",
    ]
