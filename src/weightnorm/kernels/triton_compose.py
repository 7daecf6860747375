"""The weight ``w = g v/‖v‖`` in Triton, and with ``BACK`` its gradients instead: eqs. 2 and 3 in one pass.

``one`` takes a weight's addresses and layout as arguments, so that little is done to launch it; ``many`` reads those of
all weights of a model from tables, and has in it every tile that they need. Both keep rows on chip where they fit, and
else walk along them twice, served by the cache the second time. ``sums`` and ``close`` do what ``one`` does with rows
that are too few and too long to be a program's: each is spread over several.

A layout ``at`` is a tuple: ``rows, length, row_split, split``, and for the weight and then for its gradient the strides
of rows (outer, inner) and of elements (outer, inner), as in ``layout.Layout``. Where it has two levels of either, the
kernels need ``SPLIT``. Neighbours in memory are a row's elements or, ``ACROSS``, rows; ``VECTOR`` of them, if it is not
1, lie side by side from a multiple of 16 bytes on in every array.
"""

import triton
import triton.language as tl

from weightnorm.kernels.triton_kernels import _array, _pointer, _tile


@triton.jit
def _multiple(x, VECTOR: tl.constexpr):
    """Return a multiple of ``VECTOR`` such that the compiler sees what it is."""
    return tl.cast(x, tl.int64) // VECTOR * VECTOR


