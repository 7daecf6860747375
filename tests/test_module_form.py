"""The module form: what wrapping changes and what it must not. One table runs against torch's own weight_norm too.

``WRONG_IN_TORCH`` lists by name where torch's differs from what is right; those cases must fail there.
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jvp, stack_module_state, vmap
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm
from torch.optim.swa_utils import AveragedModel

import weightnorm as wn
from weightnorm.axes import Axis
from weightnorm.formula import sum_rows
from weightnorm.layers.compose import by_formula, compose

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # torch's own use, in forward mode
    pytest.mark.filterwarnings("ignore:LSTM with projections"),  # not supported by oneDNN
]

# What is wrapped: how it is made, the weight's name, where its vectors lie for torch, an input.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), "weight", 0, (3, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, 3), "weight", 0, (2, 3, 5, 5)),
    "grouped conv": (lambda: nn.Conv1d(4, 6, 3, groups=2), "weight", 0, (2, 4, 7)),
    "transposed conv": (lambda: nn.ConvTranspose1d(6, 4, 3), "weight", 1, (2, 6, 5)),
    "grouped transposed conv": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), "weight", 1, (2, 6, 5, 5)),
    "kernel position": (lambda: nn.Conv1d(4, 4, 8, groups=2, padding=4), "weight", 2, (2, 4, 9)),
    "whole tensor": (lambda: nn.Linear(6, 4), "weight", None, (3, 6)),
    "one output": (lambda: nn.Conv1d(4, 1, 3), "weight", 0, (2, 4, 5)),
    "recurrent": (lambda: nn.LSTM(4, 3, num_layers=2), "weight_hh_l1", 0, (5, 2, 4)),
    "cell": (lambda: nn.GRUCell(4, 3), "weight_ih", 0, (2, 4)),
}


def wrap(form, layer, name="weight", dim=0):
    return wn.weight_norm(layer, name, dim) if form == "ours" else torch_weight_norm(layer, name, dim)


def run(layer, x):
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


def g_and_v(layer, name="weight"):
    held = layer.parametrizations[name]
    return held.original0, held.original1


def check_output_stays(form, case):
    make, name, dim, shape = LAYERS[case]
    layer, x = make(), torch.randn(shape)
    before = run(layer, x)
    torch.testing.assert_close(run(wrap(form, layer, name, dim), x), before)


def check_gradients(form, case):
    make, name, dim, shape = LAYERS[case]
    layer = wrap(form, make().double(), name, dim)
    run(layer, torch.randn(shape).double()).square().sum().backward()
    g, v = g_and_v(layer, name)
    assert g.grad.abs().sum() > 0
    assert v.grad.abs().sum() > 0
    cosine = (v * v.grad).sum() / (v.norm() * v.grad.norm())
    assert abs(cosine) < 1e-12  # ∂v ⟂ v, eq. 4


def check_deepcopy_after_a_forward(form, case):
    make, name, dim, shape = LAYERS[case]
    layer, x = wrap(form, make(), name, dim), torch.randn(shape)
    before = run(layer, x)
    torch.testing.assert_close(run(copy.deepcopy(layer), x), before)


def check_second_derivatives(form, case):
    make, name, dim, _ = LAYERS[case]
    layer = wrap(form, make().double(), name, dim)
    g, v = g_and_v(layer, name)
    keys = (f"parametrizations.{name}.original0", f"parametrizations.{name}.original1")

    def weight(g, v):
        with torch.nn.utils.stateless._reparametrize_module(layer, dict(zip(keys, (g, v), strict=True))):
            return getattr(layer, name).clone()

    assert gradcheck(weight, (g.detach().requires_grad_(), v.detach().requires_grad_()))
    assert gradgradcheck(weight, (g.detach().requires_grad_(), v.detach().requires_grad_()))


def check_zero_row(form, case):
    make, name, dim, shape = LAYERS[case]
    layer = make()
    weight = getattr(layer, name)
    with torch.no_grad():
        weight.select(dim or 0, 0).zero_() if dim is not None else weight.zero_()
    x = torch.randn(shape)
    before = run(layer, x)
    wrapped = wrap(form, layer, name, dim)
    out = run(wrapped, x)
    torch.testing.assert_close(out, before)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in wrapped.parameters() if p.grad is not None)
    g, _ = g_and_v(wrapped, name)
    assert (g.grad[g == 0] != 0).all()  # it can learn


def check_assignment(form, case):
    make, name, dim, _ = LAYERS[case]
    layer = wrap(form, make(), name, dim)
    value = torch.randn_like(getattr(layer, name))
    setattr(layer, name, value)
    torch.testing.assert_close(getattr(layer, name).detach(), value)


def check_initialising_in_place(form, case):
    make, name, dim, _ = LAYERS[case]
    layer = wrap(form, make(), name, dim)
    nn.init.constant_(getattr(layer, name), 0.5)
    torch.testing.assert_close(getattr(layer, name).detach(), torch.full_like(getattr(layer, name), 0.5))


def check_initialising_data(form, case):
    make, name, dim, _ = LAYERS[case]
    layer = wrap(form, make(), name, dim)
    getattr(layer, name).data.fill_(0.5)
    torch.testing.assert_close(getattr(layer, name).detach(), torch.full_like(getattr(layer, name), 0.5))


def check_forward_mode(form, case):
    make, name, dim, _ = LAYERS[case]
    layer = wrap(form, make().double(), name, dim)
    g, v = (x.detach() for x in g_and_v(layer, name))
    step_g, step_v = torch.randn_like(g), torch.randn_like(v)
    part = layer.parametrizations[name][0]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(part(forward_ad.make_dual(g, step_g), forward_ad.make_dual(v, step_v))).tangent
    small = 1e-6
    difference = part(g + small * step_g, v + small * step_v) - part(g - small * step_g, v - small * step_v)
    torch.testing.assert_close(tangent, (difference / (2 * small)).detach(), rtol=1e-6, atol=1e-8)


def check_layout(form, case):
    make, name, dim, _ = LAYERS[case]
    layer = make().to(memory_format=torch.channels_last)
    before = getattr(layer, name).stride()
    assert getattr(wrap(form, layer, name, dim), name).stride() == before


def check_folding_without_grad(form, case):
    make, name, dim, shape = LAYERS[case]
    layer, x = make(), torch.randn(shape)
    kind, before = type(layer), run(layer, x)
    wrap(form, layer, name, dim)
    with torch.no_grad():
        fold = wn.remove_weight_norm if form == "ours" else parametrize.remove_parametrizations
        fold(layer, name)
    assert type(layer) is kind
    assert isinstance(getattr(layer, name), nn.Parameter)
    torch.testing.assert_close(run(layer, x), before)
    torch.save(layer, io.BytesIO())


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
EVERY = set(LAYERS)
COMPOSITE = {"transposed conv", "grouped transposed conv"}  # torch's middle axes, in plain torch
WRONG_IN_TORCH = {
    "zero_row": EVERY,  # NaN
    "second_derivatives": EVERY - COMPOSITE - {"whole tensor"},  # its saved norm counts as a constant
    "forward_mode": EVERY - COMPOSITE,  # not implemented
    "initialising_in_place": EVERY,  # silently without effect
    "initialising_data": EVERY,
    "layout": {"conv", "grouped transposed conv"},  # comes back contiguous
    "deepcopy_after_a_forward": {"recurrent"},  # its list of weights is part of a graph
    "folding_without_grad": EVERY,  # no parameter after, and a hook that cannot be pickled
}
# A channels_last weight is one with four axes; the lazily flattened recurrent weights are no function of (g, v) alone.
SKIPPED = {("layout", case) for case in EVERY - {"conv", "grouped transposed conv"}}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("form", ["ours", "torch"])
def test_form(form, check, case):
    if (check, case) in SKIPPED:
        pytest.skip("says nothing about this layer")
    if form == "torch" and case in WRONG_IN_TORCH.get(check, ()):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError, TypeError, AttributeError)):
            CHECKS[check](form, case)
        return
    CHECKS[check](form, case)


def net():
    layers = [nn.Conv1d(3, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(28, 2)]
    return nn.Sequential(*layers)


X = torch.randn(5, 3, 7)


def by_compile(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def by_export(model):
    return torch.export.export(model, (X,)).module()


def by_functional_call(model):
    return lambda x: functional_call(model, dict(model.named_parameters()), (x,))


def by_average(model):
    average = AveragedModel(model)
    average.update_parameters(model)
    return average


def by_state_dict(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = wn.weight_norm(net())
    other.load_state_dict(torch.load(file))
    return other


def by_ensemble(model):
    parameters, buffers = stack_module_state([copy.deepcopy(model) for _ in range(3)])
    outputs = vmap(lambda p, b, x: functional_call(model, (p, b), (x,)), in_dims=(0, 0, None))
    return lambda x: outputs(parameters, buffers, x)[1]


def by_inference(model):
    with torch.inference_mode():
        return lambda x: model(x).clone()


def by_cache(model):
    def run_twice(x):
        with wn.cached(model):
            model(x)
            return model(x).detach()

    return run_twice


WAYS = [by_compile, by_export, by_functional_call, by_average, by_state_dict, by_ensemble, by_inference, by_cache]


@pytest.mark.parametrize("way", [*WAYS, copy.deepcopy], ids=lambda way: way.__name__)
def test_whatever_torch_does_with_models_gives_the_same_output(way):
    model = wn.weight_norm(net())
    torch.testing.assert_close(way(model)(X), model(X))


def test_compiled_gradients_are_those_of_eager():
    eager = wn.weight_norm(net())
    compiled = copy.deepcopy(eager)
    eager(X).square().sum().backward()
    by_compile(compiled)(X).square().sum().backward()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_functional_transforms_differentiate_to_second_order():
    layer = wn.weight_norm(nn.Linear(3, 2).double())
    g, v = (x.detach() for x in g_and_v(layer))
    x = torch.randn(4, 3).double()

    def loss(g, v):
        parameters = {"parametrizations.weight.original0": g, "parametrizations.weight.original1": v}
        return functional_call(layer, parameters, (x,)).tanh().sum()

    curvature = hessian(loss, argnums=1)(g, v).reshape(6, 6)
    torch.testing.assert_close(curvature, curvature.T)
    small, step = 1e-5, torch.randn_like(v)
    slope = [torch.func.grad(loss, argnums=1)(g, v + sign * small * step) for sign in (1, -1)]
    expected = (slope[0] - slope[1]).reshape(-1) / (2 * small)
    torch.testing.assert_close(curvature @ step.reshape(-1), expected, rtol=1e-6, atol=1e-8)
    assert jvp(lambda v: loss(g, v), (v,), (step,))[1].isfinite()


def test_pickling_a_module_says_what_to_do_instead():
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        torch.save(wn.weight_norm(net()), io.BytesIO())


def test_attention_gives_every_part_a_gradient():
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    before = layer(x, x, x)[0]
    wn.weight_norm(layer)
    after = layer(x, x, x)[0]
    torch.testing.assert_close(after, before)
    after.square().sum().backward()
    parts = {name: p.grad.abs().sum() for name, p in layer.named_parameters() if "original" in name}
    assert len(parts) == 4
    assert all(size > 0 for size in parts.values())
    layer.eval()
    with torch.no_grad():  # its fast path
        torch.testing.assert_close(layer(x, x, x)[0], before)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_train_on_every_gate_row(kind):
    layer, x = kind(4, 3, num_layers=2, bidirectional=True), torch.randn(5, 2, 4)
    before = layer(x)[0]
    wn.weight_norm(layer)
    torch.testing.assert_close(layer(x)[0], before)
    layer(x)[0].square().sum().backward()
    lengths = {name: p for name, p in layer.named_parameters() if name.endswith("original0")}
    assert len(lengths) == 8
    assert all((p.grad != 0).all() for p in lengths.values())
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.allclose(layer(x)[0], before)


def test_gradients_of_lstm_with_projections_and_embedding_reach_g_and_v():
    embedding, lstm = wn.weight_norm(nn.Embedding(9, 4)), wn.weight_norm(nn.LSTM(4, 6, proj_size=3))
    lstm(embedding(torch.randint(9, (5, 2))))[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in [*embedding.parameters(), *lstm.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_as_right_as_torch_can_make_them(dtype):
    exact = nn.Linear(64, 32)
    ours, theirs = (copy.deepcopy(exact).to(dtype) for _ in range(2))
    truth = ours.weight.float()
    wn.weight_norm(ours)
    torch_weight_norm(theirs)
    errors = [(layer.weight.float() - truth).abs().max() for layer in (ours, theirs)]
    assert errors[0] <= 2 * errors[1]
    assert g_and_v(ours)[0].dtype == torch.float32
    ours.to(torch.bfloat16)  # lengths are of another dtype now than when it was wrapped
    ours.weight = torch.full((32, 64), 0.5, dtype=torch.bfloat16)
    assert (ours.weight == 0.5).all()


LAYOUTS = {
    "channels_last": (lambda w: w.contiguous(memory_format=torch.channels_last), Axis(0)),
    "channels_last, input axis": (lambda w: w.contiguous(memory_format=torch.channels_last), Axis(1)),
    "contiguous": (lambda w: w.contiguous(), Axis(0)),
    "last axis": (lambda w: w.contiguous(), Axis(3)),
    "last axis in memory first": (lambda w: w.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), Axis(3)),
    "two axes": (lambda w: w.contiguous(), Axis((0, 1))),
    "whole tensor": (lambda w: w.contiguous(), Axis(None)),
    "groups": (lambda w: w.contiguous(), Axis(1, 2)),
    "every other row": (lambda w: w[::2], Axis(0)),
}


@pytest.mark.parametrize("gradient", [lambda w: torch.randn(w.shape), lambda w: torch.ones(()).expand(w.shape)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_what_the_formula_gives(layout, gradient):
    lay_out, axis = LAYOUTS[layout]
    v = lay_out(torch.randn(4, 6, 3, 5)).detach().requires_grad_()
    g = (
        torch.rand_like(axis.rows(v.detach())[:, 0])
        .reshape(sum_rows(axis.split(v), axis.kept(v)).shape)
        .requires_grad_()
    )
    w = compose(v, g, axis)
    grad_w = gradient(w)
    torch.testing.assert_close(w, by_formula(v, g, axis))
    assert w.stride() == (v.stride() if layout != "every other row" else w.stride())
    found = torch.autograd.grad(w, (v, g), grad_w)
    for one, expected in zip(found, torch.autograd.grad(by_formula(v, g, axis), (v, g), grad_w), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)
