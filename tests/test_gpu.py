"""On a real GPU: the kernels beside the torch path, in CUDA graphs, under a loss scaler. Skipped without one."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import weightnorm as wn
from nets import batches, conv_net, distance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RULES = {
    "sgd": partial(wn.SGD, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adam": partial(wn.Adam, lr=1e-3, amsgrad=True),
    "adamw": partial(wn.AdamW, lr=1e-3, weight_decay=0.1, v_std=0.05),
    "adamax": partial(wn.Adamax, lr=1e-3),
}


def on_gpu(dtype=torch.float32):
    net = conv_net().to("cuda", dtype)
    return net, [(x.to("cuda"), y.to("cuda")) for x, y in batches(6, dtype)]


def loss_of(net, x, y):
    return (net(x) - y).square().mean()


def train(net, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rule", RULES)
def test_kernels_beside_the_torch_path(rule, dtype, tolerance, layout):
    net, data = on_gpu(dtype)
    net.to(memory_format=layout)
    twin = copy.deepcopy(net)
    train(net, RULES[rule](net, backend="triton"), data)
    train(twin, RULES[rule](twin, backend="torch"), data)
    assert distance(net, twin) < tolerance


@pytest.mark.parametrize("length", [3, 96, 1600, 6400, 8192, 14336, 28672, 65536, 131072])
@pytest.mark.parametrize("rows", [5, 100])
def test_rows_of_every_length_beside_the_torch_path(rows, length):
    weight = nn.Parameter(torch.randn(rows, length, device="cuda"))
    twin = copy.deepcopy(weight)
    optimizers = wn.AdamW([weight], backend="triton"), wn.AdamW([twin], backend="torch")
    for _ in range(3):
        weight.grad = twin.grad = torch.randn_like(weight)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_recorded_step_replays_as_eager_steps_go(rule):
    net, data = on_gpu()
    twin = copy.deepcopy(net)
    lr = torch.tensor(1e-3, device="cuda")
    optimizer, reference = RULES[rule](net, lr=lr), RULES[rule](twin, lr=lr.clone())
    x, y = (torch.empty_like(tensor) for tensor in data[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.copy_(data[0][0]), y.copy_(data[0][1])
        train(net, optimizer, [(x, y)])
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the whole step: the gradients are the graph's own
        loss_of(net, x, y).backward()
        optimizer.step()
    train(twin, reference, data[:1])
    for step, (a, b) in enumerate(data[1:]):
        for one in (optimizer, reference):
            one.param_groups[0]["lr"].fill_(1e-3 / (step + 1))
        x.copy_(a), y.copy_(b)
        graph.replay()
        train(twin, reference, [(a, b)])
    assert distance(net, twin) < 1e-5


def test_a_step_waits_for_nothing():
    net, data = on_gpu()
    optimizer = wn.AdamW(net, fused=True)
    train(net, optimizer, data[:2])
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_loss_scaler_skips_a_bad_step():
    net, data = on_gpu()
    optimizer, scaler = wn.AdamW(net, fused=True), torch.amp.GradScaler("cuda")
    for factor in (1.0, torch.inf):
        before = copy.deepcopy(net.state_dict())
        optimizer.zero_grad()
        scaler.scale(loss_of(net, *data[0]) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert moved is (factor == 1.0)


def test_a_model_may_move_between_devices():
    net, data = on_gpu()
    twin = copy.deepcopy(net)
    optimizer, reference = wn.AdamW(net), wn.AdamW(twin, backend="torch")
    train(net, optimizer, data[:2])
    net.cpu()
    train(net, optimizer, [(x.cpu(), y.cpu()) for x, y in data[2:4]])
    net.cuda()
    train(net, optimizer, data[4:])
    train(twin, reference, data)
    assert distance(net, twin) < 1e-5


def test_one_optimizer_may_hold_several_devices():
    here, there = nn.Parameter(torch.randn(4, 8, device="cuda")), nn.Parameter(torch.randn(4, 8))
    optimizer = wn.AdamW([here, there])
    before = here.detach().clone(), there.detach().clone()
    here.grad, there.grad = torch.ones_like(here), torch.ones_like(there)
    optimizer.step()
    assert not torch.equal(here, before[0])
    assert not torch.equal(there, before[1])
