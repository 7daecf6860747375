"""The fused ``w = g v/‖v‖`` and its gradients are the formula's, in every layout; in Triton's interpreter."""

import copy

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import oracle
from weightnorm import formula
from weightnorm.axes import Axis
from weightnorm.kernels import compose, compose_launches, compose_tiles, compose_together, tables, triton_compose
from weightnorm.kernels.compose_tiles import Kind, chunks_of, tile_of

LAST = torch.channels_last
CONTIGUOUS = torch.contiguous_format

# Shape, where the vectors lie, layout of v, layout of the gradient (None: as v). What each is for is in its name;
# "aligned": 16 bytes at a time in float32, along rows or, where these are neighbours in memory, across them.
ZOO = {
    "matrix": ((5, 7), Axis(0), None, None),
    "aligned": ((6, 64), Axis(0), None, None),
    "ragged": ((3, 130), Axis(0), None, None),
    "tiny rows": ((37, 3), Axis(0), None, None),
    "one row": ((1, 9), Axis(0), None, None),
    "one element a row": ((6, 1), Axis(0), None, None),
    "one element": ((1, 1), Axis(0), None, None),
    "vector of single elements": ((5,), Axis(0), None, None),
    "whole tensor": ((4, 5), Axis(None), None, None),
    "stacked matrices": ((2, 3, 8), Axis((0, 1)), None, None),
    "last axis": ((12, 10), Axis(1), None, None),
    "last axis, aligned": ((10, 64), Axis(-1), None, None),
    "last of three": ((3, 5, 8), Axis(2), None, None),
    "transposed": ((4, 6, 3), Axis(1), None, None),
    "transposed, aligned": ((4, 6, 8), Axis(1), None, None),
    "grouped": ((6, 4, 3), Axis(1, groups=2), None, None),
    "grouped, aligned": ((8, 4, 8), Axis(1, groups=2), None, None),
    "channels last": ((8, 4, 3, 3), Axis(0), LAST, None),
    "contiguous gradient": ((8, 4, 3, 3), Axis(0), LAST, CONTIGUOUS),
    "channels-last gradient": ((8, 4, 3, 3), Axis(0), CONTIGUOUS, LAST),
    "transposed channels last": ((4, 8, 3, 3), Axis(1), LAST, None),
    "transposed, mixed": ((4, 6, 3, 3), Axis(1), LAST, CONTIGUOUS),
    "grouped, mixed": ((6, 4, 3, 3), Axis(1, groups=2), CONTIGUOUS, LAST),
    "transposed view": ((7, 5), Axis(0), "transposed", None),
    "transposed view, contiguous gradient": ((7, 8), Axis(0), "transposed", CONTIGUOUS),
    "off by an element": ((6, 64), Axis(0), "off", None),
    "gradient off by an element": ((6, 64), Axis(0), None, "off"),
    "gradient with gaps": ((10, 8), Axis(0), None, "gaps"),
    "expanded gradient": ((4, 8), Axis(0), None, "expanded"),
    "gradient of a sum": ((4, 8), Axis(0), None, "one number"),
    "gradient that two levels of strides cannot follow": ((2, 3, 4, 5), Axis(1), CONTIGUOUS, "scattered"),
}
SOME = ("ragged", "aligned", "last axis, aligned", "transposed", "grouped, aligned", "contiguous gradient")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Limits so low that small tensors take the way of large ones.
WAYS = {
    "on chip": {},
    "walk": dict(_ON_CHIP=16, _STRIDE=64, _SHARED=32, _ACROSS=8),
    "spread": dict(_ON_CHIP=16, _STRIDE=64, _SHARED=32, _ACROSS=8, _WALKED=32, _FULL=12),
}
EVERY_WAY = [(name, way) for way in WAYS for name in (ZOO if way == "on chip" else SOME)]


