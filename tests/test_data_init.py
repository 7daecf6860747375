"""Data-dependent initialisation: afterwards the same batch finds every unit standardised, and nothing else changed."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import weightnorm as wn
from feedforward import CASES, LAYERS, assert_unchanged, called, chain, deviation, made, pre_activations, snapshot, x_of
from weightnorm.data_dependent import DataInitReport, LayerReport

G = "parametrizations.weight.original0"


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
    everywhere = net.named_modules(remove_duplicate=False)
    layers = [path for path, module in everywhere if isinstance(module, LAYERS)]
    names = {f"{path}.{own}".lstrip(".") for path in layers for own in ("weight", "bias", G)}
    names |= {"self_attn.in_proj_weight", "self_attn.in_proj_bias"}
    means = [path for path, module in net.named_modules() if isinstance(module, wn.MeanOnlyBatchNorm)]
    names |= {f"{path}.{own}" for path in means for own in ("running_mean", "num_batches_tracked")}
    before = snapshot(net)
    outputs = []
    with net.register_forward_hook(lambda net, args, output: outputs.append(output.clone())):
        wn.data_init(net, batch)
    assert_unchanged(net, before, names)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(called(net.train(), batch), outputs[-1])


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


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_before_mean_only_batch_norm_a_layer_is_only_scaled_and_the_running_mean_is_that_of_the_batch(
    momentum, train, bias
):
    net, batch = made("mean-only batch norm")
    net[0] = nn.Conv2d(3, 8, 3, bias=bias)
    net[1].momentum = net[4].momentum = momentum
    found, biases = pre_activations(net, batch)[net[0]], copy.deepcopy(net[0].bias)
    for norm in (net[1], net[4]):
        norm.reset_running_stats()
    wn.data_init(net, batch, train=train)
    assert [net[1].num_batches_tracked, net[4].num_batches_tracked] == [1, 1]  # the first that they have seen
    means = [net[1].running_mean.clone(), net[4].running_mean.clone()]
    assert not net[1].bias.any()
    assert not bias or torch.equal(net[0].bias, biases)
    seen = pre_activations(net, batch)
    shift = biases.detach().double().numpy()[:, None] if bias else 0
    scaled = (found - shift) / found.std(1, keepdims=True) + shift
    np.testing.assert_allclose(seen[net[0]], scaled, rtol=1e-4, atol=1e-5)
    for layer, mean in zip((net[0], net[3]), means, strict=True):
        np.testing.assert_allclose(mean, seen[layer].mean(1), rtol=1e-4, atol=1e-5)


def test_before_batch_norm_a_layer_stays_and_nobody_is_warned():
    net, batch = made("batch norm")
    net.insert(0, nn.Conv2d(3, 3, 1))
    net.insert(1, nn.ReLU(inplace=True))
    net.insert(2, nn.BatchNorm2d(3))  # what it takes in is no longer what the layer before has put out
    before = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings(action="error"):
        report = wn.data_init(net, batch)
    assert report.left_out == {"3": "feeds batch normalization, 4"}
    assert [layer.name for layer in report.layers] == ["0", "6"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items() if name[0] not in "06")


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
    for layer, own in zip(report.layers, (net[1], net[3], net[9]), strict=True):
        lengths = own.weight.detach().flatten(1).norm(dim=1)
        np.testing.assert_allclose(layer.lengths, [lengths.min(), lengths.max()], rtol=1e-5)
    first = report.layers[0]
    np.testing.assert_allclose(first.mean_before, [before.mean(1).min(), before.mean(1).max()], rtol=1e-4)
    np.testing.assert_allclose(first.std_before, [before.std(1).min(), before.std(1).max()], rtol=1e-4)
    for layer in report.layers:
        np.testing.assert_allclose([*layer.mean_after, *layer.std_after], [0, 0, 1, 1], atol=1e-4)


REPORT = DataInitReport(
    (
        LayerReport("features.0", 64, (-0.25, 0.5), (0.125, 0.75), (0.0, 0.0), (1.0, 1.0), (0.5, 2.0)),
        LayerReport("head", 10, (-1.5, 12.0), (0.0, 3.0), (0.0, 7.0), (0.0, 1.0), (0.0, 1.0), tuple(range(9))),
    ),
    {"idle": "never ran"},
)


def test_the_report_prints_as_a_table():
    left = "left alone"
    assert str(REPORT).splitlines() == [
        f"layer       units   mean before     std before  mean after  std after   g after  {left:>33}",
        f"features.0     64  -0.25 to 0.5  0.125 to 0.75      0 to 0     1 to 1  0.5 to 2  {'-':>33}",
        "head           10    -1.5 to 12         0 to 3      0 to 7     0 to 1    0 to 1  "
        "0, 1, 2, 3, 4, 5, 6, 7 and 1 more",
        "idle never ran",
    ]


def test_rich_prints_it_too():
    console = pytest.importorskip("rich.console").Console(width=200, record=True, file=io.StringIO())
    console.print(REPORT)
    text = console.export_text()
    assert "-0.25 to 0.5" in text
    assert "idle never ran" in text
