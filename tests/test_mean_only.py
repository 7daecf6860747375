"""Mean-only batch normalization against float64 NumPy, in every input shape, and its running mean."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weightnorm as wn
from weightnorm.mean_only import centre

# (N, C), sequences, images, volumes; a batch of one; one channel; one element per channel.
SHAPES = [(7, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4), (1, 3, 6), (5, 1, 2), (1, 3)]

# Sums of about 40 numbers of size 1 to 10 in float32 lose a few 1e-6; one rounding to bf16/fp16 is 2^-9/2^-12 relative.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def centred(t: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Eq. 7, a channel at a time."""
    out = np.empty_like(t)
    for c in range(t.shape[1]):
        out[:, c] = t[:, c] - t[:, c].sum() / t[:, c].size + bias[c]
    return out


def centred_gradient(grad: np.ndarray) -> np.ndarray:
    """Eq. 8: the gradient that comes back, less its mean over everything its channel holds."""
    return grad - np.stack([np.full(grad[:, c].shape, grad[:, c].mean()) for c in range(grad.shape[1])], axis=1)


def layer_and_input(shape, dtype=torch.float64):
    layer = wn.MeanOnlyBatchNorm(shape[1], dtype=dtype)
    nn.init.normal_(layer.bias)
    return layer, (2 * torch.randn(shape, dtype=torch.float64) + 3).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_output_and_gradients_are_equations_7_and_8(shape, dtype):
    layer, t = layer_and_input(shape, dtype)
    out = layer(t)
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    out.backward(grad)

    grad64 = grad.double().numpy()
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}
    assert out.dtype == dtype
    expected = centred(t.detach().double().numpy(), layer.bias.detach().double().numpy())
    np.testing.assert_allclose(out.detach().double().numpy(), expected, **close)
    np.testing.assert_allclose(t.grad.double().numpy(), centred_gradient(grad64), **close)
    others = tuple(axis for axis in range(grad64.ndim) if axis != 1)
    sum_rounding = {"rtol": 1e-2 if dtype.itemsize == 2 else 1e-5, "atol": TOLERANCE[dtype]}
    np.testing.assert_allclose(layer.bias.grad.double().numpy(), grad64.sum(others), **sum_rounding)


def test_both_derivatives_pass_gradcheck():
    layer, t = layer_and_input((3, 2, 4))
    inputs = (t, layer.bias)

    def square(t, bias):  # of itself the layer is linear: its second derivative would be zero and prove nothing
        return torch.func.functional_call(layer, {"bias": bias}, t).square()

    assert torch.autograd.gradcheck(square, inputs)
    assert torch.autograd.gradgradcheck(square, inputs)


def test_a_third_derivative_and_that_of_the_biass_gradient():
    layer, t = layer_and_input((3, 2, 4))
    pull = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    def plain(t):
        return t - t.mean((0, 2), keepdim=True) + layer.bias.reshape(1, 2, 1)

    def third(function):
        found = function(t).pow(4).mul(pull).sum()
        for _ in range(3):
            found = sum((grad * (2 + grad)).sum() for grad in torch.autograd.grad(found, (t, pull), create_graph=True))
        return torch.autograd.grad(found, (t, pull, layer.bias))

    torch.testing.assert_close(third(layer), third(plain), rtol=1e-11, atol=0)
    (bias_grad,) = torch.autograd.grad(layer(t), layer.bias, pull, create_graph=True)
    (found,) = torch.autograd.grad(bias_grad @ torch.tensor([2.0, 3.0], dtype=torch.float64), pull)
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0], dtype=torch.float64).reshape(1, 2, 1).expand(3, 2, 4))


def test_the_bias_learns_where_the_input_needs_no_gradient():
    layer, t = layer_and_input((3, 2, 4))
    grad = torch.randn(3, 2, 4, dtype=torch.float64)
    layer(t.detach()).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2)))


