"""What a teacher's k most likely tokens say about its divergence from a student: bounds of both KLs on both sides.

A teacher that runs elsewhere sends the log-probabilities of some tokens S, as a rule its k most likely ones. Of all
others, the tail T, only the sum is known: W = w(T) = 1 - w(S). The student's row is at hand, so p(S), P = p(T), the
entropy H_T of p within the tail, and the probability p_low of its least likely token in the tail are exact. Natural
logarithm throughout; F = KL(w‖p), R = KL(p‖w), both over all columns.

**From below**, one bucket stands for the tail:

    F >= sum_S w log(w/p) + W log(W/P),        R >= sum_S p log(p/w) + P log(P/W).

By the chain rule what is missing is W KL(w(.|T)‖p(.|T)), or P KL(p(.|T)‖w(.|T)), hence >= 0 (the log-sum inequality, or
data processing for the map that merges T). It misses how the two differ *within* the tail, where a student can hide:
a budget that the lower bound meets may be exceeded by the true KL. A larger S splits the bucket and raises both.

**From above, F.** If S has the teacher's k most likely tokens, no token of T is likelier than c, the least of those k.
So the tail's part, sum_T w log w - sum_T w log p, is at most W log min(c, W) - W log p_low:

    F <= sum_S w log(w/p) + W log(min(c, W) / p_low).

The first term since log w <= log min(c, W), the second since p >= p_low. It is reached by a teacher that has c on W/c
tokens to which the student gives p_low. With the student's whole row sorted the second term would be exact: the W/c
least likely tokens have c each (`topk_reference.forward_kl_upper`). One pass knows the least of them only. Where many
tokens are about as unlikely as that one, little is lost by it; what is loose then is the premise, which says nothing of
*which* unlikely tokens the teacher's tail is on. At W = .01, c = 1e-4 and p_low = 1e-12 the term is .18 nats. A cap
that does not hold the tail, c |T| < W, is of no teacher's k most likely tokens: +inf.

**From above, R.** Where the teacher gives no token less than e^f,

    R <= sum_S p log(p/w) + P (log P - H_T) - P f,

since sum_T p log p = P (log P - H_T) and -log w <= -f. It is reached, but for what the tail's excess over e^f takes off
at the student's least likely tokens. Without f nothing bounds it: +inf, unless the student has no tail. The teacher
sends f as one more number; it may also be asked for the student's k most likely tokens, which makes P small: S may be
any set of columns whose log-probabilities are known, and then c is that of the teacher's own k among them.

**Not used.** With the cap c the bucket of the lower bounds could be raised: the least of sum_T p log(p/w) under w <= c
is reached by w = min(c, l p) (water-filling). Finding l takes the tail in sorted order, or several passes over it.
The token that was sampled is at hand, and taking it out of the bucket would raise the bound too; but then the cost
of a state would depend on the action that was drawn there.

**Rounding makes no bound false.** A log-probability of the teacher is known to d = eps max(1, |log w|), eps that of its
dtype: one half for storing it, one for the log-normaliser that it came from. (Of a log-softmax that adds up in sequence
this is not true: PyTorch's in float32 on a CPU missed tails by 4e-5 at V = 152,064.) So w is known by a factor e^d, and
W to e_W = sum_S w (e^d - 1): about 1e-7 in float32, .01 in bfloat16. The student's log-probabilities have few
roundings, u max(1, |log p|) with u = 8 eps of float32, or (8 + sqrt V) eps in float64, where kernels add in sequence.
(The logits count as they are given; what made them is no matter. What is not counted is that of float64 logits over a
temperature: eps |logit|, 1e-12 at logits of 1e4.) Each term then moves by at most the length of its
interval times the largest derivative there:

    w log(w/p)       by   w (e^d - 1) (1 + |log(w/p)| + d + u_p) + w e^d u_p            (over S; likewise p log(p/w))
    W log(W/P)       is convex in W, so least at the point of [W - e_W, W + e_W] that is nearest to P/e
    P log(P/W)       is least at W + e_W
    W log(c/p_low)   is linear in W: largest at an end of that interval

Lower bounds are lowered by that much, never below 0; upper ones are raised by it, and both once more by the rounding of
the result. So `forward_kl` of a model with itself is 0, and in bfloat16 both bounds are some hundredths of a nat wide
of each other even where k = V. In the value that is differentiated a tail W <= e_W counts as 0, and the teacher's W in
R as W + e_W; the gradient is that of the bucketed KL, whatever rounding takes off its value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast.compiling import in_tensor
from cmdp_fast.field_docs import documented


@documented
class TopkStats(NamedTuple):
    """Statistics per token from k of the teacher's columns, in nats, shaped like ``tokens``; float32, or float64 for
    float64 logits or log-probabilities.

    ``logprob, entropy, forward_kl, reverse_kl`` are differentiable with respect to the student, the others detached.
    """

    logprob: Tensor
    """log p(a) of the sampled token under the student, exact, in nats; shaped like ``tokens``, differentiable."""
    entropy: Tensor
    """The student's entropy, exact, in nats; shaped like ``tokens``, differentiable."""
    forward_kl: Tensor
    """A lower bound of KL(w‖p) over the whole vocabulary, in nats; shaped like ``tokens``, differentiable."""
    reverse_kl: Tensor
    """A lower bound of KL(p‖w) over the whole vocabulary, in nats; shaped like ``tokens``, differentiable."""
    forward_kl_upper: Tensor
    """An upper bound of KL(w‖p), +inf where nothing bounds it, in nats; shaped like ``tokens``, detached."""
    reverse_kl_upper: Tensor
    """An upper bound of KL(p‖w), +inf where nothing bounds it, in nats; shaped like ``tokens``, detached."""
    student_mass: Tensor
    """The student's probability of the listed columns together, 0 to 1; shaped like ``tokens``, detached."""
    teacher_mass: Tensor
    """The teacher's probability of the listed columns together, 0 to 1; shaped like ``tokens``, detached."""


