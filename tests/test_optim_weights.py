"""The weight wins when somebody else changes it; and what happens at the points where the formula has no answer."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import oracle
import weightnorm as wn
from nets import batches, conv_net, train

pytestmark = pytest.mark.usefixtures("each_backend")


def by_hand(weight, value):
    with torch.no_grad():
        weight.copy_(value)


def one_step(weight, gradient, optimizer):
    weight.grad = gradient
    optimizer.step()
    return weight.detach().clone()


CHANGES = {
    "load_state_dict": lambda net, fresh: net.load_state_dict(fresh.state_dict()),
    "in place": lambda net, fresh: by_hand(net[0].weight, fresh[0].weight),
    "data": lambda net, fresh: setattr(net[0].weight, "data", fresh[0].weight.data.clone()),
    "scaled": lambda net, fresh: by_hand(net[0].weight, 0.1 * net[0].weight),
    "nn.init": lambda net, fresh: nn.init.orthogonal_(net[0].weight),
    "clipped": lambda net, fresh: by_hand(net[0].weight, net[0].weight.clamp(-0.05, 0.05)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_changed_between_steps_is_taken_as_it_is(change):
    """The next step starts from the new weight and the scale there was: v = w/s, g = sign(s)‖w‖."""
    net, fresh = conv_net().double(), conv_net().double()
    optimizer = wn.SGD(net, lr=0.01)
    train(net, optimizer, batches(5))
    CHANGES[change](net, fresh)

    weight, scale = net[0].weight, optimizer.state[net[0].weight]["scale"].clone()
    rows = weight.detach().flatten(1).numpy().copy()
    train(net, optimizer, batches(1))
    v, g = rows / scale.numpy().reshape(-1, 1), np.sign(scale.numpy().ravel()) * np.linalg.norm(rows, axis=1)
    grad_v, grad_g = oracle.gradients(weight.grad.flatten(1).numpy(), v, g)
    expected = oracle.w_of(v - 0.01 * grad_v, g - 0.01 * grad_g)
    np.testing.assert_allclose(weight.detach().flatten(1), expected, rtol=1e-10)


def test_the_master_is_used_only_where_it_still_rounds_to_the_weight():
    weight = nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16))
    optimizer = wn.SGD([weight], lr=1e-4)
    tiny = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]], dtype=torch.bfloat16)
    for _ in range(5):
        assert torch.equal(one_step(weight, tiny, optimizer), torch.ones(2, 4, dtype=torch.bfloat16))
    master = optimizer.state[weight]["master"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, 1 - 5e-4 * tiny.float(), rtol=0, atol=1e-6)  # bf16 alone would have stood still
    by_hand(weight[0, :2], torch.tensor([5.0, 6.0]))
    one_step(weight, torch.zeros_like(weight), optimizer)
    assert master[0, :2].tolist() == [5.0, 6.0]
    torch.testing.assert_close(master[0, 2:], 1 - 5e-4 * tiny[0, 2:].float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("v_std", [None, 1.0])
@pytest.mark.parametrize("rule", [wn.SGD, wn.AdamW])
def test_a_zero_row_takes_a_plain_step_and_learns_from_then_on(rule, v_std):
    weight = nn.Parameter(torch.zeros(3, 5))
    by_hand(weight[0], torch.ones(5))
    optimizer = rule([weight], lr=0.1, v_std=v_std)
    gradient = torch.randn(3, 5)
    gradient[2] = 0
    moved = one_step(weight, gradient, optimizer)
    plain = -0.1 * gradient[1] if rule is wn.SGD else -0.1 * gradient[1].sign()
    torch.testing.assert_close(moved[1], plain)
    assert moved[2].eq(0).all()  # no gradient: it stays zero
    moved = one_step(weight, torch.randn(3, 5), optimizer)
    assert moved.isfinite().all()
    length_of_v = (moved[1] / optimizer.state[weight]["scale"][1]).norm()
    if v_std:
        assert length_of_v > 0.9 * v_std * 5**0.5  # v_std holds for rows that came alive later too
    for _ in range(200):
        moved = one_step(weight, weight.detach() - 1, optimizer)
    torch.testing.assert_close(moved[1:], torch.ones(2, 5), rtol=0.05, atol=0.05)


def test_a_trained_row_zeroed_by_hand_steps_with_its_scale():
    layer = nn.Linear(4, 2, bias=False)
    optimizer = wn.SGD(layer, lr=0.1, v_std=0.05)
    one_step(layer.weight, torch.randn(2, 4), optimizer)
    scale = optimizer.state[layer.weight]["scale"][0].item()
    by_hand(layer.weight[0], torch.zeros(4))
    moved = one_step(layer.weight, torch.ones(2, 4), optimizer)
    torch.testing.assert_close(moved[0], torch.full((4,), -0.1 * scale**2))  # w' = s v', v' = −lr s ∂w


def test_a_length_crosses_zero_and_the_direction_survives():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = wn.SGD([{"params": [weight], "weight_norm": True}], lr=1.0)
    inward = torch.tensor([[3.0, 4.0]]) / 5
    path = [one_step(weight, 2 * inward, optimizer) for _ in range(4)]  # g: 5, 3, 1, −1, −3
    for moved, g in zip(path, (3, 1, -1, -3), strict=True):
        torch.testing.assert_close(moved, g * inward, rtol=1e-5, atol=1e-6)
    assert optimizer.state[weight]["scale"].item() < 0
    torch.testing.assert_close(one_step(weight, -2 * inward, optimizer), -inward, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rule", [wn.SGD, wn.AdamW])
def test_a_bad_gradient_is_seen_and_stays_in_its_row(bad, rule):
    weight = nn.Parameter(torch.randn(3, 4))
    gradient = torch.randn(3, 4)
    gradient[1, 2] = bad
    moved = one_step(weight, gradient, rule([weight], lr=0.1))
    assert not moved[1].isfinite().all()
    assert moved[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rule", [wn.SGD, wn.AdamW])
def test_a_row_of_one_element_moves_as_a_plain_weight(rule):
    weight = nn.Parameter(torch.randn(6, 1))
    plain = nn.Parameter(weight.detach().clone())
    options = dict(lr=0.01) if rule is wn.SGD else dict(lr=0.01, weight_decay=0.0)
    ours = rule([{"params": [weight], "weight_norm": True}], **options)
    theirs = getattr(torch.optim, rule.__name__)([plain], **options)
    for _ in range(10):
        gradient = torch.randn(6, 1)
        torch.testing.assert_close(one_step(weight, gradient, ours), one_step(plain, gradient.clone(), theirs))


def test_v_std_sets_the_length_of_v_at_the_first_step_and_no_later():
    layer = nn.Linear(400, 3, bias=False)
    optimizer = wn.SGD(layer, lr=0.0, v_std=0.05)
    for _ in range(2):
        one_step(layer.weight, torch.ones(3, 400), optimizer)
        lengths = (layer.weight.detach() / optimizer.state[layer.weight]["scale"]).norm(dim=1)
        torch.testing.assert_close(lengths, torch.full((3,), 0.05 * 20))
        optimizer.param_groups[0]["v_std"] = 7.0


LAYOUTS = {
    "channels_last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True])
def test_memory_layout_of_the_gradient_does_not_matter(layout, fused):
    results = []
    layer = LAYOUTS[layout]()
    gradients = torch.randn(3, *layer.weight.shape)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        twin = copy.deepcopy(layer)
        optimizer = wn.AdamW(twin, lr=0.01, fused=fused)
        for gradient in gradients:
            twin.weight.grad = gradient.clone(memory_format=memory_format)
            optimizer.step()
        assert twin.weight.stride() == layer.weight.stride()
        results.append(twin.weight.detach())
    torch.testing.assert_close(*results)


def test_grouped_transposed_conv_is_one_vector_per_output_channel():
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False).double()
    twin = copy.deepcopy(layer)
    optimizer = wn.SGD(layer, lr=0.1)
    gradient = torch.randn_like(layer.weight)
    one_step(layer.weight, gradient, optimizer)
    assert optimizer.state[layer.weight]["scale"].numel() == 6

    def by_channel(w):
        return w.unflatten(0, (2, 2)).permute(0, 2, 1, 3).reshape(6, 6)

    matrix = nn.Parameter(by_channel(twin.weight.detach()))
    expected = one_step(matrix, by_channel(gradient), wn.SGD([matrix], lr=0.1))
    torch.testing.assert_close(by_channel(layer.weight.detach()), expected)
