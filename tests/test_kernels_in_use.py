"""The module form and the optimizers on Triton's kernels, here in its interpreter; and what happens where they fail."""

import copy

import pytest
import torch
from torch import nn

import weightnorm as wn
from weightnorm.kernels import compose as kernels
from weightnorm.kernels import trust
from weightnorm.kernels.compose_launches import Alone
from weightnorm.layers import compose
from weightnorm.optim import backends, trial

CPU = torch.device("cpu")


@pytest.fixture
def counted(monkeypatch):
    """Let the kernels take weights on the CPU, and count the passes that they make."""
    calls = {"forward": [], "backward": []}
    monkeypatch.setattr(kernels, "HOMES", {"cpu"})
    monkeypatch.setattr(compose, "_DTYPES", ())  # nothing for torch's own kernels
    monkeypatch.setattr(trust, "_found", {})
    trust.works("the weight", CPU, compose._composes_rightly)
    for name, seen in calls.items():
        monkeypatch.setattr(Alone, name, counting(seen, lambda _: 1, getattr(Alone, name)))
        monkeypatch.setattr(kernels, name, counting(seen, lambda args: len(args[0]), getattr(kernels, name)))
    return calls


def counting(seen, count, run):
    """Return a function that runs another and notes for how many weights."""

    def noting(*args):
        seen.append(count(args))
        return run(*args)

    return noting


def net():
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 2, 3), nn.Flatten(), nn.Linear(14, 2))


def gradients(model, x, passes=1):
    for _ in range(passes):
        model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def test_layers_compose_and_pull_back_by_kernels(counted):
    model, x = wn.weight_norm(net()), torch.randn(2, 3, 7)
    found = gradients(model, x)
    assert counted == {"forward": [1, 1, 1], "backward": [1, 1, 1]}
    with torch.no_grad():
        model(x)
    assert len(counted["forward"]) == 6
    kernels.HOMES.clear()
    other = copy.deepcopy(model)
    other.zero_grad()
    for one, expected in zip(found, gradients(other, x), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


def test_a_cached_model_takes_one_pass_each_way(counted):
    model, x = wn.weight_norm(net()), torch.randn(2, 3, 7)
    other = copy.deepcopy(model)
    with wn.cached(model):
        gradients(model, x, passes=2)
    assert counted == {"forward": [3], "backward": [3]}
    kernels.HOMES.clear()
    for one, expected in zip(model.parameters(), gradients(other, x, passes=2), strict=True):
        torch.testing.assert_close(one.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_cached_weight_without_gradient_is_left_out(counted):
    model = wn.weight_norm(nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]))
    with wn.cached(model):
        model[0](torch.ones(1, 3)).sum().backward()
    assert counted["backward"] == [2]
    assert model[0].parametrizations.weight.original0.grad is not None
    assert model[1].parametrizations.weight.original0.grad is None


def test_second_derivatives_are_those_of_the_formula(counted):
    layer, x = wn.weight_norm(nn.Linear(3, 2).double()), torch.randn(4, 3).double()
    other = copy.deepcopy(layer)

    def penalty(layer):
        grads = torch.autograd.grad(layer(x).tanh().sum(), list(layer.parameters()), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        return [p.grad for p in layer.parameters()]

    found = penalty(layer)
    assert counted["forward"]
    kernels.HOMES.clear()
    for one, expected in zip(found, penalty(other), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_kernels_that_fail_their_trial_are_left_alone(monkeypatch, fault):
    def broken(*_):
        if fault == "raises":
            raise RuntimeError("no kernel image is available\nfor this device")
        return torch.zeros(3, 40)

    monkeypatch.setattr(kernels, "HOMES", {"cpu"})
    monkeypatch.setattr(compose, "_DTYPES", ())
    monkeypatch.setattr(trust, "_found", {})
    monkeypatch.setattr(Alone, "forward", broken)
    plain = nn.Linear(3, 2)
    layer, x = wn.weight_norm(copy.deepcopy(plain)), torch.randn(4, 3)
    trust._found.clear()
    told = "no kernel image is available\\)" if fault == "raises" else "results are wrong"
    with pytest.warns(UserWarning, match=told):
        torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer(x), plain(x))  # and says so once


def test_the_step_passes_its_trial_and_a_wrong_one_does_not(monkeypatch):
    make = backends.launcher_of("triton")
    assert trial.steps_rightly(CPU, make)
    monkeypatch.setattr(make, "__call__", lambda *_: None)
    assert not trial.steps_rightly(CPU, make)


@pytest.mark.parametrize(("right", "expected"), [(True, "triton"), (False, "torch")])
def test_auto_takes_kernels_on_a_gpu_only_after_their_trial(monkeypatch, right, expected):
    monkeypatch.setattr(trust, "_found", {})
    monkeypatch.setattr(trial, "steps_rightly", lambda *_: right)
    monkeypatch.setattr(backends, "_why_not", lambda *_: "")

    class OnGpu:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(trust, "is_recording", lambda _: False)
    if right:
        assert backends.backend_of("auto", torch.optim.SGD, None, {}, OnGpu()) == expected
    else:
        with pytest.warns(UserWarning, match="for the step fail on cuda:0"):
            assert backends.backend_of("auto", torch.optim.SGD, None, {}, OnGpu()) == expected
    assert backends.backend_of("triton", torch.optim.SGD, None, {}, OnGpu()) == "triton"  # who asks gets it
