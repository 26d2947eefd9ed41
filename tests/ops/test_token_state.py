"""The state's algebra, in C++ through the binding and in the public TokenState."""

import itertools
from functools import partial

import pytest
import torch
from helpers import make_logits, make_tokens
from hypothesis import given
from hypothesis import strategies as st

import cmdp_fast as cf
from cmdp_fast import reference, states
from cmdp_fast.cpu import native
from cmdp_fast.layout import Pair
from cmdp_fast.ops import backends

pytestmark = pytest.mark.tiles

INF, NAN = torch.inf, torch.nan
needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")
columns = st.lists(st.tuples(*[st.floats(-40, 40) | st.just(-torch.inf)] * 2), max_size=12)


def fold(pairs, by_block=False):
    state = native.TokenState()
    if by_block:
        state.push_block([x for x, _ in pairs], [y for _, y in pairs])
    else:
        for x, y in pairs:
            state.push(x, y)
    if pairs:
        state.label(*pairs[0])
    return state


def close(a, b, skip=0):
    pairs = list(zip(a.finish(), b.finish(), strict=True))[skip:]
    return all(p == pytest.approx(q, rel=1e-12, abs=1e-12, nan_ok=True) for p, q in pairs)


def merged(*states):
    total = native.TokenState()
    for state in states:
        total.merge(state)
    return total


@needs_native
@given(columns)
def test_columns_one_by_one_or_as_a_block(pairs):
    assert close(fold(pairs), fold(pairs, by_block=True))


@needs_native
@given(columns, columns, columns)
def test_merge_is_associative_and_commutative(first, second, third):
    a, b, c = fold(first), fold(second), fold(third)
    left, right = merged(merged(a, b), c), merged(a, merged(b, c))
    assert close(left, right)
    assert close(merged(a, b, c), merged(c, a, b))


@needs_native
@given(columns)
def test_the_empty_state_is_the_identity(pairs):
    state = fold(pairs)
    assert merged(native.TokenState(), state).fields() == state.fields()
    assert merged(state, native.TokenState()).fields() == state.fields()


@needs_native
@given(columns, columns)
def test_merging_equals_pushing_everything(first, second):
    together = fold(first + second)
    parts = merged(fold(first), fold(second))
    assert close(parts, together, skip=2)  # the labels are those of different columns


@needs_native
@given(columns, st.integers(1, 3))
def test_a_column_that_both_exclude_is_none(pairs, count):
    assert close(fold(pairs + [(-torch.inf, -torch.inf)] * count), fold(pairs), skip=0 if pairs else 2)


@needs_native
@given(columns, st.floats(0, 50), st.floats(0, 50))
def test_raising_changes_no_statistic(pairs, by_x, by_y):
    state, raised = fold(pairs), fold(pairs)
    m, n = raised.fields()[:2]
    raised.raise_to(max(m, -100.0) + by_x, max(n, -100.0) + by_y)
    for p, q in zip(state.finish(), raised.finish(), strict=True):
        assert p == pytest.approx(q, rel=1e-9, abs=1e-9, nan_ok=True)


@needs_native
def test_the_state_against_the_reference():
    x, y = make_logits(1, 50, dtype=torch.float64), make_logits(1, 50, dtype=torch.float64, seed=1)
    state = fold(list(zip(x[0].tolist(), y[0].tolist(), strict=True)))
    exact = reference.token_stats(x, y, torch.tensor([0]))
    assert state.finish() == pytest.approx([float(s) for s in exact], abs=1e-12)


@needs_native
def test_an_empty_state_has_no_statistics():
    assert all(value != value for value in native.TokenState().finish())


@needs_native
def test_a_label_that_is_nan_has_such_a_log_probability():
    """Rounding is cut off at zero, and nothing else."""
    state = fold([(0.0, 1.0)])
    state.label(NAN, NAN)
    first, second, *others = state.finish()
    assert first != first and second != second and others == [0, 0, 0, 0]


@needs_native
def test_push_block_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="as many columns"):
        native.TokenState().push_block([1.0], [1.0, 2.0])


