"""The fused step in Triton: rows of many tensors in a launch, through tables of addresses.

``tiles`` holds whole rows on chip: one read of the weight, its gradient and its moments, one write of all but the
gradient. ``walk`` goes along longer rows three times, served by the cache the second time; ``split_*`` spreads the
longest over several programs. The mathematics is in ``arithmetic``.
"""

import triton
import triton.language as tl

from weightnorm.kernels import arithmetic, columns

_open_row, _pull_back_element, _settle, _close_row, _sgd, _adam, _amsgrad, _adamax, _sgd_clock, _adam_clock = (
    triton.jit(arithmetic.bound_to(function, tl))
    for function in (
        arithmetic.open_row,
        arithmetic.pull_back,
        arithmetic.settle,
        arithmetic.close_row,
        arithmetic.sgd,
        arithmetic.adam,
        arithmetic.amsgrad,
        arithmetic.adamax,
        arithmetic.sgd_clock,
        arithmetic.adam_clock,
    )
)


@triton.jit
def _pointer(address, KIND: tl.constexpr):
    return address.to(tl.pointer_type(KIND))


@triton.jit
def _array(address, KIND: tl.constexpr, VECTOR: tl.constexpr):
    """Return a pointer to an array read ``VECTOR`` elements at a time, which begins at a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(KIND))  # not by a call: the hint must lie on the cast itself
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _count(place, runs):
    """Add one to counts of steps, where there are any, and return them."""
    address = tl.load(place, runs, other=0)
    counts = _pointer(address, tl.float32)
    count = tl.load(counts, address != 0, other=0.0) + 1.0
    tl.store(counts, count, address != 0)
    return count.to(tl.float64)


@triton.jit
def clock(table, facts, options, moves, grads, grad_scale, found_inf, count, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Count the step of every tensor that has a gradient, and work out what moves its elements."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tensor < count
    move = moves + tensor * columns.MOVES
    runs = here & (tl.load(grads + tensor, here, other=0) != 0) & (tl.load(found_inf + 0 * tensor) == 0.0)
    tl.store(move + columns.MOVE_ON, tl.where(runs, 1.0, 0.0).to(tl.float64), here)

    row = table + tensor * columns.ADDRESSES
    step = _count(row + columns.STEP, runs)
    _count(row + columns.G_STEP, runs)  # that of g: the same

    option = options + tl.load(row + columns.GROUP, here, other=0) * columns.OPTIONS
    lr = tl.load(option + columns.OPTION_RATE, here, other=0.0)
    keep1 = tl.load(option + columns.OPTION_KEEP1, here, other=0.0)
    log1 = tl.load(option + columns.OPTION_LOG_KEEP1, here, other=-1.0)
    keep2 = tl.load(option + columns.OPTION_KEEP2, here, other=0.0)
    log2 = tl.load(option + columns.OPTION_LOG_KEEP2, here, other=-1.0)
    nesterov = tl.load(option + columns.OPTION_NESTEROV, here, other=0.0)
    if RULE == "sgd":
        rate, mix1, keep2, mix2, root = _sgd_clock(step, lr, keep1, log1, keep2, log2, nesterov)
    else:
        rate, mix1, keep2, mix2, root = _adam_clock(step, lr, keep1, log1, keep2, log2, nesterov)

    fact = facts + tensor * columns.FACTS
    v_decay = tl.load(fact + columns.FACT_V_DECAY, here, other=0.0)
    g_rate = tl.load(fact + columns.FACT_G_RATE, here, other=0.0)
    coupled = tl.load(option + columns.OPTION_COUPLED, here, other=0.0)
    decoupled = tl.load(option + columns.OPTION_DECOUPLED, here, other=0.0) * lr
    sign = tl.load(option + columns.OPTION_SIGN, here, other=0.0)
    tl.store(move + columns.MOVE_GRADIENT, sign / tl.load(grad_scale).to(tl.float64), here)
    tl.store(move + columns.MOVE_RATE, rate, here)
    tl.store(move + columns.MOVE_G_RATE, rate * g_rate, here)
    tl.store(move + columns.MOVE_COUPLED, coupled * v_decay, here)
    tl.store(move + columns.MOVE_G_COUPLED, coupled, here)
    tl.store(move + columns.MOVE_DECOUPLED, decoupled * v_decay, here)
    tl.store(move + columns.MOVE_G_DECOUPLED, decoupled * g_rate, here)
    tl.store(move + columns.MOVE_MIX1, mix1, here)
    tl.store(move + columns.MOVE_KEEP2, keep2, here)
    tl.store(move + columns.MOVE_MIX2, mix2, here)
    tl.store(move + columns.MOVE_ROOT, root, here)
    tl.store(move + columns.MOVE_EPS, tl.load(option + columns.OPTION_EPS, here, other=0.0), here)
    tl.store(move + columns.MOVE_V_LENGTH, tl.load(fact + columns.FACT_V_LENGTH, here, other=0.0), here)


@triton.jit
def _rule(x, grad, first, second, third, rate, coupled, decoupled, move, A: tl.constexpr, RULE: tl.constexpr):
    """Return the step of the rule, and its new state."""
    mix1 = tl.load(move + columns.MOVE_MIX1).to(A)
    keep2 = tl.load(move + columns.MOVE_KEEP2).to(A)
    mix2 = tl.load(move + columns.MOVE_MIX2).to(A)
    root = tl.load(move + columns.MOVE_ROOT).to(A)
    eps = tl.load(move + columns.MOVE_EPS).to(A)
    if RULE == "adam":
        result = _adam(x, grad, first, second, third, rate, coupled, decoupled, mix1, keep2, mix2, root, eps)
    elif RULE == "amsgrad":
        result = _amsgrad(x, grad, first, second, third, rate, coupled, decoupled, mix1, keep2, mix2, root, eps)
    elif RULE == "adamax":
        result = _adamax(x, grad, first, second, third, rate, coupled, decoupled, mix1, keep2, mix2, root, eps)
    else:
        result = _sgd(x, grad, first, second, third, rate, coupled, decoupled, mix1, keep2, mix2, root, eps)
    return result


@triton.jit
def _load_state(row, PLACE: tl.constexpr, start, offset, mask, S: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
                KEPT: tl.constexpr):  # fmt: skip
    """Load one of the rule's arrays, zeros where the rule does not keep it."""
    state = tl.zeros(mask.shape, A)
    if KEPT:
        state = tl.load(_array(tl.load(row + PLACE), S, VECTOR) + start + offset, mask, other=0.0).to(A)
    return state


