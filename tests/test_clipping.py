"""Clipping by the norm of (∂v, ∂g): beside torch's function on torch's module form, and the NumPy oracle."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn, optim

import oracle
import weightnorm as wn
from nets import batches, conv_net, distance, in_torch_module_form

V_STD = [None, 0.05]
OPTIMIZERS = {
    "sgd": partial(wn.SGD, lr=0.05, momentum=0.5, backend="torch"),
    "adam": partial(wn.Adam, lr=1e-3, backend="torch"),
    "adamw": partial(wn.AdamW, lr=1e-3, weight_decay=0.1, backend="torch"),
    "adamax": partial(wn.Adamax, lr=1e-3, backend="torch"),
    "rmsprop": partial(wn.wrap, optim.RMSprop, lr=1e-3),
    "muon": partial(wn.wrap, optim.Muon, lr=0.02, g_class=optim.AdamW),
    "numba": partial(wn.AdamW, backend="numba"),
    "triton": partial(wn.AdamW, backend="triton"),
    "foreach": partial(wn.SGD, lr=0.05, foreach=True),
    "frozen lengths": partial(wn.SGD, lr=0.05, g_lr=0, backend="torch"),
}
NARROW = [(name, torch.bfloat16) for name in ("sgd", "adamw", "triton", "stochastic")]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def started_with(twin, v_std):
    """Give a net in torch's module form the v that ``v_std`` stands for: of length v_std·sqrt(k), w unchanged."""
    for layer in twin:
        if v_std is not None and hasattr(layer, "parametrizations"):
            g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
            v.data.mul_(v_std * (v.numel() / g.numel()) ** 0.5 / g.data)
    return twin


def clipped_training(net, optimizer, clip, data):
    """Take one step a batch, ``clip`` before each; return what it returned."""
    norms = []
    for x, y in data:
        optimizer.zero_grad()
        (10 * (net(x) - y)).square().mean().backward()
        norms.append(clip().item())
        optimizer.step()
    return norms


def norm_of(rows, gradient, lengths_of_v=None, *, frozen=False):
    """The norm of (∂v, ∂g) by the oracle, for a weight given row by row; v = w where the lengths of v are not said."""
    rows, gradient = (np.asarray(x, dtype=np.float64) for x in (rows, gradient))
    g = np.sqrt((rows * rows).sum(1))
    v = rows if lengths_of_v is None else rows * lengths_of_v / g[:, None]
    grad_v, grad_g = oracle.gradients(gradient, v, g)
    return math.hypot(np.linalg.norm(grad_v), 0 if frozen else np.linalg.norm(grad_g))


def with_gradient(*shape, dtype=torch.float32):
    parameter = nn.Parameter(torch.randn(*shape).to(dtype))
    parameter.grad = torch.randn(*shape).to(dtype)
    return parameter


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("ours", "theirs"), [(wn.SGD, optim.SGD), (wn.Adam, optim.Adam)])
@pytest.mark.parametrize("v_std", V_STD)
def test_clipped_training_goes_as_with_torchs_function_on_its_module_form(v_std, ours, theirs, dtype, norm_type):
    net = conv_net().to(dtype)
    start = copy.deepcopy(net)
    twin = started_with(in_torch_module_form(net), v_std)
    optimizer, other = ours(net, lr=0.01, v_std=v_std, backend="torch"), theirs(twin.parameters(), lr=0.01)
    data, limit = batches(10, dtype), 5.0 if norm_type == 2.0 else 1.0
    norms = clipped_training(net, optimizer, lambda: wn.clip_grad_norm_(optimizer, limit, norm_type), data)
    expected = clipped_training(
        twin, other, lambda: nn.utils.clip_grad_norm_(twin.parameters(), limit, norm_type), data
    )
    assert norms == pytest.approx(expected, rel=10 * TOLERANCE[dtype])
    assert norms[0] > limit  # something was clipped
    assert distance(net, twin) < 10 * TOLERANCE[dtype]
    assert distance(net, start) > 1e-3


