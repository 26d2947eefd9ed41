"""Arguments that no operation may take: each is an error that says what was given, and none a wrong number."""

import pytest
import torch
from helpers import make_logits, make_tokens

import cmdp_fast as cf

X, Y, TOKENS = make_logits(2, 3, 7), make_logits(2, 3, 7, seed=1), make_tokens(2, 3, vocab=7)
COST = make_logits(2, 3, seed=2).abs()
IDS = torch.zeros(2, 3, 1, dtype=torch.long)
SPARSE = COST.to_sparse()

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
    "no state": (lambda: cf.TokenState.empty(2).merge(None), TypeError, "other must be a TokenState, got NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


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
