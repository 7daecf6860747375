"""Data-dependent initialisation on models that do what models should not, each found by trying."""

import copy
import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import weightnorm as wn
from feedforward import assert_unchanged, deviation, mlp, pre_activations, snapshot, x_of


class Composed(nn.Module):
    """Two layers, and a way of its own from one to the other."""

    def __init__(self, between, width=4):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(width, width), nn.Linear(width, width), between

    def forward(self, x):
        return self.between(self, x)


@pytest.mark.parametrize("wrap", [wn.weight_norm, parametrizations.weight_norm], ids=["ours", "torch"])
def test_layers_without_bias_in_module_form_are_scaled(wrap):
    net = nn.Sequential(wrap(nn.Linear(4, 8, bias=False)), nn.ReLU(), wrap(nn.Linear(8, 3, bias=False)))
    x = x_of(50, 4)
    assert not wn.data_init(net, x).left_out
    assert max(deviation(net, x)) < 1e-3


def test_attention_without_bias_in_module_form_is_scaled():
    net = wn.weight_norm(nn.TransformerEncoderLayer(8, 2, 16, 0.0, bias=False))
    assert not wn.data_init(net, x_of(6, 5, 8)).left_out


class Score(nn.Module):
    """Puts out the derivative of a net by its input, as energy models do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8, bias=False), wn.MeanOnlyBatchNorm(8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates_leaves_no_graph_behind():
    net, x = Score(), x_of(50, 4)
    wn.data_init(net, x)
    assert not net.net[1].running_mean.requires_grad
    copy.deepcopy(net)
    assert max(deviation(net.net, x)) < 1e-3


@pytest.mark.parametrize("several", [False, True])
def test_a_model_that_writes_to_its_input_gets_a_copy(several):
    net = Composed(lambda self, x: self.b(self.a(x.sub_(100).div_(50)).relu()))
    net.norm = nn.BatchNorm1d(4)  # for it there is another pass
    x = torch.rand(60, 4) * 255
    before = x.clone()
    wn.data_init(net, [x[:40], x[40:]] if several else x)
    assert torch.equal(x, before)
    torch.testing.assert_close(net(x).std(0, correction=0), torch.ones(4))


def cached_around(net, x):
    with parametrize.cached():
        wn.data_init(net, x)


def cached_by_ours(net, x):
    with wn.cached(net):
        wn.data_init(net, x)


@pytest.mark.parametrize("call", [cached_around, cached_by_ours])
def test_where_weights_are_cached_nothing_is_set(call):
    net, x = wn.weight_norm(mlp()), x_of(50, 7)
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"unit \d was given the standard deviation 1 and has .*cache of weights"):
        call(net, x)
    assert_unchanged(net, before)


def test_a_layer_that_runs_now_and_then_is_named():
    def sometimes(self, x):
        return self.b(x) if random.random() < 0.5 else self.a(x)

    net, x = Composed(sometimes), x_of(20, 4)
    before = snapshot(net)
    random.seed(1)  # one that lets the last pass miss a layer
    with pytest.raises(ValueError, match=r"layer [ab] ran in one pass and not in the next"):
        wn.data_init(net, [x, x + 1])
    assert_unchanged(net, before)


def test_a_padding_mask_in_eval_mode_does_not_end_in_nested_tensors():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    wn.data_init(net, {"src": x_of(3, 5, 8), "src_key_padding_mask": mask}, train=False)
    assert torch.backends.mha.get_fastpath_enabled()


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_attention_with_a_forward_of_its_own_is_left_out():
    net = nn.Sequential(OwnAttention(8, 2), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="0 is attention with a forward of its own"):
        assert [layer.name for layer in wn.data_init(net, x_of(6, 5, 8)).layers] == ["1"]


def test_a_dry_run_shows_the_hooks_weight_as_it_was():
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        net = nn.utils.weight_norm(nn.Linear(4, 3))
    before = net.weight.detach().clone()
    wn.data_init(net, x_of(40, 4), dry_run=True)
    torch.testing.assert_close(net.weight, before)


def test_warnings_that_are_errors_leave_nothing_set():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).requires_grad_(False))
    x, before = x_of(9, 4), copy.deepcopy(net.state_dict())
    with warnings.catch_warnings(action="error"), pytest.raises(UserWarning, match="1 is frozen"):
        wn.data_init(net, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Buffers(nn.Module):
    """Buffers of every kind, and what a forward may do to them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("none", None)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("grown", torch.zeros(2))
        self.register_buffer("last", torch.zeros(2))
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        self.none = torch.ones(2)
        self.sparse.mul_(2)
        self.grown.resize_(5).fill_(1)
        self.last += 1
        return self.layer(x)


