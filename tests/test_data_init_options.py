"""Data-dependent initialisation beyond one batch through a plain net: forms, attention, lists of batches, options."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import weightnorm as wn
from feedforward import assert_unchanged, chain, conv_net, deviation, made, mlp, pre_activations, snapshot, x_of
from weightnorm.layers.found import find


def hooked(layer):
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.utils.weight_norm(layer)


def each(wrap):
    """Return what wraps every layer of a net."""

    def wrap_all(net):
        for module in list(net.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                wrap(module)
        return net

    return wrap_all


FORMS = {
    "ours": wn.weight_norm,
    "ours, log g": partial(wn.weight_norm, log_g=True),
    "torch": each(parametrizations.weight_norm),
    "torch, whole tensor": each(partial(parametrizations.weight_norm, dim=-1)),
    "torch's hook": each(hooked),
}


def transposed_net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("form", FORMS)
def test_in_module_form_the_lengths_are_set_as_in_the_plain_net_and_each_length_of_v_stays(form):
    plain, x = transposed_net().double(), x_of(6, 3, 9, 9).double()
    net = FORMS[form](copy.deepcopy(plain))
    before = [found.v.detach().clone() for found in find(net)]
    wn.data_init(plain, x)
    wn.data_init(net, x)
    torch.testing.assert_close(net(x), plain(x))
    assert max(deviation(net, x)) < 1e-8
    for found, v in zip(find(net), before, strict=True):
        norm = partial(torch.linalg.vector_norm, dim=[i for i in range(v.ndim) if i not in found.axis.kept(v)])
        torch.testing.assert_close(norm(found.v), norm(v))
        if "whole" not in form and (form.startswith("ours") or found.module.weight.shape[0] != 6):
            assert torch.equal(found.v, v)


def test_frozen_lengths_are_a_frozen_layer():
    net = nn.Sequential(wn.weight_norm(nn.Linear(3, 3), train_g=False), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="0 is frozen"):
        assert wn.data_init(net, x_of(9, 3)).left_out == {"0": "is frozen"}


class Attention(nn.Module):
    """Self or cross attention of torch's, and a layer behind it."""

    def __init__(self, wrap=lambda attention: attention, **options):
        super().__init__()
        self.attention = wrap(nn.MultiheadAttention(8, 2, **options))
        self.head = nn.Linear(8, 3)

    def forward(self, query, memory=None):
        memory = query if memory is None else memory
        return self.head(self.attention(query, memory, memory, need_weights=False)[0])


def attended(net, query, memory):
    """Compute in NumPy what the projections of attention put out, a unit a row: query's, key's, value's and the last.

    Batch first, no dropout.
    """
    own = net.attention
    query, memory = query.double().numpy(), memory.double().numpy()
    if own.in_proj_weight is not None:
        weights = np.split(own.in_proj_weight.detach().double().numpy(), 3)
    else:
        weights = [getattr(own, f"{name}_proj_weight").detach().double().numpy() for name in "qkv"]
    biases = [0.0] * 3 if own.in_proj_bias is None else np.split(own.in_proj_bias.detach().double().numpy(), 3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, memory, memory), weights, biases, strict=True))
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = np.exp(q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(4))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
    out = np.concatenate(heads, -1) @ own.out_proj.weight.detach().double().numpy().T
    out = out if own.out_proj.bias is None else out + own.out_proj.bias.detach().double().numpy()
    return [t.reshape(-1, 8).T for t in (q, k, v, out)]


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 5, "vdim": 5}, {"wrap": wn.weight_norm}],
    ids=["stacked", "no bias", "apart", "module form"],
)
def test_the_projections_of_attention_are_standardised(options):
    net = Attention(batch_first=True, **options)
    query, memory = x_of(7, 4, 8), x_of(7, 6, 5 if "kdim" in options else 8)
    report = wn.data_init(net, (query, memory))
    stacked = ["in_proj"] if "kdim" not in options else ["q_proj", "k_proj", "v_proj"]
    assert [layer.name for layer in report.layers] == [f"attention.{name}" for name in (*stacked, "out_proj")] + [
        "head"
    ]
    for t in attended(net, query, memory):
        assert abs(t.std(1) - 1).max() < 1e-3
        assert options.get("bias") is False or abs(t.mean(1)).max() < 1e-4
    assert max(deviation(net, (query, memory))) < 1e-3


@pytest.mark.parametrize("train", [True, False])
def test_attention_with_dropout_hands_on_what_the_next_pass_will(train):
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.3), 2, enable_nested_tensor=False)
    x, outputs = x_of(6, 5, 8), []
    with net.register_forward_hook(lambda net, args, output: outputs.append(output)):
        wn.data_init(net, x, train=train)
    with torch.no_grad():
        torch.testing.assert_close(net.train(train)(x), outputs[-1])
    assert net.layers[1].self_attn.out_proj.weight.shape == (8, 8)