@pytest.mark.parametrize("v_std", V_STD)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_norm_is_that_of_v_and_g_and_of_what_is_plain(name, v_std):
    weight, plain, bias, unused = (
        with_gradient(6, 8),
        with_gradient(3, 4),
        with_gradient(6),
        nn.Parameter(torch.ones(2, 2)),
    )
    groups = [{"params": [weight, bias, unused]}, {"params": [plain], "weight_norm": False}]
    optimizer = OPTIMIZERS[name](groups, v_std=v_std)
    rows, gradient = weight.detach().clone(), weight.grad.clone()
    normalised = norm_of(rows, gradient, v_std and v_std * 8**0.5, frozen=name == "frozen lengths")
    expected = math.hypot(normalised, plain.grad.norm(), bias.grad.norm())
    before = [p.grad.clone() for p in (weight, plain, bias)]
    assert wn.clip_grad_norm_(optimizer, 0.5).item() == pytest.approx(expected, rel=1e-5)
    for p, grad in zip((weight, plain, bias), before, strict=True):
        torch.testing.assert_close(p.grad, grad * 0.5 / expected)
    assert unused.grad is None
    assert wn.clip_grad_norm_(optimizer, 1.0).item() == pytest.approx(0.5, rel=1e-5)  # linear in ∂w


@pytest.mark.parametrize("v_std", V_STD)
@pytest.mark.parametrize(("name", "dtype"), [*[(name, torch.float32) for name in OPTIMIZERS], *NARROW])
def test_where_nothing_is_clipped_no_bit_changes(name, dtype, v_std):
    make = partial(wn.AdamW, stochastic_rounding=True) if name == "stochastic" else OPTIMIZERS[name]
    weight, bias = with_gradient(6, 8, dtype=dtype), with_gradient(6, dtype=dtype)
    weight.data[0] = 0
    twins = copy.deepcopy([weight, bias])
    for p, twin in zip((weight, bias), twins, strict=True):
        twin.grad = p.grad.clone()
    clipped, other = make([weight, bias], v_std=v_std), make(twins, v_std=v_std)
    for _ in range(3):
        held, random, state = weight.grad, torch.get_rng_state(), copy.deepcopy(clipped.state_dict())
        wn.clip_grad_norm_(clipped, 1e6)
        assert weight.grad is held
        assert torch.equal(torch.get_rng_state(), random)
        assert_same(clipped.state_dict(), state)
        torch.manual_seed(1), clipped.step()
        torch.manual_seed(1), other.step()
        assert torch.equal(weight, twins[0])
        assert torch.equal(bias, twins[1])
    assert_same(clipped.state_dict(), other.state_dict())


