"""On a real GPU: the kernels beside the torch path, in CUDA graphs, under a loss scaler. Skipped without one."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import weightnorm as wn
from nets import batches, conv_net, distance
from weightnorm import formula
from weightnorm.axes import Axis
from weightnorm.compare.step import Recorded
from weightnorm.kernels import compose

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


LAST = torch.channels_last
# Shape, where the vectors lie, layout; all ways that rows take through the kernels.
WEIGHTS = {
    "short rows": ((300, 27), Axis(0), torch.contiguous_format),
    "rows": ((768, 768), Axis(0), torch.contiguous_format),
    "rows of 4608": ((512, 512, 3, 3), Axis(0), torch.contiguous_format),
    "rows walked along": ((300, 16384), Axis(0), torch.contiguous_format),
    "rows spread": ((10, 70_000), Axis(0), torch.contiguous_format),
    "whole tensor": ((1536, 1536), Axis(None), torch.contiguous_format),
    "wav2vec2": ((768, 48, 128), Axis(2), torch.contiguous_format),
    "columns": ((100, 5000), Axis(1), torch.contiguous_format),
    "columns walked along": ((1030, 5000), Axis(1), torch.contiguous_format),
    "transposed": ((512, 256, 16), Axis(1), torch.contiguous_format),
    "grouped": ((256, 128, 4, 4), Axis(1, groups=4), torch.contiguous_format),
    "channels last": ((256, 128, 3, 3), Axis(0), LAST),
    "transposed channels last": ((256, 128, 3, 3), Axis(1), LAST),
    "single elements": ((3000, 1), Axis(0), torch.contiguous_format),
}
NARROW = [torch.float32, torch.bfloat16, torch.float16]


def to_compose(name, dtype, grad_layout=None):
    """Return v, g, the axis, and a gradient at w."""
    shape, axis, layout = WEIGHTS[name]
    v, grad = (torch.randn(shape, device="cuda").to(dtype, memory_format=layout) for _ in range(2))
    v[:1, :1] = 0
    g = formula.decompose(axis.split(v), axis.kept(v))[1]
    return v, g, axis, grad if grad_layout is None else grad.contiguous(memory_format=grad_layout)


def by_formula(v, g, axis, grad):
    split, kept = axis.split(v), axis.kept(v)
    grad_v, grad_g = formula.pull_back(axis.split(grad), split, g, kept)
    return formula.compose(split, g, kept).reshape(v.shape), grad_v.reshape(v.shape), grad_g


def by_kernels(v, g, axis, grad):
    (grad_v,), (grad_g,) = compose.backward([grad], [v], [g], [axis])
    return compose.forward([v], [g], [axis])[0], grad_v, grad_g


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_composed_weights_and_gradients_are_as_near_to_float64_as_torchs(name, dtype):
    layouts = [None] if len(WEIGHTS[name][0]) != 4 else [None, LAST, torch.contiguous_format]
    for v, g, axis, grad in (to_compose(name, dtype, layout) for layout in layouts):
        assert compose.one(v, g, axis)
        for _ in range(2):  # by Triton's own way, and by the short one
            ours = by_kernels(v, g, axis, grad)
        truth = by_formula(v.double(), g.double(), axis, grad.double())
        largest = [truth[0].abs().max(), truth[1].abs().max(), axis.rows(grad.double()).norm(dim=1).max()]
        assert ours[0].stride() == ours[1].stride() == v.stride()
        for result, torchs, true, scale in zip(ours, by_formula(v, g, axis, grad), truth, largest, strict=True):
            error, allowed = ((x.double() - true).abs().max() for x in (result, torchs))
            assert result.dtype == torchs.dtype
            units = 32 if dtype == torch.float64 else 1  # where truth is no truer than torch
            assert error <= 2 * allowed + units * torch.finfo(result.dtype).eps * scale


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_composed_together_is_alone_to_the_last_bit(dtype):
    vs, gs, axes, grads = (list(each) for each in zip(*(to_compose(name, dtype) for name in WEIGHTS), strict=True))
    for _ in range(2):
        together = compose.forward(vs, gs, axes), *compose.backward(grads, vs, gs, axes)
    for ours, *one in zip(zip(*together, strict=True), vs, gs, axes, grads, strict=True):
        assert all(map(torch.equal, ours, by_kernels(*one)))


def test_a_recorded_composition_replays_with_new_values():
    vs, gs, axes, grads = (
        list(each) for each in zip(*(to_compose(name, torch.float32) for name in WEIGHTS), strict=True)
    )

    def run():
        return compose.forward(vs, gs, axes), *compose.backward(grads, vs, gs, axes)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for _ in range(2):
        for x in (*vs, *gs, *grads):
            x.normal_()
        graph.replay()
        for found, expected in zip(recorded, run(), strict=True):
            assert all(map(torch.equal, found, expected))
        vs_elsewhere = [v.clone() for v in vs]  # other addresses in the tables that eager passes use
        compose.forward(vs_elsewhere, gs, axes)


def test_composing_waits_for_nothing():
    vs, gs, axes, grads = (
        list(each) for each in zip(*(to_compose(name, torch.float32) for name in WEIGHTS), strict=True)
    )
    for _ in range(2):
        compose.forward(vs, gs, axes), compose.backward(grads, vs, gs, axes)
    grads = [grad.clone() for grad in grads]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compose.forward(vs, gs, axes), compose.backward(grads, vs, gs, axes)
        by_kernels(vs[0], gs[0], axes[0], grads[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_weight_of_more_than_2_to_the_31_elements():
    v = torch.randn(2**20 + 3, 2**11 + 8, device="cuda", dtype=torch.bfloat16)
    g = torch.ones(len(v), 1, device="cuda")
    w, grad_v, grad_g = by_kernels(v, g, Axis(0), v)
    for rows in (slice(0, 5), slice(-5, None)):
        for result, expected in zip((w, grad_v, grad_g), by_formula(v[rows], g[rows], Axis(0), v[rows]), strict=True):
            torch.testing.assert_close(result[rows], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_mean_only_batch_norm_on_the_gpu_is_that_on_the_cpu(dtype, tolerance, layout):
    t = (torch.randn(8, 6, 9, 9) + 3).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn(8, 6, 9, 9).to(dtype)
    found = []
    for device in ("cuda", "cpu"):
        layer, own = wn.MeanOnlyBatchNorm(6).to(device), t.to(device).requires_grad_()
        nn.init.ones_(layer.bias)
        out = layer(own)
        out.backward(grad.to(device))
        assert out.stride() == own.grad.stride() == t.stride()
        found.append([x.detach().cpu().float() for x in (out, own.grad, layer.bias.grad, layer.running_mean)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_a_shift_of_zero_on_narrow_activations_changes_no_bit():
    t = torch.randn(64, 5, 33, device="cuda").bfloat16()
    assert torch.equal(wn.MeanOnlyBatchNorm(5).cuda().eval()(t), t)  # it goes through batch_norm, whose 1/sqrt is 1


def test_mean_only_batch_norm_waits_for_nothing():
    layer, t = wn.MeanOnlyBatchNorm(6).cuda(), torch.randn(8, 6, 9, 9, device="cuda", requires_grad=True)
    layer(t).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(t).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("several", [False, True])
def test_data_init_on_the_gpu_hands_on_what_the_next_pass_will(several):
    net = nn.Sequential(
        nn.Linear(6, 8), nn.Dropout(), nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
    ).cuda()
    x, outputs = torch.randn(7, 5, 6, device="cuda"), []
    before = torch.cuda.get_rng_state()
    with net.register_forward_hook(lambda net, args, output: outputs.append(output)):
        wn.data_init(net, [x, x + 1] if several else x)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    if not several:
        torch.testing.assert_close(net(x), outputs[-1])


class ByKeyword(nn.Module):
    """Attention with dropout, called by keyword alone."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, 0.3, batch_first=True)

    def forward(self, x):
        return self.attention(query=x, key=x, value=x)[0]


