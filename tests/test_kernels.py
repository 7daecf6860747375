"""The fused kernels step as the torch path does: Triton's in its interpreter, numba's as they are."""

import copy
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import oracle
import weightnorm as wn
from nets import batches, conv_net, distance, train
from weightnorm.kernels import triton_step
from weightnorm.optim.fused import Fused

RULES = {
    "sgd": (wn.SGD, dict(lr=0.05, weight_decay=0.1)),
    "sgd momentum": (wn.SGD, dict(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1)),
    "sgd nesterov": (wn.SGD, dict(lr=0.05, momentum=0.9, nesterov=True, maximize=True)),
    "adam": (wn.Adam, dict(lr=0.01, weight_decay=0.1, v_std=0.05)),
    "adam amsgrad": (wn.Adam, dict(lr=0.01, betas=(0.5, 0.9), amsgrad=True)),
    "adamw": (wn.AdamW, dict(lr=0.01, weight_decay=0.1, g_lr="sqrt")),
    "adamw no momentum": (wn.AdamW, dict(lr=0.01, weight_decay=0.1, decay="g", betas=(0.0, 0.99))),
    "adamax": (wn.Adamax, dict(lr=0.01, weight_decay=0.1)),
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def tensor(*shape, dtype=torch.float32, layout=torch.contiguous_format, grad_layout=None, **group):
    """Return a param group of one tensor and its gradients' layout."""
    value = torch.randn(*shape, dtype=dtype).to(memory_format=layout)
    return group | {"params": [nn.Parameter(value)], "grad_layout": grad_layout or layout}


def zoo(dtype=torch.float32):
    """Return tensors of every shape and layout that takes a path of its own."""
    last = torch.channels_last
    groups = {
        "matrix": tensor(5, 7, dtype=dtype),
        "aligned": tensor(6, 64, dtype=dtype),
        "ragged": tensor(3, 130, dtype=dtype),
        "one row": tensor(1, 9, dtype=dtype, weight_norm=True),
        "one element a row": tensor(6, 1, dtype=dtype, weight_norm=True),
        "one element": tensor(1, 1, dtype=dtype, weight_norm=True),
        "tiny rows": tensor(37, 3, dtype=dtype),
        "whole tensor": tensor(4, 5, dtype=dtype, dim=None),
        "stacked matrices": tensor(2, 3, 8, dtype=dtype, dim=(0, 1)),
        "last axis": tensor(12, 10, dtype=dtype, dim=1),
        "transposed": tensor(4, 6, 3, dtype=dtype, dim=1),
        "grouped": tensor(6, 4, 3, dtype=dtype, dim=1, groups=2),
        "channels last": tensor(8, 4, 3, 3, dtype=dtype, layout=last),
        "contiguous gradient": tensor(8, 4, 3, 3, dtype=dtype, layout=last, grad_layout=torch.contiguous_format),
        "channels-last gradient": tensor(8, 4, 3, 3, dtype=dtype, grad_layout=last),
        "transposed channels last": tensor(4, 6, 3, 3, dtype=dtype, dim=1, layout=last),
        "mixed transposed": tensor(4, 6, 3, 3, dtype=dtype, dim=1, layout=last, grad_layout=torch.contiguous_format),
        "grouped, mixed": tensor(6, 4, 3, 3, dtype=dtype, dim=1, groups=2, grad_layout=last),
        "bias": tensor(5, dtype=dtype),
        "plain": tensor(30, 50, dtype=dtype, weight_norm=False),
        "plain, mixed": tensor(8, 4, 3, 3, dtype=dtype, weight_norm=False, layout=last, grad_layout=None),
        "empty": tensor(0, 5, dtype=dtype),
    }
    groups["transposed view"] = {"params": [nn.Parameter(torch.randn(7, 5, dtype=dtype).t())]}
    groups["gradient with gaps"] = tensor(10, 6, dtype=dtype, grad_layout="gaps")
    groups["expanded gradient"] = tensor(4, 6, dtype=dtype, grad_layout="expanded")
    groups["matrix"]["params"][0].data[1] = 0  # a vector without direction
    groups["plain, mixed"]["grad_layout"] = torch.contiguous_format
    return groups


def laid_out(gradient, layout):
    """Return a gradient in a layout, by name or by torch's own."""
    if layout == "gaps":
        return torch.cat([gradient, gradient[:, :2]], dim=1)[:, : gradient.shape[1]]
    if layout == "expanded":
        return gradient[:1].expand_as(gradient)
    return gradient if layout == torch.preserve_format else gradient.contiguous(memory_format=layout)


def steps(groups, rule, backend, count=3, **more):
    """Return copies of the groups' tensors after some steps, and their optimizer."""
    make, options = RULES[rule]
    groups = copy.deepcopy(groups)
    layouts = [group.pop("grad_layout", torch.preserve_format) for group in groups.values()]
    optimizer = make(list(groups.values()), backend=backend, **options | more)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for group, layout in zip(groups.values(), layouts, strict=True):
            for p in group["params"]:
                gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.grad = laid_out(gradient, layout)
        optimizer.step()
    return [group["params"][0] for group in groups.values()], optimizer


def assert_alike(groups, ours, theirs, tolerance):
    for name, one, other in zip(groups, ours[0], theirs[0], strict=True):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert one.stride() == other.stride()
        kept, known = ours[1].state[one], theirs[1].state[other]
        assert set(known) <= set(kept) | {"step"}, name  # the kernels count SGD's steps too
        for key, value in known.items():
            torch.testing.assert_close(
                kept[key], value, rtol=tolerance, atol=tolerance, check_layout=False,
                msg=lambda text, name=name, key=key: f"{name}, {key}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_every_layout_steps_as_on_the_torch_path(rule, dtype, backend):
    groups = zoo(dtype)
    ours, theirs = steps(groups, rule, backend), steps(groups, rule, "torch")
    assert any(isinstance(engine, Fused) for engine in ours[1]._engines)
    assert_alike(groups, ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamax"])
@pytest.mark.parametrize(("walked", "few"), [(1 << 20, 0), (64, 0), (64, 100)], ids=["walk", "walk and split", "split"])
def test_long_rows_step_as_on_the_torch_path(rule, walked, few, monkeypatch):
    small = dict(
        _ON_CHIP=32, _STRIDE=32, _SHARED=8, _ACROSS=2, _WALKED=walked, _FEW=few, _WARPS=dict.fromkeys(range(64), 4)
    )
    for name, value in small.items():
        monkeypatch.setattr(triton_step, name, value)
    chosen = ("matrix", "whole tensor", "last axis", "grouped", "contiguous gradient", "mixed transposed")
    groups = {name: group for name, group in zoo().items() if name in chosen}
    groups |= {"long": tensor(3, 130), "long and narrow": tensor(2, 75, dtype=torch.bfloat16)}
    ours, theirs = steps(groups, rule, "triton", count=2), steps(groups, rule, "torch", count=2)
    assert_alike(groups, ours, theirs, 2e-2)
    exact = {name: group for name, group in groups.items() if name != "long and narrow"}
    assert_alike(exact, ours_of(ours, groups, exact), ours_of(theirs, groups, exact), TOLERANCE[torch.float32])


def ours_of(result, groups, chosen):
    return [tensor for name, tensor in zip(groups, result[0], strict=True) if name in chosen], result[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["sgd momentum", "adamw", "adamax"])
def test_narrow_weights_keep_a_wide_master(rule, dtype):
    groups = {name: group for name, group in zoo(dtype).items() if name not in ("plain", "bias", "plain, mixed")}
    ours, theirs = steps(groups, rule, "triton"), steps(groups, rule, "torch")
    assert_alike(groups, ours, theirs, TOLERANCE[dtype])
    for ours_p, theirs_p in zip(ours[0], theirs[0], strict=True):
        if ours_p.numel():
            ours_master, theirs_master = ours[1].state[ours_p]["master"], theirs[1].state[theirs_p]["master"]
            assert ours_master.dtype == torch.float32
            torch.testing.assert_close(ours_master, theirs_master, rtol=2e-5, atol=2e-5)


def test_a_weight_changed_by_its_user_wins_over_its_master():
    weight = nn.Parameter(torch.randn(4, 8, dtype=torch.bfloat16))
    optimizer = wn.SGD([weight], lr=0.1, backend="triton")
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight[1] *= 3
    changed = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, changed)
    assert torch.equal(optimizer.state[weight]["master"], changed.float())


def test_dtypes_mix_in_one_optimizer():
    groups = {}
    for dtype in TOLERANCE:
        groups |= {
            f"{name} {dtype}": tensor(*shape, dtype=dtype) for name, shape in {"matrix": (6, 24), "bias": (6,)}.items()
        }
    ours, theirs = steps(groups, "adamw", "triton"), steps(groups, "adamw", "torch")
    for name, one, other in zip(groups, ours[0], theirs[0], strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[one.dtype], atol=TOLERANCE[one.dtype], msg=name)
        widest = torch.promote_types(one.dtype, torch.float32)
        state = ours[1].state[one]
        assert state["exp_avg"].dtype == (widest if one.ndim > 1 else one.dtype)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_bfloat16_gradients_on_float32_weights(backend):
    weight, bias = nn.Parameter(torch.randn(6, 24)), nn.Parameter(torch.randn(6))
    twin = copy.deepcopy(weight)
    gradient = torch.randn(6, 24).bfloat16()
    weight.grad_dtype = torch.bfloat16
    weight.grad, twin.grad = gradient, gradient.float()
    wn.AdamW([weight, bias], lr=0.01, backend=backend).step()
    wn.AdamW([twin, bias], lr=0.01, backend="torch").step()
    torch.testing.assert_close(weight, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_hundreds_of_tensors(backend):
    sizes = torch.randint(1, 12, (150, 2)).tolist()
    groups = {"all": {"params": [nn.Parameter(torch.randn(rows, length)) for rows, length in sizes]}}
    ours, theirs = steps(groups, "adamw", backend, count=2), steps(groups, "adamw", "torch", count=2)
    for one, other in zip(ours[1].param_groups[0]["params"], theirs[1].param_groups[0]["params"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_nothing_outside_a_tensor_is_written(backend):
    """Weights, gradients and state lie between NaN: one read or written too far would show."""

    def guarded(like, value):
        room = torch.full((like.numel() + 64,), torch.nan)
        inside = room[32 : 32 + like.numel()].view(like.shape)
        inside.copy_(value)
        return room, inside

    rooms, parameters = [], []
    for shape in [(5, 7), (4, 64), (3, 130), (9, 1), (40,)]:
        room, inside = guarded(torch.empty(shape), torch.randn(shape))
        rooms.append(room)
        parameters.append(nn.Parameter(inside))
    optimizer = wn.Adam(
        [{"params": parameters[:-1], "weight_norm": True}, {"params": parameters[-1:]}], backend=backend
    )
    for _ in range(3):
        for p in parameters:
            room, p.grad = guarded(p, torch.randn(p.shape))
            rooms.append(room)
            for name, value in optimizer.state[p].items():
                if value.ndim:
                    room, optimizer.state[p][name] = guarded(value, value)
                    rooms.append(room)
        optimizer.step()
    for room in rooms:
        assert room[:32].isnan().all()
        assert room[-32:].isnan().all()
        assert room[32:-32].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter, about what is not chosen
@pytest.mark.parametrize("backend", ["torch", "triton", "numba"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_in_a_plain_parameter_in_its_element(bad, rule, backend):
    make, options = RULES[rule]
    weight, bias, masked = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(1500)), nn.Parameter(torch.ones(3))
    masked.data[1] = -torch.inf
    optimizer = make([weight, bias, masked], backend=backend, **options | {"weight_decay": 0.0})
    for _ in range(2):
        weight.grad, bias.grad, masked.grad = torch.randn(4, 6), torch.randn(1500), torch.zeros(3)
        weight.grad[2, 3] = bias.grad[700] = bad
        optimizer.step()
    assert weight.isfinite().all(dim=1).tolist() == [True, True, False, True]
    assert bias.isfinite().logical_not().nonzero().flatten().tolist() in ([700], [])  # Adamax bears infinity
    assert masked.tolist() == [1.0, -torch.inf, 1.0]
    assert optimizer.state[bias].get("exp_inf", torch.tensor(bad)).isfinite().all().item() is False or bad != bad


@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_autograd_sees_that_a_step_changed_its_weights(backend):
    weight = nn.Parameter(torch.randn(4, 6))
    loss = (weight * torch.ones(4, 6, requires_grad=True)).sum()
    loss.backward(retain_graph=True)
    wn.SGD([weight], lr=0.1, backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_gradients_are_let_go_after_a_step(backend):
    weight = nn.Parameter(torch.randn(4, 6))
    weight.grad = torch.ones_like(weight)
    optimizer = wn.SGD([weight], lr=0.1, backend=backend)
    optimizer.step()
    known = weakref.ref(weight.grad)
    optimizer.zero_grad()
    assert known() is None


@pytest.mark.parametrize("backend", ["torch", "triton", "numba"])
def test_a_momentum_restarted_takes_a_first_step_again(backend):
    def restarted(backend):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 6))
        optimizer = wn.SGD([weight], lr=0.1, momentum=0.9, dampening=0.5, backend=backend)
        for step in range(4):
            weight.grad = torch.randn(4, 6)
            if step == 2:
                for name in ("momentum_buffer", "g.momentum_buffer"):
                    optimizer.state[weight].pop(name)
            optimizer.step()
        return weight

    torch.testing.assert_close(restarted(backend), restarted("torch"))


def test_state_made_in_the_constructor_can_be_copied():
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = wn.SGD([weight], lr=0.1, backend="triton")
    assert not optimizer.state[weight]["master"].requires_grad
    copy.deepcopy(optimizer).step()


@pytest.mark.slow
def test_a_forked_child_goes_on_without_its_parents_threads():
    program = """
import os, torch, weightnorm as wn
def stepped(weight):
    optimizer = wn.AdamW([weight], backend="numba")
    weight.grad = torch.ones_like(weight).cumsum(1)
    optimizer.step()
    return weight.detach()
torch.manual_seed(0)
first = torch.randn(64, 40)
expected = stepped(torch.nn.Parameter(first.clone()))
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(stepped(torch.nn.Parameter(first.clone())), expected) else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=200)


@pytest.mark.parametrize("backend", ["triton", "numba"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sgd_beside_the_numpy_oracle(momentum, backend):
    weight, target = nn.Parameter(torch.randn(4, 7).double()), torch.randn(4, 7).double()
    path = oracle.sgd(weight.detach().numpy().copy(), lambda w: 2 * (w - target.numpy()), 10, 0.1, momentum=momentum)
    optimizer = wn.SGD([weight], lr=0.1, momentum=momentum, backend=backend)
    for expected in path:
        weight.grad = 2 * (weight.detach() - target)
        optimizer.step()
        np.testing.assert_allclose(weight.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "rule"), [("triton", "adamw"), ("numba", "adamw"), ("numba", "sgd momentum")])
def test_a_thousand_steps_are_no_further_from_float64_than_the_torch_path(backend, rule):
    """Beside runs of the torch path that start one unit in the last place apart, which are what rounding does.

    Not beside the torch path itself: float32 ``v + Δv`` rounds equal steps equally, which is a bias of its own.
    """
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    make, options = RULES[rule]

    def trained(backend, seed=None, dtype=torch.float32):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for p in net.parameters():
                up = torch.rand(p.shape, generator=generator) < 0.5
                p.data = torch.nextafter(p.data, torch.where(up, torch.inf, -torch.inf))
        net.to(dtype)
        optimizer = make(net, backend=backend, **options | {"lr": 0.003})
        for step in range(1000):
            optimizer.zero_grad()
            here = slice(8 * (step % 8), 8 * (step % 8) + 8)
            (net(x[here].to(dtype)) - y[here].to(dtype)).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten().double() for p in net.parameters()])

    truth = trained("torch", dtype=torch.float64)
    spread = max((trained("torch", seed) - truth).norm() for seed in range(3))
    assert (trained(backend) - truth).norm() <= spread


@pytest.mark.parametrize("backend", ["triton", "numba"])
@pytest.mark.parametrize("other", ["triton", "numba", "torch"])
@pytest.mark.parametrize("rule", ["sgd momentum", "adamw"])
def test_state_moves_from_one_backend_to_another(rule, other, backend):
    make, options = RULES[rule]
    net, data = conv_net(), batches(4, torch.float32)
    twin = copy.deepcopy(net)
    first = make(net, backend=other, **options)
    train(net, first, data[:2])
    second = make(net, backend=backend, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(net, second, data[2:])
    train(twin, make(twin, backend="torch", **options), data)
    assert distance(net, twin) < 1e-5


@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(backend):
    net, data = conv_net(), batches(4, torch.float32)
    optimizer = wn.AdamW(net, backend=backend)
    train(net, optimizer, data[:2])
    twin, twin_optimizer = copy.deepcopy(net), None
    twin_optimizer = wn.AdamW(twin, backend=backend)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, data[2:])
    train(twin, twin_optimizer, data[2:])
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_numba_does_not_depend_on_the_number_of_threads():
    weight = torch.randn(300, 500)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            p = nn.Parameter(weight.clone())
            p.grad = torch.ones_like(p).cumsum(1)
            wn.AdamW([p], backend="numba").step()
            assert torch.get_num_threads() == threads  # and leaves it alone
        finally:
            torch.set_num_threads(before)
        results.append(p.detach())
    assert torch.equal(*results)
