"""Statistics of every token from a teacher's k most likely ones, from one pass over the student's logits.

    a backend:               the row without the listed columns, as 4 numbers; the listed logits and the token's
    here, float64 [..., k]:  everything that follows from those, and by autograd its derivatives
    a backend:               one pass that writes p_T (constant + slope log p_T), and the listed columns

Bounds and proofs stand in `cmdp_fast.topk_bounds`, the state in `cmdp_fast.tails`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast import checks, tails, topk_bounds
from cmdp_fast.compiling import replaced
from cmdp_fast.cpu import in_huge_pages
from cmdp_fast.layout import ListedRows, TailGradient, unit_stride
from cmdp_fast.ops import backends
from cmdp_fast.ops.operator import Backward, operator
from cmdp_fast.reference import compute_dtype
from cmdp_fast.tails import Tail
from cmdp_fast.topk_bounds import StudentTerms, TeacherTerms, TopkStats


def topk_stats(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    top_k: int | None = None,
    min_logprob: Tensor | float | None = None,
    backend: backends.BackendName | None = None,
) -> TopkStats:
    """Log-probability, entropy, and bounds of both KL divergences, where the teacher has sent k columns of its row.

    The teacher is a server that sends the log-probabilities of its k most likely tokens, or of any other columns. The
    KLs are those over the whole vocabulary, of which the rest of the teacher's row is unknown: ``forward_kl`` and
    ``reverse_kl`` count it as one bucket and are never more than the exact KL(w‖p) and KL(p‖w); ``forward_kl_upper``
    and ``reverse_kl_upper`` are never less. `budget_verdict` says of a completion what they prove. `topk_bounds` of
    this package has the proofs, how loose the bounds are, and why rounding makes none of them false.

    Args:
        student_logits: ``[..., V]`` float32, bfloat16, float16 or float64. Any strides; where the last
            axis is not contiguous, or more than 8 others lie scattered, they are copied.
        topk_ids: ``[..., k]`` int64 or int32, in any order. An id that stands again in its row is absent there, as is
            one outside of [0, vocab_size); what the teacher gives it is a part of its tail. An id beyond the
            vocabulary that is likelier than -inf is a token that the student does not have: ``forward_kl_upper`` is
            +inf. To fill up a row, use -1 with -inf: a column of the vocabulary with -inf says that the teacher
            excludes it. No id is looked at by the host.
        topk_logprobs: ``[..., k]`` the teacher's log-probabilities of these tokens over its whole vocabulary, at the
            same temperature, in the floating dtype in which they were computed: it says how exact they are. Numbers
            that a server sent as text are float32, whatever they were read into. Of a wide row on a CPU compute them in
            float64: a softmax in float32 that adds up in sequence, as PyTorch's there, is off by more than its dtype
            says, and bounds made of it may be false.
        tokens: ``[...]`` integers in [0, vocab_size): the actions. Masked tokens may hold anything.
        mask: ``[...]`` bool, False = the row is not read; its statistics and its gradient are exactly 0.
        temperature: divides the student's logits.
        vocab_size: the columns that both models have; those beyond it count as -inf for the student.
        top_k: how many of the leading columns are the teacher's own most likely tokens: no other token is likelier
            than the least of them. None: all of them. 0: none, as where all ids are the student's choice. For the union
            of the teacher's k and the student's k, list the teacher's first and pass k. Where it is more than is true
            ``forward_kl_upper`` is no bound.
        min_logprob: ``[...]`` or a number, the teacher's log-probability of its least likely token, in the dtype in
            which it was computed. Without it ``reverse_kl_upper`` is +inf wherever the student has a tail.
        backend: None chooses: ``cpu`` (native) for CPU tensors, ``triton`` on a GPU (not float64), else ``torch``; a
            name forces it.

    Returns:
        `TopkStats` of tensors ``[...]`` in nats: float32, or float64 if logits or log-probabilities are. ``logprob,
        entropy, forward_kl, reverse_kl`` are differentiable with respect to the student, together, in one backward
        pass over its logits. The teacher never receives a gradient, the bounds from above have none. Reverse mode only.
        Beside the logits it holds some 20 numbers of 8 bytes for each listed column, and 10 until the backward pass.

    Special values: where the student gives a column -inf that the teacher uses, ``forward_kl`` is +inf and passes its
    usual gradient p - w; where the teacher lists a token with -inf that the student uses, ``reverse_kl`` is +inf and
    passes none. NaN or +inf in a row of logits makes the statistics of the student and both KLs of that row NaN, and
    its gradient; a row whose statistics get no gradient passes none, whatever is in it. NaN in a row of
    ``topk_logprobs`` makes the KLs of that row NaN.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes, devices, widths or numbers that do not fit, or a token outside the vocabulary (on the CPU,
            as `token_stats`).

    Source: this project's own; the bucket is the data-processing inequality of Kullback and Leibler 1951.
    """
    vocab = checks.logits(student_logits, student_logits, vocab_size)
    check_topk(topk_ids, topk_logprobs, tokens, student_logits, "student_logits")
    computed = compute_dtype(student_logits)
    settings = Settings(mask, temperature, vocab, top_k, min_logprob)
    chosen = backends.choose_for_logits(backend, student_logits, computed, "topk_stats")
    message = received(topk_ids, topk_logprobs, tokens, settings)
    rows = ListedRows(unit_stride(student_logits), message.ids, tokens, mask, float(temperature), vocab)
    return statistics(_tail_of_logits(_Given(rows, chosen)), message, computed)


class Settings(NamedTuple):
    """The settings of `topk_stats`."""

    mask: Tensor | None
    temperature: float
    vocab: int  # columns that count
    top_k: int | None
    min_logprob: Tensor | float | None


class Message(NamedTuple):
    """What a teacher has sent, checked and in order."""

    ids: Tensor  # [..., k] int64, ascending, -1 where absent
    teacher: TeacherTerms
    tokens: Tensor
    mask: Tensor | None
    vocab: int
    dtype: torch.dtype  # of its log-probabilities


def check_topk(ids: Tensor, logprobs: Tensor, tokens: Tensor, student: Tensor, name: str) -> None:
    """Checks what a teacher has sent; ``student``: the logits or hidden states ``[..., *]``, called ``name``."""
    checks.tokens(tokens, student, name)
    checks.tensor("topk_ids", ids)
    checks.tensor("topk_logprobs", logprobs)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"topk_ids must be int64 or int32, got {checks.describe(ids)}")
    if logprobs.dtype not in checks.LOGIT_DTYPES:
        raise TypeError(f"topk_logprobs must be float32, bfloat16, float16 or float64, got {checks.describe(logprobs)}")
    for what, value in (("topk_ids", ids), ("topk_logprobs", logprobs)):
        checks.same_device(what, value, name, student)
        if value.dim() == 0 or value.shape[:-1] != tokens.shape or value.shape != ids.shape:
            expected = ", ".join([*map(str, tokens.shape), "k"])
            raise ValueError(
                f"topk_ids and topk_logprobs must both have shape [{expected}], got {list(ids.shape)} and "
                f"{list(logprobs.shape)}"
            )


def received(ids: Tensor, logprobs: Tensor, tokens: Tensor, settings: Settings) -> Message:
    """What a teacher has sent, of which `check_topk` has made sure; checks the settings."""
    mask, temperature, vocab, top_k, min_logprob = settings
    checks.mask(mask, tokens, tokens.shape, "tokens")
    checks.positive("temperature", temperature)
    if top_k is not None:
        checks.integer("top_k", top_k)
        if top_k < 0:
            raise ValueError(f"top_k must not be negative, got {top_k}")
    if isinstance(min_logprob, Tensor):
        checks.tensor("min_logprob", min_logprob)
        checks.same_device("min_logprob", min_logprob, "tokens", tokens)
        if min_logprob.dtype not in checks.LOGIT_DTYPES:
            given = checks.describe(min_logprob)
            raise TypeError(f"min_logprob must be float32, bfloat16, float16 or float64, got {given}")
        if min_logprob.shape != tokens.shape:
            raise ValueError(
                f"min_logprob must have the shape of tokens, {list(tokens.shape)}, got {list(min_logprob.shape)}"
            )
    elif min_logprob is not None:
        checks.number("min_logprob", min_logprob)
        if not min_logprob <= 0:
            raise ValueError(f"min_logprob must be the logarithm of a probability, at most 0, got {min_logprob}")
    columns, teacher = topk_bounds.teacher_terms(
        ids, logprobs, vocab=vocab, top_k=top_k, min_logprob=min_logprob, mask=mask
    )
    return Message(columns, teacher, tokens, mask, vocab, logprobs.dtype)


def statistics(tail: Tail, message: Message, computed: torch.dtype) -> TopkStats:
    """What follows from the state of each row, in float64; ``computed``: the dtype that it was folded in."""
    tokens, mask, vocab = message.tokens, message.mask, message.vocab
    dtype = torch.float64 if message.dtype == torch.float64 else computed
    log_mass, lowest = tail.log_mass - tail.height, tail.lowest - tail.height
    normalizer = torch.cat([tail.listed, log_mass[..., None]], -1).logsumexp(-1)
    student = StudentTerms(
        tail.listed - normalizer[..., None],
        log_mass - normalizer,
        tail.entropy,
        (lowest - normalizer).detach(),
        topk_bounds.student_rounding(computed, vocab),
    )
    stats = topk_bounds.statistics(student, message.teacher, tail.own - normalizer, dtype)
    # added: the gradient that arrives is not NaN because of it, and a row that gets none is not read again
    poison = torch.where(tail.reference.isnan(), torch.nan, 0.0).to(dtype)
    of_student = {name: getattr(stats, name) + poison for name in TopkStats._fields if name != "teacher_mass"}
    stats = replaced(stats, **of_student)
    index = tokens.long()  # a narrow type could not hold the bound it is compared with
    known = (index >= 0) & (index < vocab)
    stats = replaced(stats, logprob=torch.where(known, stats.logprob, torch.nan))
    return stats if mask is None else TopkStats(*(torch.where(mask, value, 0.0) for value in stats))


# --------------------------------------------------------------------------------------------------------------
# The operators that torch sees


class _Given(NamedTuple):
    rows: ListedRows
    backend: str


DIFFERENTIABLE = ("listed", "own", "log_mass", "entropy")  # of the fields of a `Tail`


@operator("tail_of_logits")
def _tail_of_logits(given: _Given) -> Tail:
    rows = given.rows
    if rows.tokens.device.type == "cpu":
        checks.token_range(rows.tokens, rows.mask, rows.width)
    state = tails.empty(rows.tokens.numel(), rows.ids.shape[-1], rows.student.device)
    backends.get(given.backend).update_tails(rows, 0, state)
    mask = None if rows.mask is None else rows.mask.flatten()
    return shaped(tails.finished(state, mask), rows.tokens.shape)


def shaped(tail: Tail, shape: torch.Size) -> Tail:
    """The fields ``[rows, *]`` as ``[..., *]``."""
    return Tail(*(t.reshape((*shape, *t.shape[1:])) for t in tail))


@_tail_of_logits.shapes
def _(given: _Given) -> Tail:
    return tail_room(given.rows.ids)


def tail_room(ids: Tensor) -> Tail:
    """As much of it as there is before anything is computed: shapes and dtypes."""
    each = [ids.new_empty(ids.shape[:-1], dtype=torch.float64) for _ in Tail._fields]
    return Tail(*each)._replace(listed=ids.new_empty(ids.shape, dtype=torch.float64))


class FoldedTail(NamedTuple):
    """What the backward pass needs of a `Tail`."""

    reference: Tensor
    log_mass: Tensor
    entropy: Tensor


def folded(tail: Tail) -> FoldedTail:
    return FoldedTail(tail.reference, tail.log_mass, tail.entropy)


class _Kept(NamedTuple):
    given: _Given
    tail: FoldedTail


@_tail_of_logits.gradient(
    of=DIFFERENTIABLE, keep=lambda given, made: _Kept(given, folded(made)), operation="topk_stats"
)
def _(backward: Backward[_Kept]) -> dict[str, Tensor]:
    return {"rows_student": _tail_of_logits_backward(_Upward(backward.kept, TailUpstream(*backward.upstream)))}


class TailUpstream(NamedTuple):
    """The gradients that arrive at `DIFFERENTIABLE`; None for one that does not count."""

    listed: Tensor | None  # [..., k]
    own: Tensor | None  # [...]
    log_mass: Tensor | None
    entropy: Tensor | None


class _Upward(NamedTuple):
    kept: _Kept
    upstream: TailUpstream


@operator("tail_of_logits_backward")
def _tail_of_logits_backward(given: _Upward) -> Tensor:
    (rows, backend), tail = given.kept
    out = in_huge_pages(rows.student.new_empty(rows.student.shape))
    gradient = tail_gradient(rows.ids, rows.tokens, tail, given.upstream, 1 / rows.temperature)
    backends.get(backend).tail_backward(rows, gradient, out)
    return out


@_tail_of_logits_backward.shapes
def _(given: _Upward) -> Tensor:
    student = given.kept.given.rows.student
    return student.new_empty(student.shape)


def tail_gradient(ids: Tensor, tokens: Tensor, tail: FoldedTail, upstream: TailUpstream, factor: float) -> TailGradient:
    """The numbers that the gradient of each row is made of, times a factor.

    With p_T the distribution within the tail, d log_mass / dx = p_T and d entropy / dx = -p_T (log p_T + entropy).
    """
    reference, log_mass, entropy = (t.reshape(-1) for t in tail)
    rows = len(reference)

    def arrived(g: Tensor | None) -> Tensor:
        return reference.new_zeros(rows) if g is None else g.reshape(rows) * factor

    of_mass, of_entropy, own = arrived(upstream.log_mass), arrived(upstream.entropy), arrived(upstream.own)
    listed = reference.new_zeros(ids.shape) if upstream.listed is None else upstream.listed * factor
    listed = listed.reshape(rows, ids.shape[-1])
    is_token = ids.reshape(listed.shape) == tokens.reshape(rows, 1)
    listed = listed + torch.where(is_token, own[:, None], 0.0)
    constant = of_mass - torch.where(of_entropy == 0, 0.0, of_entropy * entropy)
    read = (constant != 0) | (of_entropy != 0) | (own != 0) | (listed != 0).any(-1)
    # of a row that is no use the backends make NaN
    listed = torch.where((reference.isnan() & read)[:, None], torch.nan, listed)
    numbers = (reference, log_mass, constant, -of_entropy, own, listed)
    return TailGradient(*(t.contiguous() for t in numbers))
