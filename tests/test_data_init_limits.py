"""Data-dependent initialisation where it stops: constant units, failing passes, what cannot be set."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import weightnorm as wn
from feedforward import assert_unchanged, snapshot, x_of
from weightnorm.data_dependent.moments import Moments, moments_of, together


def test_units_that_do_not_vary_are_left_alone_and_named():
    class Inputs(nn.Module):
        """Half the features constant, one of them to rounding only."""

        def forward(self, x):
            return torch.cat([x, torch.full_like(x, 3.0) * (1 + 1e-7 * x.sign())], 1)

    net = nn.Sequential(Inputs(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        net[1].weight[0] = 0  # a dead unit: all bias
        net[1].weight[2, :2] = 0  # sees the constant features only
        net[1].weight[3] *= 1e-4  # a small unit is not a constant one
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(
        UserWarning, match=r"^data_init left units 0, 2 of 5 in layer 1 alone: they do not vary"
    ) as caught:
        report = wn.data_init(net, torch.randn(50, 2))
    assert caught[0].filename == __file__
    assert report.layers[0].left_alone == (0, 2)
    for name in ("1.weight", "1.bias"):
        same = [torch.equal(a, b) for a, b in zip(net.state_dict()[name], before[name], strict=True)]
        assert same == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("mean", "std", "dtype", "expected"),
    [
        ([5, 0.1], [1e-6, 0.1], torch.float32, [True, False]),  # 4 ulps of 5 are 2.4e-6
        ([5, 0.1], [1e-5, 0.1], torch.float32, [False, False]),
        ([5, 0.1], [1e-1, 0.1], torch.bfloat16, [True, False]),  # 4 ulps of 5 are 0.16
        ([0, 30], [1e-6, 1], torch.float32, [True, False]),  # terms of size 30 that cancel leave rounding
        ([0, 30], [1e-4, 1], torch.float32, [False, False]),
        ([0, 0], [0.0, 0.0], torch.float32, [True, True]),  # a dead layer
    ],
)
def test_the_floor_under_which_a_unit_is_constant(mean, std, dtype, expected):
    count, mean, std = torch.full((2,), 10.0), torch.tensor(mean, dtype=torch.float32), torch.tensor(std)
    assert Moments(count, mean, std.square() * count, dtype).is_constant().tolist() == expected


def test_moments_add_up_whatever_is_empty():
    t = torch.randn(9, 2, dtype=torch.float64) + 5
    whole = moments_of(t, -1)
    for cuts in ([0, 0, 9], [9, 0, 0], [2, 0, 7], [1, 1, 7]):
        added = together(moments_of(part, -1) for part in t.split(cuts))
        for name in ("count", "mean", "std"):
            torch.testing.assert_close(getattr(added, name), getattr(whole, name))


def test_a_batch_of_one_sets_nothing_in_a_linear_layer():
    net, batch = nn.Linear(3, 12), torch.randn(1, 3)
    before = snapshot(net)
    with pytest.warns(UserWarning, match=r"units 0, 1, 2, 3, 4, 5, 6, 7 and 4 more of 12 in layer Linear alone"):
        wn.data_init(net, batch)
    assert_unchanged(net, before)


class Poison(nn.Module):
    """Passes its input on, or what ``what`` makes of it."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


def interrupt(x):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (lambda x: x * float("nan"), ValueError, r"^layer 5 puts out NaN, infinity or .*nothing was set"),
        (lambda x: torch.where(x == x.max(), float("inf"), x), ValueError, r"^layer 5 puts out NaN, infinity"),
        (lambda x: x * 1e30, ValueError, r"^layer 5 puts out NaN, infinity"),  # its square is past float32's range
        (lambda x: x[:0], ValueError, r"^layer 5 puts out nothing\. Pass a batch that is not empty"),
        (lambda x: x[:, :-1], RuntimeError, "shapes"),
        (interrupt, KeyboardInterrupt, None),
    ],
    ids=["nan", "inf", "overflow", "empty", "the model's own error", "ctrl-c"],
)
def test_all_or_nothing(what, error, message):
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(), Poison(what), nn.Linear(8, 4), nn.ReLU()]
    net, batch = nn.Sequential(*layers, nn.Linear(4, 2)), x_of(20, 6)
    net[2].eval()
    before = snapshot(net)
    with pytest.raises(error, match=message):
        wn.data_init(net, batch)
    assert_unchanged(net, before)
    assert not any(module._forward_hooks for module in net.modules())


def test_buffers_come_back_however_the_model_moves_them():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("in_place", torch.zeros(2))
            self.register_buffer("replaced", torch.zeros(2), persistent=False)
            self.register_buffer("expanded", torch.arange(3).expand(4, 3))  # has no memory of its own to copy to
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            self.in_place += 1
            self.replaced = self.replaced + 1
            return self.layer(x)

    net = Counting()
    found = dict(net.named_buffers())
    wn.data_init(net, x_of(9, 3))
    assert all(buffer is found[name] for name, buffer in net.named_buffers())
    assert not any(buffer.any() for buffer in (net.in_place, net.replaced))