@pytest.fixture(autouse=True)
def _poison_and_forget():
    """Fill what ``torch.empty`` returns with NaN; know no launches of earlier tests, which had other limits."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    forget()


def forget():
    compose._alone.cache_clear()
    compose._model.cache_clear()


@pytest.fixture
def take(monkeypatch):
    """Return what makes rows take a way."""

    def take(way):
        for name, value in WAYS[way].items():
            monkeypatch.setattr(compose_tiles, name, value)

    return take


def laid_out(x, layout):
    """Return a tensor in a layout, by name or by torch's own."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "off":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "gaps":
        return torch.cat([x, x[:, :2]], dim=1)[:, : x.shape[1]]
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "one number":
        return x[0, 0].expand_as(x)
    if layout == "scattered":
        return x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    return x.clone() if layout is None else x.contiguous(memory_format=layout)


def example(name, dtype=torch.float32, g_dtype=None, grad_dtype=None):
    """Return v, g, the axis and a gradient."""
    shape, axis, layout, grad_layout = ZOO[name]
    v = laid_out(torch.randn(shape).to(dtype), layout)
    g = formula.decompose(axis.split(v), axis.kept(v))[1] * 1.5 - 0.3
    grad = torch.randn_like(v) if grad_layout is None else laid_out(torch.randn(shape).to(dtype), grad_layout)
    return v, g.to(g_dtype or dtype), axis, grad.to(grad_dtype or dtype)


def by_formula(v, g, axis, grad):
    """Return w, ∂v and ∂g in plain torch."""
    split, kept = axis.split(v), axis.kept(v)
    grad_v, grad_g = formula.pull_back(axis.split(grad), split, g, kept)
    return formula.compose(split, g, kept).reshape(v.shape), grad_v.reshape(v.shape), grad_g


def by_kernels(v, g, axis, grad):
    """Return the same of the kernels."""
    (w,) = compose.forward([v], [g], [axis])
    (grad_v,), (grad_g,) = compose.backward([grad], [v], [g], [axis])
    assert w.stride() == grad_v.stride() == v.stride()
    assert grad_g.stride() == g.stride()
    return w, grad_v, grad_g


