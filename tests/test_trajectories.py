"""The optimizer form walks the path of torch's optimizers on torch's stored (g, v)."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn, optim

import oracle
import weightnorm as wn
from nets import Lion, batches, conv_net, distance, in_torch_module_form, train
from weightnorm.formula import row_lengths

pytestmark = pytest.mark.usefixtures("each_backend")

RULES = {
    "sgd": (wn.SGD, optim.SGD, dict(lr=0.01)),
    "sgd momentum": (wn.SGD, optim.SGD, dict(lr=0.01, momentum=0.9, weight_decay=0.1)),
    "sgd nesterov": (wn.SGD, optim.SGD, dict(lr=0.01, momentum=0.9, nesterov=True, dampening=0)),
    "adam": (wn.Adam, optim.Adam, dict(lr=1e-3, weight_decay=0.1)),
    "adam amsgrad": (wn.Adam, optim.Adam, dict(lr=1e-3, amsgrad=True)),
    "adam maximize": (wn.Adam, optim.Adam, dict(lr=1e-4, maximize=True)),
    "adamw": (wn.AdamW, optim.AdamW, dict(lr=1e-3, weight_decay=0.1)),
    "adamw fused": (wn.AdamW, optim.AdamW, dict(lr=1e-3, weight_decay=0.1, fused=True)),
    "adamw foreach": (wn.AdamW, optim.AdamW, dict(lr=1e-3, foreach=True)),
    "adamw tensor lr": (wn.AdamW, optim.AdamW, dict(lr=torch.tensor(1e-3, dtype=torch.float64))),
    "adamax": (wn.Adamax, optim.Adamax, dict(lr=1e-3)),
    "rmsprop": (partial(wn.wrap, optim.RMSprop), optim.RMSprop, dict(lr=1e-3, momentum=0.5, centered=True)),
    "adagrad": (partial(wn.wrap, optim.Adagrad), optim.Adagrad, dict(lr=0.01, initial_accumulator_value=0.1)),
    "nadam": (partial(wn.wrap, optim.NAdam), optim.NAdam, dict(lr=1e-3)),
    "lion": (partial(wn.wrap, Lion), Lion, dict(lr=1e-4, weight_decay=0.1)),
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# A rule of signs turns rounding into whole steps: only float64 keeps two computations of it together.
CASES = [(rule, dtype) for rule in RULES for dtype in TOLERANCE if (rule, dtype) != ("lion", torch.float32)]


@pytest.mark.parametrize(("rule", "dtype"), CASES)
def test_fifty_steps_beside_torchs_module_form(rule, dtype):
    ours, theirs, options = RULES[rule]
    net = conv_net().to(dtype)
    twin = in_torch_module_form(net)
    data = batches(50, dtype)
    start = copy.deepcopy(net)
    train(net, ours(net, **options), data)
    train(twin, theirs(twin.parameters(), **options), data)
    assert distance(net, twin) < TOLERANCE[dtype]
    assert distance(net, start) > 1e-3  # it did go somewhere


def test_sgd_beside_the_numpy_oracle():
    layer, target = nn.Linear(7, 4, bias=False).double(), torch.randn(4, 7, dtype=torch.float64)
    path = oracle.sgd(layer.weight.detach().numpy().copy(), lambda w: 2 * (w - target.numpy()), 30, 0.1, momentum=0.5)
    optimizer = wn.SGD(layer, lr=0.1, momentum=0.5)
    for expected in path:
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
        np.testing.assert_allclose(layer.weight.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_a_hundred_thousand_float32_steps_do_not_drift():
    steps = 100_000
    x, target = torch.randn(64, 6, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    layer = nn.Linear(6, 4, bias=False)
    start = layer.weight.detach().double().numpy()
    picks = [slice(8 * (step % 8), 8 * (step % 8) + 8) for step in range(steps)]
    inputs, targets, queue = x.numpy(), target.numpy(), iter(picks)

    def gradient(w):
        pick = next(queue)
        return (inputs[pick] @ w.T - targets[pick]).T @ inputs[pick] / 16

    expected = oracle.sgd(start, gradient, steps, 0.01)[-1]
    optimizer = wn.SGD(layer, lr=0.01)
    x, target = x.float(), target.float()
    with torch.no_grad():  # the same gradient by hand: autograd would only make the test slower
        for pick in picks:
            layer.weight.grad = (x[pick] @ layer.weight.T - target[pick]).T @ x[pick] / 16
            optimizer.step()
    assert np.linalg.norm(layer.weight.detach().numpy() - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [wn.SGD, wn.Adam, partial(wn.AdamW, weight_decay=0.0), wn.Adamax])
@pytest.mark.parametrize("v_std", [None, 0.05])
def test_zero_gradients_change_no_bit(rule, dtype, v_std):
    net = conv_net().to(dtype)
    before = copy.deepcopy(net.state_dict())
    optimizer = rule(net, v_std=v_std)
    for _ in range(3):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, value in net.state_dict().items():
        # In float16 torch's own Adam makes NaN of a plain parameter here: its eps of 1e-8 rounds to zero.
        assert torch.equal(value, before[name]) or (dtype == torch.float16 and "bias" in name), name


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_length_of_v_never_shrinks_under_plain_sgd(momentum):
    net = conv_net().double()
    optimizer = wn.SGD(net, lr=0.1, momentum=momentum)
    weight = net[0].weight
    lengths = []
    for batch in batches(10):
        train(net, optimizer, [batch])
        lengths.append((weight.detach() / optimizer.state[weight]["scale"]).flatten(1).norm(dim=1))
    growth = torch.stack(lengths).diff(dim=0)
    assert growth.max() > 1e-4
    if momentum == 0:
        assert growth.min() > -1e-12  # section 2.1, for plain descent only


def test_v_std_is_the_same_run_as_rescaling_v_in_the_module_form():
    net = conv_net().double()
    twin = in_torch_module_form(net)
    for layer in twin:
        if hasattr(layer, "weight"):
            g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
            dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            v.data *= 0.05 * (v.numel() / g.numel()) ** 0.5 / row_lengths(v, dim)[0]
    data = batches(50)
    train(net, wn.Adam(net, lr=1e-3, v_std=0.05), data)
    train(twin, optim.Adam(twin.parameters(), lr=1e-3), data)
    assert distance(net, twin) < 1e-9


@pytest.mark.parametrize("g_lr", [0, 3.0, "sqrt"])
def test_g_lr_is_a_param_group_of_g_in_the_module_form(g_lr):
    net = conv_net().double()
    twin = in_torch_module_form(net)
    groups = []
    for layer in twin:
        if hasattr(layer, "weight"):
            g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
            factor = (v.numel() / g.numel()) ** 0.5 if g_lr == "sqrt" else g_lr
            groups += [{"params": [g], "lr": 1e-3 * factor}, {"params": [v, layer.bias]}]
    data = batches(20)
    lengths = net[5].weight.detach().norm(dim=1)
    optimizer = wn.AdamW(net, lr=1e-3, g_lr=g_lr, weight_decay=0.1)
    train(net, optimizer, data)
    train(twin, optim.AdamW(groups, lr=1e-3, weight_decay=0.1), data)
    assert distance(net, twin) < 1e-9
    if g_lr == 0:
        torch.testing.assert_close(net[5].weight.detach().norm(dim=1), lengths, rtol=1e-12, atol=0)


def test_decay_of_g_only():
    net = conv_net().double()
    twin = in_torch_module_form(net)
    directions = [p for name, p in twin.named_parameters() if name.endswith("original1")]
    others = [p for name, p in twin.named_parameters() if not name.endswith("original1")]
    data = batches(20)
    train(net, wn.AdamW(net, lr=1e-3, weight_decay=1.0, decay="g"), data)
    groups = [{"params": directions, "weight_decay": 0.0}, {"params": others}]
    train(twin, optim.AdamW(groups, lr=1e-3, weight_decay=1.0), data)
    assert distance(net, twin) < 1e-9


def test_muon_steps_on_v_as_a_matrix_and_adamw_on_the_rest():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)).double()
    twin = in_torch_module_form(net)
    wide = nn.Parameter(twin[0].parametrizations.weight.original1.detach().flatten(1))
    twin[0].parametrizations.weight.original1.requires_grad_(False)
    muon = optim.Muon([wide, twin[2].parametrizations.weight.original1], lr=0.02)
    rest = [p for name, p in twin.named_parameters() if not name.endswith("original1")]
    adamw = optim.AdamW(rest, lr=3e-4)
    data = batches(10)
    train(net, wn.wrap(optim.Muon, net, lr=0.02, g_class=partial(optim.AdamW, lr=3e-4)), data)
    for x, y in data:
        conv_v = twin[0].parametrizations.weight.original1
        conv_v.requires_grad_(True)
        twin.zero_grad()
        (twin(x) - y).square().mean().backward()
        wide.grad = conv_v.grad.flatten(1)
        muon.step()
        adamw.step()
        conv_v.data = wide.detach().view_as(conv_v).clone()
    assert distance(net, twin) < 1e-9
