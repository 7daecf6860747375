"""Tables of addresses hold while nothing moves, and never outlive what they point at."""

import contextlib
import copy
from itertools import chain

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

import weightnorm as wn
from weightnorm.axes import Axis
from weightnorm.kernels import columns, step, tables, triton_kernels
from weightnorm.kernels.layout import is_dense, rows_of
from weightnorm.optim import fused


@pytest.fixture
def counted(monkeypatch):
    """Count the tables that are made: all of them, and those of gradients or options alone."""
    made = {"tables": 0, "uploads": 0}

    class Counted(step.FusedStep):
        def __init__(self, *args):
            made["tables"] += 1
            super().__init__(*args)

    def send(upload, host, original=tables.Upload._send):
        made["uploads"] += 1
        return original(upload, host)

    monkeypatch.setattr(fused, "FusedStep", Counted)
    monkeypatch.setattr(tables.Upload, "_send", send)
    return made


def parameters():
    return [nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(4, 12)), nn.Parameter(torch.randn(5))]


def new_gradients(params):
    old = [p.grad for p in params]  # alive until the new ones are there, which so cannot lie where these do
    for p in params:
        p.grad = torch.randn_like(p)
    del old


def give_gradient(params, optimizer):
    params[0].grad = torch.randn_like(params[0])


def change_lr(params, optimizer):
    optimizer.param_groups[0]["lr"] = 0.5


def move_weight(params, optimizer):
    params[0].data = params[0].data.clone()


def resize_weight(params, optimizer):
    params[0].data = torch.randn(6, 9)
    params[0].grad = torch.randn(6, 9)
    optimizer.state.pop(params[0])


def replace_state(params, optimizer):
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].clone()


def move_state(params, optimizer):
    state = optimizer.state[params[0]]["exp_avg_sq"]
    state.data = state.data.clone()


def forget_state(params, optimizer):
    optimizer.state.clear()


