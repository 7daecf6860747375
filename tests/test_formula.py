"""The formula against the NumPy oracle, autograd, and the places where other implementations break."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import oracle
from weightnorm.formula import advance, compose, decompose, kept_axes, length_floor, pull_back, row_lengths

# One row per layout in use: a matrix, a conv, a transposed conv, wav2vec2's position kernel, the whole tensor, a vector
# whose elements are rows of one, a grouped transposed conv seen as (groups, in, out, kernel).
LAYOUTS = [
    ((5, 7), 0),
    ((4, 3, 2, 2), 0),
    ((3, 4, 5), 1),
    ((3, 2, 6), -1),
    ((3, 4), None),
    ((6,), 0),
    ((2, 3, 4, 5), (0, 2)),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def rows(x, dim):
    """Return a tensor as float64 NumPy rows, one per kept index."""
    kept = kept_axes(x.ndim, dim)
    count = math.prod(x.shape[axis] for axis in kept)
    return x.detach().double().movedim(kept, tuple(range(len(kept)))).reshape(count, -1).numpy()


def case(shape, dim, dtype=torch.float64):
    v = torch.randn(shape, dtype=torch.float64)
    g = torch.randn(row_lengths(v, dim)[0].shape, dtype=torch.float64)
    return v.to(dtype), g.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_compose_is_equation_2(shape, dim):
    v, g = case(shape, dim)
    expected = oracle.w_of(rows(v, dim), g.numpy().reshape(-1))
    np.testing.assert_allclose(rows(compose(v, g, dim), dim), expected, rtol=1e-14)


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_pull_back_is_equations_3_and_4(shape, dim):
    v, g = case(shape, dim)
    grad_w = torch.randn(shape, dtype=torch.float64)
    grad_v, grad_g = pull_back(grad_w, v, g, dim)
    expected_v, expected_g = oracle.gradients(rows(grad_w, dim), rows(v, dim), g.numpy().reshape(-1))
    np.testing.assert_allclose(rows(grad_v, dim), expected_v, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grad_g.numpy().reshape(-1), expected_g, rtol=1e-12)
    assert grad_v.shape == v.shape
    assert grad_g.shape == g.shape


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_pull_back_is_what_autograd_finds(shape, dim):
    v, g = (x.requires_grad_() for x in case(shape, dim))
    grad_w = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(compose(v, g, dim), (v, g), grad_w)
    for ours, theirs in zip(pull_back(grad_w, v, g, dim), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_first_and_second_derivatives(shape, dim):
    v, g = (x.requires_grad_() for x in case(shape, dim))
    assert gradcheck(lambda v, g: compose(v, g, dim), (v, g))
    assert gradgradcheck(lambda v, g: compose(v, g, dim), (v, g))
    grad_w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda w, v, g: pull_back(w, v, g, dim), (grad_w, v, g))


@pytest.mark.parametrize("length", [0.0, 1e-30], ids=["zero", "under the floor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_direction_is_zero_and_passes_no_gradient(dtype, length):
    v, g = case((3, 4), 0, dtype)
    v[1] = length
    v, g = v.requires_grad_(), g.requires_grad_()
    w = compose(v, g)
    assert w[1].eq(0).all() == (length == 0 or dtype != torch.float64)
    first = torch.autograd.grad(w.pow(3).sum(), (v, g), create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), (v, g))
    for gradient in (*first, *second):
        assert gradient.isfinite().all()
        assert gradient[0].ne(0).any()
        if w[1].eq(0).all():
            assert gradient[1].eq(0).all()
    assert all(x.isfinite().all() for x in pull_back(w.detach(), v, g))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), [((64, 300), 0), ((16, 8, 9), 2), ((300, 40), 1)])
def test_error_is_at_most_twice_torchs(dtype, shape, dim):
    """Judge by float64 truth and by torch's own kernel in that dtype, so that no tolerance is guessed."""
    v, g = case(shape, dim, dtype)
    g_narrow = g.to(dtype)  # torch wants one dtype
    truth = compose(v.double(), g_narrow.double(), dim)
    torch_error = (torch._weight_norm(v, g_narrow, dim).double() - truth).abs().max()
    our_error = (compose(v, g_narrow, dim).double() - truth).abs().max()
    assert our_error <= 2 * torch_error + torch.finfo(torch.float64).eps
    assert compose(v, g_narrow, dim).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_decompose_is_undone_by_compose(dtype):
    w, _ = case((6, 50), 0, dtype)
    w[2] = 0
    v, g = decompose(w)
    assert g[2] == 0
    assert g.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(compose(v, g), w)