@triton.jit
def _store_state(row, PLACE: tl.constexpr, start, offset, value, mask, S: tl.constexpr, VECTOR: tl.constexpr,
                 KEPT: tl.constexpr):  # fmt: skip
    if KEPT:
        tl.store(_array(tl.load(row + PLACE), S, VECTOR) + start + offset, value.to(S), mask)


@triton.jit
def _offset(row, r, j, PLACE: tl.constexpr):
    """Return where element ``j`` of row ``r`` lies, by the four strides that begin at column ``PLACE``."""
    row_split, split = tl.load(row + columns.ROW_SPLIT), tl.load(row + columns.SPLIT)
    by_row = (r // row_split) * tl.load(row + PLACE) + (r % row_split) * tl.load(row + PLACE + 1)
    return by_row + (j // split) * tl.load(row + PLACE + 2) + (j % split) * tl.load(row + PLACE + 3)


@triton.jit
def _place(row, r, j, VECTOR: tl.constexpr, STRIDED: tl.constexpr):
    """Return where rows start, offsets from there in the weight and in its gradient, and which elements exist.

    In rows that follow each other without gaps ``VECTOR`` elements at a time are aligned, and offsets fit 32 bits.
    """
    if STRIDED:
        j = j.to(tl.int64)
        mask = (r < tl.load(row + columns.ROWS)) & (j < tl.load(row + columns.LENGTH))
        return 0, _offset(row, r, j, columns.ROW_OUTER), _offset(row, r, j, columns.GRAD_ROW_OUTER), mask
    else:
        length = tl.multiple_of(tl.load(row + columns.LENGTH), VECTOR)
        numel = tl.multiple_of(tl.load(row + columns.NUMEL), VECTOR)
        start = r * length  # in 64 bits
        return start, j, j, (j < length) & (j < numel - start)  # the last row of a plain tensor is shorter


@triton.jit
def _load_weight(
    row, start, offset, mask, W: tl.constexpr, A: tl.constexpr, MASTER: tl.constexpr, VECTOR: tl.constexpr
):
    """Load the weight in the wide dtype: the master where it still rounds to the weight, else the weight."""
    narrow = tl.load(_array(tl.load(row + columns.WEIGHT), W, VECTOR) + start + offset, mask, other=0.0)
    weight = narrow.to(A)
    if MASTER:
        master = tl.load(_array(tl.load(row + columns.MASTER), A, VECTOR) + start + offset, mask, other=0.0)
        weight = tl.where(master.to(W) == narrow, master, weight)
    return weight


@triton.jit
def _store_weight(row, start, offset, weight, mask, seed, tensor, r, j, W: tl.constexpr, A: tl.constexpr,
                  MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Store the weight, and its master where there is one; rounded at random if so asked."""
    if MASTER:
        tl.store(_array(tl.load(row + columns.MASTER), A, VECTOR) + start + offset, weight, mask)
    if STOCHASTIC:
        # The lower half of the bits decides, against as many random ones, whether the upper half goes up.
        key = tl.load(seed) + (tensor << 40) + r + tl.zeros(mask.shape, tl.int64)
        noise = tl.randint(key, j.to(tl.int32) + tl.zeros(mask.shape, tl.int32)).to(tl.uint32, bitcast=True) >> 16
        bits = weight.to(tl.uint32, bitcast=True)
        finite = tl.abs(weight) < float("inf")
        bits = tl.where(finite, (bits + noise) & 0xFFFF0000, bits)
        weight = bits.to(tl.float32, bitcast=True)
    tl.store(_array(tl.load(row + columns.WEIGHT), W, VECTOR) + start + offset, weight.to(W), mask)


@triton.jit
def _load_gradient(grads, tensor, move, start, offset, mask, G: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr):
    gradient = tl.load(_array(tl.load(grads + tensor), G, VECTOR) + start + offset, mask, other=0.0)
    return gradient.to(A) * tl.load(move + columns.MOVE_GRADIENT).to(A)


@triton.jit
def _has_length(row, r):
    """Say which rows exist and are normalised; by row, since the interpreter mistypes comparisons of single numbers."""
    return (r < tl.load(row + columns.ROWS)) & (tl.load(row + columns.NORMALIZED) + 0 * r != 0)


@triton.jit
def _pull_back(row, move, r, squares, product, A: tl.constexpr, FLOOR: tl.constexpr):
    """Return ``open_row`` of rows with these sums."""
    stored = tl.load(_pointer(tl.load(row + columns.SCALE), A) + r, _has_length(row, r), other=1.0)
    v_length = tl.load(move + columns.MOVE_V_LENGTH).to(A)
    single = tl.load(row + columns.LENGTH) + 0 * r == 1
    return _open_row(squares, product, stored, v_length, single, _has_length(row, r), FLOOR)


@triton.jit
def _step_elements(row, move, start, offset, mask, weight, gradient, turn, along, scale, S: tl.constexpr,
                   A: tl.constexpr, VECTOR: tl.constexpr, RULE: tl.constexpr, FIRST: tl.constexpr):  # fmt: skip
    """Step the rule on v, keep its state, and return by how much the weight moves before its length is set."""
    first = _load_state(row, columns.FIRST, start, offset, mask, S, A, VECTOR, FIRST)
    second = _load_state(row, columns.SECOND, start, offset, mask, S, A, VECTOR, RULE != "sgd")
    third = _load_state(row, columns.THIRD, start, offset, mask, S, A, VECTOR, RULE == "amsgrad")
    rate = tl.load(move + columns.MOVE_RATE).to(A)
    coupled = tl.load(move + columns.MOVE_COUPLED).to(A)
    decoupled = tl.load(move + columns.MOVE_DECOUPLED).to(A)
    gradient = _pull_back_element(gradient, weight, scale, turn, along)
    step, first, second, third = _rule(
        weight / scale, gradient, first, second, third, rate, coupled, decoupled, move, A, RULE
    )
    _store_state(row, columns.FIRST, start, offset, first, mask, S, VECTOR, FIRST)
    _store_state(row, columns.SECOND, start, offset, second, mask, S, VECTOR, RULE != "sgd")
    _store_state(row, columns.THIRD, start, offset, third, mask, S, VECTOR, RULE == "amsgrad")
    return tl.where(mask, scale * step, 0.0)


@triton.jit
def _step_length(row, move, r, sign, length, grad_length, alive, A: tl.constexpr, RULE: tl.constexpr,
                 FIRST: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """Step the rule on g, keep its state if asked to, and return by how much the length grows."""
    here = _has_length(row, r)
    first = _load_state(row, columns.G_FIRST, 0, r, here, A, A, 1, FIRST)
    second = _load_state(row, columns.G_SECOND, 0, r, here, A, A, 1, RULE != "sgd")
    third = _load_state(row, columns.G_THIRD, 0, r, here, A, A, 1, RULE == "amsgrad")
    rate = tl.load(move + columns.MOVE_G_RATE).to(A)
    coupled = tl.load(move + columns.MOVE_G_COUPLED).to(A)
    decoupled = tl.load(move + columns.MOVE_G_DECOUPLED).to(A)
    g = tl.where(alive, sign * length, 0.0)
    step, first, second, third = _rule(
        g, sign * grad_length, first, second, third, rate, coupled, decoupled, move, A, RULE
    )
    if KEEP:
        tl.debug_barrier()  # all threads of a row have read what one of them writes now
        _store_state(row, columns.G_FIRST, 0, r, first, here, A, 1, FIRST)
        _store_state(row, columns.G_SECOND, 0, r, second, here, A, 1, RULE != "sgd")
        _store_state(row, columns.G_THIRD, 0, r, third, here, A, 1, RULE == "amsgrad")
    return sign * step


@triton.jit
def _store_scale(row, r, kept, small, excess, factor, A: tl.constexpr):
    tl.debug_barrier()  # likewise
    scale = tl.where(small, kept + kept * excess, factor * kept)  # one that is not set yet, 0, stays so
    tl.store(_pointer(tl.load(row + columns.SCALE), A) + r, scale, _has_length(row, r))


@triton.jit
def _tile(first_row, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACROSS: tl.constexpr):
    """Return the rows and the elements of a tile, neighbours in memory along its last axis."""
    r = first_row.to(tl.int64) + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)
    if ACROSS:
        return r[None, :], j[:, None]
    else:
        return r[:, None], j[None, :]


@triton.jit
def _program(table, moves, programs):
    """Return which tensor a program has and from which row on, and where the tables describe the tensor."""
    program = programs + 2 * tl.program_id(0)
    tensor = tl.load(program).to(tl.int64)
    return tensor, tl.load(program + 1), table + tensor * columns.ADDRESSES, moves + tensor * columns.MOVES


@triton.jit
def tiles(table, grads, moves, programs, seed,
          W: tl.constexpr, G: tl.constexpr, S: tl.constexpr, A: tl.constexpr, RULE: tl.constexpr,
          FIRST: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, STRIDED: tl.constexpr,
          ACROSS: tl.constexpr, VECTOR: tl.constexpr, FLOOR: tl.constexpr, EPS: tl.constexpr,
          ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Step ``ROWS`` rows of at most ``BLOCK`` elements, held on chip."""
    tensor, first_row, row, move = _program(table, moves, programs)
    if tl.load(move + columns.MOVE_ON) != 0.0:
        AXIS: tl.constexpr = 0 if ACROSS else 1
        r, j = _tile(first_row, ROWS, BLOCK, ACROSS)
        start, offset, grad_offset, mask = _place(row, r, j, VECTOR, STRIDED)
        weight = _load_weight(row, start, offset, mask, W, A, MASTER, VECTOR)
        gradient = _load_gradient(grads, tensor, move, start, grad_offset, mask, G, A, VECTOR)
        squares = tl.sum(weight * weight, AXIS, keep_dims=True)
        product = tl.sum(weight * gradient, AXIS, keep_dims=True)
        alive, length, grad_length, turn, along, kept, scale = _pull_back(row, move, r, squares, product, A, FLOOR)
        sign = tl.where(scale < 0.0, -1.0, 1.0)
        t = _step_elements(
            row, move, start, offset, mask, weight, gradient, turn, along, scale, S, A, VECTOR, RULE, FIRST
        )
        step_length = _step_length(row, move, r, sign, length, grad_length, alive, A, RULE, FIRST, True)

        moved = weight + t
        new_squares = tl.sum(moved * moved, AXIS, keep_dims=True)
        growth = tl.sum(t * (weight + moved), AXIS, keep_dims=True)
        small, excess, factor = _close_row(alive, length, step_length, new_squares, growth, FLOOR, EPS)
        weight = _settle(weight, t, small, excess, factor)
        _store_weight(row, start, offset, weight, mask, seed, tensor, r, j, W, A, MASTER, STOCHASTIC, VECTOR)
        _store_scale(row, r, kept, small, excess, factor, A)


@triton.jit
def walk(table, grads, moves, programs, seed,
         W: tl.constexpr, G: tl.constexpr, S: tl.constexpr, A: tl.constexpr, RULE: tl.constexpr,
         FIRST: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, STRIDED: tl.constexpr,
         ACROSS: tl.constexpr, VECTOR: tl.constexpr, FLOOR: tl.constexpr, EPS: tl.constexpr,
         ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Step ``ROWS`` rows of any length, ``BLOCK`` elements at a time: sums; then steps; then lengths."""
    tensor, first_row, row, move = _program(table, moves, programs)
    if tl.load(move + columns.MOVE_ON) != 0.0:
        AXIS: tl.constexpr = 0 if ACROSS else 1
        r, j = _tile(first_row, ROWS, BLOCK, ACROSS)
        length_of_row = tl.load(row + columns.LENGTH).to(tl.int32)
        squares, product = tl.zeros(r.shape, A), tl.zeros(r.shape, A)
        for begin in range(0, length_of_row, BLOCK):
            start, offset, grad_offset, mask = _place(row, r, j + begin, VECTOR, STRIDED)
            weight = _load_weight(row, start, offset, mask, W, A, MASTER, VECTOR)
            gradient = _load_gradient(grads, tensor, move, start, grad_offset, mask, G, A, VECTOR)
            squares += tl.sum(weight * weight, AXIS, keep_dims=True)
            product += tl.sum(weight * gradient, AXIS, keep_dims=True)
        alive, length, grad_length, turn, along, kept, scale = _pull_back(row, move, r, squares, product, A, FLOOR)
        sign = tl.where(scale < 0.0, -1.0, 1.0)
        step_length = _step_length(row, move, r, sign, length, grad_length, alive, A, RULE, FIRST, True)

        new_squares, growth = tl.zeros(r.shape, A), tl.zeros(r.shape, A)
        for begin in range(0, length_of_row, BLOCK):
            start, offset, grad_offset, mask = _place(row, r, j + begin, VECTOR, STRIDED)
            weight = _load_weight(row, start, offset, mask, W, A, MASTER, VECTOR)
            gradient = _load_gradient(grads, tensor, move, start, grad_offset, mask, G, A, VECTOR)
            t = _step_elements(
                row, move, start, offset, mask, weight, gradient, turn, along, scale, S, A, VECTOR, RULE, FIRST
            )
            moved = weight + t
            new_squares += tl.sum(moved * moved, AXIS, keep_dims=True)
            growth += tl.sum(t * (weight + moved), AXIS, keep_dims=True)
            _store_weight(row, start, offset, moved, mask, seed, tensor, r, j + begin, W, A, MASTER, STOCHASTIC, VECTOR)
        small, excess, factor = _close_row(alive, length, step_length, new_squares, growth, FLOOR, EPS)
        _store_scale(row, r, kept, small, excess, factor, A)

        tl.debug_barrier()  # what a thread has written another may read now
        for begin in range(0, length_of_row, BLOCK):
            start, offset, grad_offset, mask = _place(row, r, j + begin, VECTOR, STRIDED)
            moved = _load_weight(row, start, offset, mask, W, A, MASTER, VECTOR)
            weight = _settle(moved, 0.0, small, excess, factor)
            _store_weight(
                row, start, offset, weight, mask, seed + 1, tensor, r, j + begin, W, A, MASTER, STOCHASTIC, VECTOR
            )


@triton.jit
def _total(partials, first, count, BLOCK: tl.constexpr, A: tl.constexpr):
    """Add up the two sums of a row's chunks, always in the same order."""
    i = tl.arange(0, BLOCK)[None, :]
    one, other = tl.zeros((1, BLOCK), A), tl.zeros((1, BLOCK), A)
    for start in range(0, count, BLOCK):
        place = partials + 2 * (first + start + i)
        one += tl.load(place, start + i < count, other=0.0)
        other += tl.load(place + 1, start + i < count, other=0.0)
    return tl.sum(one, 1, keep_dims=True), tl.sum(other, 1, keep_dims=True)


@triton.jit
def split_sums(table, grads, moves, programs, before,
               W: tl.constexpr, G: tl.constexpr, A: tl.constexpr, MASTER: tl.constexpr, STRIDED: tl.constexpr,
               VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sum one chunk of one long row: Σw² and Σw ∂w, into ``before``."""
    tensor, r, chunk, first, count, row, move = _chunk(table, moves, programs)
    if tl.load(move + columns.MOVE_ON) != 0.0:
        j = tl.arange(0, BLOCK)[None, :] + chunk * BLOCK
        start, offset, grad_offset, mask = _place(row, r, j, VECTOR, STRIDED)
        weight = _load_weight(row, start, offset, mask, W, A, MASTER, VECTOR)
        gradient = _load_gradient(grads, tensor, move, start, grad_offset, mask, G, A, VECTOR)
        tl.store(before + 2 * (first + chunk), tl.sum(tl.sum(weight * weight, 1), 0))
        tl.store(before + 2 * (first + chunk) + 1, tl.sum(tl.sum(weight * gradient, 1), 0))


@triton.jit
def split_steps(table, grads, moves, programs, before, after, seed,
                W: tl.constexpr, G: tl.constexpr, S: tl.constexpr, A: tl.constexpr, RULE: tl.constexpr,
                FIRST: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, STRIDED: tl.constexpr,
                VECTOR: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Step one chunk of one long row, and sum what its length will be set by, into ``after``."""
    tensor, r, chunk, first, count, row, move = _chunk(table, moves, programs)
    if tl.load(move + columns.MOVE_ON) != 0.0:
        squares, product = _total(before, first, count, 128, A)
        alive, length, grad_length, turn, along, kept, scale = _pull_back(row, move, r, squares, product, A, FLOOR)
        j = tl.arange(0, BLOCK)[None, :] + chunk * BLOCK
        start, offset, grad_offset, mask = _place(row, r, j, VECTOR, STRIDED)
        weight = _load_weight(row, start, offset, mask, W, A, MASTER, VECTOR)
        gradient = _load_gradient(grads, tensor, move, start, grad_offset, mask, G, A, VECTOR)
        t = _step_elements(
            row, move, start, offset, mask, weight, gradient, turn, along, scale, S, A, VECTOR, RULE, FIRST
        )
        moved = weight + t
        tl.store(after + 2 * (first + chunk), tl.sum(tl.sum(moved * moved, 1), 0))
        tl.store(after + 2 * (first + chunk) + 1, tl.sum(tl.sum(t * (weight + moved), 1), 0))
        _store_weight(row, start, offset, moved, mask, seed, tensor, r, j, W, A, MASTER, STOCHASTIC, VECTOR)


@triton.jit
def split_lengths(table, grads, moves, programs, before, after, seed,
                  W: tl.constexpr, S: tl.constexpr, A: tl.constexpr, RULE: tl.constexpr, FIRST: tl.constexpr,
                  MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, STRIDED: tl.constexpr, VECTOR: tl.constexpr,
                  FLOOR: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Set the length of one chunk of one long row; or, ``LAST``, keep the row's own state, which all have read."""
    tensor, r, chunk, first, count, row, move = _chunk(table, moves, programs)
    runs = tl.load(move + columns.MOVE_ON)
    if LAST:
        runs = tl.where(chunk == 0, runs, 0.0)
    if runs != 0.0:
        squares, product = _total(before, first, count, 128, A)
        new_squares, growth = _total(after, first, count, 128, A)
        alive, length, grad_length, turn, along, kept, scale = _pull_back(row, move, r, squares, product, A, FLOOR)
        sign = tl.where(scale < 0.0, -1.0, 1.0)
        step_length = _step_length(row, move, r, sign, length, grad_length, alive, A, RULE, FIRST, LAST)
        small, excess, factor = _close_row(alive, length, step_length, new_squares, growth, FLOOR, EPS)
        if LAST:
            _store_scale(row, r, kept, small, excess, factor, A)
        else:
            j = tl.arange(0, BLOCK)[None, :] + chunk * BLOCK
            start, offset, grad_offset, mask = _place(row, r, j, VECTOR, STRIDED)
            moved = _load_weight(row, start, offset, mask, W, A, MASTER, VECTOR)
            weight = _settle(moved, 0.0, small, excess, factor)
            _store_weight(row, start, offset, weight, mask, seed + 1, tensor, r, j, W, A, MASTER, STOCHASTIC, VECTOR)


@triton.jit
def _chunk(table, moves, programs):
    """Return which chunk of which row a program of the split kernels has: a row's chunks lie side by side."""
    program = programs + 5 * tl.program_id(0)
    tensor = tl.load(program).to(tl.int64)
    r = tl.full((1, 1), 0, tl.int64) + tl.load(program + 1)
    chunk, first, count = tl.load(program + 2), tl.load(program + 3), tl.load(program + 4)
    return tensor, r, chunk, first, count, table + tensor * columns.ADDRESSES, moves + tensor * columns.MOVES