class Traffic(TorchDispatchMode):
    """Counts the numbers that operations read and write; views move none."""

    def __init__(self):
        super().__init__()
        self.numbers, self.largest_sum = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.numbers += sum(tensor.numel() for tensor in tensors)
            if function.overloadpacket is torch.ops.aten.sum:
                self.largest_sum = max(self.largest_sum, args[0].numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_forward_and_backward_pass_three_times_each_over_memory(dtype, layout):
    layer = wn.MeanOnlyBatchNorm(4)
    t, grad = (torch.randn(8, 4, 32, 32).to(dtype, memory_format=layout) for _ in range(2))
    for needs_grad, passes in ((True, 3), (False, 1)):
        with Traffic() as forward:
            out = layer(t.requires_grad_(needs_grad))
        with Traffic() as backward:
            out.backward(grad)
        assert forward.numbers / t.numel() == pytest.approx(3, abs=0.01)
        assert backward.numbers / t.numel() == pytest.approx(passes, abs=0.01)
    with Traffic() as inference, torch.no_grad():
        layer.eval()(t)
    assert inference.numbers / t.numel() == pytest.approx(2, abs=0.01)


def test_large_narrow_inputs_are_summed_in_parts(monkeypatch):
    monkeypatch.setattr(centre, "_PART", 1024)  # torch sums bf16 in float32 by way of a copy
    layer, t = layer_and_input((50, 3, 40), torch.bfloat16)
    with Traffic() as traffic:
        out = layer.float()(t)
    assert 512 < traffic.largest_sum <= 1024
    expected = centred(t.detach().double().numpy(), layer.bias.detach().double().numpy())
    np.testing.assert_allclose(out.detach().double().numpy(), expected, rtol=2**-8, atol=1e-6)
    assert layer(torch.ones(1, 3, 2000, dtype=torch.bfloat16)).shape == (1, 3, 2000)  # an example is not divided


def test_a_shift_of_the_input_changes_nothing_and_the_scale_is_kept():
    layer, t = layer_and_input((6, 3, 4))
    shift = torch.tensor([5.0, -7.0, 100.0], dtype=torch.float64).reshape(1, 3, 1)
    torch.testing.assert_close(layer(t + shift), layer(t))
    bias = layer.bias.reshape(1, 3, 1)
    torch.testing.assert_close(layer(10 * t) - bias, 10 * (layer(t) - bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_averaged_in_float32(dtype):
    # 4096 numbers near 100 add up to 4e5: past fp16's range, and in bf16 the sum stops growing at 256 terms.
    layer = wn.MeanOnlyBatchNorm(1)
    t = (100 + torch.arange(4096) % 2).to(dtype).reshape(4096, 1)
    mean = t.double().mean()
    layer(t)
    torch.testing.assert_close(layer.running_mean.double() * 10, mean.reshape(1), rtol=1e-6, atol=0)


def test_under_autocast_statistics_are_float32_and_the_dtype_is_the_inputs():
    conv, layer = nn.Conv2d(3, 4, 3, bias=False), wn.MeanOnlyBatchNorm(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        t = conv(torch.randn(2, 3, 8, 8))
        out = layer(t)
    assert t.dtype == out.dtype == torch.bfloat16
    mean = t.detach().double().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double() * 10, mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, 0.0, None], ids=str)
def test_running_mean_follows_its_recursion(momentum):
    layer = wn.MeanOnlyBatchNorm(3, momentum=momentum, dtype=torch.float64)
    batches = [torch.randn(n, 3, 2, dtype=torch.float64) + n for n in (4, 1, 7)]  # unequal: every batch counts once
    expected = np.zeros(3)
    for i, batch in enumerate(batches):
        layer(batch)
        share = 1 / (i + 1) if momentum is None else momentum
        expected = (1 - share) * expected + share * batch.numpy().mean((0, 2))
    np.testing.assert_allclose(layer.running_mean.numpy(), expected, rtol=1e-14)
    assert layer.num_batches_tracked == 3


def test_eval_subtracts_the_running_mean_and_moves_nothing():
    layer, t = layer_and_input((4, 3, 5))
    layer(t)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    expected = t - layer.running_mean.reshape(1, 3, 1) + layer.bias.reshape(1, 3, 1)
    torch.testing.assert_close(layer(t), expected)
    torch.testing.assert_close(layer(t[:1]), expected[:1])  # an example does not depend on its neighbours
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_narrow_running_mean_and_bias_are_joined_in_float32():
    layer = wn.MeanOnlyBatchNorm(1, dtype=torch.bfloat16).eval()
    nn.init.ones_(layer.bias)
    layer.running_mean.fill_(512)  # 1 - 512 takes nine bits, bf16 has eight
    assert layer(torch.full((1, 1), 512.0, dtype=torch.bfloat16)) == 1


def test_without_running_statistics_eval_takes_the_batch_mean():
    layer = wn.MeanOnlyBatchNorm(3, track_running_stats=False)
    t = torch.randn(4, 3)
    assert list(layer.state_dict()) == ["bias"]
    assert torch.equal(layer.eval()(t), layer.train()(t))
    torch.testing.assert_close(layer(t).mean(0), torch.zeros(3), rtol=0, atol=1e-6)


def test_without_affine_there_is_no_bias():
    layer = wn.MeanOnlyBatchNorm(3, affine=False)
    assert layer.bias is None
    assert list(layer.parameters()) == []
    torch.testing.assert_close(layer(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))[0], torch.tensor([-1.0, 0, 1]))


def test_a_batch_of_one_trains():
    layer, _ = layer_and_input((1, 3))
    out = layer(torch.randn(1, 3, dtype=torch.float64))
    torch.testing.assert_close(out, layer.bias[None])


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 3, 4, 5),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last, 3 d": lambda: torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "a sequence of vectors": lambda: torch.randn(2, 5, 3).transpose(1, 2),
    "examples innermost": lambda: torch.randn(3, 5, 2).permute(2, 0, 1),
    "a transposed matrix": lambda: torch.randn(3, 5).t(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout, training, dtype):
    layer = wn.MeanOnlyBatchNorm(3).train(training)
    nn.init.normal_(layer.bias)
    t = (4 + LAYOUTS[layout]()).to(dtype)
    t = t.detach().requires_grad_()
    out = layer(t)
    out.square().sum().backward()
    assert out.stride() == t.stride()
    assert t.grad.stride() == t.stride()
    assert t.grad.dtype == dtype
    before = torch.tensor([1.0, 2.0, 3.0])
    layer.running_mean.copy_(before)
    with torch.no_grad():
        again = layer(t)
    mean = t.detach().double().mean([axis for axis in range(t.ndim) if axis != 1]) if training else before
    expected = t.double() + (layer.bias - mean).reshape(-1, *[1] * (t.ndim - 2))
    assert again.stride() == t.stride()
    tolerance = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(again.double(), expected.detach(), **tolerance)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_activation_in_place_may_follow(dtype, layout, training, grad):
    layer = wn.MeanOnlyBatchNorm(3).train(training)
    t = LAYOUTS[layout]().to(dtype).requires_grad_()
    with torch.set_grad_enabled(grad):
        expected = nn.functional.relu(copy.deepcopy(layer)(t))
        out = nn.functional.relu_(layer(t))
    assert torch.equal(out, expected)
    if grad:
        given = torch.randn_like(out)
        pair = (torch.autograd.grad(x, t, given)[0] for x in (out, expected))
        torch.testing.assert_close(*pair)