# --------------------------------------------------------------------------------------------------------------
# The public TokenState


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_tiles_in_any_order(order, dtype, backend):
    x, y = make_logits(4, 500, dtype=dtype), make_logits(4, 500, dtype=dtype, seed=1)
    tokens = torch.tensor([0, 120, 320, 499])
    bounds = (0, 121, 320, 500)
    state = cf.TokenState.empty(4, temperature=0.8)
    for i in order:
        piece = slice(bounds[i], bounds[i + 1])
        state.update(x[:, piece], y[:, piece], tokens, first_column=bounds[i], backend=backend)
    stats, whole = state.finish(), cf.token_stats(x, y, tokens, temperature=0.8)
    for got, want in zip(stats, whole, strict=True):
        assert got.dtype == want.dtype
        assert torch.allclose(got, want, rtol=2e-6, atol=2e-6)


def test_merge_of_two_halves(backend):
    x, y, tokens = make_logits(4, 300), make_logits(4, 300, seed=1), make_tokens(4, vocab=300)
    x[0, :150], y[1, 150:] = -torch.inf, -torch.inf
    left = cf.TokenState.empty(4).update(x[:, :150], y[:, :150], tokens, backend=backend)
    right = cf.TokenState.empty(4).update(x[:, 150:], y[:, 150:], tokens, first_column=150, backend=backend)
    for a, b in ((left, right), (right, left)):
        both = cf.TokenState.empty(4).merge(a).merge(b).finish()
        for got, want in zip(both, cf.token_stats(x, y, tokens), strict=True):
            assert torch.allclose(got, want, rtol=2e-6, atol=2e-6)


NARROW = {  # a tile's special values: of the student and of the teacher, in one column or in all
    "none": {},
    "a column is excluded by the student": {"x": -INF},
    "a column is excluded by the teacher": {"y": -INF},
    "a column is excluded by both": {"x": -INF, "y": -INF},
    "the student has no column": {"all_x": -INF},
    "the teacher has no column": {"all_y": -INF},
    "the student's logits are far above those before": {"all_x": 1e6},
    "the teacher's logits are far above those before": {"all_y": 1e6},
}
WIDE = {
    "the student's reference is rounded by octaves": {"all_x": 1e8},
    "the teacher's reference is rounded by octaves": {"all_y": 1e8},
    "an abyss of the student": {"x": -3e38},
    "an abyss of the teacher": {"y": -3e38},
    "a NaN": {"x": NAN},
}


@needs_native
@pytest.mark.parametrize("special", [*NARROW, *WIDE])
def test_what_needs_double_precision(special, variant):
    """Of three tiles one of them, in any place; nothing else takes the slow way."""
    values = (NARROW | WIDE)[special]
    tile, plain = ([make_logits(1, 90, seed=seed) for seed in (0, 1)] for _ in range(2))
    for logits, name in zip(tile, "xy", strict=True):
        logits[:, 80] = values.get(name, logits[:, 80])
        logits[:] = values.get(f"all_{name}", logits)
    for place in range(3):
        state = cf.TokenState.empty(1)
        for i in range(3):
            state.update(*(tile if i == place else plain), torch.tensor([5]), first_column=90 * i, backend="cpu")
        assert state.fields[0, states.FIELDS.index("exact")] == (special in WIDE), place


@pytest.mark.float64
def test_one_float64_tile_makes_the_statistics_float64(backend):
    x, tokens = make_logits(2, 30), make_tokens(2, vocab=60)
    for first, second in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        state = cf.TokenState.empty(2).update(x.to(first), x.to(first), tokens, backend=backend)
        other = cf.TokenState.empty(2).update(x.to(second), x, tokens, first_column=30, backend=backend)
        assert state.merge(other).finish().entropy.dtype == torch.float64


def test_a_masked_row_is_not_read_and_keeps_its_state(backend):
    x, y, tokens = make_logits(3, 30), make_logits(3, 30, seed=1), make_tokens(3, vocab=30)
    mask = torch.tensor([True, False, True])
    fields = cf.TokenState.empty(3).update(x, y, tokens, backend=backend).fields
    before, all_rows = fields.clone(), fields.clone()
    pair = Pair(y, x, tokens, None, 1.0, 30)
    backends.get(backend).update_states(pair, 0, all_rows)
    x[1], y[1] = torch.nan, torch.nan
    backends.get(backend).update_states(pair._replace(mask=mask), 0, fields)
    assert torch.equal(fields[1], before[1])
    assert torch.equal(fields[mask], all_rows[mask]) and not torch.equal(fields[0], before[0])