def load_state(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def lay_gradient_out(params, optimizer):
    params[0].grad = torch.randn(8, 5).t()


def misalign_gradient(params, optimizer):
    params[1].grad = torch.randn(4 * 12 + 1)[1:].view(4, 12)


def add_parameter(params, optimizer):
    params.append(nn.Parameter(torch.randn(3, 4)))
    optimizer.add_param_group({"params": [params[-1]]})
    params[-1].grad = torch.randn(3, 4)


def remove_parameter(params, optimizer):
    del optimizer.param_groups[0]["params"][1], params[1]


def nothing(params, optimizer):
    pass


def drop_gradient(params, optimizer):
    params[1].grad = None


# What happens between two steps -> tables made anew, and uploads of gradients' addresses and of options.
EVENTS = {
    nothing: (0, 0),
    give_gradient: (0, 1),
    drop_gradient: (0, 1),
    change_lr: (0, 1),
    move_weight: (1, 2),
    resize_weight: (1, 2),
    replace_state: (1, 2),
    move_state: (1, 2),
    forget_state: (1, 2),
    load_state: (1, 2),
    lay_gradient_out: (1, 2),
    misalign_gradient: (1, 2),
    add_parameter: (1, 2),
    remove_parameter: (1, 2),
}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_tables_are_made_anew_when_and_only_when_something_moved(event, backend, counted):
    params = parameters()
    twins = copy.deepcopy(params)
    optimizer, reference = wn.AdamW(params, backend=backend), wn.AdamW(twins, backend="torch")
    for _ in range(2):
        new_gradients(params)
        for p, twin in zip(params, twins, strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    counted.update(tables=0, uploads=0)
    torch.manual_seed(1)
    event(params, optimizer)
    optimizer.step()
    assert tuple(counted.values()) == EVENTS[event]
    torch.manual_seed(1)
    event(twins, reference)
    for p, twin in zip(params, twins, strict=True):
        twin.grad = None if p.grad is None else p.grad.clone()
    reference.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)
    counted.update(tables=0, uploads=0)
    for p, twin in zip(params, twins, strict=True):  # and a step later, on the same tables
        if p.grad is not None:
            p.grad.normal_()
            twin.grad = p.grad.clone()
    optimizer.step()
    reference.step()
    assert tuple(counted.values()) == (0, 0)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_comes_and_goes_builds_no_tables(counted):
    params = parameters()
    optimizer = wn.AdamW(params, backend="numba")
    new_gradients(params)
    optimizer.step()
    counted.update(tables=0)
    for turn in range(4):
        params[turn % 2].grad, params[1 - turn % 2].grad = None, torch.ones_like(params[1 - turn % 2])
        before = params[turn % 2].detach().clone()
        optimizer.step()
        assert torch.equal(params[turn % 2], before)
    assert counted["tables"] == 0
    assert optimizer.state[params[0]]["step"] == 3


@pytest.fixture
def recording(monkeypatch):
    """Let the CPU pass for a GPU on which a CUDA graph is being recorded; what a replay does cannot be tested so."""

    @contextlib.contextmanager
    def record():
        with monkeypatch.context() as patch:
            for module in (tables, step, fused):
                patch.setattr(module, "is_recording", lambda device: True)
            yield

    return record


def warm(backend="numba"):
    params = parameters()
    optimizer = wn.AdamW(params, backend=backend)
    new_gradients(params)
    optimizer.step()
    (fused_step,) = optimizer._engines[0]._steps
    fused_step._grads._spare = [torch.empty(3, dtype=torch.int64) for _ in range(2)]  # as pinned memory on a GPU
    return params, optimizer, fused_step


def test_a_graph_has_tables_of_its_own_which_nothing_rewrites(recording):
    params, optimizer, fused_step = warm()
    eager = fused_step._grads([p.grad.data_ptr() for p in params])
    new_gradients(params)
    with recording():
        optimizer.step()
    _, table = fused_step._grads._recorded
    at = table.clone()
    assert at.tolist() == [p.grad.data_ptr() for p in params]
    assert eager is fused_step._grads._table  # an eager step does not trust a table that only a replay fills
    new_gradients(params)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert torch.equal(table, at)
    assert any(kept is table for kept in fused_step._grads._recorded)


@pytest.mark.parametrize("event", [move_weight, replace_state, forget_state, load_state, add_parameter], ids=str)
def test_what_a_graph_would_not_see_is_refused(event, recording):
    params, optimizer, _ = warm()
    with recording():
        optimizer.step()
    before = [p.detach().clone() for p in params]

    def go_on():
        event(params, optimizer)
        optimizer.step()

    with pytest.raises(ValueError, match="CUDA graph has recorded"):
        go_on()
    for p, value in zip(params, before, strict=False):
        assert torch.equal(p, value)


def test_the_first_step_is_not_recorded(recording):
    params = parameters()
    optimizer = wn.AdamW(params, backend="numba")
    new_gradients(params)
    with recording(), pytest.raises(ValueError, match="take an eager one before"):
        optimizer.step()


def test_a_misaligned_gradient_is_refused_as_often_as_it_comes(recording):
    params, optimizer, _ = warm()
    with recording():
        optimizer.step()
    params[1].grad = torch.randn(4 * 12 + 1)[1:].view(4, 12)
    for _ in range(2):
        with pytest.raises(ValueError, match="CUDA graph has recorded"):
            optimizer.step()


def test_a_learning_rate_of_zero_after_one_on_the_device_is_zero(monkeypatch):
    monkeypatch.setattr(tables, "is_on_device", lambda lr: isinstance(lr, torch.Tensor))
    monkeypatch.setattr(step, "is_on_device", lambda lr: isinstance(lr, torch.Tensor))
    params = parameters()
    optimizer = wn.SGD(params, lr=torch.tensor([0.1]), backend="numba")
    new_gradients(params)
    before = params[0].detach().clone()
    optimizer.step()
    assert not torch.equal(params[0], before)
    optimizer.param_groups[0]["lr"] = 0.0
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)


def test_recording_more_graphs_than_there_are_spare_tables_is_refused(recording):
    params, optimizer, _ = warm()
    alive = [p.grad for p in params]  # or a new gradient could come to lie where an old one was
    with recording():
        for _ in range(2):
            new_gradients(params)
            alive += [p.grad for p in params]
            optimizer.step()
        new_gradients(params)
        with pytest.raises(ValueError, match="take an eager step before"):
            optimizer.step()