def test_reset_parameters_forgets_everything():
    layer, t = layer_and_input((4, 3))
    layer(t)
    layer.reset_parameters()
    assert all(not tensor.any() for tensor in layer.state_dict().values())
    layer(t)
    layer.reset_running_stats()
    assert not layer.running_mean.any()
    assert layer.num_batches_tracked == 0


def test_state_dict_copy_and_device_behave_as_a_modules_should():
    layer, t = layer_and_input((4, 3))
    layer(t)
    twin = wn.MeanOnlyBatchNorm(3, dtype=torch.float64)
    twin.load_state_dict(copy.deepcopy(layer).state_dict())
    assert list(twin.state_dict()) == ["bias", "running_mean", "num_batches_tracked"]
    assert torch.equal(twin.eval()(t), layer.eval()(t))
    assert wn.MeanOnlyBatchNorm(3, device="meta").running_mean.is_meta
    assert wn.MeanOnlyBatchNorm(3).half().num_batches_tracked.dtype == torch.long


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiles_and_exports_to_one_graph(training, dtype):
    layer, t = layer_and_input((4, 3, 5), dtype)
    twin = copy.deepcopy(layer.float().train(training))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(copy.deepcopy(layer), (t.detach(),)).module()
    expected, t_compiled = layer(t), t.detach().clone().requires_grad_()
    found = compiled(t_compiled)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(exported(t.detach()), expected.detach())
    torch.testing.assert_close(twin.running_mean, layer.running_mean)
    grad = torch.randn_like(expected)
    found.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(t_compiled.grad, t.grad)
    torch.testing.assert_close(twin.bias.grad, layer.bias.grad)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func.jvp's own use
def test_transforms_and_forward_mode_see_plain_operations():
    layer = wn.MeanOnlyBatchNorm(3, track_running_stats=False, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    t, direction = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    expected = direction - direction.mean((0, 2), keepdim=True)

    def cubes(t):
        return layer(t).pow(3).sum()

    torch.testing.assert_close(torch.func.jvp(layer, (t,), (direction,))[1], expected)
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(layer(forward_ad.make_dual(t, direction))).tangent, expected)
    hessians = [
        hessian(t) for hessian in (torch.func.hessian(cubes), partial(torch.autograd.functional.hessian, cubes))
    ]
    torch.testing.assert_close(*hessians)
    both = torch.stack([t, direction])
    torch.testing.assert_close(torch.func.vmap(layer)(both), torch.stack([layer(t), layer(direction)]))


def test_repr_tells_the_arguments():
    expected = "MeanOnlyBatchNorm(8, momentum=None, affine=True, track_running_stats=False)"
    layer = wn.MeanOnlyBatchNorm(8, momentum=None, track_running_stats=False)
    assert repr(layer) == expected
    layer.sync = False
    assert repr(layer) == f"{expected[:-1]}, sync=False)"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 5), "3 channels on axis 1.*got shape \\(4, 5\\)"),
        ((4, 5, 3), "3 channels on axis 1.*got shape \\(4, 5, 3\\)"),
        ((3,), "3 channels on axis 1.*got shape \\(3,\\)"),
        ((0, 3), "empty batch has no mean; got shape \\(0, 3\\).*eval"),
        ((2, 3, 0), "empty batch has no mean; got shape \\(2, 3, 0\\)"),
    ],
    ids=str,
)
def test_wrong_shapes_are_refused_and_leave_no_trace(shape, message):
    layer = wn.MeanOnlyBatchNorm(3)
    with pytest.raises(ValueError, match=message):
        layer(torch.ones(shape))
    assert layer.num_batches_tracked == 0


def test_an_empty_batch_needs_no_mean_in_eval():
    assert wn.MeanOnlyBatchNorm(3).eval()(torch.ones(0, 3)).shape == (0, 3)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"floating point; got torch\.int64"):
        wn.MeanOnlyBatchNorm(3)(torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match=r"momentum must be between 0 and 1, or None.*got"):
        wn.MeanOnlyBatchNorm(3, momentum=momentum)