@pytest.mark.parametrize(
    ("name", "train"),
    [
        *(("shared layer", train) for train in (True, False)),
        *(("u-net, a tuple", train) for train in (True, False)),
        ("transformer block", True),
        ("mean-only batch norm", False),  # in training mode each batch has a mean of its own
    ],
)
def test_several_batches_count_as_one(name, train):
    net, batch = made(name)
    x = (batch[0] if isinstance(batch, tuple) else batch).double()
    net = net.double()
    for part in net.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    twin = copy.deepcopy(net)
    whole, parts = wn.data_init(net, x, train=train), wn.data_init(twin, [x[:3], x[3:4], x[4:]], train=train)
    for one, other in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        for own in ("mean_before", "std_before", "mean_after", "std_after", "lengths"):
            np.testing.assert_allclose(getattr(one, own), getattr(other, own), rtol=1e-9, atol=1e-12)


def test_each_batch_has_noise_of_its_own_and_the_same_in_every_pass():
    net, x = conv_net(), x_of(8, 3, 10, 10)
    seen = {}

    def keep(layer, args, t):
        seen.setdefault(layer, []).append(args[0])

    net[1].register_forward_hook(keep)
    before = snapshot(net)
    report = wn.data_init(net, [x, x])
    assert torch.equal(torch.get_rng_state(), before[2])
    first, second = seen[net[1]][0::2], seen[net[1]][1::2]
    # A pass for each layer, which for the first ends before this hook; one that finds no more; one to report.
    assert len(first) == len(report.layers) + 1
    assert all(torch.equal(first[0], other) for other in first)
    assert all(torch.equal(second[0], other) for other in second)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], pre_input(net, x))


def pre_input(net, x):
    """Return what the first layer takes in, in a pass that draws the noise that comes next."""
    with torch.random.fork_rng([]):
        return net.train()[0](x)


def test_batches_may_run_different_layers():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x, left):
            return (self.left if left else self.right)(self.body(x).relu())

    net, x, y = Either().double(), x_of(30, 4).double(), x_of(20, 4).double()
    wn.data_init(net, [(x, True), (y, False), (x + 1, True)])
    t = net.body(torch.cat([x, y, x + 1]))
    torch.testing.assert_close(t.std(0, correction=0), torch.ones(5).double())
    for layer, inputs in ((net.left, torch.cat([x, x + 1])), (net.right, y)):
        torch.testing.assert_close(layer(net.body(inputs).relu()).mean(0), torch.zeros(layer.out_features).double())


def test_a_standard_deviation_by_pattern():
    net, x = chain(nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3))(), x_of(50, 5)
    wn.data_init(net, x, std={"2": 0.1, "[24]": 3.0})
    stds = [t.std(1) for t in pre_activations(net, x).values()]
    for found, expected in zip(stds, (1.0, 0.1, 3.0), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("skip", "expected"),
    [("0", {"0"}), (["0", "4"], {"0", "4"}), (nn.Linear, {"2", "4"}), ([nn.Conv1d, "4"], {"0", "4", "6"})],
    ids=str,
)
def test_skipped_layers_stay_and_nobody_is_warned(skip, expected):
    layers = [nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Unflatten(1, (2, 1))]
    net, x = nn.Sequential(*layers, nn.Conv1d(2, 1, 1)), x_of(20, 3, 1)
    before = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings(action="error"):
        report = wn.data_init(net, x, skip=skip)
    assert report.left_out == dict.fromkeys(expected, "is skipped")
    changed = {name[0] for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0", "2", "4", "6"} - expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": "body*"}, r"skip: 'body\*' matches no layer; names are 0, 2, \.\.\. and \* stands for anything"),
        ({"std": {"body": 0.1}}, r"std: 'body' matches no layer"),
        ({"std": {"0": -1.0}}, r"std must be a positive number, .*; got -1\.0"),
        ({"where": "post"}, r"where must be \"pre\".*got 'post'"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options, message):
    net, x = mlp(), x_of(9, 7)
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        wn.data_init(net, x, **options)
    assert_unchanged(net, before)


def test_a_forward_of_the_users_runs_the_model():
    net, x = mlp(), x_of(30, 7)
    report = wn.data_init(net, {"pixels": x}, forward=lambda model, batch: model[0](batch["pixels"]), skip="2")
    assert [layer.name for layer in report.layers] == ["0"]
    twin = mlp()
    wn.data_init(twin, [x.numpy(), x.numpy()], forward=lambda model, batch: model(torch.from_numpy(batch)))
    assert max(deviation(twin, x)) < 1e-3


@pytest.mark.parametrize("norm", [nn.Identity, partial(wn.MeanOnlyBatchNorm, 8), partial(nn.BatchNorm2d, 8)])
def test_a_dry_run_reports_and_changes_nothing(norm):
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), norm(), nn.ReLU(), nn.Conv2d(8, 2, 1)), x_of(6, 3, 9, 9)
    before = snapshot(net)
    report = wn.data_init(net, x, dry_run=True)
    assert_unchanged(net, before)
    wn.data_init(net, [x, x], dry_run=True)
    assert_unchanged(net, before)
    assert report == wn.data_init(net, x)