def assert_as_near_as_torch(v, g, axis, grad):
    """Each result is at most twice as far from float64 as plain torch is, and half a unit in the last place.

    A whole one for bfloat16: Triton's interpreter cuts it off where GPUs round it.
    """
    ours, torchs = by_kernels(v, g, axis, grad), by_formula(v, g, axis, grad)
    truth = by_formula(v.double(), g.double(), axis, grad.double())
    largest = [truth[0].abs().max(), truth[1].abs().max(), axis.rows(grad.double()).norm(dim=1).max()]
    for result, theirs, true, scale in zip(ours, torchs, truth, largest, strict=True):
        assert (result.dtype, result.shape) == (theirs.dtype, theirs.shape)
        error, allowed = ((x.double() - true).abs().max() for x in (result, theirs))
        unit = torch.finfo(result.dtype).eps * (1 if result.dtype == torch.bfloat16 else 0.5)
        assert error <= 2 * allowed + unit * scale


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("name", "way"), EVERY_WAY)
def test_every_layout_is_as_near_to_float64_as_torch(name, dtype, way, take):
    take(way)
    assert_as_near_as_torch(*example(name, dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_beside_the_numpy_oracle(name, way, take):
    take(way)
    v, g, axis, grad = example(name, torch.float64)
    v_rows, g_rows, grad_rows = (x.numpy() for x in (axis.rows(v), g.flatten(), axis.rows(grad)))
    w, grad_v, grad_g = by_kernels(v, g, axis, grad)
    expected_v, expected_g = oracle.gradients(grad_rows, v_rows, g_rows)
    np.testing.assert_allclose(axis.rows(w), oracle.w_of(v_rows, g_rows), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(axis.rows(grad_v), expected_v, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grad_g.flatten(), expected_g, rtol=1e-12, atol=1e-14)


def test_a_direction_may_come_back_in_another_layout(monkeypatch):
    """As of ``torch.autograd.graph.save_on_cpu``."""
    monkeypatch.setattr(compose, "HOMES", {"cpu"})
    v, g, axis, grad = example("channels last")
    found = compose.one(v, g, axis).backward(grad, v.contiguous(), g)
    assert found[0].stride() == v.stride()
    for result, expected in zip(found, by_formula(v, g, axis, grad)[1:], strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("dtype", "g_dtype", "grad_dtype"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_of_v_g_and_the_gradient_may_differ(dtype, g_dtype, grad_dtype):
    for name in ("matrix", "aligned", "transposed, aligned"):
        assert_as_near_as_torch(*example(name, dtype, g_dtype, grad_dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_at_or_under_the_floor_is_dead(dtype, way, take):
    take(way)
    floor = formula.length_floor(dtype) if dtype != torch.float16 else 1e-3  # all that it can hold is 0, or above
    lengths = [0.0, (0.99 if dtype != torch.float16 else 0.0) * floor, 1.01 * floor, 1.0]
    for axis, shape in ((Axis(0), (4, 36)), (Axis(1), (36, 4))):
        v = torch.zeros(shape, dtype=dtype)
        axis.rows(v)[:, 5] = torch.tensor(lengths, dtype=dtype)
        g = torch.full_like(formula.decompose(v, axis.dim)[1], 2.0)
        w, grad_v, grad_g = by_kernels(v, g, axis, torch.ones_like(v))
        assert axis.rows(w).abs().sum(1).tolist() == [0, 0, 2, 2]
        assert axis.rows(grad_v).abs().sum(1).gt(0).tolist() == [False, False, True, True]
        assert grad_g.flatten().tolist() == [0, 0, 1, 1]


def test_a_row_of_one_element_has_no_direction_to_turn():
    for name in ("one element a row", "one element", "vector of single elements"):
        v, g, axis, grad = example(name)
        grad.fill_(torch.nan)
        _, grad_v, grad_g = by_kernels(v, g, axis, grad)
        assert not grad_v.any()
        assert grad_g.isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["v", "g", "gradient"])
def test_what_is_not_finite_is_as_in_the_formula_and_stays_in_its_row(where, bad, way, take):
    take(way)
    for name in ("ragged", "transposed"):
        v, g, axis, grad = example(name)
        if where == "g":
            g.flatten()[2] = bad
        else:
            # rows of a view: what is set there is set in the tensor
            x = v if where == "v" else grad
            axis.rows(x)[2, 1], rows = bad, axis.rows(x)
            rows[2, 1] = bad
            x.copy_(axis.from_rows(rows, x))
        ours, torchs = by_kernels(v, g, axis, grad), by_formula(v, g, axis, grad)
        for result, expected in zip(ours, torchs, strict=True):
            torch.testing.assert_close(result, expected, equal_nan=True)
        w, grad_v, grad_g = axis.rows(ours[0]), axis.rows(ours[1]), ours[2].flatten()[:, None]
        for result in (w, grad_v, grad_g):
            assert result.isfinite().all(1).logical_not().nonzero().flatten().tolist() in ([2], [])


@pytest.mark.parametrize(("name", "way"), EVERY_WAY)
def test_nothing_outside_a_tensor_is_read_or_written(name, way, take):
    """All five arrays lie between NaN: one element read or written too far would show."""
    take(way)
    v, g, axis, grad = example(name)
    grad = compose_tiles.described(grad, v, axis)
    rooms, inside = [], []
    for x in (v, g, grad, v, g):
        span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        room = torch.full((64 + span,), torch.nan)
        rooms.append(room)
        inside.append(room.as_strided(x.shape, x.stride(), 32))
    for there, x in zip(inside, (v, g, grad), strict=False):
        once = tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())
        there[once].copy_(x[once])
    expected = by_formula(v, g, axis, grad)
    compose_launches.Pass(Kind(*compose._kind(v, g, axis, inside[2])))(*(x.data_ptr() for x in inside))
    torch.testing.assert_close(inside[3], expected[1])
    torch.testing.assert_close(inside[4], expected[2])
    compose_launches.Pass(Kind(*compose._kind(v, g, axis, None)))(*(inside[i].data_ptr() for i in (0, 1, 0, 3, 1)))
    torch.testing.assert_close(inside[3], expected[0])
    for room in rooms:
        assert room[:32].isnan().all()
        assert room[-32:].isnan().all()


def model(names, dtypes=DTYPES[:1]):
    """Return lists of v, g, axes and gradients: every example in several dtypes."""
    examples = [example(name, dtype) for name in names for dtype in dtypes]
    return (list(each) for each in zip(*examples, strict=True))


@pytest.fixture
def counted(monkeypatch):
    """Count launches by kernel, uploads of tables, and how often these are made."""
    made = {"launches": 0, "uploads": 0, "tables": 0}

    def launch(self, *arguments, original=compose_launches.Launch.__call__):
        made["launches"] += 1
        return original(self, *arguments)

    def send(upload, host, original=tables.Upload._send):
        made["uploads"] += 1
        return original(upload, host)

    def make(self, kinds, original=compose_together.Together.__init__):
        made["tables"] += 1
        return original(self, kinds)

    monkeypatch.setattr(compose_launches.Launch, "__call__", launch)
    monkeypatch.setattr(tables.Upload, "_send", send)
    monkeypatch.setattr(compose_together.Together, "__init__", make)
    return made


@pytest.mark.parametrize(
    ("way", "names", "dtypes", "launches"),
    [
        ("on chip", ZOO, DTYPES[:2], 2),
        ("walk", SOME, DTYPES[:1], 1),
        ("spread", ("ragged", "last axis, aligned", "matrix", "tiny rows"), DTYPES[:1], 2 + 2 + 1),
    ],
    ids=WAYS,
)
def test_all_at_once_is_one_by_one_to_the_last_bit(way, names, dtypes, launches, take, counted):
    take(way)
    vs, gs, axes, grads = model(names, dtypes)
    ws, (grad_vs, grad_gs) = compose.forward(vs, gs, axes), compose.backward(grads, vs, gs, axes)
    assert counted["launches"] == 2 * launches  # for each dtype one each way, but two for each weight that is spread
    for ours, v, g, axis, grad in zip(zip(ws, grad_vs, grad_gs, strict=True), vs, gs, axes, grads, strict=True):
        for result, alone, like in zip(ours, by_kernels(v, g, axis, grad), (v, v, g), strict=True):
            assert torch.equal(result, alone)
            assert (result.dtype, result.stride()) == (like.dtype, like.stride())


def test_weights_without_a_gradient_get_none(take):
    take("walk")
    vs, gs, axes, grads = model(SOME)
    expected = compose.backward(grads, vs, gs, axes)
    some = [None if i % 3 == 1 else grad for i, grad in enumerate(grads)]
    for results, all_results in zip(compose.backward(some, vs, gs, axes), expected, strict=True):
        for grad, result, whole in zip(some, results, all_results, strict=True):
            assert result is None if grad is None else torch.equal(result, whole)
    assert compose.backward([None], vs[:1], gs[:1], axes[:1]) == ([None], [None])


def test_results_are_no_views_of_each_other():
    vs, gs, axes, grads = model(("matrix", "aligned", "last axis"))
    for results in (compose.forward(vs, gs, axes), *compose.backward(grads, vs, gs, axes)):
        before = copy.deepcopy(results[1:])
        results[0].fill_(7)
        assert [result._version for result in results] == [1] + [0] * (len(results) - 1)
        assert all(torch.equal(*pair) for pair in zip(results[1:], before, strict=True))
        assert not any(result._is_view() for result in results)


def test_results_are_such_as_autograd_takes_without_copying():
    class All(torch.autograd.Function):
        @staticmethod
        def forward(ctx, axes, *tensors):
            ctx.axes = axes
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors)
            return tuple(compose.forward(tensors[: len(axes)], tensors[len(axes) :], axes))

        @staticmethod
        def backward(ctx, *grads):
            vs, gs = ctx.saved_tensors[: len(grads)], ctx.saved_tensors[len(grads) :]
            grad_vs, grad_gs = compose.backward(grads, vs, gs, ctx.axes)
            at[:] = [None if x is None else x.data_ptr() for x in (*grad_vs, *grad_gs)]
            return None, *grad_vs, *grad_gs

    at = []
    vs, gs, axes, grads = model(("matrix", "channels last", "last axis", "grouped"))
    for x in (*vs, *gs):
        x.requires_grad_()
    ws = All.apply(axes, *vs, *gs)
    torch.autograd.backward(ws[:3], [grad.clone() for grad in grads[:3]], retain_graph=True)
    assert vs[3].grad is gs[3].grad is None
    for v, g, axis, grad in zip(vs[:3], gs, axes, grads, strict=False):
        torch.testing.assert_close((v.grad, g.grad), by_formula(v.detach(), g.detach(), axis, grad)[1:])
    for x in (*vs, *gs):
        x.grad = None
    torch.autograd.backward(ws, grads)
    assert [x.grad.data_ptr() for x in (*vs, *gs)] == at


def test_tables_stay_while_nothing_moves(counted):
    names = ("matrix", "aligned", "last axis", "channels last")
    vs, gs, axes, grads = model(names)
    alive = [*vs, *gs, *grads]  # so that nothing new can lie where they do

    def uploads():
        counted.update(uploads=0, tables=0)
        ws, (grad_vs, grad_gs) = compose.forward(vs, gs, axes), compose.backward(grads, vs, gs, axes)
        for results, *one in zip(zip(ws, grad_vs, grad_gs, strict=True), vs, gs, axes, grads, strict=True):
            for result, expected in zip(results, by_formula(*one), strict=True):
                torch.testing.assert_close(result, expected)
        return counted["uploads"], counted["tables"]

    assert uploads() == (2, 2)
    assert uploads() == (0, 0)
    vs[1] = torch.randn_like(vs[1])
    assert uploads() == (2, 0)
    grads[0] = torch.randn_like(grads[0])
    assert uploads() == (1, 0)
    vs[0].normal_()
    assert uploads() == (0, 0)
    grads[3] = grads[3].contiguous()  # another layout
    assert uploads() == (1, 1)
    assert len(alive) == 12


@pytest.fixture
def recording(monkeypatch):
    """Let the CPU pass for a GPU on which a CUDA graph is being recorded; what a replay does cannot be tested so."""

    def record(on):
        for module in (tables, compose_together):
            monkeypatch.setattr(module, "is_recording", lambda device: on)

    monkeypatch.setattr(compose_together, "_recorded", [])
    return record


def test_a_graph_has_tables_that_nothing_rewrites(recording):
    vs, gs, axes, grads = model(("matrix", "aligned"))
    recording(True)
    with pytest.raises(ValueError, match="run forward and backward once before"):
        compose.forward(vs, gs, axes)
    recording(False)
    compose.forward(vs, gs, axes), compose.backward(grads, vs, gs, axes)
    recording(True)
    compose.forward(vs, gs, axes)
    (forward,) = compose_together._recorded
    (table,) = forward._addresses._recorded
    assert table is forward._addresses._table
    compose.backward(grads, vs, gs, axes)
    before = table.clone()
    recording(False)
    vs[0] = torch.randn_like(vs[0])
    compose.forward(vs, gs, axes)
    assert torch.equal(table, before)
    assert table is not forward._addresses._table
    assert len(compose_together._recorded) == 2


def test_the_second_launch_calls_the_compiled_kernel_with_the_same_arguments():
    calls = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: calls.append(("compiled", grid, arguments))

    class Kernel:
        arg_names = ("a", "at", "BLOCK", "ROWS")

        def __getitem__(self, grid):
            def run(*arguments, num_warps):
                calls.append(("jit", grid, arguments))
                return Compiled()

            return run

    launch = compose_launches.Launch(Kernel(), 5, [(1, 2)], {"ROWS": 3, "BLOCK": 4, "WALK": True})
    launch(7)
    launch(8)
    assert calls == [("jit", (5, 1, 1), (7, (1, 2), 4, 3)), ("compiled", (5, 1, 1), (8, (1, 2), 4, 3))]


def test_what_the_kernels_take(monkeypatch):
    v, g, axis, _ = example("matrix")
    assert not compose.one(v, g, axis)  # on a CPU
    monkeypatch.setattr(compose, "HOMES", {"cpu"})
    for name in ZOO:
        v, g, axis, _ = example(name)
        assert compose.one(v, g, axis), name
    v, g, axis, _ = example("matrix")
    refused = {
        "complex": (v.to(torch.complex64), g, axis),
        "whole numbers": (v, g.int(), axis),
        "gaps": (laid_out(v, "gaps"), g, axis),
        "expanded": (v[:1].expand(5, 7), g, axis),
        "scattered": (torch.randn(2, 3, 2, 3, 2), torch.randn(1, 3, 1, 3, 1), Axis((1, 3))),
        "empty": (v[:0], g[:0], axis),
        "empty rows": (v[:, :0], g, axis),
        "lengths with gaps": (v, torch.randn(5, 2)[:, :1], axis),
        "lengths of another axis": (v, g, Axis(1)),
        "elsewhere": (v, g.to("meta"), axis),
    }
    assert [name for name, one in refused.items() if compose.one(*one)] == []
    forget()
    monkeypatch.setattr(compose.importlib.util, "find_spec", lambda name: None)
    assert not compose.one(v, g, axis)


def kind(shape, axis, dtype=torch.float32, aligned=True):
    v, g = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(1)
    return Kind(
        v.shape, v.stride(), dtype, v.device, g.shape, g.dtype, axis.dim, axis.groups, aligned, v.stride(), dtype
    )


def test_tiles_of_known_weights():
    """wav2vec2's positional convolution, and others that a GPU should be filled by."""
    wav2vec2, whole = kind((768, 48, 128), Axis(2)), kind((1536, 1536), Axis(None))
    assert tile_of(wav2vec2) == (False, True, 4, 32, 64, True)
    for each in (wav2vec2, whole):
        tile = tile_of(each)
        chunks, steps = chunks_of(each.at, tile)
        assert 256 <= tile.programs(each.at) * chunks <= 600
        assert (chunks - 1) * steps * tile.block < each.at.length <= chunks * steps * tile.block
    assert tile_of(kind((512, 512, 3, 3), Axis(0))) == (False, False, 4, 1, 8192, False)
    assert tile_of(kind((512, 256, 16), Axis(1)))[:3] == (True, False, 4)  # HiFi-GAN's first upsampling
    assert tile_of(kind((768, 768), Axis(0), torch.bfloat16)).vector == 8
    assert tile_of(kind((768, 768), Axis(0), aligned=False)).vector == 1
    assert tile_of(kind((768, 27), Axis(0))).vector == 1


@triton.jit
def places(out, at, first, SPLIT: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr):
    r, j = triton_compose._tile(first, 4, 8, ACROSS)
    here = (r - first) * 8 + j
    tl.store(out + here, triton_compose._place(at, r, j, 4, SPLIT, ACROSS, VECTOR).to(tl.int64))
    tl.store(out + 32 + here, triton_compose._place(at, r, j, 8, SPLIT, ACROSS, VECTOR).to(tl.int64))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("vector", [1, 4])
def test_offsets_beyond_32_bits(vector, split, across):
    rows, first = 2**21, 2**21 - 4
    strides = [2**36, 2**22, 2**34, 2**33]
    if vector > 1:
        strides[1 if across else 3] = 1
    grad_strides = [stride + (4 if stride > 1 else 0) for stride in strides]
    sizes = (2**10, 4) if split else (rows, 2**12)
    out = torch.zeros(2, 4, 8, dtype=torch.int64)
    places[(1,)](out, (rows, 2**12, *sizes, *strides, *grad_strides), first, split, across, vector)
    for which, (outer, inner, column_outer, column_inner) in enumerate((strides, grad_strides)):
        for r in range(4):
            for j in range(8):
                by_row = (first + r) // sizes[0] * outer + (first + r) % sizes[0] * inner
                assert out[which, r, j] == by_row + j // sizes[1] * column_outer + j % sizes[1] * column_inner
    assert out.max() > 2**31