class StudentTerms(NamedTuple):
    """A row of the student's as the bounds need it, in float64 and differentiable but for ``lowest``."""

    listed: Tensor  # [..., k] log p of the listed columns; -inf where absent
    tail: Tensor  # [...] log P
    tail_entropy: Tensor  # [...] H_T
    lowest: Tensor  # [...] log p_low; +inf where no column is left for a tail
    rounding: float  # u


class TeacherTerms(NamedTuple):
    """What the teacher has said of a row, in float64, and how exact that is."""

    listed: Tensor  # [..., k] log w; -inf where absent
    error: Tensor  # [..., k] d
    mass: Tensor  # [...] w(S)
    tail: Tensor  # [...] W as it comes, which rounding can make negative; 0 where no column is left
    tail_error: Tensor  # [...] e_W
    cap: Tensor  # [...] log c, raised by its rounding; 0 where nothing caps the tail
    floor: Tensor | None  # [...] f, lowered by its rounding
    beyond: Tensor  # [...] bool: it has listed a likely token that the student does not have
    columns: Tensor  # [...] |T|


def rounding_of(logprob: Tensor) -> Tensor:
    """By how much a rounded log-probability may be off, in float64; 0 for one of -inf."""
    eps = torch.finfo(logprob.dtype).eps
    return eps * (-logprob.double()).clamp(min=1.0).masked_fill(torch.isneginf(logprob), 0.0)


def student_rounding(dtype: torch.dtype, vocab: int) -> float:
    """u: what the student's log-probabilities may be off by, in units of their size."""
    eps = torch.finfo(dtype).eps
    return float(eps * (8 + vocab**0.5)) if dtype == torch.float64 else float(8 * eps)