def test_buffers_of_every_kind_come_back():
    net = Buffers()
    wn.data_init(net, x_of(9, 3))
    assert net.none is None
    assert torch.equal(net.sparse.to_dense(), torch.eye(3))
    assert net.grown.tolist() == net.last.tolist() == [0, 0]


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
def test_inside_inference_mode(made_in):
    with made_in():
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    x = x_of(30, 4)
    with torch.inference_mode():
        report = wn.data_init(net, x)
        assert report.left_out == {"0": "feeds batch normalization, 1"}
        torch.testing.assert_close(net.train()(x).std(0, correction=0), torch.ones(3))


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def test_a_layer_with_noise_of_its_own_has_the_same_again():
    net, x = nn.Sequential(Noisy(6, 5), nn.ReLU(), Noisy(5, 2)), x_of(40, 6)
    wn.data_init(net, x)
    assert max(deviation(net, x)) < 1e-3


def test_weights_tied_by_their_memory_are_set_once():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), x_of(30, 4)
    net[2].weight = nn.Parameter(net[0].weight.data)
    with pytest.warns(UserWarning, match="2 shares a parameter with a layer that ran before"):
        wn.data_init(net, x)
    torch.testing.assert_close(
        torch.from_numpy(pre_activations(net, x)[net[0]]).std(1, correction=0), torch.ones(4).double()
    )


def test_attentions_kind_of_layer_is_set_where_it_is_an_ordinary_one():
    layer = nn.modules.linear.NonDynamicallyQuantizableLinear
    net, x = nn.Sequential(layer(4, 5), nn.ReLU(), nn.Linear(5, 2)), x_of(30, 4)
    assert len(wn.data_init(net, x).layers) == 2


def test_a_norm_that_only_some_batches_reach_is_seen():
    net = Composed(lambda self, x: self.b(self.norm(self.a(x)) if len(x) > 10 else self.a(x)))
    net.norm = wn.MeanOnlyBatchNorm(4)
    wn.data_init(net, [x_of(9, 4), x_of(20, 4)])
    assert net.norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (mlp, {"std": None}, ValueError, "std must be a positive number, or a dict"),
        (
            mlp,
            {"skip": None},
            TypeError,
            "skip must be a pattern of names, a type of layer, or a list of these; got None",
        ),
        (mlp, {"skip": [3]}, TypeError, r"skip must be a pattern .*; got \[3\]"),
        (mlp, {"forward": 3}, TypeError, "forward must be a function of model and batch; got 3"),
        (lambda: [mlp()], {}, TypeError, "data_init takes a module; got list"),
        (lambda: mlp().to("meta"), {}, ValueError, "0.weight has no values yet, being on the meta device"),
        (
            lambda: nn.Linear(7, 2, dtype=torch.complex64),
            {},
            ValueError,
            "Linear puts out torch.complex64, which has no",
        ),
        (lambda: nn.Linear(7, 0), {}, ValueError, "Linear has no weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_cannot_be_is_refused_in_a_line(make, options, error, message):
    net = make()
    x = x_of(9, 7)
    x = x.to(torch.complex64) if "complex" in message else x
    with pytest.raises(error, match=message):
        wn.data_init(net, x, **options)


def test_other_order_in_another_batch_is_told():
    net = Composed(lambda self, x: self.b(self.a(x)) if x[0, 0] > 0 else self.a(self.b(x)))
    x = x_of(40, 4).abs()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="another order of layers"):
        wn.data_init(net, [x, -3 * x])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_functional_calls_with_other_weights_are_noticed():
    net = Composed(lambda self, x: self.b(torch.func.functional_call(self.a, {"weight": 2 * torch.eye(4)}, (x,))))
    with pytest.warns(UserWarning, match="every layer: a runs with another weight than its own"):
        assert [layer.name for layer in wn.data_init(net, x_of(30, 4)).layers] == ["b"]
