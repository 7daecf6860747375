"""From batch normalization to normalised weights and mean-only norms: eval outputs stay, and what stays says why."""

import copy
import re
import warnings
from threading import Lock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import weightnorm as wn
from batch_norm_nets import NETS, BasicBlock, Case, Recording, ResNet, block, build, distance, norms_of, outputs
from weightnorm.mean_only import feeding, replacing, tracing

pytestmark = pytest.mark.filterwarnings("ignore:replace_batch_norm left")

each_net = pytest.mark.parametrize("case", NETS.values(), ids=NETS)


def plain_name(name):
    return name.replace("_orig_mod.", "").replace("_orig_mod", "")


def layers_of(net):
    return [layer for layer in net.modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_net
def test_outputs_stay_and_the_report_tells_what_does_not_change(case, dtype):
    net, x = build(case, dtype)
    before, batch_norms = outputs(net, x), norms_of(net)
    biases = {name: norm.bias for name, norm in batch_norms.items()}
    kinds = {name: type(module) for name, module in net.named_modules() if name not in batch_norms}
    report = wn.replace_batch_norm(net)
    assert distance(outputs(net, x), before) < (1e-12 if dtype == torch.float64 else 1e-5)

    assert set(report.left) == set(case.left)
    for name, reason in case.left.items():
        assert re.search(reason, report.left[name]), report.left[name]
    assert set(report.replaced) | set(case.left) == set(map(plain_name, batch_norms))
    assert {plain_name(name) for name in norms_of(net)} == set(case.left)
    new = norms_of(net, wn.MeanOnlyBatchNorm)
    assert set(map(plain_name, new)) == set(report.replaced)
    assert all(norm.bias is biases[name] and not norm.training for name, norm in new.items())
    assert all(norm.affine is (norm.bias is not None) for norm in new.values())
    assert {name: type(module) for name, module in net.named_modules() if name in kinds} == kinds


@each_net
def test_again_changes_nothing(case):
    net, _ = build(case)
    wn.replace_batch_norm(net)
    before = copy.deepcopy(net.state_dict())
    report = wn.replace_batch_norm(net)
    assert not report.replaced
    assert set(report.left) == set(case.left)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


PUBLISHED = ["resnet, basic", "resnet, bottleneck", "mobilenet v2", "mobilenet v3"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_replaced_nets_are_and_that_they_train(name):
    net, x = build(NETS[name], torch.float32)
    keys, count = list(net.state_dict()), len(norms_of(net))
    report = wn.replace_batch_norm(net)
    assert str(report).endswith(f"\n{count} of {count} batch norms replaced")
    gone = {f"{norm}.{key}" for norm in report.replaced for key in ("weight", "running_var")}
    assert sorted(net.state_dict()) == sorted(set(keys) - gone)
    assert all(type(layer.weight) is nn.Parameter for layer in layers_of(net))
    optimizer = wn.AdamW(net.train(), lr=1e-2, backend="torch")
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(net(x), torch.tensor([0, 3])))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in net.parameters())
    assert not [key for key, p in net.named_parameters() if torch.equal(p, before[key])]


def test_by_hand():
    """w <- c w, a <- c a, μ <- c μ, c = γ/sqrt(σ² + ε)."""
    layer, norm = nn.Linear(2, 2).double(), nn.BatchNorm1d(2, eps=0.25, momentum=0.3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1, 2], [3, 4]]))
        layer.bias.copy_(torch.tensor([5, 6]))
        norm.weight.copy_(torch.tensor([3, -1]))
        norm.bias.copy_(torch.tensor([7, 8]))
        norm.running_mean.copy_(torch.tensor([2, 10]))
        norm.running_var.copy_(torch.tensor([2, 0.75]))
        norm.num_batches_tracked.fill_(9)
    net = nn.Sequential(layer, norm)
    assert wn.replace_batch_norm(net).replaced == {"1": "0"}
    assert layer.weight.tolist() == [[2, 4], [-3, -4]]
    assert layer.bias.tolist() == [10, -6]
    assert net[1].running_mean.tolist() == [4, -10]
    assert net[1].bias.tolist() == [7, 8]
    assert (net[1].num_batches_tracked, net[1].momentum, net[1].training) == (9, 0.3, True)