def teacher_terms(
    ids: Tensor,
    logprob: Tensor,
    *,
    vocab: int,
    top_k: int | None,
    min_logprob: Tensor | float | None,
    mask: Tensor | None,
) -> tuple[Tensor, TeacherTerms]:
    """The listed columns ``[..., k]`` int64, ascending and -1 where absent, and what is said of them in that order.

    An id that stands again in its row is absent there, and so is one outside of [0, vocab). What the teacher gives an
    absent id is a part of its tail.
    """
    outside = (ids < 0) | (ids >= vocab)
    beyond = (outside & (logprob > -torch.inf)).any(-1)
    columns, order = ids.long().masked_fill(outside, vocab).sort(dim=-1, stable=True)
    absent = columns == vocab
    absent[..., 1:] |= columns[..., 1:] == columns[..., :-1]
    whole = (~absent).sum(-1) == vocab  # no column is left for a tail, whatever rounding says
    if mask is not None:
        absent, beyond = absent | ~mask[..., None], beyond & mask
    rounded = logprob.detach().gather(-1, order).masked_fill(absent, -torch.inf)
    listed, error = rounded.double(), rounding_of(rounded)
    probability = listed.exp()
    mass = probability.sum(-1)
    most_likely = ~absent if top_k is None else ~absent & (order < min(top_k, order.shape[-1]))
    caps = torch.cat([torch.where(most_likely, listed + error, 0.0), torch.zeros_like(mass)[..., None]], -1)
    floor = None
    if min_logprob is not None:
        floor = in_tensor(min_logprob)
        floor = floor if isinstance(min_logprob, Tensor) else floor.to(logprob.device, logprob.dtype)
        floor = (floor.double() - rounding_of(floor)).detach()
    said = TeacherTerms(
        listed,
        error,
        mass,
        (1.0 - mass).masked_fill(whole, 0.0),
        (probability * _grown(error)).sum(-1).masked_fill(whole, 0.0),
        caps.amin(-1),
        floor,
        beyond,
        vocab - (~absent).sum(-1),
    )
    return columns.masked_fill(absent, -1), said


def statistics(p: StudentTerms, w: TeacherTerms, logprob: Tensor, dtype: torch.dtype) -> TopkStats:
    """All of them, of rows without a NaN; ``logprob`` is that of the token."""
    forward, forward_upper = forward_kl(p, w, dtype)
    reverse, reverse_upper = reverse_kl(p, w, dtype)
    student_mass = p.listed.detach().exp().sum(-1).clamp(max=1)
    return TopkStats(
        logprob.to(dtype),
        entropy(p).to(dtype),
        forward,
        reverse,
        forward_upper,
        reverse_upper,
        student_mass.to(dtype),
        w.mass.to(dtype),
    )