@triton.jit
def _along(i, split, outer, inner, SPLIT: tl.constexpr, FAST: tl.constexpr, VECTOR: tl.constexpr):
    """Return how far off the ``i``-th row is, or the ``i``-th element; ``FAST``: neighbours in memory, if any are."""
    i = i.to(tl.int32)  # cheaper to divide
    step = _multiple(inner, VECTOR)
    if FAST and VECTOR > 1:
        step = 1
    if SPLIT:
        size = _multiple(split, VECTOR if FAST else 1).to(tl.int32)
        return (i // size) * _multiple(outer, VECTOR) + (i % size) * step
    else:
        return i * step


@triton.jit
def _place(at, r, j, FIRST: tl.constexpr, SPLIT: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr):
    """Return where element ``j`` of row ``r`` lies, in 64 bits, by the four strides that begin at ``FIRST``."""
    by_row = _along(r, at[2], at[FIRST], at[FIRST + 1], SPLIT, ACROSS, VECTOR)
    return by_row + _along(j, at[3], at[FIRST + 2], at[FIRST + 3], SPLIT, not ACROSS, VECTOR)


@triton.jit
def _exists(at, r, j, ACROSS: tl.constexpr, VECTOR: tl.constexpr):
    """Say which rows and elements there are."""
    return (r < _multiple(at[0], VECTOR if ACROSS else 1)) & (j < _multiple(at[1], 1 if ACROSS else VECTOR))


@triton.jit
def _load(v, grad, at, r, j, A: tl.constexpr, BACK: tl.constexpr, SPLIT: tl.constexpr, ACROSS: tl.constexpr,
          VECTOR: tl.constexpr):  # fmt: skip
    """Load elements of ``v``, and of ``∂w`` where it is wanted, in the wide dtype."""
    here = _exists(at, r, j, ACROSS, VECTOR)
    x = tl.load(v + _place(at, r, j, 4, SPLIT, ACROSS, VECTOR), here, other=0.0).to(A)
    dw = x
    if BACK:
        dw = tl.load(grad + _place(at, r, j, 8, SPLIT, ACROSS, VECTOR), here, other=0.0).to(A)
    return x, dw


@triton.jit
def _store(out, at, r, j, x, dw, scale, along, BACK: tl.constexpr, SPLIT: tl.constexpr, ACROSS: tl.constexpr,
           VECTOR: tl.constexpr):  # fmt: skip
    """Store elements of ``w``, or of ``∂v``: zero in a row of one element, which is all length."""
    y = scale * x
    if BACK:
        y = tl.where(at[1] + 0 * r == 1, 0.0, scale * (dw - along * x))
    y = y.to(out.dtype.element_ty)
    tl.store(out + _place(at, r, j, 4, SPLIT, ACROSS, VECTOR), y, _exists(at, r, j, ACROSS, VECTOR))


@triton.jit
def _row(g, grad_g, at, r, squares, product, keeps, A: tl.constexpr, BACK: tl.constexpr, FLOOR: tl.constexpr):
    """Return what ``w = scale v`` and ``∂v = scale (∂w − along v)`` need; store ``∂g`` where it is to be kept.

    A row whose length is at or under the floor composes to zero and passes no gradient.
    """
    here = r < at[0]
    alive = squares > FLOOR * FLOOR
    length = tl.sqrt(tl.where(alive, squares, 1.0))
    inverse = tl.where(alive, 1.0 / length, 0.0)
    scale = tl.where(alive, tl.load(g + r, here, other=0.0).to(A) / length, 0.0)
    if BACK:
        tl.store(grad_g + r, (product * inverse).to(grad_g.dtype.element_ty), here & keeps)
    return scale, product * inverse * inverse


@triton.jit
def _sums(v, grad, at, r, j, first, last, A: tl.constexpr, BACK: tl.constexpr, SPLIT: tl.constexpr,
          ACROSS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Walk from block ``first`` of the rows to ``last``; return each row's ``Σv²`` and, ``BACK``, ``Σ v ∂w``."""
    AXIS: tl.constexpr = 0 if ACROSS else 1
    squares = tl.zeros((r + j).shape, A)
    products = tl.zeros((r + j).shape, A)
    for block in range(first, last):
        x, dw = _load(v, grad, at, r, j + block * BLOCK, A, BACK, SPLIT, ACROSS, VECTOR)
        squares += x * x
        if BACK:
            products += x * dw
    return tl.sum(squares, AXIS, keep_dims=True), tl.sum(products, AXIS, keep_dims=True)


@triton.jit
def _rescale(v, grad, out, at, r, j, scale, along, first, last, A: tl.constexpr, BACK: tl.constexpr,
             SPLIT: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Walk from block ``first`` of the rows to ``last`` once more, and store."""
    for block in range(first, last):
        x, dw = _load(v, grad, at, r, j + block * BLOCK, A, BACK, SPLIT, ACROSS, VECTOR)
        _store(out, at, r, j + block * BLOCK, x, dw, scale, along, BACK, SPLIT, ACROSS, VECTOR)


@triton.jit
def _rows(v, g, grad, out, grad_g, at, first_row, A: tl.constexpr, BACK: tl.constexpr, FLOOR: tl.constexpr,
          SPLIT: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
          WALK: tl.constexpr):  # fmt: skip
    """Do ``ROWS`` whole rows: of at most ``BLOCK`` elements, held on chip, or so many at a time on a ``WALK``."""
    AXIS: tl.constexpr = 0 if ACROSS else 1
    r, j = _tile(first_row, ROWS, BLOCK, ACROSS)
    if WALK:
        blocks = tl.cdiv(at[1], BLOCK)
        squares, product = _sums(v, grad, at, r, j, 0, blocks, A, BACK, SPLIT, ACROSS, VECTOR, BLOCK)
        scale, along = _row(g, grad_g, at, r, squares, product, True, A, BACK, FLOOR)
        _rescale(v, grad, out, at, r, j, scale, along, 0, blocks, A, BACK, SPLIT, ACROSS, VECTOR, BLOCK)
    else:
        x, dw = _load(v, grad, at, r, j, A, BACK, SPLIT, ACROSS, VECTOR)
        squares, product = tl.sum(x * x, AXIS, keep_dims=True), tl.sum(x * dw, AXIS, keep_dims=True)
        scale, along = _row(g, grad_g, at, r, squares, product, True, A, BACK, FLOOR)
        _store(out, at, r, j, x, dw, scale, along, BACK, SPLIT, ACROSS, VECTOR)


@triton.jit(do_not_specialize=("v", "g", "grad", "out", "grad_g"))
def one(v: tl.int64, g: tl.int64, grad: tl.int64, out: tl.int64, grad_g: tl.int64, at,
        V: tl.constexpr, G: tl.constexpr, D: tl.constexpr, A: tl.constexpr, BACK: tl.constexpr, FLOOR: tl.constexpr,
        SPLIT: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
        WALK: tl.constexpr):  # fmt: skip
    """Compose the rows of one weight, or pull their gradients back."""
    _rows(
        _array(v, V, VECTOR), _pointer(g, G), _array(grad, D, VECTOR), _array(out, V, VECTOR), _pointer(grad_g, G),
        at, tl.program_id(0) * ROWS, A, BACK, FLOOR, SPLIT, ACROSS, VECTOR, ROWS, BLOCK, WALK,
    )  # fmt: skip


@triton.jit(do_not_specialize=("out", "grad_g"))
def many(table, addresses, programs, out: tl.int64, grad_g: tl.int64, count,
         V: tl.constexpr, G: tl.constexpr, D: tl.constexpr, A: tl.constexpr, BACK: tl.constexpr, FLOOR: tl.constexpr,
         TILES: tl.constexpr):  # fmt: skip
    """Compose the rows of many weights, or pull their gradients back.

    A program has a tensor, a first row, and one of the ``TILES``: the last six constants of ``one``. ``table`` has each
    tensor's layout, and how many bytes its results lie from the beginning of all; ``addresses`` those of every v, then
    of every g, then of every ``∂w``, 0 where there is none.
    """
    program = programs + 3 * tl.program_id(0)
    tensor, first_row, tile = tl.load(program).to(tl.int64), tl.load(program + 1), tl.load(program + 2)
    row = table + tensor * 14
    at = (tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5),
          tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9), tl.load(row + 10),
          tl.load(row + 11))  # fmt: skip
    v, g = tl.load(addresses + tensor), tl.load(addresses + count + tensor)
    grad = v
    if BACK:
        grad = tl.load(addresses + 2 * count + tensor)
    out, grad_g = out + tl.load(row + 12), grad_g + tl.load(row + 13)
    for index in tl.static_range(len(TILES)):
        if (tile == index) & (grad != 0):
            _rows(
                _array(v, V, TILES[index][2]), _pointer(g, G), _array(grad, D, TILES[index][2]),
                _array(out, V, TILES[index][2]), _pointer(grad_g, G), at, first_row, A, BACK, FLOOR, TILES[index][0],
                TILES[index][1], TILES[index][2], TILES[index][3], TILES[index][4], TILES[index][5],
            )  # fmt: skip


@triton.jit
def _chunk(at, chunks, steps, ACROSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return a program's rows and the elements of a block; its chunk of them, by number, first and last block."""
    chunk = tl.program_id(0) % chunks
    r, j = _tile(tl.program_id(0) // chunks * ROWS, ROWS, BLOCK, ACROSS)
    return r, j, chunk, chunk * steps, tl.minimum((chunk + 1) * steps, tl.cdiv(at[1], BLOCK))


@triton.jit(do_not_specialize=("v", "grad", "partials", "chunks", "steps"))
def sums(v: tl.int64, grad: tl.int64, partials: tl.int64, at, chunks: tl.int32, steps: tl.int32,
         V: tl.constexpr, D: tl.constexpr, A: tl.constexpr, BACK: tl.constexpr, SPLIT: tl.constexpr,
         ACROSS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sum up a chunk of ``ROWS`` rows: ``steps`` blocks. All ``Σv²`` come first, chunk by chunk, then ``Σ v ∂w``."""
    r, j, chunk, first, last = _chunk(at, chunks, steps, ACROSS, ROWS, BLOCK)
    squares, product = _sums(
        _array(v, V, VECTOR), _array(grad, D, VECTOR), at, r, j, first, last, A, BACK, SPLIT, ACROSS, VECTOR, BLOCK
    )
    place = _pointer(partials, A) + chunk * at[0] + r
    tl.store(place, squares, r < at[0])
    if BACK:
        tl.store(place + chunks * at[0], product, r < at[0])


@triton.jit
def _total(partials, at, r, chunks, A: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the sums of the rows' chunks, always in the same order."""
    AXIS: tl.constexpr = 0 if ACROSS else 1
    _, c = _tile(chunks * 0, 1, BLOCK, ACROSS)
    total = tl.zeros((r + c).shape, A)
    for start in range(0, chunks, BLOCK):
        here = (r < at[0]) & (start + c < chunks)
        total += tl.load(partials + (start + c) * at[0] + r, here, other=0.0)
    return tl.sum(total, AXIS, keep_dims=True)


@triton.jit(do_not_specialize=("v", "g", "grad", "out", "grad_g", "partials", "chunks", "steps"))
def close(v: tl.int64, g: tl.int64, grad: tl.int64, out: tl.int64, grad_g: tl.int64, partials: tl.int64, at,
          chunks: tl.int32, steps: tl.int32,
          V: tl.constexpr, G: tl.constexpr, D: tl.constexpr, A: tl.constexpr, BACK: tl.constexpr, FLOOR: tl.constexpr,
          SPLIT: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Compose, or pull back, what ``sums`` has summed up."""
    r, j, chunk, first, last = _chunk(at, chunks, steps, ACROSS, ROWS, BLOCK)
    totals = _pointer(partials, A)
    squares = _total(totals, at, r, chunks, A, ACROSS, 64)
    product = squares
    if BACK:
        product = _total(totals + chunks * at[0], at, r, chunks, A, ACROSS, 64)
    keeps = chunk + 0 * r == 0  # one program of the row
    scale, along = _row(_pointer(g, G), _pointer(grad_g, G), at, r, squares, product, keeps, A, BACK, FLOOR)
    _rescale(
        _array(v, V, VECTOR), _array(grad, D, VECTOR), _array(out, V, VECTOR), at, r, j, scale, along, first, last,
        A, BACK, SPLIT, ACROSS, VECTOR, BLOCK,
    )  # fmt: skip