def test_the_direction_gradient_is_orthogonal_and_length_of_v_does_not_matter():
    v, g = case((20, 30), 0)
    grad_v, _ = pull_back(torch.randn(20, 30, dtype=torch.float64), v, g)
    assert (grad_v * v).sum(1).abs().max() < 1e-13
    torch.testing.assert_close(compose(3 * v, g), compose(v, g), rtol=1e-14, atol=0)


def test_memory_format_is_kept():
    v = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    assert compose(v, torch.ones(8, 1, 1, 1)).is_contiguous(memory_format=torch.channels_last)


def test_a_row_of_one_element_is_all_length():
    w, grad_w = torch.randn(50, 1), torch.randn(50, 1)
    grad_v, grad_g = pull_back(grad_w, w, w.abs())
    assert grad_v.eq(0).all()  # rounding would leave noise here, which Adam turns into steps of lr
    torch.testing.assert_close(grad_g, grad_w * w.sign())


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.3, 3.0, 1e4])
def test_advance_is_the_step_on_stored_v_and_g(size, negative):
    w = torch.randn(6, 9, dtype=torch.float64)
    scale = torch.rand(6, 1, dtype=torch.float64) + 0.1
    scale = -scale if negative else scale
    step_v, step_g = size * torch.randn(6, 9, dtype=torch.float64), size * torch.randn(6, 1, dtype=torch.float64)
    new_w, new_scale = advance(w, scale, step_v, step_g)
    expected_w, expected_scale = oracle.moved(w.numpy(), scale.numpy()[:, 0], step_v.numpy(), step_g.numpy()[:, 0])
    np.testing.assert_allclose(new_w, expected_w, rtol=1e-9, atol=1e-15 * (1 + size))
    np.testing.assert_allclose(new_scale[:, 0], expected_scale, rtol=1e-9)


def test_advance_by_zero_changes_no_bit():
    w, scale = torch.randn(5, 8), torch.randn(5, 1)
    new_w, new_scale = advance(w, scale, torch.zeros(5, 8), torch.zeros(5, 1))
    assert torch.equal(new_w.view(torch.int32), w.view(torch.int32))
    assert torch.equal(new_scale.view(torch.int32), scale.view(torch.int32))


def test_length_can_land_on_zero_and_come_back_along_the_same_line():
    w = torch.tensor([[3.0, -4.0]])
    zero = torch.zeros(1, 2)
    at_zero, scale = advance(w, torch.ones(1, 1), zero, torch.tensor([[-5.0]]))
    assert 0 < at_zero.norm() < 1e-6
    back, scale = advance(at_zero, scale, zero, torch.tensor([[-5.0]]))
    torch.testing.assert_close(back, -w)
    torch.testing.assert_close(scale, -torch.ones(1, 1))


def test_a_row_without_direction_takes_a_plain_step():
    w = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    scale = torch.tensor([[2.0], [1.0]])
    new_w, new_scale = advance(w, scale, torch.tensor([[0.5, 1.0], [-2.0, 0.0]]), torch.tensor([[7.0], [0.0]]))
    assert torch.equal(new_w, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))  # the second lost its direction
    assert torch.equal(new_scale, scale)


def test_nan_stays_in_its_row():
    w, step = torch.randn(3, 4), torch.zeros(3, 4)
    step[1, 2] = math.nan
    new_w, _ = advance(w, torch.ones(3, 1), step, torch.zeros(3, 1))
    assert new_w[1].isnan().any()
    assert torch.equal(new_w[[0, 2]], w[[0, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compose(torch.ones(3, 4), torch.ones(4)), r"one element per vector of v, shape \(3, 1\); got shape"),
        (lambda: compose(torch.ones(3, 4), torch.ones(3, 1), dim=2), "names no axis of a weight with 2 axes; use -2"),
        (lambda: decompose(torch.ones(3, 4), dim=-3), "dim=-3"),
        (lambda: decompose(torch.ones(3, 4), dim=(0, -2)), "names an axis twice"),
        (lambda: pull_back(torch.ones(4), torch.ones(3, 4), torch.ones(3)), r"must have the shape of v, \(3, 4\); got"),
    ],
)
def test_errors_say_rule_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_floor_is_where_squares_that_matter_stay_normal():
    for dtype in (torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        assert length_floor(dtype) ** 2 * limits.eps == pytest.approx(limits.tiny)


def test_integers_are_no_weights():
    with pytest.raises(TypeError, match=r"real floating point numbers; got torch.int64"):
        compose(torch.ones(3, 4, dtype=torch.int64), torch.ones(3))