def forward_kl(p: StudentTerms, w: TeacherTerms, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(lower bound, upper bound) of KL(w‖p), for results in ``dtype``."""
    none = torch.isneginf(w.listed)
    # a weight that underflows to 0 would turn an infinite term into NaN
    weight = torch.where(torch.isneginf(p.listed) & ~none, w.listed.clamp(min=-700.0), w.listed).exp()
    ratio = (w.listed - p.listed).masked_fill(none, 0.0)
    listed = (weight * ratio).sum(-1)
    known = w.tail > w.tail_error
    tail = torch.where(known, w.tail, 0.0)
    bucket = torch.where(known, tail * (tail.clamp(min=1e-300).log() - p.tail), 0.0)

    u = _sized(p.listed, p.rounding).masked_fill(none, 0.0)
    growth = weight * _grown(w.error)
    slack = (growth * (1 + ratio.detach().abs() + w.error + u) + (weight + growth) * u).sum(-1)
    least, most = (w.tail - w.tail_error).clamp(min=0), (w.tail + w.tail_error).clamp(min=0)
    log_tail, u_tail = p.tail.detach(), _sized(p.tail, p.rounding)
    lowest_bucket = _x_log_x_over((log_tail - 1).exp().clamp(least, most), log_tail) - most * u_tail
    lower = _lowered(listed + bucket, listed + lowest_bucket - slack, dtype)

    cap = torch.minimum(w.cap, most.log())
    height = cap - p.lowest + _sized(p.lowest, p.rounding)
    of_tail = torch.where(height > 0, most * height, least * height)
    tailless = p.lowest.isposinf() | (most == 0) | torch.isneginf(cap)  # a teacher that lists a -inf has no tail
    of_tail = torch.where(tailless, 0.0, of_tail)
    unbounded = w.beyond | (w.cap + w.columns.log() < least.log())
    upper = _raised((listed.detach() + of_tail + slack).masked_fill(unbounded, torch.inf), lower, dtype)
    return lower, upper


def reverse_kl(p: StudentTerms, w: TeacherTerms, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(lower bound, upper bound) of KL(p‖w), for results in ``dtype``. An infinite one passes no gradient."""
    none = torch.isneginf(p.listed)
    unbounded = (torch.isneginf(w.listed) & ~none).any(-1)
    # Taken out before the arithmetic: autograd would meet inf - inf in them.
    probability = p.listed.exp().masked_fill(torch.isneginf(w.listed), 0.0)
    ratio = (p.listed.masked_fill(none, 0.0) - w.listed).masked_fill(none | torch.isneginf(w.listed), 0.0)
    listed = (probability * ratio).sum(-1)
    weightless = torch.isneginf(p.tail)
    log_tail = p.tail.masked_fill(weightless, 0.0)
    tail = log_tail.exp().masked_fill(weightless, 0.0)
    most = (w.tail.clamp(min=0) + w.tail_error).log()
    bucket = tail * (log_tail - most).masked_fill(weightless, 0.0)

    u = _sized(p.listed, p.rounding).masked_fill(none, 0.0)
    weight = probability.detach()
    growth = weight * _grown(u)
    slack = (growth * (1 + ratio.detach().abs() + w.error + u) + (weight + growth) * w.error).sum(-1)
    mass, log_mass = tail.detach(), log_tail.detach()
    u_tail = _sized(log_mass, p.rounding)
    bucket_slack = mass * _grown(u_tail) * (1 + (log_mass - most).abs() + u_tail)
    bucket_slack = bucket_slack.masked_fill(weightless, 0.0)
    value = (listed + bucket).masked_fill(unbounded, torch.inf)
    lower = _lowered(value, value.detach() - slack - bucket_slack, dtype)

    entropy = p.tail_entropy.detach()
    if w.floor is None:
        of_tail = torch.full_like(mass, torch.inf)
    else:
        of_tail = mass * (log_mass - entropy - w.floor)
        of_tail += mass * _grown(u_tail) * (1 + log_mass.abs() + entropy + w.floor.abs())
        of_tail += mass * p.rounding * entropy.clamp(min=1.0)
        of_tail = of_tail.masked_fill(torch.isneginf(w.floor), torch.inf)  # also where P underflows to 0
    of_tail = of_tail.masked_fill(weightless, 0.0)
    upper = _raised((listed.detach() + of_tail + slack).masked_fill(unbounded, torch.inf), lower, dtype)
    return lower, upper


def entropy(p: StudentTerms) -> Tensor:
    """-sum p log p over all columns, differentiable."""
    none, weightless = torch.isneginf(p.listed), torch.isneginf(p.tail)
    log_tail = p.tail.masked_fill(weightless, 0.0)
    tail = log_tail.exp().masked_fill(weightless, 0.0)
    return tail * (p.tail_entropy - log_tail) - (p.listed.exp() * p.listed.masked_fill(none, 0.0)).sum(-1)


def _sized(logprob: Tensor, rounding: float) -> Tensor:
    return rounding * logprob.detach().abs().clamp(min=1.0).nan_to_num(posinf=0.0)


def _grown(rounding: Tensor) -> Tensor:
    """e^rounding - 1, finite: where a logarithm is that large, the probability that is multiplied with it is 0."""
    return torch.expm1(rounding.clamp(max=700.0))


def _x_log_x_over(x: Tensor, log_y: Tensor) -> Tensor:
    """x log(x/y), 0 for x = 0."""
    return torch.where(x > 0, x * (x.clamp(min=1e-300).log() - log_y), 0.0)


def _lowered(value: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound with the gradient of the value, in ``dtype`` and never negative. An infinite value is its own bound."""
    bound = torch.where(torch.isposinf(value), value, bound).detach()
    bound = (bound - torch.finfo(dtype).eps * bound.nan_to_num(posinf=0.0).abs()).clamp(min=0)
    # a divergence of 1e-7 may have a gradient of 4e-4
    return torch.where(torch.isposinf(bound), value, value + (bound - value.detach())).to(dtype)


def _raised(bound: Tensor, lower: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound in ``dtype``, no lower than the lower one; NaN where that is."""
    raised = bound + torch.finfo(dtype).eps * bound.abs()
    return torch.maximum(raised.to(dtype), lower.detach())
