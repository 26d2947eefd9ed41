"""A student's row and a teacher's of many shapes, and what such a teacher sends."""

from typing import NamedTuple

import torch
from helpers import here, make_logits, make_tokens

from cmdp_fast import reference

DIFFERENTIABLE = ("logprob", "entropy", "forward_kl", "reverse_kl")
KINDS = ("gaussian", "heads", "sure", "unsure", "hides", "ties", "flat", "student excludes", "no tail", "teacher stops")


class Sent(NamedTuple):
    """The arguments of `topk_stats` that a teacher's server sends."""

    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor
    min_logprob: torch.Tensor


def drawn(kind, seed, *, rows=(4,), vocab=60, k=5):
    """Logits [*rows, vocab] in float64 of a student and a teacher; the teacher's k most likely ones are a case."""
    x, y = (make_logits(*rows, vocab, dtype=torch.float64, scale=2.0, seed=2 * seed + i) for i in (0, 1))
    likely = y.argsort(-1, descending=True)
    if kind == "heads":
        x, y = (t.scatter_add(-1, likely[..., :3], torch.full_like(t[..., :3], 6.0)) for t in (x, y))
    elif kind in ("sure", "unsure"):  # of one token: both, or the teacher alone
        y = y.scatter_add(-1, likely[..., :1], torch.full_like(y[..., :1], 40.0))
        x = y + 0.1 * x if kind == "sure" else x
    elif kind == "hides":  # nearly all of the student is on a token of the tail
        x = (y + 0.1 * x).scatter_add(-1, likely[..., -1:], torch.full_like(x[..., :1], 25.0))
    elif kind == "ties":
        x, y = x.round(), (y / 2).round()
    elif kind == "flat":
        x, y = torch.zeros_like(x), torch.zeros_like(y)
    elif kind == "student excludes":
        x = x.scatter(-1, likely[..., -3:], -torch.inf)
    elif kind in ("no tail", "teacher stops"):  # one of them uses the k tokens alone
        stopped = x if kind == "no tail" else y
        stopped = stopped.scatter(-1, likely[..., k:], -torch.inf)
        x, y = (stopped, y) if kind == "no tail" else (x, stopped)
    return x, y


def sent(teacher, k, dtype=torch.float32):
    """What a teacher sends that computes in float64 and rounds to a dtype."""
    logprob = teacher.double().log_softmax(-1)
    values, ids = logprob.topk(k, -1)
    return Sent(here(ids), here(values.to(dtype)), here(logprob.amin(-1).to(dtype)))


def exact(student, teacher, tokens, temperature=1.0):
    """All six statistics in float64; the teacher's logits are of temperature 1."""
    return reference.token_stats(student.double() / temperature, teacher.double(), tokens)


def assert_bounds(stats, exact, what=""):
    """lower <= exact <= upper, where float64 rounds the exact ones by no more than 1e-12 of themselves."""
    for name in ("forward_kl", "reverse_kl"):
        value = getattr(exact, name)
        rounding = 1e-12 * (1 + value.nan_to_num(posinf=0.0))
        lower, upper = getattr(stats, name).double(), getattr(stats, f"{name}_upper").double()
        assert (lower >= 0).all() and (lower <= value + rounding).all(), (what, name, lower - value)
        assert (upper >= value - rounding).all(), (what, name, upper - value)


def weighted(stats, seed=0):
    """A scalar that sends a different gradient into each differentiable statistic of each token."""
    shape = stats.logprob.shape or (1,)
    weights = [make_logits(*shape, dtype=torch.float64, scale=1.0, seed=seed + i) for i in range(4)]
    parts = zip(DIFFERENTIABLE, weights, strict=True)
    return sum((getattr(stats, name) * w.to(getattr(stats, name).dtype)).sum() for name, w in parts)


def evaluate(function, student, message, tokens, **settings):
    """Statistics and the gradient of the logits."""
    x = student.detach().clone().requires_grad_()
    stats = function(x, message.topk_ids, message.topk_logprobs, tokens, min_logprob=message.min_logprob, **settings)
    return stats, torch.autograd.grad(weighted(stats), x)[0]


def given(*rows, vocab=60, k=5, dtype=torch.float32, seed=0):
    """(student's logits, message, tokens) of language models, in a dtype."""
    x, y = drawn("heads", seed, rows=rows, vocab=vocab, k=k)
    return here(x.to(dtype)), sent(y, k, torch.promote_types(dtype, torch.float32)), make_tokens(*rows, vocab=vocab)
