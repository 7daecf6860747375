"""What gets normalised and what stays plain, what the optimizer says about it, and what it refuses."""

import inspect
import logging
import warnings
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm

import weightnorm as wn
from nets import conv_net


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.body = nn.Linear(4, 4)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.linear, self.deconv = nn.Linear(3, 3, bias=False), nn.ConvTranspose1d(3, 3, 1, bias=False)
        self.deconv.weight = self.linear.weight


def treatments(model, **choices):
    return {
        e.name: (e.axis and (e.axis.dim, e.axis.groups)) or e.reason for e in wn.param_groups(model, **choices).entries
    }


def hooked(layer):
    """Return a layer as torch's deprecated weight_norm makes it."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.utils.weight_norm(layer)


MODELS = {
    "conv net": (
        conv_net(),
        {"0.weight": (0, 1), "2.weight": (1, 1), "5.weight": (0, 1), "0.bias": "a vector"},
    ),
    "norm layers": (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), {"1.weight": "a vector"}),
    "grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), {"weight": (1, 2)}),
    "rnn": (nn.LSTM(3, 4), {"weight_ih_l0": (0, 1), "weight_hh_l0": (0, 1), "bias_ih_l0": "a vector"}),
    "attention": (nn.MultiheadAttention(4, 2), {"in_proj_weight": (0, 1), "out_proj.weight": (0, 1)}),
    "tied": (Tied(), {"embed.weight": "tied to an embedding", "body.weight": (0, 1)}),
    "embedding": (nn.Embedding(3, 4), {"weight": "an embedding"}),
    "unknown": (
        Odd(),
        {
            "table": "no output axis known for Odd.table (register_axis)",
            "linear.weight": "shared by layers with different output axes",
        },
    ),
    "parametrized": (
        torch_weight_norm(nn.Linear(3, 4)),
        {"parametrizations.weight.original1": "carries another parametrization", "bias": "a vector"},
    ),
    "torch's old hook": (
        hooked(nn.Linear(3, 4)),
        {"weight_v": "carries another parametrization", "weight_g": "carries another parametrization"},
    ),
    "two models": ([nn.Linear(3, 4), nn.Linear(3, 4)], {"0.weight": (0, 1), "1.weight": (0, 1)}),
}


@pytest.mark.parametrize("model", MODELS)
def test_what_of_a_model_is_normalised(model):
    model, expected = MODELS[model]
    found = treatments(model)
    assert {name: found[name] for name in expected} == expected
    parts = model if isinstance(model, list) else [model]
    assert len(found) == sum(len(list(part.parameters())) for part in parts)


def test_choices_by_name_and_by_type():
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert treatments(net, skip=["2.*"])["2.weight"] == "skipped"
    assert treatments(net, skip=[nn.Conv1d])["0.weight"] == "skipped"
    assert treatments(Tied(), include=["embed*"])["embed.weight"] == (0, 1)
    groups = wn.param_groups(net, no_decay=["*.bias", nn.BatchNorm1d])
    assert {e.name for e in groups.entries if not e.decays} == {"0.bias", "1.weight", "1.bias", "2.bias"}
    assert sum(group.get("weight_decay", 1) == 0 for group in groups) == 1
    assert wn.AdamW(groups, weight_decay=0.3).param_groups[0]["weight_decay"] == 0.3


def test_one_choice_needs_no_list_and_wrappers_of_torch_are_not_part_of_names():
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(4, 2))
    assert [e.decays for e in wn.param_groups(net, no_decay="*.bias").entries] == [True, False, True, False]
    assert treatments(net, skip=nn.Linear)["1.weight"] == "skipped"
    compiled = nn.Module()
    compiled._orig_mod = net  # as torch.compile returns it
    assert treatments(compiled, skip="0.*")["0.weight"] == "skipped"


def test_other_kinds_of_parameter_stay_plain():
    eighth = nn.Parameter(torch.ones(4, 3).to(torch.float8_e4m3fn), requires_grad=False)
    optimizer = wn.SGD(nn.ParameterList([eighth, torch.ones(4, 3), torch.ones(3)]), lr=0.1)
    for parameter in optimizer.param_groups[0]["params"][1:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert ["scale" in optimizer.state[p] for p in optimizer.param_groups[0]["params"]] == [False, True, False]
    stack = nn.Parameter(torch.randn(2, 3, 4))
    optimizer = wn.SGD([{"params": [stack], "dim": (0, 1)}], lr=0.1)
    stack.grad = torch.ones_like(stack)
    optimizer.step()
    assert optimizer.state[stack]["scale"].shape == (2, 3, 1)


def test_no_decay_and_own_options_hold_under_another_rule_too():
    net = nn.Linear(5, 4)
    adamw = partial(optim.AdamW, lr=0.1, weight_decay=0.5)
    optimizer = wn.wrap(optim.Muon, wn.param_groups(net, no_decay="weight"), lr=1e-9, g_class=adamw)
    lengths = net.weight.detach().norm(dim=1)
    net.weight.grad = torch.zeros(4, 5)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach().norm(dim=1), lengths)
    plain = {"params": [net.bias], "lr": 7e-4, "weight_decay": 0.0}  # a vector: nothing of it is normalised
    optimizer = wn.wrap(optim.Muon, [{"params": [net.weight]}, plain], g_class=adamw)
    net.bias.grad = torch.ones(4)
    optimizer.step()
    of_biases = optimizer._engines[0]._rest.param_groups[1]
    assert (of_biases["lr"], of_biases["weight_decay"], of_biases["betas"]) == (7e-4, 0.0, (0.9, 0.999))


def test_bare_tensors_are_normalised_when_they_are_matrices():
    matrix, conv, column = torch.randn(3, 4), torch.randn(2, 3, 1, 5), torch.randn(1, 8, 1)
    parameters = [nn.Parameter(x) for x in (matrix, conv, column, torch.randn(5), torch.tensor(1.0))]
    optimizer = wn.SGD(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert ["scale" in optimizer.state[p] for p in parameters] == [True, True, False, False, False]


@pytest.mark.parametrize(("options", "shape"), [({"dim": 1}, (1, 4)), ({"dim": -1}, (1, 4)), ({"dim": None}, (1, 1))])
def test_a_group_says_its_axis(options, shape):
    weight, plain = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    groups = [{"params": [weight], **options}, {"params": [plain], "weight_norm": False}]
    optimizer = wn.SGD(groups, lr=0.1)
    weight.grad = plain.grad = torch.ones(3, 4)
    optimizer.step()
    assert optimizer.state[weight]["scale"].shape == shape
    assert "scale" not in optimizer.state[plain]


def test_named_parameters_keep_their_names():
    optimizer = wn.AdamW(conv_net().named_parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"  # as torch keeps them
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_one_line_says_what_was_normalised(capsys, caplog, monkeypatch):
    line = "3 of 6 tensors normalised; print(weightnorm.param_groups(model)) for the list"
    with caplog.at_level(logging.INFO, logger="weightnorm"):
        wn.AdamW(conv_net())
    assert [record.getMessage() for record in caplog.records] == [line]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(logging.getLogger("weightnorm"), "propagate", False)  # as if logging was not set up
    wn.AdamW(conv_net())
    assert capsys.readouterr().err == f"weightnorm: {line}\n"


def linear():
    return nn.Linear(3, 4)


REFUSED = {
    "flattened shards": (lambda: wn.AdamW([nn.Parameter(torch.ones(12))]), "nothing to normalise.*FSDP2"),
    "all left plain": (
        lambda: wn.AdamW([{"params": linear().parameters(), "weight_norm": False}]),
        "nothing to normalise",
    ),
    "LBFGS": (lambda: wn.wrap(optim.LBFGS, linear()), r"LBFGS cannot step on \(v, g\): .*use a first-order"),
    "SparseAdam": (lambda: wn.wrap(optim.SparseAdam, linear()), "SparseAdam cannot step"),
    "SparseAdam for g": (lambda: wn.wrap(optim.SGD, linear(), g_class=optim.SparseAdam), "SparseAdam cannot step"),
    "Muon alone": (lambda: wn.wrap(optim.Muon, linear()), "Muon steps on matrices only.*g_class="),
    "no rate to keep a share of": (
        lambda: wn.wrap(optim.Muon, linear(), lr=0.0, g_class=optim.AdamW),
        "with g_class the learning rate must not be 0",
    ),
    "differentiable": (lambda: wn.AdamW(linear(), differentiable=True), "differentiable must be False, since the step"),
    "negative lr": (lambda: wn.AdamW(linear(), lr=-1), "Invalid learning rate"),
    "v_std": (lambda: wn.AdamW(linear(), v_std=0.0), "v_std must be None or a positive number; got 0.0"),
    "g_lr": (lambda: wn.AdamW(linear(), g_lr="cube"), "g_lr must be \"sqrt\" or a number >= 0; got 'cube'"),
    "decay": (lambda: wn.AdamW(linear(), decay="v"), 'decay must be "both" or "g"; got \'v\''),
    "weight_norm": (
        lambda: wn.AdamW([{"params": linear().parameters(), "weight_norm": "yes"}]),
        "weight_norm must be None, True or False",
    ),
    "dim": (lambda: wn.AdamW([{"params": [linear().weight], "dim": 5}]), "dim=5 names no axis"),
    "zero for False": (
        lambda: wn.AdamW([{"params": [linear().weight], "weight_norm": 0}]),
        "weight_norm must be None, True or False; got 0",
    ),
    "output": (lambda: wn.AdamW([{"params": [linear().weight], "dim": "output"}]), "dim must be an axis.*got 'output'"),
    "groups": (lambda: wn.AdamW([{"params": [linear().weight], "groups": 3}]), "groups=3 does not divide axis 0"),
    "endless v": (lambda: wn.AdamW(linear(), v_std=float("inf")), "v_std must be None or a positive number"),
    "one g_lr": (lambda: wn.AdamW([{"params": [linear().weight], "g_lr": None}]), "g_lr must be"),
    "twice": (lambda: wn.AdamW([linear().weight] * 2), "a parameter appears twice"),
    "no such name": (lambda: wn.param_groups(linear(), skip=["hed*"]), r"skip='hed\*' matches no parameter; names are"),
    "lazy": (lambda: wn.AdamW(nn.LazyLinear(3)), "weight has no shape yet; run one batch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_why_and_what_instead(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wn.AdamW(linear().weight), r"got one tensor. Pass \[tensor\]"),
        (lambda: wn.AdamW([linear(), nn.Parameter(torch.ones(3))]), "a list of models must hold nothing else"),
        (lambda: wn.AdamW(linear(), momentum=0.9), "unexpected keyword argument 'momentum'"),
        (lambda: wn.wrap(optim.SGD, linear(), lrr=0.9), "unexpected keyword argument 'lrr'"),
    ],
)
def test_wrong_kinds_of_argument(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_a_refused_group_is_not_added():
    optimizer = wn.AdamW(linear())
    with pytest.raises(ValueError, match="decay must be"):
        optimizer.add_param_group({"params": linear().parameters(), "decay": "none"})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_that_cannot_be_pulled_back_are_refused_before_anything_moves(kind):
    linear = nn.Linear(3, 4)
    other = nn.Embedding(5, 3, sparse=True) if kind == "sparse" else nn.Linear(3, 4, dtype=torch.complex64)
    optimizer = wn.SGD([*linear.parameters(), other.weight], lr=0.1)
    before = linear.weight.detach().clone()
    linear(torch.ones(2, 3)).sum().backward()
    x = torch.tensor([1, 2]) if kind == "sparse" else torch.ones(2, 3, dtype=torch.complex64)
    other(x).abs().sum().backward()
    with pytest.raises(ValueError, match=rf"the gradient of a weight of shape .* is {kind}.*weight_norm=False"):
        optimizer.step()
    assert torch.equal(linear.weight, before)
    assert not optimizer.state


def test_sparse_embeddings_that_stay_plain_work():
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 4))
    optimizer = wn.SGD(net, lr=0.1)
    before = net[0].weight.detach().clone()
    net(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert (net[0].weight != before).any(dim=1).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adamax"])
def test_signatures_are_torchs_and_ours(name):
    ours, theirs = inspect.signature(getattr(wn, name)), inspect.signature(getattr(optim, name))
    assert list(ours.parameters) == [*theirs.parameters, "v_std", "g_lr", "decay", "stochastic_rounding", "backend"]
    for parameter in theirs.parameters.values():
        assert ours.parameters[parameter.name].default == parameter.default
    positional = getattr(wn, name)(linear(), 0.123)
    assert all(group["lr"] == 0.123 for group in positional.param_groups)


def test_the_other_rule_of_wrap_keeps_its_options_and_its_share_of_the_schedule():
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    optimizer = wn.wrap(optim.Muon, net, lr=0.02, g_class=partial(optim.AdamW, lr=3e-4, betas=(0.5, 0.6)))
    normalized, plain = optimizer.param_groups
    assert (normalized["lr"], plain["lr"], plain["betas"]) == (0.02, 3e-4, (0.5, 0.6))
    optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1)
    net(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    of_g, of_biases = optimizer._engines[0]._rest.param_groups
    assert of_g["lr"] == pytest.approx(3e-5)
    assert of_biases["lr"] == pytest.approx(3e-5)
    assert of_g["betas"] == (0.5, 0.6)


def test_rules_that_need_whole_matrices_are_refused_on_shards(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = dist.init_device_mesh("cpu", (1,))
        adamw = optim.AdamW
        for place, refused in ((Shard(0), True), (Replicate(), False)):
            weight = nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [place]))
            if refused:
                with pytest.raises(ValueError, match=r"Muon mixes .* shape \(4, 3\) is sharded.*elementwise"):
                    wn.wrap(optim.Muon, [weight], g_class=adamw)
            else:
                wn.wrap(optim.Muon, [weight], g_class=adamw)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("place", ["shard", "replicate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_tensors_walk_the_path_of_plain_ones(place, dtype, tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = dist.init_device_mesh("cpu", (1,))
        placement = [Shard(0) if place == "shard" else Replicate()]
        plain = nn.Parameter(torch.randn(4, 6).to(dtype))
        spread = nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, placement))
        optimizers = [wn.AdamW([p], lr=0.1) for p in (plain, spread)]
        for step in range(4):
            gradient = torch.randn(4, 6).to(dtype)
            plain.grad, spread.grad = gradient, distribute_tensor(gradient, mesh, placement)
            if step == 2:
                with torch.no_grad():
                    plain.mul_(2)
                    spread.mul_(2)
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(spread.full_tensor(), plain.data)
    finally:
        dist.destroy_process_group()