@triton.jit
def offsets(table, out, first, VECTOR: tl.constexpr, STRIDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r, j = triton_kernels._tile(tl.load(first), ROWS, BLOCK, False)
    start, offset, grad_offset, _ = triton_kernels._place(table, r, j, VECTOR, STRIDED)
    here = (r - tl.load(first)) * BLOCK + j
    tl.store(out + here, (start + offset).to(tl.int64))
    tl.store(out + ROWS * BLOCK + here, (start + grad_offset).to(tl.int64))


@pytest.mark.parametrize("strided", [False, True])
def test_offsets_beyond_32_bits(strided):
    row = torch.zeros(columns.ADDRESSES, dtype=torch.int64)
    rows, length = 2**21, 2**12
    strides = [length, 1, 0, 1] if not strided else [2**33, 2**22, 2**31, 7]
    row[columns.ROWS], row[columns.LENGTH], row[columns.NUMEL] = rows, length, rows * length
    row[columns.ROW_SPLIT], row[columns.SPLIT] = 2**10, 4
    row[columns.ROW_OUTER : columns.GRAD_ROW_OUTER] = torch.tensor(strides)
    row[columns.GRAD_ROW_OUTER : columns.ADDRESSES] = torch.tensor(strides) + (1 if strided else 0)
    first = torch.tensor([rows - 2], dtype=torch.int32)
    out = torch.zeros(2, 2, 8, dtype=torch.int64)
    offsets[(1,)](row, out, first, VECTOR=1, STRIDED=strided, ROWS=2, BLOCK=8)
    for which, extra in ((0, 0), (1, 1 if strided else 0)):
        outer, inner, column_outer, column_inner = (stride + extra for stride in strides)
        for r in range(2):
            for j in range(8):
                at = rows - 2 + r
                expected = at * length + j
                if strided:
                    expected = at // 2**10 * outer + at % 2**10 * inner + j // 4 * column_outer + j % 4 * column_inner
                assert out[which, r, j] == expected
    assert out.min() > 2**31


LAYOUTS = {
    "matrix": (torch.zeros(4, 6), Axis(0)),
    "whole": (torch.zeros(4, 6), Axis(None)),
    "transposed": (torch.zeros(4, 6, 3), Axis(1)),
    "grouped": (torch.zeros(8, 6, 3), Axis(1, 2)),
    "stacked": (torch.zeros(2, 3, 8), Axis((0, 1))),
    "channels last": (torch.zeros(8, 4, 3, 3).to(memory_format=torch.channels_last), Axis(0)),
    "view": (torch.zeros(6, 4).t(), Axis(0)),
    "plain": (torch.zeros(50, 60), None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_finds_every_element_once_in_its_row(name):
    weight, axis = LAYOUTS[name]
    weight = weight.clone(memory_format=torch.preserve_format)
    layout = rows_of(weight, weight, axis)
    flat = torch.as_strided(weight, (weight.numel(),), (1,))
    flat.copy_(torch.arange(weight.numel()))
    found = []
    for r in range(layout.rows):
        start = r // layout.row_split * layout.row[0] + r % layout.row_split * layout.row[1]
        columns_of = [
            j // layout.split * layout.column[0] + j % layout.split * layout.column[1] for j in range(layout.length)
        ]
        found.append([start + at for at in columns_of if axis or start + at < weight.numel()])
    assert sorted(chain.from_iterable(found)) == list(range(weight.numel()))
    if axis:
        assert [sorted(row) for row in found] == [sorted(row) for row in axis.rows(weight).tolist()]


@pytest.mark.parametrize(
    ("weight", "dense"),
    [
        (torch.zeros(4, 6), True),
        (torch.zeros(4, 6).t(), True),
        (torch.zeros(1, 6).expand(4, 6), False),
        (torch.zeros(4, 8)[:, :6], False),
        (torch.zeros(3, 1, 4).transpose(0, 1), True),
    ],
)
def test_dense_tensors_are_told_from_others(weight, dense):
    assert is_dense(weight) is dense
    p = nn.Parameter(torch.empty(0))
    p.data = weight
    p.grad = torch.ones_like(weight)
    if not dense:
        with pytest.raises(ValueError, match="gaps or overlaps"):
            wn.SGD([p], lr=0.1, backend="triton")
