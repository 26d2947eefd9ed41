"""Cases of topk_stats: what a teacher may have sent, in whatever order and however wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from topk_inputs import assert_bounds, exact
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import reference, topk_bounds, topk_reference
from fuzzing.case import Case, Tensors, drawn_upstream
from fuzzing.draws import Draw
from fuzzing.layouts import Placed, place
from fuzzing.of_logits import PER_TOKEN, Rows, gradient_size

OF_TAILS = ("logprob", "entropy", "forward_kl", "reverse_kl")


def message(draw: Draw, teacher: Tensor, given: dict[str, Placed], settings: dict[str, Any], vocab: int) -> bool:
    """Adds what a teacher of these logits ``[..., V]`` sends; whether all of it is true."""
    width = teacher.shape[-1]
    logprobs = teacher.double().log_softmax(-1)
    k = draw.choice("k", (0, 1, 2, 5, 20, 10_000), (0.5, 2, 3, 4, 2, 1))
    values, ids = logprobs.topk(min(k, width), -1)
    settings["top_k"] = draw.choice("top_k", (None, 0, 1, 5))
    honest = settings["top_k"] in (None, 0)
    if ids.shape[-1] > 1 and draw.chance("other than the most likely", 0.3):  # the union with the student's
        likely = draw.integer(1, ids.shape[-1] - 1)
        others = logprobs.argsort(-1)[..., : ids.shape[-1] - likely]
        ids = torch.cat([ids[..., :likely], others], -1)
        values, settings["top_k"], honest = logprobs.gather(-1, ids), likely, 2 * ids.shape[-1] - likely <= width
    elif draw.chance("ids in any order", 0.5):
        order = draw.uniform(*ids.shape).argsort(-1)
        values, ids = values.gather(-1, order), ids.gather(-1, order)
    if ids.shape[-1] > 1 and draw.chance("repeated ids", 0.2):
        ids[..., 1], honest = ids[..., 0], False
    if ids.shape[-1] and draw.chance("foreign ids", 0.2):
        ids[..., -1] = draw.choice("foreign id", (-1, vocab, -(2**31), 2**31 - 1))
        honest = False
        if draw.chance("likely foreign ids", 0.5):
            values[..., -1] = -torch.inf
    if ids.shape[-1] and draw.chance("a teacher's -inf", 0.1):
        values[..., 0], honest = -torch.inf, False
    wide = teacher.dtype == torch.float64
    dtype = draw.choice("topk dtype", (torch.float32, torch.float64 if wide else torch.float32, torch.bfloat16))
    ids_dtype = draw.choice("topk_ids' dtype", (torch.int64, torch.int32))
    given["topk_ids"] = place(draw, ids.to(ids_dtype), "topk", PER_TOKEN)
    given["topk_logprobs"] = place(draw, values.to(dtype), "topk", PER_TOKEN)
    floor = draw.choice("min_logprob", ("none", "number", "tensor"))
    if floor == "number":
        settings["min_logprob"] = -40.0
    elif floor == "tensor":
        given["min_logprob"] = place(draw, logprobs.amin(-1).to(dtype), "min_logprob", PER_TOKEN)
    strange = ("topk_ids", "topk_logprobs", "min_logprob")
    return (
        honest and floor != "number" and not any(0 in given[name].layout.strides for name in strange if name in given)
    )


def without_sense(tensors: Tensors) -> Tensors:
    """What a teacher has sent of rows that do not count."""
    out, away = dict(tensors), ~tensors["mask"]
    out["topk_logprobs"] = out["topk_logprobs"].masked_fill(away[..., None], torch.nan)
    out["topk_ids"] = out["topk_ids"].masked_fill(away[..., None], torch.iinfo(out["topk_ids"].dtype).max)
    if "min_logprob" in out:
        out["min_logprob"] = out["min_logprob"].masked_fill(away, torch.nan)
    return out


def declared_sizes(rows: Rows, truth: Callable[[Tensors], Tensors], exact: Tensors) -> Tensors:
    """How far the bounds are moved by the rounding u that they declare of the student's log-probabilities, in units of
    u. A weight p is e^(log p), and known to u |log p| of itself; a teacher's -3.4e38 makes that any size."""
    given = {name: placed.view() for name, placed in rows.given.items()}
    u = topk_bounds.student_rounding(reference.compute_dtype(given["student_logits"]), rows.vocab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_bounds, "student_rounding", lambda dtype, vocab: 0.0)
        unmoved = truth(given)
    return {name: ((t - unmoved[name]).double().abs() / u).nan_to_num(0.0, 0.0, 0.0) for name, t in exact.items()}


def topk_stats(draw: Draw) -> Case:
    rows = Rows(draw)
    teacher = rows.given.pop("teacher_logits").view()[..., : rows.vocab]
    honest = message(draw, teacher, rows.given, rows.settings, rows.vocab)
    rows.pair, settings = False, rows.settings
    student = rows.given["student_logits"].memory.dtype
    log = rows.given["topk_logprobs"].memory.dtype
    computed = torch.float64 if torch.float64 in (student, log) else torch.float32
    upstream = drawn_upstream(draw, OF_TAILS, rows.rows, computed)

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return cf.topk_stats(**tensors, **settings, backend=backend)._asdict()

    def truth(tensors: Tensors) -> Tensors:
        stats = topk_reference.topk_stats(**tensors, **settings)
        # A row of the student's without a meaning has none either where nothing is listed, or an infinity is
        poison = torch.where(stats.logprob.detach().isnan(), torch.nan, 0.0).to(stats.logprob.dtype)
        return {name: t if name == "teacher_mass" else t + poison for name, t in stats._asdict().items()}

    usual = torch.tensor([kind.endswith(", none") for kind in rows.kinds], dtype=torch.bool).reshape(rows.rows)

    def bounds(tensors: Tensors, outputs: Tensors, backend: str) -> None:
        """Below and above the true divergences of a teacher that is known."""
        counts = usual & tensors["mask"] if "mask" in tensors else usual
        if not honest or not counts.any() or torch.float64 in (student, log):
            return
        x = tensors["student_logits"][..., : rows.vocab][counts]
        right = exact(x, teacher[counts], tensors["tokens"][counts], settings["temperature"])
        assert_bounds(cf.TopkStats(*(t[counts] for t in outputs.values())), right)

    case = rows.case(
        "topk_stats",
        call=call,
        truth=truth,
        widened=(),
        computed=computed,
        leaves=("student_logits",),
        upstream=upstream,
        also=bounds,
        sizes=lambda found: gradient_size(found, upstream, settings["temperature"]),
        value_sizes=lambda found: declared_sizes(rows, truth, found),
        needs="topk_stats",
    )
    case.precision = student if student == torch.float64 else torch.float32
    case.nan_gradient_is_free = True
    case.public = lambda tensors, changed: cf.topk_stats(**tensors, **{**settings, **changed})
    of_rows = case.garbage
    case.garbage = None if of_rows is None else lambda tensors: without_sense(of_rows(tensors))
    return case
