"""Divergences from the teacher's k most likely tokens and one bucket for all others: the message of a teacher that runs
elsewhere.

Let S be the k tokens, T the tail, W = w(T) and P = p(T) the tail masses of teacher w and student p. The bucket stands
for the tail:

    D_k = sum_S w log(w/p) + W log(W/P)                                                          (forward KL)

**It never counts too much.** By the chain rule D(w‖p) - D_k = W D(w(.|T) ‖ p(.|T)), a divergence, hence >= 0. That is
the log-sum inequality for the terms of T, or the data-processing inequality for the map that merges T into one token.
It misses how the two differ *within* the tail, so a student can hide its divergence there: **a budget that D_k
meets may be exceeded by the true KL.** A larger k splits the bucket and D_k grows, up to the KL at k = V.

**By how much at most.** Let R be the spread of log(w/p) over T, its largest less its smallest value. Then

    0 <= D(w‖p) - D_k <= W min(R, R²/8).

With X = log of the ratio of the two conditional distributions, D(w(.|T)‖p(.|T)) = E_w X. X has the spread R, and
E_p e^X = 1 puts 0 between its smallest and largest value, so E_w X <= max X <= R. And E_w e^-X = 1, so Hoeffding's
lemma gives 0 = log E_w e^-X <= -E_w X + R²/8. A teacher knows W, and k can be chosen for it; R takes the whole of both
rows. Where log(w/p) stays within +-L on the tail, R <= 2L; with no such bound nothing bounds the error. Over a
completion the errors of its tokens add up.

The reverse KL from the same k tokens behaves alike with the roles exchanged: D(p‖w) less its bucketed form is
P D(p(.|T)‖w(.|T)), at most P min(R, R²/8), where P is the mass that the *student* has outside the teacher's k tokens.

Without the bucket sum_S w log(w/p) alone is no divergence: it can be negative, and bounds nothing.

**Rounding.** A tail is 1 less the mass of the k tokens, and their log-probabilities are known no better than to
eps max(1, |log q|), eps that of their dtype: one half for storing them, one for the log-normaliser that they came from.
So a tail is known to e_q = eps sum_S q max(1, |log q|), about 1e-7 in float32 and .01 in bfloat16, and nothing is known
of a smaller one, which a language model that is sure of its next token has. (A log-softmax that adds up in sequence is
worse, and all that follows with it: PyTorch's in float32 on a CPU missed tails by 4e-5 at V = 152,064.) Call the KL's
first distribution a and its second b, A and B their tails. D_k falls with B, to which it is steep near 0, so B counts
as 1 - b(S) + e_b, its upper bound; A counts as 0 where 1 - a(S) <= e_a. What follows from rounding is then, to first
order in eps and with L the largest |log(a/b)| of the k tokens and of the bucket (of max(A, e_a) and B as they count),

    too much by no more than   3 (1 + L) e_a + eps sum_S a max(1, |log b|),
    too little by no more than that and A log(1 + 2 e_b / B).

The first: sum_S a log(a/b) errs by L e_a + e_a for a and by the sum for b; f(A) = A log(A/B) is convex, so it errs by
at most |f'| e_a = |1 + log(A/B)| e_a, or by -f(2 e_a) where A counts as 0. The second adds how far the upper bound of B
may be above B, which is much where B is below e_b: the tail's gradient is then too small by the same factor.

**So where the logits are at hand, use them**: `topk_divergence_of_logits` sums the student's tail itself, with no
difference of masses, and b errs by a few float32 roundings of log b at any size of the tail.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmdp_fast import checks

KINDS = ("forward_kl", "reverse_kl")
PIECE = 1 << 24
"""Logits that are worked on at a time: 64 MiB in float32."""


class TopkDivergence(NamedTuple):
    """What `topk_divergence_of_logits` returns, [...] each; the masses are detached."""

    divergence: Tensor  # nats
    student_mass: Tensor  # of the k tokens
    teacher_mass: Tensor  # of the k tokens; 1 - this bounds what the bucket can hide


def topk_divergence(student_logprob: Tensor, teacher_logprob: Tensor, kind: str = "forward_kl") -> Tensor:
    """KL between the distributions over k tokens and a bucket for the rest, [...], in nats; a lower bound of the KL.

    For log-probabilities that both came from elsewhere. A student's tail below eps of its dtype is lost (the module
    says what that does to value and gradient); where its logits are at hand use `topk_divergence_of_logits`.

    Args: the log-probabilities [..., k] of the same k tokens under both models, over the whole vocabulary, in the
    floating dtype that they were computed in, which says how exact they are; ``kind`` is ``forward_kl``
    (teacher‖student) or ``reverse_kl``. Computed in float64. Returns float32 (float64 if an argument is),
    differentiable with respect to the student; the teacher gets no gradient. Infinite where the first distribution has
    mass on a token that the second gives none; an infinite reverse KL passes no gradient. Raises ValueError for another
    kind or shapes that differ.
    """
    checks.choice("kind", kind, KINDS)
    if student_logprob.shape != teacher_logprob.shape:
        raise ValueError(
            f"shapes {tuple(student_logprob.shape)} and {tuple(teacher_logprob.shape)}, expected equal ones"
        )
    student, teacher = _Masses(student_logprob), _Masses(teacher_logprob.detach())
    dtype = _result_dtype(student_logprob, teacher_logprob)
    if kind == "forward_kl":
        return _bucketed(teacher.as_first(), student.as_second()).to(dtype)
    first, second = student.as_first(), teacher.as_second()
    infinite = (torch.isneginf(second) & ~torch.isneginf(first)).any(-1)
    value = _bucketed(first.masked_fill(infinite[..., None], -torch.inf), second)
    return value.masked_fill(infinite, torch.inf).to(dtype)


def topk_divergence_of_logits(
    student_logits: Tensor,
    teacher_logprob: Tensor,
    teacher_ids: Tensor,
    kind: str = "forward_kl",
    temperature: float = 1.0,
) -> TopkDivergence:
    """As `topk_divergence`, with the student's tail summed over its other columns: exact at any size of it.

    Args:
        student_logits: [..., V], any floating dtype; they are divided by ``temperature``.
        teacher_logprob: [..., k], over the teacher's whole vocabulary and at the same temperature, in the dtype that
            they were computed in.
        teacher_ids: [..., k], int32 or int64. An id that stands again in its row is absent there (verl fills up what
            it has no answer for with one id), and so is one outside [0, V), as a teacher with a wider vocabulary may
            send. What the teacher gives an absent id belongs to its tail. That needs no look at the values, so no
            wait for a GPU; ids of another tokenizer show in the masses.
        kind: ``forward_kl`` (teacher‖student) or ``reverse_kl``.

    The divergence is float32 (float64 if an argument is), in nats, differentiable with respect to the logits. Rows are
    worked on in pieces, so that beside the logits and their gradient it holds 64 MiB, forward and backward; the
    logits are kept for the backward pass. A NaN stays in its row, and a row whose divergence gets no gradient passes
    none, whatever is in it. An infinite forward KL passes its usual gradient p - w, an infinite reverse KL none.

    Raises ValueError for shapes that do not fit, another kind or a temperature that is not positive, TypeError for
    dtypes.
    """
    checks.choice("kind", kind, KINDS)
    checks.positive("temperature", temperature)
    _check_topk(student_logits, teacher_logprob, teacher_ids)
    vocab = student_logits.shape[-1]
    ids = teacher_ids.long().masked_fill((teacher_ids < 0) | (teacher_ids >= vocab), vocab)
    absent = _repeated(ids) | (ids == vocab)
    teacher = _Masses(teacher_logprob.detach().masked_fill(absent, -torch.inf))
    buckets = teacher.as_first() if kind == "forward_kl" else teacher.as_second()
    whole = (~absent).sum(-1) == vocab  # no column is left for a tail, whatever rounding says
    buckets[..., -1].masked_fill_(whole, -torch.inf)
    divergence, student_mass = _OfLogits.apply(student_logits, ids, absent, buckets, kind, float(temperature))
    dtype = _result_dtype(student_logits, teacher_logprob)
    return TopkDivergence(divergence.to(dtype), student_mass.to(dtype), teacher.head.to(dtype))


class _Masses:
    """The distribution over k tokens and a bucket, from rounded log-probabilities [..., k]."""

    def __init__(self, logprob: Tensor) -> None:
        self.logprob = logprob.double()
        mass = self.logprob.exp()
        self.head = mass.sum(-1)
        self.tail = 1.0 - self.head
        size = (-self.logprob.detach()).clamp(min=1.0).masked_fill(torch.isneginf(self.logprob), 0.0)
        self.error = torch.finfo(logprob.dtype).eps * (mass.detach() * size).sum(-1)

    def as_first(self) -> Tensor:
        """Its logarithms [..., k + 1]; a tail that may be rounding is 0."""
        unknown = self.tail <= self.error
        return self._with(self.tail.masked_fill(unknown, 1.0).log().masked_fill(unknown, -torch.inf))

    def as_second(self) -> Tensor:
        """Its logarithms [..., k + 1], with the upper bound of its tail."""
        raised = self.tail.detach().clamp(min=0.0) + self.error - self.tail.detach()
        return self._with((self.tail + raised).log())

    def _with(self, tail: Tensor) -> Tensor:
        return torch.cat([self.logprob, tail[..., None]], -1)


def _bucketed(first: Tensor, second: Tensor) -> Tensor:
    """sum a log(a/b) over the last axis, from logarithms. Where rounding makes it negative it is 0, with its gradient:
    a divergence of 1e-7 may have one of 4e-4."""
    # 0 log(0/anything) = 0
    value = (first.exp() * (first - second).masked_fill(torch.isneginf(first), 0.0)).sum(-1)
    return torch.where(value < 0, value - value.detach(), value)


def _result_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _repeated(ids: Tensor) -> Tensor:
    """Where an id [..., k] stands in its row for the second time or more."""
    ordered, order = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return torch.zeros_like(again).scatter(-1, order, again)


def _check_topk(logits: Tensor, logprob: Tensor, ids: Tensor) -> None:
    for name, value in (("student_logits", logits), ("teacher_logprob", logprob)):
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}, expected a floating one")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"teacher_ids has dtype {ids.dtype}, expected torch.int64 or torch.int32")
    if ids.shape != logprob.shape or ids.dim() == 0:
        raise ValueError(f"teacher_ids has shape {tuple(ids.shape)}, teacher_logprob {tuple(logprob.shape)}")
    if logits.dim() == 0 or logits.shape[:-1] != ids.shape[:-1] or logits.shape[-1] == 0:
        raise ValueError(
            f"student_logits has shape {tuple(logits.shape)}, expected [{', '.join([*map(str, ids.shape[:-1]), 'V'])}]"
        )


class _OfLogits(torch.autograd.Function):
    """(divergence [...], student's mass of the k tokens [...]) in float64, from logits [..., V] / temperature.

    The tail is a sum of float32 exponentials (float64 of float64 logits) relative to the largest of them, so its
    logarithm is exact to a few float32 roundings at any size of the tail. `Tensor.sum` adds them up in a tree;
    a log-softmax on a CPU does not, which at V = 152,064 costs hundreds of roundings.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, absent: Tensor, teacher: Tensor, kind: str, temperature: float
    ) -> tuple[Tensor, Tensor]:
        rows, at = _rows(logits), _rows(ids)
        largest = rows.new_empty(len(rows), 1, dtype=_working(rows))
        total = rows.new_empty(len(rows), 1, dtype=torch.float64)
        for piece in _pieces(rows):
            others = _scaled(rows[piece], temperature).scatter_(-1, at[piece], -torch.inf)
            # a row of -inf alone: -inf less a number is -inf, less itself NaN
            largest[piece] = others.amax(-1, keepdim=True).clamp(min=torch.finfo(others.dtype).min)
            total[piece] = others.sub_(largest[piece]).exp_().sum(-1, keepdim=True)
        logit = rows.gather(-1, at.clamp(max=rows.shape[-1] - 1)).double() / temperature
        logit.masked_fill_(_rows(absent), -torch.inf)
        student = torch.cat([logit, largest + total.log()], -1).log_softmax(-1)
        first, second = (_rows(teacher), student) if kind == "forward_kl" else (student, _rows(teacher))
        value = _bucketed(first, second)
        if ctx.needs_input_grad[0]:
            slope = _slope(first, second, value, kind)
            ctx.save_for_backward(logits, at, largest, total, slope)
            ctx.temperature = temperature
        mass = student[:, :-1].exp().sum(-1).reshape(logits.shape[:-1])
        ctx.mark_non_differentiable(mass)
        return value.reshape(logits.shape[:-1]), mass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, at, largest, total, slope = ctx.saved_tensors
        rows, unread = _rows(logits), (upstream == 0).reshape(-1, 1)
        slope = (slope * upstream.reshape(-1, 1) / ctx.temperature).masked_fill(unread, 0.0)
        of_tail = (slope[:, -1:] / total).to(_working(rows))
        empty = unread | (total == 0)
        gradient = torch.empty_like(rows)
        for piece in _pieces(rows):
            share = _scaled(rows[piece], ctx.temperature).sub_(largest[piece]).exp_().mul_(of_tail[piece])
            share.masked_fill_(empty[piece], 0.0).scatter_(-1, at[piece], 0.0)
            share.scatter_add_(-1, at[piece], slope[piece, :-1].to(share.dtype))
            gradient[piece] = share[:, :-1].to(rows.dtype)
        return gradient.reshape(logits.shape), None, None, None, None, None


def _slope(first: Tensor, second: Tensor, value: Tensor, kind: str) -> Tensor:
    """The derivative by the student's logits of k tokens and bucket, whose log-softmax is one of the two."""
    if kind == "forward_kl":
        return second.exp() * first.exp().sum(-1, keepdim=True) - first.exp()
    slope = first.exp() * ((first - second).masked_fill(torch.isneginf(first), 0.0) - value[:, None])
    return slope.masked_fill(torch.isposinf(value)[:, None], 0.0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _working(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _pieces(rows: Tensor) -> list[slice]:
    step = max(1, PIECE // max(1, rows.shape[-1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _scaled(rows: Tensor, temperature: float) -> Tensor:
    """Logits / temperature [N, V + 1] that may be written over; the last column, for ids outside of V, is -inf."""
    scaled = rows.new_empty(len(rows), rows.shape[-1] + 1, dtype=_working(rows))
    scaled[:, -1] = -torch.inf
    scaled[:, :-1] = rows
    return scaled if temperature == 1 else scaled.div_(temperature)