FORMS = {
    "ours": wn.weight_norm,
    "ours, log g": lambda layer: wn.weight_norm(layer, log_g=True),
    "torch": parametrizations.weight_norm,
    "torch, whole tensor": lambda layer: parametrizations.weight_norm(layer, dim=-1),
    "torch's hook": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", ["resnet, basic", "mobilenet v2", "transposed, grouped", "mlp"])
@pytest.mark.parametrize("form", FORMS)
def test_the_gain_goes_into_g_in_module_form(form, name):
    net, x = build(NETS[name])
    for layer in layers_of(net):
        FORMS[form](layer)
    before, keys = outputs(net, x), set(net.state_dict())
    directions = {key: p.clone() for key, p in net.state_dict().items() if key.endswith(("original1", "weight_v"))}
    report = wn.replace_batch_norm(net)
    assert not report.left
    assert distance(outputs(net, x), before) < 1e-12
    gone = {f"{norm}.{key}" for norm in report.replaced for key in ("weight", "running_var")}
    assert set(net.state_dict()) == keys - gone
    if "whole" not in form and "log" not in form and "transposed" not in name:
        assert all(torch.equal(net.state_dict()[key], v) for key, v in directions.items())


def test_weight_norm_of_a_whole_model_before_or_after_is_the_same():
    (net, x), y = build(NETS["resnet, basic"]), None
    other = copy.deepcopy(net)
    wn.replace_batch_norm(wn.weight_norm(net))
    wn.replace_batch_norm(other)
    y = other(x)
    torch.testing.assert_close(wn.weight_norm(other)(x), y)
    torch.testing.assert_close(net(x), y)


def test_a_parametrization_on_top_of_weight_norm_is_named():
    net = nn.Sequential(wn.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    nn.utils.parametrize.register_parametrization(net[0], "weight", nn.Tanh())
    assert wn.replace_batch_norm(net).left == {"1": "comes after 0, which has parameters that are computed"}


@pytest.mark.parametrize("name", ["resnet, basic", "mlp", "no affine"])
def test_without_the_gain_weights_stay(name):
    net, x = build(NETS[name])
    old, before = norms_of(net), copy.deepcopy(net.state_dict())
    count = len(norms_of(net))
    report = wn.replace_batch_norm(net, keep_gain=False)
    assert len(report.replaced) == count
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    new = norms_of(net, wn.MeanOnlyBatchNorm)
    assert all(new[key].running_mean is not old[key].running_mean for key in old)
    assert wn.data_init(net, x).layers


def test_without_running_statistics_there_is_no_scale_to_keep():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert wn.replace_batch_norm(net).left == {"1": "keeps no running variance"}
    assert wn.replace_batch_norm(net, keep_gain=False).replaced == {"1": "0"}
    assert net[1].running_mean is None
    assert not net[1].track_running_stats
    x = torch.randn(5, 3)
    torch.testing.assert_close(net.eval()(x), net[0](x) - net[0](x).mean(0) + net[1].bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    net, x = build(Case(lambda: nn.Sequential(nn.Linear(50, 70), nn.BatchNorm1d(70)), (6, 50)))
    wide = copy.deepcopy(net.to(dtype)).double()  # the same numbers
    factor = wide[1].weight / (wide[1].running_var + wide[1].eps).sqrt()
    wn.replace_batch_norm(net)
    assert (
        distance(net[0].weight.double(), factor[:, None] * wide[0].weight) < torch.finfo(dtype).eps / 4
    )  # rounded once
    assert {tensor.dtype for tensor in net.state_dict().values()} == {dtype, torch.long}
    assert distance(net(x.to(dtype)).double(), wide(x.to(dtype).double())) < 4 * torch.finfo(dtype).eps


def test_norms_of_another_dtype_than_their_layers_keep_it():
    net = nn.Sequential(nn.Linear(5, 7).bfloat16(), nn.BatchNorm1d(7))
    wn.replace_batch_norm(net)
    assert (net[0].weight.dtype, net[1].running_mean.dtype, net[1].bias.dtype) == (torch.bfloat16, *[torch.float32] * 2)


def test_flags_stay():
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.BatchNorm1d(3))
    net[0].weight.requires_grad_(False)
    net[1].eval().bias.requires_grad_(False)
    wn.replace_batch_norm(net)
    assert [p.requires_grad for p in net.parameters()] == [False, True, False, True, True, True]
    assert [module.training for module in net] == [True, False, True, True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_any_grad_mode_what_comes_out_trains(mode):
    net, x = build(NETS["mlp"])
    with mode():
        wn.replace_batch_norm(net)
    assert not any(tensor.is_inference() for tensor in (*net.parameters(), *net.buffers()))
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_tied_biases_of_norms_stay_tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[3].bias = net[1].bias
    wn.replace_batch_norm(net)
    assert net[3].bias is net[1].bias


def everything_of(net):
    """Return what tracing could change: tensors and their versions, flags, hooks and attributes of every module."""
    held = [(id(p), p._version, p.clone()) for p in (*net.parameters(), *net.buffers())]
    return held, [dict(vars(module)) for module in net.modules()], torch.get_rng_state()


def test_finding_pairs_leaves_no_trace_on_a_model_and_calls_no_hook():
    net, _ = build(Case(lambda: nn.Sequential(Recording(), ResNet(BasicBlock, depths=(1,))), (1,)))
    net[0].block.register_forward_hook(lambda *_: pytest.fail("called"))
    net.train()
    wn.replace_batch_norm(net)
    held, attributes, random = everything_of(net)
    pairs, left = feeding.find_pairs(net, wn.MeanOnlyBatchNorm)
    again, attributes_again, random_again = everything_of(net)
    assert torch.equal(random, random_again)
    assert attributes == attributes_again
    assert not net[0].seen
    assert (len(pairs), left) == (4, {})
    for (key, version, tensor), (key_again, version_again, tensor_again) in zip(held, again, strict=True):
        assert key == key_again
        assert version == version_again
        assert torch.equal(tensor, tensor_again)


def test_parameters_take_no_memory_while_it_looks():
    net = block()
    twin = tracing.twin(net, tracing.memo_of(net), training=True)
    assert all(p.is_meta for p in twin.parameters())


def test_what_cannot_be_copied_is_traced_part_by_part():
    net, x = build(Case(lambda: nn.Sequential(block(), nn.BatchNorm2d(4)), (2, 3, 5, 5)))
    net.lock = Lock()
    net[0].attention = net(x)  # not a leaf: torch does not copy such
    before = outputs(net, x)
    report = wn.replace_batch_norm(net)
    assert report.replaced == {"0.1": "0.0"}
    assert re.match(r"is fed by Sequential, which cannot be traced \(TypeError: cannot pickle", report.left["1"])
    assert distance(outputs(net, x), before) < 1e-12


def test_synchronised_over_the_same_processes():
    net = nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    group = net[1].process_group = Lock()  # cannot be copied, as a process group cannot
    assert wn.replace_batch_norm(net).replaced == {"1": "0", "3": "2"}
    assert [(net[i].sync, net[i].process_group) for i in (1, 3)] == [(True, group), (False, None)]
    assert wn.fold_mean(net) == 2


def test_what_is_compiled_is_compiled_anew():
    net, x = build(Case(block, (2, 3, 5, 5)))
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    before = outputs(compiled, x)
    assert wn.replace_batch_norm(compiled).replaced == {"1": "0"}
    assert distance(outputs(compiled, x), before) < 1e-12
    with torch.no_grad():
        net[1].bias += 1
    assert distance(outputs(compiled, x) - 1, before) < 1e-12


def test_a_failure_changes_nothing(monkeypatch):
    net, _ = build(NETS["mlp"])
    before, modules = copy.deepcopy(net.state_dict()), list(net.modules())
    scale_units, calls = replacing.scale_units, []

    def fail_at_the_second(layer, factor):
        scale_units(layer, factor)
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(replacing, "scale_units", fail_at_the_second)
    with pytest.raises(MemoryError):
        wn.replace_batch_norm(net)
    assert list(net.modules()) == modules
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("function", [wn.replace_batch_norm, wn.fold_mean])
@pytest.mark.parametrize(
    "lazy", [nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)), nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d())]
)
def test_lazy_layers_are_refused(function, lazy):
    with pytest.raises(ValueError, match=r"\d\.weight has no shape yet; run one batch through"):
        function(lazy)