class Tied(nn.Module):
    """Every reason to leave a layer out; ``body`` and ``head`` are set."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.same, self.head, self.idle = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 2)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.normed, self.scores = spectral_norm(nn.Linear(5, 5)), nn.Linear(5, 7)
        self.rnn = nn.GRU(3, 2)
        self.same.weight, self.scores.weight = self.body.weight, self.table.weight

    def forward(self, index):
        x = self.normed(self.frozen(self.same(self.body(self.table(index)).tanh())))
        return self.head(x), self.scores(x)


def test_layers_that_cannot_be_set_are_named_with_the_reason():
    net, batch = Tied(), torch.randint(0, 7, (30,))
    before = snapshot(net)
    with pytest.warns(UserWarning, match=r"^data_init did not set every layer: .*idle never ran$") as caught:
        report = wn.data_init(net, batch)
    assert caught[0].filename == __file__
    assert [layer.name for layer in report.layers] == ["body", "head"]
    assert report.left_out == {
        "idle": "never ran",
        "frozen": "is frozen",
        "normed": "carries another parametrization",
        "rnn": "is recurrent",
        "scores": "shares a parameter with a layer of another kind",
        "same": "shares a parameter with a layer that ran before",
    }
    assert_unchanged(net, before, {"body.weight", "body.bias", "same.weight", "head.weight", "head.bias"})


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), r"could be set: the model has none\. Pass a model with"),
        (nn.Linear(3, 2).requires_grad_(False), r"could be set: Linear is frozen"),
        (
            nn.Sequential(nn.Identity(), spectral_norm(weight_norm(nn.Linear(3, 2)))),
            r"could be set: 1 carries another parametrization",
        ),
        (nn.LazyLinear(2), r"weight has no shape yet; run one batch"),
    ],
    ids=["no layer", "frozen", "two parametrizations", "lazy"],
)
def test_a_model_with_nothing_to_set_is_refused(net, message):
    with pytest.raises(ValueError, match=message):
        wn.data_init(net, torch.randn(4, 3))


@pytest.mark.parametrize("std", [0, -1.0, float("nan"), float("inf")])
def test_a_standard_deviation_that_is_none_is_refused(std):
    with pytest.raises(ValueError, match=r"std must be a positive number, or a dict .* to such; got"):
        wn.data_init(nn.Linear(3, 2), torch.randn(4, 3), std=std)


@pytest.mark.parametrize("batch", [None, np.zeros((4, 3)), [torch.randn(4, 3), "text"]], ids=type)
def test_other_batches_are_refused(batch):
    wrong = batch[1] if isinstance(batch, list) else batch
    with pytest.raises(TypeError, match=rf"batch must be a tensor, .* or a list of these; got {type(wrong).__name__}"):
        wn.data_init(nn.Linear(3, 2), batch)


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.zeros(4, 3, dtype=torch.long)], ids=["axes", "dtype"])
def test_inputs_and_labels_of_a_loader_are_not_taken_for_two_batches(labels):
    with pytest.raises(TypeError, match=r"\[inputs, labels\] do: pass the inputs"):
        wn.data_init(nn.Linear(3, 2), [torch.randn(4, 3), labels])


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="empty list"):
        wn.data_init(nn.Linear(3, 2), [])


class Odd(nn.Linear):
    """Puts out something that no units are found in."""

    def forward(self, x):
        return {"dict": {"t": x}, "transposed": super().forward(x).T}[self.what]


@pytest.mark.parametrize(
    ("what", "message"),
    [("dict", "puts out a dict, no tensor"), ("transposed", r"puts out shape \(2, 4\), where 2 units .* on axis -1")],
)
def test_layers_in_whose_output_no_units_are_found_are_named(what, message):
    net = nn.Sequential(nn.Linear(3, 3), Odd(3, 2))
    net[1].what = what
    with pytest.warns(UserWarning, match=f"did not set every layer: 1 {message}"):
        report = wn.data_init(net, torch.randn(4, 3))
    assert [layer.name for layer in report.layers] == ["0"]


def test_where_batch_norm_does_all_the_work_there_is_nothing_to_do():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))
    x, before = torch.randn(5, 3), copy.deepcopy(net.state_dict())
    report = wn.data_init(net, x)
    assert not report.layers
    assert list(report.left_out) == ["0", "3"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_model_of_recurrent_layers_alone_is_refused():
    with pytest.raises(ValueError, match="could be set: LSTM is recurrent"):
        wn.data_init(nn.LSTM(3, 2), torch.randn(5, 4, 3))