def test_merge_with_the_empty_state_changes_nothing(backend):
    x, y, tokens = make_logits(4, 30), make_logits(4, 30, seed=1), make_tokens(4, vocab=30)
    state = cf.TokenState.empty(4).update(x, y, tokens, backend=backend)
    before = state.finish()
    state.merge(cf.TokenState.empty(4))
    assert all(torch.equal(a, b) for a, b in zip(before, state.finish(), strict=True))


def test_token_state_refuses_what_does_not_fit(backend):
    state = cf.TokenState.empty(4)
    x, tokens = make_logits(4, 30), make_tokens(4, vocab=30)
    with pytest.raises(ValueError, match=r"shape \[4, C\], got \[3, 30\]"):
        state.update(x[:3], x[:3], tokens[:3], backend=backend)
    with pytest.raises(ValueError, match="vocab_size"):
        state.update(x, x[:, :20], tokens, backend=backend)
    with pytest.raises(ValueError, match="first_column must be at least 0"):
        state.update(x, x, tokens, first_column=-1, backend=backend)
    with pytest.raises(ValueError, match="cannot merge"):
        state.merge(cf.TokenState.empty(4, temperature=2.0))
    with pytest.raises(ValueError, match="rows must be at least 0"):
        cf.TokenState.empty(-1)


def test_fields_that_anyone_may_have_made(backend):
    """`fields` is all there is to send, and `update` writes to it."""
    x, y, tokens = make_logits(4, 9), make_logits(4, 9, seed=1), make_tokens(4, vocab=9)
    whole = cf.TokenState.empty(4).fields
    around = torch.full((9, 26), 7.0, dtype=torch.float64)
    around[0, :13] = whole[0]
    refused = {
        "rows that share memory": (
            around[0, :13].expand(4, 13),
            ValueError,
            r"contiguous, \[4, 13\].*strides \[0, 1\]",
        ),
        "columns first": (whole.t().contiguous().t(), ValueError, r"strides \[1, 4\]; make a state of fields.cont"),
        "every other row": (around[:8:2, :13], ValueError, r"fields must be contiguous, \[4, 13\].*\[52, 1\]"),
        "float32": (whole.float(), TypeError, r"fields must be float64 \[rows, 13\], got float32\[4, 13\]"),
        "a column less": (
            whole[:, 1:].contiguous(),
            ValueError,
            r"must be float64 \[rows, 13\], got .*\[4, 12\]",
        ),
        "no rows": (whole[0], ValueError, r"\[rows, 13\], got float64\[13\]"),
        "no tensor": (whole.tolist(), TypeError, "fields must be a tensor, got list"),
    }
    for fields, error, message in refused.values():
        with pytest.raises(error, match=message):
            cf.TokenState(fields, 1.0, torch.float32).update(x, y, tokens, backend=backend)
    assert (around[0, 13:] == 7.0).all() and (around[1:] == 7.0).all()
    for fields, error, message in list(refused.values())[3:]:
        state, sound = cf.TokenState(fields, 1.0, torch.float32), cf.TokenState.empty(4)
        for call in (state.finish, partial(state.merge, sound), partial(sound.merge, state)):
            with pytest.raises(error, match=message):
                call()
    # What is only read may lie anywhere.
    turned = cf.TokenState.empty(4).update(x, y, tokens, backend=backend)
    expected = turned.finish()
    turned.fields = turned.fields.t().contiguous().t()
    for state in (turned, cf.TokenState.empty(4).merge(turned)):
        assert all(torch.equal(a, b) for a, b in zip(state.finish(), expected, strict=True))


def test_a_refused_tile_leaves_the_state_as_it_was():
    state, x, tokens = cf.TokenState.empty(4), make_logits(4, 9), make_tokens(4, vocab=9)
    before = state.fields.clone()
    unknown = [name for name, problem in cf.available_backends().items() if problem is not None] or ["triton"]
    for change in ({"backend": unknown[0]}, {"backend": ["cpu"]}, {"first_column": 2**63 - 5}):
        with pytest.raises(ValueError):
            state.update(x.double(), x, tokens, **change)
    assert state.dtype == torch.float32 and torch.equal(state.fields, before)


def test_states_of_two_devices_are_not_merged():
    with pytest.raises(ValueError, match=r"cannot merge a state of 2 rows .* on meta into one of 2 rows"):
        cf.TokenState.empty(2).merge(cf.TokenState.empty(2, device="meta"))