@pytest.mark.parametrize("function", [wn.replace_batch_norm, wn.fold_mean])
def test_wrappers_that_hold_parameters_are_refused(function, monkeypatch):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(block())
        with pytest.raises(
            ValueError, match="DistributedDataParallel holds on to the parameters; give the model inside"
        ):
            function(nn.Sequential(net))
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(net.module[1], nn.BatchNorm2d)


def test_what_is_left_is_warned_of():
    net = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(6)])
    expected = (
        r"left 6 of 6 norms: 0 is fed by the input of Sequential; 1 is fed by 0; 2 .*; 3 is fed by 2; and 2 more$"
    )
    with pytest.warns(UserWarning, match=expected):
        report = wn.replace_batch_norm(net)
    assert str(report).splitlines()[1] == "1: stays; it is fed by 0"
    assert str(report).splitlines()[-1] == "0 of 6 batch norms replaced"


def test_where_warnings_are_errors_nothing_has_changed():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    before = net[0].weight.detach().clone()
    with warnings.catch_warnings(action="error"), pytest.raises(UserWarning, match="left 1 of 2 norms"):
        wn.replace_batch_norm(net)
    assert isinstance(net[1], nn.BatchNorm1d)
    assert torch.equal(net[0].weight, before)


def test_norms_that_did_not_count_their_batches_keep_their_means():
    net, x = build(NETS["mlp"])
    for norm in norms_of(net).values():
        norm.num_batches_tracked = None
    before = outputs(net, x)
    wn.replace_batch_norm(net)
    assert distance(outputs(net, x), before) < 1e-12
    assert net[1].num_batches_tracked == 0


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()])
def test_without_batch_norm_there_is_nothing_to_do(model):
    with warnings.catch_warnings(action="error"):
        report = wn.replace_batch_norm(model)
    assert str(report) == "0 of 0 batch norms replaced"


@pytest.mark.filterwarnings("ignore:replace_batch_norm left")
def test_a_norm_alone_is_named():
    assert wn.replace_batch_norm(nn.BatchNorm1d(3)).left == {"BatchNorm1d": "is not called by any forward"}
