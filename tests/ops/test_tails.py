"""What every backend does of `topk_stats`: a row without its listed columns, whole or a tile of columns at a time."""

import pytest
import torch
from helpers import here, make_logits, make_tokens
from topk_inputs import KINDS, assert_bounds, drawn, exact, sent

import cmdp_fast as cf
from cmdp_fast import tails, tiles, topk_bounds
from cmdp_fast.layout import ListedRows, TailGradient
from cmdp_fast.ops import backends

# The edges of what a program reads: a warp's columns, a step's, a block's span and a segment's; those of all blocks of
# the native kernels meet at 4224.
EDGES = (0, 31, 256, 4095, 4096, 4223, 4224, 8191, 16383, 16384, 32767, 32768, 39998)
ABSENT = -1


def listed_rows(dtype, vocab=40000, offset=0.0):
    """Two rows, of which one lists the edges and some neighbours, the other nothing within its first segment."""
    student = make_logits(2, vocab, dtype=dtype, offset=offset)
    edges = [i for i in EDGES if i < vocab]
    ids = torch.tensor([[*edges[:3], ABSENT, *edges[3:], ABSENT], [*[ABSENT] * (len(edges) + 1), vocab - 1]])
    tokens = torch.tensor([edges[-1], vocab // 2])
    return ListedRows(student, here(ids), here(tokens), None, 0.9, vocab)


def parts(rows, widths):
    """(first column, rows of that tile) for each."""
    first = 0
    for width in widths:
        yield first, rows._replace(student=rows.student[:, first : first + width].clone(), width=width)
        first += width


def fold(module, rows, widths):
    state = tails.empty(len(rows.tokens), rows.ids.shape[-1], rows.student.device)
    for first, part in parts(rows, widths):
        module.update_tails(part, first, state)
    return tails.finished(state)


def gradient_of(tail, slope):
    """Numbers that no formula ties together."""
    listed = torch.arange(tail.listed.numel(), dtype=torch.float64, device=tail.own.device).reshape(tail.listed.shape)
    constant = torch.full_like(tail.own, 0.7)
    return TailGradient(tail.reference, tail.log_mass, constant, slope * constant, constant + 1, listed)


@pytest.mark.parametrize("widths", [(40000,), (16384, 16384, 7232), (33000, 7000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_as_exact_as_the_bounds_assume(widths, dtype, backend):
    """u of `topk_bounds`: of the listed columns, of the token and of the tail, and its entropy and its minimum."""
    rows = listed_rows(dtype)
    tail, right = (
        fold(backends.get(backend), rows, widths),
        fold(tiles, rows._replace(student=rows.student.double()), [40000]),
    )
    u = topk_bounds.student_rounding(torch.float32, 40000)
    for name in ("listed", "own", "lowest"):
        ours, exact = (
            (getattr(t, name) - t.log_mass.reshape(-1, *[1] * (getattr(t, name).dim() - 1))) for t in (tail, right)
        )
        assert torch.equal(ours.isinf(), exact.isinf())
        ours, exact = (t.nan_to_num(neginf=0.0) for t in (ours, exact))
        assert ((ours - exact).abs() <= u * exact.abs().clamp(min=1.0)).all(), name
    assert ((tail.entropy - right.entropy).abs() <= u * right.entropy).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_bounds_on_every_backend(kind, backend):
    """One seed of what test_topk_bounds.py searches through on the CPU."""
    x, y = drawn(kind, 3, rows=(6,))
    tokens, message = make_tokens(6, vocab=60), sent(y, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student = here(x.to(dtype))
        assert_bounds(cf.topk_stats(student, *message[:2], tokens, backend=backend), exact(student, here(y), tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_by_tiles_in_place_is_that_of_the_row(dtype, backend):
    module, rows = backends.get(backend), listed_rows(dtype)
    gradient = gradient_of(fold(module, rows, [40000]), 0.3)
    whole = torch.empty_like(rows.student)
    module.tail_backward(rows, gradient, whole)
    pieces = []
    for first, part in parts(rows, (16384, 16384, 7232)):
        module.tail_backward(part, gradient, part.student, first)
        pieces.append(part.student)
    assert torch.equal(torch.cat(pieces, -1), whole)
    present = rows.ids >= 0
    given = whole.gather(-1, rows.ids.clamp(min=0))[present]
    assert torch.equal(given, gradient.listed[present].to(dtype))


@pytest.mark.parametrize("offset", [0.0, 1e5, 3e7, 1e20, -1e20])
def test_a_gradient_keeps_the_rest_of_a_large_normaliser(offset, backend):
    """It is split into a float and a rest, of 4e-3 octaves at 1e5; from 1e7 on the row is done in double."""
    module, rows = backends.get(backend), listed_rows(torch.float32, vocab=500, offset=offset)
    tail = fold(module, rows, [500])
    ours = torch.empty_like(rows.student)
    module.tail_backward(rows, gradient_of(tail, 2.0), ours)
    wide = rows._replace(student=rows.student.double())
    right = torch.empty_like(wide.student)
    tiles.tail_backward(wide, gradient_of(fold(tiles, wide, [500]), 2.0), right)
    assert ((ours - right).abs() <= 1e-5 * right.abs().clamp(min=right.abs().median())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_excluded_column_weighs_nothing_in_the_gradient(dtype, backend):
    """Not its logarithm either; but it may be the token's, whose part does not depend on its weight."""
    module, rows = backends.get(backend), listed_rows(dtype, vocab=500)
    rows.student[1, 2:9], rows.student[1, rows.tokens[1]] = -torch.inf, -torch.inf
    tail = fold(module, rows, [500])
    for slope in (2.0, 1e37):  # in float -200 octaves of the larger one are infinite
        out = torch.empty_like(rows.student)
        module.tail_backward(rows, gradient_of(tail, slope)._replace(own=torch.full_like(tail.own, 1.75)), out)
        assert not out[1, 2:9].any() and out[1, rows.tokens[1]] == 1.75
        assert out[1, 9:].isfinite().all()


def test_a_slope_that_no_float_holds_of_a_column_without_weight(backend):
    """It alone is large: of a normaliser that is a float there is no rest, which would make the constant so, too."""
    module, rows = backends.get(backend), listed_rows(torch.float32, vocab=500)
    rows.student.mul_(0.01)[1, 2:9] = -torch.inf
    tail = fold(module, rows, [500])
    nothing = torch.zeros_like(tail.own)
    gradient = gradient_of(tail, 0.0)._replace(reference=nothing, log_mass=nothing, slope=nothing + 1e37)
    out = torch.empty_like(rows.student)
    module.tail_backward(rows, gradient, out)
    assert not out[1, 2:9].any() and out.isfinite().all() and out.abs().max() > 1e34


def test_a_number_that_no_float_holds_may_have_a_gradient_that_one_does(backend):
    module, rows = backends.get(backend), listed_rows(torch.float32, vocab=500)
    rows.student.mul_(0.01)
    tail = fold(module, rows, [500])
    gradient = gradient_of(tail, 0.0)._replace(constant=torch.full_like(tail.own, 1e39))
    out = torch.empty_like(rows.student)
    module.tail_backward(rows, gradient, out)
    assert out.isfinite().all() and out.max() > 1e36


def test_a_tail_without_weight_has_no_gradient(backend):
    """Where its columns are excluded, or all of them so far below the list that nothing is left."""
    module, rows = backends.get(backend), listed_rows(torch.float32, vocab=500)
    tail = fold(module, rows, [500])
    gradient = gradient_of(tail, 2.0)._replace(log_mass=torch.full_like(tail.log_mass, -torch.inf))
    for excluded in (False, True):
        if excluded:
            rows.student[1] = -torch.inf
        out = torch.full_like(rows.student, 5.0)
        module.tail_backward(rows, gradient, out)
        assert out[1, rows.tokens[1]] == gradient.own[1].float() and out[1, -1] == gradient.listed[1, -1].float()
        assert out[1].count_nonzero() == 2


def test_rows_that_nothing_reaches_are_not_read(backend):
    """All of their numbers are 0, or they are masked. A number of the list alone is enough for a row to be read, and
    one that is no use, with a NaN for its reference, then gets NaN."""
    module, rows = backends.get(backend), listed_rows(torch.float32, vocab=500)
    rows.student[:, 7] = torch.nan
    zeros = torch.zeros(2, dtype=torch.float64, device=rows.student.device)
    listed = torch.zeros(rows.ids.shape, dtype=torch.float64, device=rows.student.device)
    gradient = TailGradient(zeros * torch.nan, zeros, zeros, zeros, zeros, listed)
    out = torch.full_like(rows.student, 5.0)
    module.tail_backward(rows, gradient, out)
    assert not out.any()
    listed[0, 1] = 2.0
    module.tail_backward(rows, gradient, out)
    present = rows.ids[0][rows.ids[0] >= 0]
    assert torch.equal(out[0, present], listed[0][rows.ids[0] >= 0].float()) and not out[1].any()
    assert out[0].isnan().sum() == 500 - len(present)
    for name in ("constant", "slope", "own", "listed"):  # each of them alone
        numbers = {n: torch.zeros_like(number) for n, number in gradient._asdict().items()}
        numbers[name] = numbers[name] + 1.0
        module.tail_backward(rows, TailGradient(**numbers), out)
        assert out[1].any(), name  # whose token is not listed
    masked = rows._replace(mask=here(torch.tensor([False, True])))
    module.tail_backward(masked, gradient, out)
    assert not out.any()
