"""Arguments that no operation may take: each is an error that says what was given, and none a wrong number."""

import pytest
import torch
from helpers import make_logits, make_tokens

import cmdp_fast as cf
from cmdp_fast import storage
from cmdp_fast.cpu import native

X, Y, TOKENS = make_logits(2, 3, 7), make_logits(2, 3, 7, seed=1), make_tokens(2, 3, vocab=7)
COST = make_logits(2, 3, seed=2).abs()
IDS = torch.zeros(2, 3, 1, dtype=torch.long)
SPARSE = COST.to_sparse()
HUGE = 10**400
NESTED = torch.nested.nested_tensor([torch.zeros(2, 7), torch.zeros(3, 7)], layout=torch.strided)

REFUSED = {
    "no rows at once": (lambda: cf.dropped_teacher_mass(X, 5, rows_at_once=-1), ValueError, "at least 1, got -1"),
    "half a row": (lambda: cf.dropped_teacher_mass(X, 5, rows_at_once=0.5), TypeError, "must be an int, got float 0.5"),
    "no vocabulary": (lambda: cf.dropped_teacher_mass(X, None), TypeError, "vocab_size must be an int, got NoneType"),
    "a word for a flag": (
        lambda: cf.token_stats(X, Y, TOKENS, inplace_backward="no"),
        TypeError,
        "inplace_backward must be a bool, got str 'no'",
    ),
    "a number for a flag": (
        lambda: cf.constrained_reward(X, Y, TOKENS, COST, 1.0, inplace_backward=0),
        TypeError,
        "inplace_backward must be a bool, got int 0",
    ),
    "complex rewards": (
        lambda: cf.constrained_reward(X, Y, TOKENS, COST + 1j, 1.0),
        TypeError,
        r"task_reward must be real, got complex64\[2, 3\]",
    ),
    "bounds in integers": (
        lambda: cf.budget_verdict(COST.long(), COST, 1.0),
        TypeError,
        "lower must be floating point, got int64",
    ),
    "no bound": (lambda: cf.budget_verdict(COST, None, 1.0), TypeError, "upper must be a tensor, got NoneType"),
    "sparse costs": (lambda: cf.budget_trace(SPARSE, 1.0), TypeError, "cost must be dense, .*sparse_coo"),
    "sparse logits": (lambda: cf.token_stats(X.to_sparse(), Y, TOKENS), TypeError, "student_logits must be dense"),
    "rows in floats": (lambda: cf.TokenState.empty(2.0), TypeError, "rows must be an int, got float 2.0"),
    "a nested tensor": (
        lambda: cf.token_stats(NESTED, Y, TOKENS),
        TypeError,
        r"^student_logits must be dense, got a nested tensor; convert it with torch.nested.to_padded_tensor",
    ),
    "nested costs": (lambda: cf.budget_trace(NESTED, 1.0), TypeError, "^cost must be dense, got a nested tensor"),
    "a list of backends": (
        lambda: cf.budget_trace(COST, 1.0, backend=["cpu"]),
        ValueError,
        r"^backend=\['cpu'\] is unknown; expected None or one of cpu",
    ),
    "a huge temperature": (
        lambda: cf.token_stats(X, Y, TOKENS, temperature=HUGE),
        ValueError,
        "^temperature must fit a floating-point number, got an int of 1329 bits",
    ),
    "a huge budget": (lambda: cf.budget_trace(COST, HUGE), ValueError, "^budget must fit a floating-point number"),
    "a huge horizon": (lambda: cf.discounted_budget(1.0, 0.5, HUGE), ValueError, "^horizon must fit 64 bits"),
    "a huge first column": (
        lambda: cf.token_stats(X, Y, TOKENS, first_column=2**63),
        ValueError,
        "^first_column must fit 64 bits, got an int of 65 bits",
    ),
    "columns beyond all columns": (
        lambda: cf.TokenState.empty(2).update(X[0, :2], Y[0, :2], TOKENS[0, :2], first_column=2**63 - 7),
        ValueError,
        r"^first_column \+ C must fit 64 bits",
    ),
    "no state": (lambda: cf.TokenState.empty(2).merge(None), TypeError, "other must be a TokenState, got NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def shrunk(t, left):
    t = t.clone()
    t.untyped_storage().resize_(left * t.untyped_storage().nbytes() // 2)
    return t


LOGPROBS, COUNTED, LIMITS = torch.full((2, 3, 1), -1.0), torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
HIDDEN, WEIGHT, TRACE = make_logits(2, 3, 4), make_logits(7, 4), cf.budget_trace(COST, 1.0)
FIELDS = cf.TokenState.empty(2).fields
CU, FLAT = torch.tensor([0, 2, 6]), COST.flatten()
LOST = {  # by the name that its error has: a call with the tensor, and the tensor
    "student_logits": (lambda t: cf.token_stats(t, Y, TOKENS), X),
    "teacher_logits": (lambda t: cf.divergence(X, t), Y),
    "tokens": (lambda t: cf.token_stats(X, Y, t), TOKENS),
    "mask": (lambda t: cf.token_stats(X, Y, TOKENS, mask=t), COUNTED),
    "cost": (lambda t: cf.budget_trace(t, 1.0), COST),
    "budget": (lambda t: cf.budget_trace(COST, t), LIMITS),
    "cu_seqlens": (lambda t: cf.budget_trace(FLAT, 1.0, cu_seqlens=t), CU),
    "lower": (lambda t: cf.budget_verdict(t, COST, 1.0), COST),
    "task_reward": (lambda t: cf.constrained_reward(X, Y, TOKENS, t, 1.0), COST),
    "trace.remaining": (lambda t: cf.modified_reward(COST, COST, TRACE._replace(remaining=t)), TRACE.remaining),
    "trace.violated": (lambda t: cf.modified_reward(COST, COST, TRACE._replace(violated=t)), TRACE.violated),
    "topk_ids": (lambda t: cf.topk_stats(X, t, LOGPROBS, TOKENS), IDS),
    "topk_logprobs": (lambda t: cf.topk_stats(X, IDS, t, TOKENS), LOGPROBS),
    "min_logprob": (lambda t: cf.topk_stats(X, IDS, LOGPROBS, TOKENS, min_logprob=t), -COST),
    "student_hidden": (lambda t: cf.linear_token_stats(t, WEIGHT, HIDDEN, WEIGHT, TOKENS), HIDDEN),
    "teacher_weight": (lambda t: cf.linear_divergence(HIDDEN, WEIGHT, HIDDEN, t), torch.nn.Parameter(WEIGHT)),
    "student_tile": (lambda t: cf.TokenState.empty(2).update(t, Y[0, :2], TOKENS[0, :2]), X[0, :2]),
}


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("name", LOST)
def test_a_tensor_that_lost_its_memory_is_named(name, left):
    call, whole = LOST[name]
    with pytest.raises(ValueError, match=rf"^{name} of shape .* has lost memory: its storage has shrunk or was"):
        call(shrunk(whole, left))
    call(whole)


def askew(t):
    """The same numbers, at an address that is no multiple of their size."""
    memory = bytearray(2) + t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(memory, dtype=t.dtype, offset=2).view(t.shape)


@pytest.mark.skipif(native is None, reason="the native module is not built")
@pytest.mark.parametrize(
    "name, call, whole",
    [
        ("the student's logits", lambda t: cf.token_stats(t, Y, TOKENS), X),
        ("the teacher's logits", lambda t: cf.divergence(X, t), Y),
        ("tokens", lambda t: cf.token_stats(X, Y, t), TOKENS),
        ("cost", lambda t: cf.budget_trace(t, 1.0), COST),
        ("fields", lambda t: cf.TokenState(t, 1.0, torch.float32).update(X[0, :2], Y[0, :2], TOKENS[0, :2]), FIELDS),
    ],
)
def test_memory_at_an_odd_address_is_named(name, call, whole):
    with pytest.raises(ValueError, match=rf"^{name}, torch.*, must lie in memory at a multiple of .* with .clone\(\)"):
        call(askew(whole))
    call(askew(whole).clone())


def test_all_of_the_listed_columns_may_be_more_than_any_row_has():
    logprobs = torch.full((2, 3, 1), -1.0)
    many, all_of_them = (cf.topk_stats(X, IDS, logprobs, TOKENS, top_k=k) for k in (2**70, None))
    assert all(torch.equal(a, b) for a, b in zip(many, all_of_them, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_a_dropped_mass_has_no_room_of_its_own(rows):
    """So that it may be mapped, and holds nothing that was not computed."""
    teacher = X.flatten(0, 1)[:rows]
    expected = teacher.softmax(-1)[:, 5:].sum(-1)
    assert torch.allclose(cf.dropped_teacher_mass(teacher, 5, rows_at_once=4), expected)
    both = torch.func.vmap(lambda t: cf.dropped_teacher_mass(t, 5, rows_at_once=4))(torch.stack([teacher, teacher]))
    assert torch.allclose(both, torch.stack([expected, expected]))


def test_statistics_of_heads_without_memory():
    hidden, weight = torch.empty(2, 3, 5, device="meta"), torch.empty(7, 5, device="meta")
    stats = cf.linear_token_stats(hidden, weight, hidden, weight, TOKENS.to("meta"))
    assert stats.entropy.shape == (2, 3) and stats.entropy.device.type == "meta"


@pytest.mark.parametrize(
    "view", [lambda t: t[2:], lambda t: t[:, ::2], lambda t: t.t()], ids=["behind", "strided", "turned"]
)
def test_the_memory_of_a_view_ends_with_its_last_number(view):
    base = torch.zeros(4, 6)
    seen = view(base)
    reach = seen.storage_offset() + 1 + sum((n - 1) * step for n, step in zip(seen.shape, seen.stride(), strict=True))
    for numbers in (reach, reach - 1):
        base.untyped_storage().resize_(numbers * base.itemsize)
        assert storage.lost(seen) == (numbers < reach)
