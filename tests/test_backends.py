"""Which backend steps, refusals with their reason, loss scaling, and weights rounded at random."""

import copy
from functools import partial

import pytest
import torch
from torch import nn, optim

import weightnorm as wn
from nets import batches, conv_net, distance, train
from weightnorm.optim import backends
from weightnorm.optim.engine import Engine
from weightnorm.optim.fused import Fused


def weights(dtype=torch.float32):
    return [nn.Parameter(torch.randn(4, 8, dtype=dtype)), nn.Parameter(torch.randn(4, dtype=dtype))]


def kinds(optimizer):
    return {type(engine) for engine in optimizer._engines}


CHOICES = {
    "float32": (partial(wn.AdamW), torch.float32, {Fused}),
    "float64": (partial(wn.SGD, lr=0.1), torch.float64, {Fused}),
    "bfloat16": (partial(wn.AdamW), torch.bfloat16, {Engine}),
    "asked for foreach": (partial(wn.AdamW, foreach=True), torch.float32, {Engine}),
    "asked for no fused step": (partial(wn.AdamW, fused=False), torch.float32, {Engine}),
    "asked for torch": (partial(wn.AdamW, backend="torch"), torch.float32, {Engine}),
    "betas on the device": (
        partial(wn.AdamW, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False),
        torch.float32,
        {Engine},
    ),
    "another rule": (partial(wn.wrap, optim.RMSprop), torch.float32, {Engine}),
    "the same rule, wrapped": (partial(wn.wrap, optim.AdamW), torch.float32, {Fused}),
    "a subclass of a known rule": (partial(wn.wrap, type("Mine", (optim.AdamW,), {})), torch.float32, {Engine}),
    "another rule for g": (partial(wn.wrap, optim.AdamW, g_class=optim.SGD), torch.float32, {Engine}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_auto_takes_kernels_where_they_fit(case):
    make, dtype, expected = CHOICES[case]
    params = weights(dtype)
    optimizer = make(params)
    assert kinds(optimizer) == expected
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_backends_share_an_optimizer():
    wide, narrow = weights(), weights(torch.bfloat16)
    optimizer = wn.AdamW(wide + narrow)
    assert kinds(optimizer) == {Engine, Fused}
    before = [p.detach().clone() for p in wide + narrow]
    for p in wide + narrow:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(map(torch.equal, wide + narrow, before))


REFUSALS = {
    "no such backend": (partial(wn.AdamW, backend="cuda"), torch.float32, "must be one of auto, torch, triton, numba"),
    "dtype": (partial(wn.AdamW, backend="numba"), torch.bfloat16, "its dtype is torch.bfloat16"),
    "rule": (partial(wn.wrap, optim.RMSprop, backend="numba"), torch.float32, "only SGD, Adam, AdamW and Adamax"),
    "foreach": (partial(wn.AdamW, foreach=True, backend="numba"), torch.float32, "asks for torch's own step"),
    "g_class": (partial(wn.wrap, optim.AdamW, g_class=optim.SGD, backend="triton"), torch.float32, "g_class"),
    "stochastic float16": (partial(wn.AdamW, stochastic_rounding=True), torch.float16, "is for bfloat16 weights"),
    "stochastic option": (partial(wn.AdamW, stochastic_rounding="yes"), torch.float32, "must be True or False"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_backend_cannot_do_is_refused_with_the_reason(case):
    make, dtype, reason = REFUSALS[case]
    with pytest.raises(ValueError, match=reason):
        make(weights(dtype))


@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_a_missing_compiler_is_named_when_asked_for_and_else_done_without(backend, monkeypatch):
    monkeypatch.setattr(backends, "_is_installed", lambda name: False)
    with pytest.raises(ValueError, match=rf"{backend} is not installed \(pip install"):
        wn.AdamW(weights(), backend=backend)
    assert kinds(wn.AdamW(weights())) == {Engine}


def test_triton_steps_on_no_cpu_tensors_but_in_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="it is on cpu"):
        wn.AdamW(weights(), backend="triton")


@pytest.mark.parametrize(("options", "announced"), [({}, False), (dict(fused=True), True), (dict(foreach=True), False)])
def test_only_a_step_asked_to_be_fused_announces_that_it_unscales(options, announced):
    for optimizer in (wn.AdamW(weights(), **options), copy.deepcopy(wn.AdamW(weights(), **options))):
        assert getattr(optimizer, "_step_supports_amp_scaling", False) is announced


@pytest.mark.parametrize("backend", ["torch", "triton", "numba"])
@pytest.mark.parametrize("rule", [partial(wn.SGD, lr=0.05, momentum=0.9), partial(wn.AdamW, lr=0.01)])
def test_a_fused_step_unscales_and_skips_by_itself(rule, backend):
    net, data = conv_net(), batches(3, torch.float32)
    twin = copy.deepcopy(net)
    optimizer = rule(net, fused=True, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, y in data:
        optimizer.zero_grad()
        scaler.scale((net(x) - y).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    reference = rule(twin, backend="torch")
    train(twin, reference, data)
    assert distance(net, twin) < 1e-5

    train(net, optimizer, data)  # and without the scaler: nothing of it is left behind
    train(twin, reference, data)
    assert distance(net, twin) < 1e-5

    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
    optimizer.zero_grad()
    scaler.scale((net(data[0][0]) - data[0][1]).square().mean() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, before[1][index][name]), (index, name)


def test_a_learning_rate_that_is_a_tensor_is_read_at_every_step():
    params, twins = weights(), None
    twins = copy.deepcopy(params)
    lr = torch.tensor(0.1)
    optimizer, reference = wn.SGD(params, lr=lr), wn.SGD(twins, lr=0.1)
    for rate in (0.1, 0.01):
        optimizer.param_groups[0]["lr"].fill_(rate)
        reference.param_groups[0]["lr"] = rate
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad
        optimizer.step()
        reference.step()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_stochastic_rounding_moves_by_less_than_a_last_bit_on_average(backend):
    weight = nn.Parameter(torch.full((64, 32), 1.0, dtype=torch.bfloat16))
    optimizer = wn.SGD([weight], lr=1.0, stochastic_rounding=True, backend=backend)
    push = torch.zeros(64, 32)
    push[:, ::2] = 2.0**-11  # a quarter of the last bit below 1
    for _ in range(8):
        weight.grad = push.bfloat16()
        optimizer.step()
    state = optimizer.state[weight]
    assert "master" not in state
    assert all(value.dtype == torch.float32 for value in state.values())
    exact = nn.Parameter(torch.full((64, 32), 1.0))
    reference = wn.SGD([exact], lr=1.0, backend="torch")
    for _ in range(8):
        exact.grad = push.clone()
        reference.step()
    pushed, expected = weight[:, ::2].float().mean().item() - 1, exact[:, ::2].mean().item() - 1
    assert pushed == pytest.approx(expected, rel=0.15)  # n = 1024 draws a step; to the nearest it would be 0
    assert weight[:, 1::2].float().mean().item() - 1 == pytest.approx(exact[:, 1::2].mean().item() - 1, abs=4e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_stochastic_rounding_leaves_float32_and_special_numbers_alone(backend):
    weight, twin = nn.Parameter(torch.randn(4, 8)), None
    twin = copy.deepcopy(weight)
    weight.grad = twin.grad = torch.randn(4, 8)
    wn.SGD([weight], lr=0.1, stochastic_rounding=True, backend=backend).step()
    wn.SGD([twin], lr=0.1, backend=backend).step()
    assert torch.equal(weight, twin)
    narrow = nn.Parameter(torch.randn(4, 8, dtype=torch.bfloat16))
    narrow.grad = torch.zeros_like(narrow)
    narrow.grad[1, 2] = torch.nan
    before = narrow.detach().clone()
    wn.SGD([narrow], lr=0.1, stochastic_rounding=True, backend=backend).step()
    assert narrow.isnan().any(dim=1).tolist() == [False, True, False, False]
    assert torch.equal(narrow[[0, 2, 3]], before[[0, 2, 3]])  # a zero step rounds nothing