def test_data_init_replays_the_noise_of_calls_by_keyword():
    net, outputs = ByKeyword().cuda(), []
    x = torch.randn(7, 5, 8, device="cuda")
    with net.register_forward_hook(lambda net, args, output: outputs.append(output)):
        wn.data_init(net, x)
    torch.testing.assert_close(net(x), outputs[-1])


@pytest.mark.parametrize("form", ["optimizer", "module"])
@pytest.mark.parametrize("arm", ["plain", "weight_norm", "weight_norm_mean_only", "batch_norm"])
def test_a_comparisons_recorded_steps_are_its_eager_ones(arm, form):
    from weightnorm.compare.arms import ARMS
    from weightnorm.compare.loop import Comparison, Options
    from weightnorm.tasks import load_task

    losses = []
    for records in (True, False):
        comparison = Comparison(load_task("fashion", "cuda"), Options([ARMS[arm]], 2, (0.001,), form=form))
        comparison.prepare()
        (run,) = comparison.runs
        if not records:
            run._records = False
            run._prepare_step()
        comparison.train()
        losses.append(torch.tensor([epoch.step_loss for epoch in run.epochs]))
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


@pytest.mark.parametrize("form", ["optimizer", "module"])
@pytest.mark.parametrize("arm", ["plain", "weight_norm"])
@pytest.mark.parametrize("name", ["vae", "vae_cifar10", "draw"])
def test_generative_models_train_in_recorded_steps(name, arm, form, monkeypatch):
    """With noise, clipping and averages of weights among them; eager steps draw other noise: losses only fall alike."""
    from weightnorm.compare.arms import ARMS
    from weightnorm.compare.loop import Comparison, Options
    from weightnorm.tasks import load_task
    from weightnorm.tasks.hub import HubData

    def load(self, folder):
        height, width, *colours = self.shape
        images = torch.randint(256, (1, *(colours or [1]), height, width), dtype=torch.uint8).expand(500, -1, -1, -1)
        return {"train_images": images, "test_images": images[:100]}

    monkeypatch.setattr(HubData, "load", load)
    torch.manual_seed(0)
    options = {"draw": {"glimpses": 4}}.get(name, {})
    task = load_task(name, "cuda", limit=500, options=options)
    finals = []
    for records in (True, False):
        comparison = Comparison(task, Options([ARMS[arm]], 6, (), form=form, rates=task.rates))
        comparison.prepare()
        (run,) = comparison.runs
        if not records:
            run._records = False
            run._prepare_step()
        comparison.train()
        losses = [epoch.train["loss"] for epoch in run.epochs]
        assert losses[-1] < losses[0]
        assert all(images.is_cuda for images in run.pictures().values())
        finals.append(losses[-1])
    assert finals[0] == pytest.approx(finals[1], rel=0.1)


def test_gradients_are_clipped_in_a_graph():
    nets = [nn.Linear(64, 32).cuda() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [wn.Adam(net, lr=torch.tensor(0.01, device="cuda"), v_std=0.05, capturable=True) for net in nets]
    x, norms = torch.randn(16, 64, device="cuda"), []

    def step(net, optimizer):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        norm = wn.clip_grad_norm_(optimizer, 0.01)
        optimizer.step()
        return norm

    replay = Recorded(lambda _: step(nets[0], optimizers[0]))
    for _ in range(8):
        norms.append((float(replay(x)), float(step(nets[1], optimizers[1]))))
    assert norms[-1][0] > 0.01
    torch.testing.assert_close(*torch.tensor(norms).T, rtol=1e-4, atol=0)
    torch.testing.assert_close(nets[0].weight, nets[1].weight, rtol=1e-4, atol=1e-6)