def assert_same(state, other):
    """Compare what two state dicts hold for each parameter, to the last bit."""
    assert state["state"].keys() == other["state"].keys()
    for mine, theirs in zip(state["state"].values(), other["state"].values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def of_groups(w):
    """Rows of a transposed convolution's weight in two groups: a block of inputs and an output, each."""
    return np.concatenate([block.swapaxes(0, 1).reshape(w.shape[1], -1) for block in np.split(w, 2)])


LAYOUTS = {
    "along axis 1": ((4, 3, 2), {"dim": 1}, lambda w: w.swapaxes(0, 1).reshape(3, -1)),
    "in groups": ((4, 3, 2), {"dim": 1, "groups": 2}, of_groups),
    "along two axes": ((4, 3, 2), {"dim": (0, 1)}, lambda w: w.reshape(12, 2)),
    "whole tensor": ((4, 3), {"dim": None}, lambda w: w.reshape(1, -1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_vectors_are_those_of_the_group(name):
    shape, options, rows_of = LAYOUTS[name]
    weight = with_gradient(*shape)
    rows, gradient = (rows_of(x.numpy().copy()) for x in (weight.detach(), weight.grad))
    optimizer = wn.SGD([{"params": [weight], **options}], lr=0.1, v_std=0.05)
    expected = norm_of(rows, gradient, 0.05 * rows.shape[1] ** 0.5)
    assert wn.clip_grad_norm_(optimizer, 1.0).item() == pytest.approx(expected, rel=1e-5)


def test_a_vector_of_one_element_is_all_length():
    weight = with_gradient(5, 1)
    optimizer = wn.SGD([{"params": [weight], "weight_norm": True}], lr=0.1, v_std=0.05)
    assert wn.clip_grad_norm_(optimizer, 100.0).item() == pytest.approx(weight.grad.norm().item(), rel=1e-6)


def test_a_zero_row_counts_with_its_scale():
    weight = nn.Parameter(torch.zeros(2, 4))
    optimizer = wn.SGD([weight], lr=0.1, v_std=0.05, backend="torch")
    weight.grad = torch.full((2, 4), 3.0)
    assert wn.clip_grad_norm_(optimizer, 1e6).item() == pytest.approx(3 * 8**0.5)  # no scale yet: ∂v = ∂w
    optimizer.step()
    optimizer.step()  # now there is one
    with torch.no_grad():
        weight.zero_()
    scale = optimizer.state[weight]["scale"].norm().item() / 2**0.5
    assert abs(scale - 1) > 0.1
    assert wn.clip_grad_norm_(optimizer, 1e6).item() == pytest.approx(3 * 8**0.5 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_count_by_their_master(dtype):
    weight = with_gradient(6, 64, dtype=dtype)
    optimizer = wn.SGD([weight], lr=0.01, v_std=0.05)
    for _ in range(3):
        optimizer.step()
    kept = optimizer.state[weight]
    lengths_of_v = (kept["master"] / kept["scale"]).norm(dim=1, keepdim=True).numpy()
    gradient = weight.grad.float()
    expected, rounded = (norm_of(w, gradient, lengths_of_v) for w in (kept["master"], weight.detach().float()))
    norm = wn.clip_grad_norm_(optimizer, 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    assert norm.item() != pytest.approx(rounded, rel=3e-6)
    assert weight.grad.dtype == dtype


def test_a_tied_weight_counts_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    optimizer = wn.Adam(net, v_std=0.05)
    net(torch.ones(2, 4)).square().sum().backward()
    weight = net[0].weight
    expected = norm_of(weight.detach(), weight.grad, 0.05 * 4**0.5)
    assert wn.clip_grad_norm_(optimizer, 1.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_an_error_where_asked_for(bad):
    weight = with_gradient(3, 4)
    weight.grad[1, 2] = bad
    before, optimizer = weight.grad.clone(), wn.SGD([weight], lr=0.1)
    with pytest.raises(RuntimeError, match="non-finite"):
        wn.clip_grad_norm_(optimizer, 1.0, error_if_nonfinite=True)
    assert torch.equal(weight.grad.nan_to_num(), before.nan_to_num())
    assert not wn.clip_grad_norm_(optimizer, 1.0).isfinite()


def test_without_gradients_the_norm_is_zero():
    assert wn.clip_grad_norm_(wn.SGD(nn.Linear(3, 2), lr=0.1), 1.0).item() == 0


def test_nothing_waits_for_the_device():
    """A tensor on "meta" has no value: whatever asked for one would raise an error."""
    weight = nn.Parameter(torch.empty(3, 4, device="meta"))
    optimizer = wn.SGD([weight], lr=0.1, v_std=0.05)
    for _ in range(2):
        weight.grad = torch.empty_like(weight)
        assert wn.clip_grad_norm_(optimizer, 1.0).device.type == "meta"
        optimizer.step()


def test_other_optimizers_and_gradients_are_refused_with_the_remedy():
    layer = nn.Embedding(5, 3, sparse=True)
    for wrong in (optim.SGD(layer.parameters(), lr=0.1), layer.parameters()):
        with pytest.raises(TypeError, match=r"got (SGD|generator).*call torch\.nn\.utils\.clip_grad_norm_"):
            wn.clip_grad_norm_(wrong, 1.0)
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="is sparse; weight normalization needs dense"):
        wn.clip_grad_norm_(wn.SGD([layer.weight], lr=0.1, backend="torch"), 1.0)


def test_shards_count_as_the_whole(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = dist.init_device_mesh("cpu", (1,))
        plain = with_gradient(4, 6)
        spread = nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
        spread.grad = distribute_tensor(plain.grad.clone(), mesh, [Shard(0)])
        norms = [wn.clip_grad_norm_(wn.AdamW([p], v_std=0.05), 1.0) for p in (plain, spread)]
        torch.testing.assert_close(norms[1].full_tensor(), norms[0])
        torch.testing.assert_close(spread.grad.full_tensor(), plain.grad)
    finally:
        dist.destroy_process_group()
