"""Cases of the operations on logits: token_stats, divergence, TokenState, topk_stats, dropped_teacher_mass."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from helpers import DIFFERENTIABLE
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import reference
from fuzzing import logits
from fuzzing.case import Case, Tensors, drawn_threads, drawn_upstream
from fuzzing.draws import Draw
from fuzzing.layouts import Layout, Placed, place

TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
PAIR = ("student_logits", "teacher_logits")
PER_TOKEN = {"contiguous": 4, "offset": 2, "gaps everywhere": 2, "permuted axes": 1, "columns first": 1, "expanded": 1}


class Rows:
    """Logits of both models, tokens and a mask in memory; what the operations on them share."""

    def __init__(self, draw: Draw, rows: tuple[int, ...] | None = None, tokens: bool = True, pair: bool = True) -> None:
        self.draw, self.pair = draw, pair
        self.rows = logits.drawn_rows(draw) if rows is None else rows
        self.count = int(torch.Size(self.rows).numel())
        self.width = logits.drawn_width(draw, self.count)
        options = tuple(logits.DTYPES)
        first = draw.choice("dtype", options, tuple(logits.DTYPES.values()))
        second = first if draw.chance("one dtype", 0.7) else draw.choice("teacher's dtype", options)
        values, self.kinds = logits.drawn_pair(draw, self.rows, self.width, (first, second))
        self.given: dict[str, Placed] = {}
        self.settings: dict[str, Any] = {}
        self.vocab = self.width
        if draw.chance("vocab_size", 0.2):
            self._widen(values)
        for name, t in zip(PAIR if pair else PAIR[:1], values, strict=False):
            self.given[name] = place(draw, t, "logits")
        self.computed = reference.compute_dtype(*(t.memory for t in self.given.values()))
        if any(_strange(t) for t in self.given.values()):
            self.kinds = [f"row {i}" for i in range(self.count)]
        self.mask = draw.choice("mask", ("none", "some", "all", "nothing"), (5, 4, 1, 0.4))
        if self.mask != "none":
            share = {"some": 0.6, "all": 2.0, "nothing": -1.0}[self.mask]
            self.given["mask"] = place(draw, draw.mostly(share, *self.rows), "mask", PER_TOKEN)
        if tokens:
            self._add_tokens()
        self.settings["temperature"] = logits.drawn_temperature(draw)

    def _widen(self, values: list[Tensor]) -> None:
        """Columns beyond the prefix that both have; nobody may read them."""
        self.vocab = self.settings["vocab_size"] = self.width
        for i, t in enumerate(values):
            beyond = self.draw.choice("columns beyond", (0, 1, 5, 40))
            value = self.draw.choice("value beyond", (torch.nan, torch.inf, 3.0))
            values[i] = torch.nn.functional.pad(t, (0, beyond), value=value)

    def _add_tokens(self) -> None:
        dtype = self.draw.choice("tokens' dtype", TOKEN_DTYPES)
        most = min(self.vocab, torch.iinfo(dtype).max + 1)
        self.given["tokens"] = place(self.draw, self.draw.integers(most, *self.rows).to(dtype), "tokens", PER_TOKEN)

    def case(self, operation: str, **fields: Any) -> Case:
        wide = any(self.given[name].memory.dtype == torch.float64 for name in PAIR if name in self.given)
        return Case(
            operation,
            given=self.given,
            settings=self.settings,
            computed=fields.pop("computed", self.computed),
            widened=fields.pop("widened", PAIR if self.pair else PAIR[:1]),
            kinds=self.kinds,
            rows=self.rows,
            by_row=tuple(self.given),
            garbage=self.garbage if "mask" in self.given else None,
            mask="mask" if "mask" in self.given else None,
            float64_logits=wide,
            threads=drawn_threads(self.draw),
            terms=self.width,
            value_sizes=fields.pop("value_sizes", lambda exact: self.weighed_sizes() if self.pair else {}),
            nan_gradient_is_free=self.computed == torch.float64,  # whose largest numbers the truth cannot subtract
            **fields,
        )

    def share_memory(self) -> None:
        """Puts both models' rows into one matrix: the same rows, or the teacher's one row earlier."""
        student, teacher = (self.given[name] for name in PAIR)
        if student.shape != teacher.shape or student.memory.dtype != teacher.memory.dtype or not self.count:
            return
        width = student.shape[-1]
        rows = [teacher.view().reshape(-1, width)[:1], student.view().reshape(-1, width)]
        memory = torch.cat(rows).flatten()
        strides = torch.empty(student.shape, device="meta").stride()
        back = self.draw.choice("rows of the teacher before the student's", (0, 1), (1, 4))
        self.given["student_logits"] = Placed(memory, student.shape, Layout(strides, width))
        self.given["teacher_logits"] = Placed(memory, student.shape, Layout(strides, width * (1 - back)))
        self.kinds = [f"row {i}" for i in range(self.count)]

    def weighed_sizes(self) -> Tensors:
        """[*rows] of the divergences of float64 logits: their terms times |log weight|. A weight is the exponential of
        a rounded logarithm, and eager PyTorch, which the truth is in float64, rounds the same one in the same way."""
        if self.computed != torch.float64:
            return {}
        pair = (self.given[name].view()[..., : self.vocab].double() for name in PAIR)
        log_p, log_w = ((t / self.settings["temperature"]).log_softmax(-1) for t in pair)
        apart = (log_p - log_w).abs()
        weighed = {"reverse_kl": log_p.exp() * log_p.abs() * apart, "forward_kl": log_w.exp() * log_w.abs() * apart}
        return {name: t.nan_to_num(0.0, 0.0, 0.0).sum(-1).nan_to_num(0.0, 0.0, 0.0) for name, t in weighed.items()}

    def garbage(self, tensors: Tensors) -> Tensors:
        """Other numbers in the rows that do not count."""
        out, away = dict(tensors), ~tensors["mask"]
        for name in PAIR:
            if name in out:
                out[name] = out[name].masked_fill(away[..., None], torch.nan)
        if "tokens" in out:
            wrong = 255 if out["tokens"].dtype == torch.uint8 else -100
            out["tokens"] = out["tokens"].masked_fill(away, wrong)
        return out


def _strange(t: Placed) -> bool:
    """Whether some row shares memory with another, and with it what is special about it."""
    counted = [(stride, size) for stride, size in zip(t.layout.strides, t.shape, strict=True) if size > 1]
    extent = 1
    for stride, size in sorted(counted):
        if stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def token_stats(draw: Draw) -> Case:
    rows = Rows(draw)
    inplace = draw.chance("inplace_backward", 0.3)
    settings = rows.settings

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return cf.token_stats(**tensors, **settings, inplace_backward=inplace, backend=backend)._asdict()

    def truth(tensors: Tensors) -> Tensors:
        return reference.token_stats(**tensors, **settings)._asdict()

    upstream = drawn_upstream(draw, DIFFERENTIABLE, rows.rows, rows.computed)
    if draw.chance("a teacher in the student's memory", 0.5 if inplace else 0.05):
        rows.share_memory()
    case = rows.case(
        "token_stats",
        call=call,
        truth=truth,
        leaves=("student_logits",),
        upstream=upstream,
        sizes=lambda exact: gradient_size(exact, upstream, settings["temperature"]),
        overwrites="student_logits" if inplace else None,
        needs="token_stats",
    )
    case.settings = {**settings, "inplace_backward": inplace}
    case.public = lambda tensors, changed: cf.token_stats(**tensors, **{**case.settings, **changed})
    return case


def gradient_size(exact: Tensors, upstream: Tensors, temperature: float) -> Tensors:
    """Per row the terms that a gradient sums: p, p (log p + H), p (log p - log w - R) and p - w times what arrives."""
    parts = []
    for name, g in upstream.items():
        value = exact[name].detach().nan_to_num(0.0, 0.0, 0.0).abs().double()
        scale = value.clamp(min=1.0) if name in ("entropy", "reverse_kl") else torch.ones_like(value)
        parts.append(g.double().abs() * scale / temperature)
    return {"student_logits": sum(parts)}


def divergence(draw: Draw) -> Case:
    rows = Rows(draw, tokens=False)
    kind = draw.choice("divergence", reference.DIVERGENCES)
    beta = draw.choice("beta", (0.5, 0.1, 0.9, 0.0, 1e-3, 1.0) if kind == "jsd" else (0.5, 0.1, 0.9, 0.0, 1e-3))
    settings = rows.settings | {"kind": kind, "beta": beta}
    plain = kind.endswith("_kl") and not kind.startswith("skew")
    ends = {"jsd": (0.0, 1.0), "skew_forward_kl": (0.0,), "skew_reverse_kl": (0.0,)}.get(kind, ())

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return {"value": cf.divergence(**tensors, **settings, backend=backend)}

    name = kind
    if beta in ends:
        name = "reverse_kl" if (kind == "skew_reverse_kl" or beta == 1.0) else "forward_kl"

    def truth(tensors: Tensors) -> Tensors:
        return {"value": reference.divergence(**tensors, **settings | {"kind": name})}

    upstream = drawn_upstream(draw, ("value",), rows.rows, rows.computed)

    def sizes(exact: Tensors) -> Tensors:
        value, arriving = {"reverse_kl": exact["value"]}, {"reverse_kl": upstream["value"]}
        return gradient_size(value, arriving, settings["temperature"])

    def value_sizes(exact: Tensors) -> Tensors:
        weighed = rows.weighed_sizes()
        return {"value": weighed[name]} if name in weighed else {}

    case = rows.case(
        "divergence",
        call=call,
        truth=truth,
        leaves=("student_logits",),
        upstream=upstream,
        sizes=sizes,
        value_sizes=value_sizes,
        needs="token_stats" if plain or beta in ends else "divergence",
    )
    case.settings = settings
    case.public = lambda tensors, changed: cf.divergence(**tensors, **{**settings, **changed})
    return case


def token_state(draw: Draw) -> Case:
    """Tiles of columns in any order, folded into several states that are then merged in any order."""
    rows = Rows(draw, rows=(draw.choice("states", (0, 1, 2, 5, 9)),))
    rows.given.pop("mask", None)
    rows.settings.pop("vocab_size", None)
    width = rows.width = min(t.shape[-1] for name, t in rows.given.items() if name in PAIR)
    cuts = sorted({draw.integer(0, width) for _ in range(draw.integer(0, 4))} | {0, width})
    tiles = draw.shuffled(list(itertools.pairwise(cuts)))
    if len(tiles) > 1 and draw.chance("a tile never comes", 0.15):
        tiles = tiles[1:]
    owners = [draw.integer(0, 2) for _ in tiles]
    order, temperature = draw.shuffled(range(3)), rows.settings["temperature"]
    rows.settings |= {"tiles": tiles, "owners": owners, "order": order}

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        states = [cf.TokenState.empty(len(tensors["tokens"]), temperature=temperature) for _ in range(3)]
        for (start, stop), owner in zip(tiles, owners, strict=True):
            x, y = (tensors[name][:, start:stop] for name in PAIR)
            states[owner].update(x, y, tensors["tokens"], first_column=start, backend=backend)
        total = cf.TokenState.empty(len(tensors["tokens"]), temperature=temperature)
        for i in order:
            total.merge(states[i])
        return total.finish()._asdict()

    def truth(tensors: Tensors) -> Tensors:
        seen = torch.zeros(width, dtype=torch.bool)
        for start, stop in tiles:
            seen[start:stop] = True
        x, y = (tensors[name][..., :width].masked_fill(~seen, -torch.inf) for name in PAIR)
        return reference.token_stats(x, y, tensors["tokens"].long(), temperature=temperature)._asdict()

    return rows.case("TokenState", call=call, truth=truth, needs="token_state")


def dropped_teacher_mass(draw: Draw) -> Case:
    rows = Rows(draw, tokens=False, pair=False)
    rows.given = {"teacher_logits": rows.given["student_logits"]}
    width = rows.given["teacher_logits"].shape[-1]
    vocab, temperature = draw.integer(1, width), rows.settings["temperature"]
    at_once = draw.choice("rows_at_once", (1, 2, 64))

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        mass = cf.dropped_teacher_mass(tensors["teacher_logits"], vocab, temperature=temperature, rows_at_once=at_once)
        return {"mass": mass}

    def truth(tensors: Tensors) -> Tensors:
        probability = (tensors["teacher_logits"] / temperature).softmax(-1)
        return {"mass": torch.where(probability[..., 0].isnan(), torch.nan, probability[..., vocab:].sum(-1))}

    rows.pair = False
    case = rows.case("dropped_teacher_mass", call=call, truth=truth, widened=("teacher_logits",))
    case.settings = {"vocab_size": vocab, "temperature": temperature, "rows_at_once": at_once}
    case.layout_matters, case.by_row = True, ()  # plain PyTorch, which adds in an order of its own
    return case
