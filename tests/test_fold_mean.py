"""Folding mean-only norms: the running mean goes into biases, the norms disappear, eval outputs stay."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import weightnorm as wn
from batch_norm_nets import NETS, Auxiliary, Case, build, distance, norms_of, outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:(replace_batch_norm|fold_mean) left"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # torch.onnx's own use
]

PUBLISHED = {name: NETS[name] for name in ("resnet, basic", "resnet, bottleneck", "mobilenet v2", "mobilenet v3")}
each_published = pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)


def mean_only(case, dtype=torch.float64):
    net, x = build(case, dtype)
    return net, x, wn.replace_batch_norm(net)


def moved(net):
    """Give every bias and running mean a value that shows."""
    with torch.no_grad():
        for norm in norms_of(net, wn.MeanOnlyBatchNorm).values():
            norm.running_mean.normal_()
            if norm.bias is not None:
                norm.bias.normal_()
    return net.eval()


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", NETS.values(), ids=NETS)
def test_outputs_stay_and_the_norms_are_gone(case, dtype):
    net, x, report = mean_only(case, dtype)
    before = outputs(net, x)
    names = [name for name, _ in net.named_modules()]
    weights = {name: p for name, p in net.named_parameters() if "weight" in name}
    assert wn.fold_mean(net) == len(report.replaced)
    assert wn.fold_mean(net) == 0
    assert distance(outputs(net, x), before) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert not norms_of(net, wn.MeanOnlyBatchNorm)
    assert not any(module.training for module in net.modules())
    assert [name for name, _ in net.named_modules()] == names
    assert {name: p for name, p in net.named_parameters() if "weight" in name} == weights


@each_published
def test_a_folded_net_is_as_plain_as_can_be(case):
    net, x, report = mean_only(case)
    wn.fold_mean(net)
    expected = outputs(net, x)
    new = case.make().double().eval()
    wn.replace_batch_norm(new)
    wn.fold_mean(new)
    new.load_state_dict(net.state_dict(), strict=True)
    for other in (new, copy.deepcopy(net), through_a_file(net)):
        assert torch.equal(outputs(other, x), expected)
    assert not [key for key in net.state_dict() if key.rpartition(".")[2] not in ("weight", "bias")]
    assert all(net.get_parameter(f"{layer}.bias").requires_grad for layer in report.replaced.values())


def exported(net, x):
    """Export a net, compare it with its program, and return the number of operations in that."""
    program = torch.export.export(net, (x,))
    assert distance(program.module()(x).detach(), outputs(net, x)) < 1e-12
    return sum(node.op == "call_function" for node in program.graph.nodes)


@each_published
def test_exported(case):
    net, x = build(case)
    steps = exported(net, x)
    norms = len(wn.replace_batch_norm(net).replaced)
    assert exported(net, x) > steps
    wn.fold_mean(net)
    assert exported(net, x) == steps - norms  # nothing is left of them


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet, basic", "mobilenet v3"])
@pytest.mark.parametrize("folded", [False, True], ids=["mean-only", "folded"])
def test_run_as_onnx(name, folded):
    import onnxruntime

    net, x, report = mean_only(NETS[name], torch.float32)
    if folded:
        assert wn.fold_mean(net) == len(report.replaced)
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert distance(torch.from_numpy(found), outputs(net, x)) < 1e-5


def test_by_hand():
    layer, norm = nn.Linear(1, 2), wn.MeanOnlyBatchNorm(2)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1, 2]))
        norm.bias.copy_(torch.tensor([10, 20]))
        norm.running_mean.copy_(torch.tensor([100, -200]))
    net = nn.Sequential(layer, norm)
    assert wn.fold_mean(net) == 1
    assert net[0].bias.tolist() == [-89, 222]
    assert type(net[1]) is nn.Identity


FORMS = {
    "ours": wn.weight_norm,
    "torch": parametrizations.weight_norm,
    "torch's hook": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("form", FORMS)
def test_layers_in_module_form(form):
    net, x, _ = mean_only(NETS["mobilenet v2"])
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight)  # no zero rows: torch's weight norm makes NaN of them
            FORMS[form](layer)
    before = outputs(moved(net), x)
    assert wn.fold_mean(net) > 5
    assert distance(outputs(net, x), before) < 1e-12
    wn.fold(net)
    assert distance(outputs(net, x), before) < 1e-12
    assert sorted(net.state_dict()) == sorted(folded_keys(NETS["mobilenet v2"]))


def folded_keys(case):
    net, _, _ = mean_only(case)
    wn.fold_mean(net)
    return list(net.state_dict())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_with_and_without_biases(affine, bias):
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias), wn.MeanOnlyBatchNorm(6, affine=affine))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before = outputs(moved(net.double()), x)
    assert wn.fold_mean(net) == 1
    assert distance(outputs(net, x), before) < 1e-14
    assert list(net.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("frozen", "trains"), [((), True), (("1.bias",), True), (("0.bias", "1.bias"), False), (("0.weight",), True)]
)
def test_a_bias_trains_if_either_did(frozen, trains):
    net = nn.Sequential(nn.Linear(3, 3), wn.MeanOnlyBatchNorm(3))
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    wn.fold_mean(net)
    assert net[0].bias.requires_grad is trains


@pytest.mark.parametrize("trains", [True, False])
def test_a_new_bias_without_another_trains_as_the_weight_does(trains):
    net = nn.Sequential(nn.Linear(3, 3, bias=False).requires_grad_(trains), wn.MeanOnlyBatchNorm(3, affine=False))
    wn.fold_mean(net)
    assert net[0].bias.requires_grad is trains


def test_in_inference_mode_too_the_bias_can_train():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), wn.MeanOnlyBatchNorm(3))
    with torch.inference_mode():
        wn.fold_mean(net)
    assert not net[0].bias.is_inference()
    net(torch.randn(2, 3)).sum().backward()
    assert net[0].bias.grad.tolist() == [2, 2, 2]


def test_biases_take_the_dtype_of_their_layers():
    net = nn.Sequential(nn.Linear(3, 3, bias=False).bfloat16(), moved(wn.MeanOnlyBatchNorm(3)))
    expected = (net[1].bias - net[1].running_mean).bfloat16()
    wn.fold_mean(net)
    assert torch.equal(net[0].bias, expected)


def test_training_mode_takes_away_the_folded_mean_afterwards():
    net = moved(nn.Sequential(nn.Linear(3, 3), wn.MeanOnlyBatchNorm(3)))
    x = torch.randn(5, 3)
    expected = outputs(net, x)
    wn.fold_mean(net.train())
    assert all(module.training for module in net.modules())
    torch.testing.assert_close(outputs(net, x), expected)


def test_heads_that_run_in_training_only_are_folded_and_what_training_pulls_apart_is_not():
    net, _, _ = mean_only(Case(Auxiliary, (3, 3, 9, 9)))
    wn.replace_batch_norm(net)
    net.bn = moved(wn.MeanOnlyBatchNorm(4))
    net.aux.append(wn.MeanOnlyBatchNorm(4))
    message = "fold_mean left 2 of 4 norms: aux.3 is fed by aux.2 .ReLU6.; bn is fed by conv and relu$"
    with pytest.warns(UserWarning, match=message):
        assert wn.fold_mean(net) == 2


def test_without_a_running_mean_a_norm_stays():
    net = nn.Sequential(nn.Linear(3, 3), wn.MeanOnlyBatchNorm(3, track_running_stats=False))
    with pytest.warns(UserWarning, match="fold_mean left 1 of 1 norms: 1 keeps no running mean$"):
        assert wn.fold_mean(net) == 0
    assert isinstance(net[1], wn.MeanOnlyBatchNorm)


def test_without_norms_there_is_nothing_to_do():
    with warnings.catch_warnings(action="error"):
        assert wn.fold_mean(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) == 0