def stepped(net, x):
    optimizer = wn.SGD(net, lr=0.1, momentum=0.9)
    net(x).sum().backward()
    optimizer.step()
    return optimizer


def test_a_trained_model_is_told_from_a_fresh_one():
    net, x = mlp(), x_of(20, 7)
    wn.data_init(net, x, expect_fresh=True)
    optimizer = stepped(net, x)
    with pytest.warns(UserWarning, match="changes what the model computes, and an optimizer has taken steps") as caught:
        wn.data_init(net, x)
    assert caught[0].filename == __file__
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"fresh weights, .* an optimizer has taken steps on it and it has gradients"):
        wn.data_init(net, x, expect_fresh=True)
    assert_unchanged(net, before)
    del optimizer
    net.zero_grad()
    with warnings.catch_warnings(action="error"):
        wn.data_init(net, x, expect_fresh=True)


def test_batches_seen_by_a_norm_are_a_sign_of_training():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), x_of(9, 3)
    net(x)
    with pytest.raises(ValueError, match="its batch norms have seen batches"):
        wn.data_init(net, x, expect_fresh=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 7))

    def forward(self, x):
        return x + self.layers(x)


def compiled_inside(net):
    net[1] = torch.compile(net[1], backend="eager")
    return net


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize(
    "compiled",
    [partial(torch.compile, backend="eager"), compiled_inside, compiled_in_place],
    ids=["the model", "a part", "in place"],
)
def test_what_is_compiled_runs_as_it_was_written(compiled):
    net, x = nn.Sequential(nn.Linear(7, 7), Block(), nn.Linear(7, 2)), x_of(30, 7)
    twin = copy.deepcopy(net)
    plain = wn.data_init(twin, x)
    model = compiled(net)
    with torch.no_grad():
        model(x)  # hooks that come now would not fire
    assert wn.data_init(model, x) == plain
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


class Rows(nn.Module):
    """A layer as GPT-2's, which keeps its weight as (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_layers_taught_by_register_axis_are_set(monkeypatch):
    monkeypatch.setattr("weightnorm.axes._rules", copy.copy(wn.axes._rules))
    wn.register_axis(Rows, dim=1)
    net, x = nn.Sequential(Rows(4, 6), nn.ReLU(), Rows(6, 3)), x_of(5, 9, 4)
    wn.data_init(net, x)
    t = net(x).reshape(-1, 3)
    torch.testing.assert_close(t.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(t.std(0, correction=0), torch.ones(3))


class ByHand(nn.Module):
    """Weight normalization as the paper writes it, with v and g for parameters."""

    def __init__(self, layer, function):
        super().__init__()
        self.v, self.function = nn.Parameter(layer.weight.detach().clone()), function
        self.g, self.b = nn.Parameter(torch.ones(len(self.v)).double()), nn.Parameter(torch.zeros(len(self.v)).double())

    def forward(self, x):
        shape = (-1, *[1] * (self.v.ndim - 1))
        return self.function(x, self.v * (self.g / self.v.flatten(1).norm(dim=1)).view(shape), self.b)


def test_it_is_the_papers_run_when_weights_are_drawn_as_the_papers():
    """w ~ N(0, 0.05²), ``data_init`` and ``v_std=0.05``, against (v, g) by hand from eqs. 5 and 6: ten steps of Adam.

    ``v_std`` sets ‖v‖ to what it is on average, so v is drawn and then brought to that length.
    """
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(8 * 36, 4)).double()
    for layer in (net[0], net[3]):
        v = nn.init.normal_(layer.weight.data, std=0.05).flatten(1)
        v *= 0.05 * v.shape[1] ** 0.5 / v.norm(dim=1, keepdim=True)
        nn.init.zeros_(layer.bias)
    hand = nn.Sequential(ByHand(net[0], nn.functional.conv2d), net[1], net[2], ByHand(net[3], nn.functional.linear))
    x, labels = x_of(20, 3, 8, 8).double(), torch.arange(20) % 4
    t = x
    with torch.no_grad():  # eqs. 5 and 6, layer by layer: the next one sees what the corrected one puts out
        for layer in hand:
            if isinstance(layer, ByHand):
                found = layer(t).movedim(1, 0).flatten(1)
                mean, std = found.mean(1), found.std(1, correction=0)
                layer.g.copy_(1 / std)
                layer.b.copy_(-mean / std)
            t = layer(t)
    wn.data_init(net, x)
    torch.testing.assert_close(net(x), hand(x))
    ours, theirs = wn.Adam(net, lr=1e-2, v_std=0.05), torch.optim.Adam(hand.parameters(), lr=1e-2)
    for _ in range(10):
        losses = []
        for model, optimizer in ((net, ours), (hand, theirs)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    assert losses[0] < 0.5  # it has learned
    torch.testing.assert_close(net(x), hand(x), rtol=1e-7, atol=1e-9)
