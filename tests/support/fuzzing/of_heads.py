"""Cases of the operations on hidden states and heads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import DIFFERENTIABLE
from linear_inputs import distance, set_tiles
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import reference, topk_reference
from fuzzing.case import Case, Tensors, drawn_threads, drawn_upstream
from fuzzing.draws import Draw
from fuzzing.layouts import Placed, place
from fuzzing.of_budgets import Completions
from fuzzing.of_logits import PER_TOKEN, TOKEN_DTYPES, gradient_size
from fuzzing.of_methods import assert_same, in_turn, method_settings, named, silently
from fuzzing.of_topk import OF_TAILS, message, without_sense

PARTS = ("student_hidden", "student_weight", "student_bias")
ROWS = ((), (1,), (3,), (9,), (2, 3), (2, 1, 2), (0,), (2, 0))
FACTORS = {"contiguous": 4, "offset": 2, "wide rows": 2, "gaps everywhere": 1, "columns first": 1, "strided columns": 1}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Heads:
    """Hidden states and heads of one model or of both; tokens and a mask."""

    def __init__(
        self, draw: Draw, rows: tuple[int, ...] | None = None, models: tuple[str, ...] = ("student", "teacher")
    ):
        self.draw, self.models = draw, models
        self.rows = draw.choice("rows of hidden states", ROWS) if rows is None else rows
        self.given, self.settings = dict[str, Placed](), dict[str, Any]()
        self.vocab = draw.choice("columns of a head", (1, 2, 17, 50, 64, 333, 1000))
        narrow = draw.chance("vocab_size of heads", 0.2)
        self.as_head = draw.chance("a Head", 0.4)
        self.heads: dict[str, dict[str, Any]] = {}
        common = draw.choice("dtype of factors", DTYPES, (5, 2, 2, 2))
        for model in models:
            self._add_model(model, common, draw.integer(0, 9) if narrow else 0)
        if narrow:
            self.settings["vocab_size"] = self.vocab
        tokens = draw.choice("tokens' dtype", TOKEN_DTYPES)
        most = min(self.vocab, torch.iinfo(tokens).max + 1)
        self.given["tokens"] = place(draw, draw.integers(most, *self.rows).to(tokens), "tokens", PER_TOKEN)
        if draw.chance("mask of rows", 0.4):
            keep = draw.mostly(draw.choice("share of rows", (0.6, 2.0, -1.0), (4, 1, 0.5)), *self.rows)
            self.given["mask"] = place(draw, keep, "mask", PER_TOKEN)
        self.settings["temperature"] = draw.choice("temperature of heads", (1.0, 0.7, 2.0))
        tiles = draw.choice("tiles", ((4, 16), (7, 768), (1024, 768)))
        self.tiles = tiles
        factors = [t.memory.dtype for name, t in self.given.items() if name.endswith(("hidden", "weight"))]
        self.computed = torch.float64 if torch.float64 in factors else torch.float32
        self.parts = tuple(name for name in PARTS if name in self.given)

    def _add_model(self, model: str, common: torch.dtype, beyond: int) -> None:
        draw, columns = self.draw, self.vocab + beyond
        width = draw.choice("width of a model", (1, 3, 12, 20, 33))
        mixed = draw.chance("factors of several dtypes", 0.2)

        def add(part: str, values: Tensor, layouts: dict[str, float]) -> None:
            dtype = draw.choice("dtype of a factor", DTYPES[:3]) if mixed else common
            self.given[f"{model}_{part}"] = place(draw, values.to(dtype), f"{part} of a model", layouts)

        add("hidden", draw.normal(*self.rows, width, scale=1.5), FACTORS | {"expanded": 1})
        add("weight", draw.normal(columns, width, scale=2 / width**0.5), FACTORS)
        if draw.chance("bias", 0.4):
            add("bias", draw.normal(columns), {"contiguous": 2, "gaps everywhere": 1})
        own = {}
        if draw.chance("softcap", 0.25):
            own["softcap"] = draw.choice("softcap at", (3.0, 30.0))
        if draw.chance("scale", 0.25):
            own["scale"] = draw.choice("scale of logits", (0.5, 2.0, -1.3))
        self.heads[model] = own

    def arguments(self, tensors: Tensors, headed: bool = True) -> dict[str, Any]:
        """As an operation takes them: a `Head` each, or weights and keywords."""
        out: dict[str, Any] = dict(tensors)
        for model in self.models:
            own = self.heads[model]
            if headed and self.as_head:
                bias = out.pop(f"{model}_bias", None)
                out[f"{model}_weight"] = cf.Head(out[f"{model}_weight"], bias, **own)
            else:
                out |= {f"{model}_{name}": value for name, value in own.items()}
        return out

    def garbage(self, tensors: Tensors) -> Tensors:
        out, away = dict(tensors), ~tensors["mask"]
        for model in self.models:
            out[f"{model}_hidden"] = out[f"{model}_hidden"].masked_fill(away[..., None], torch.nan)
        out["tokens"] = out["tokens"].masked_fill(away, 99)
        return out

    @contextlib.contextmanager
    def tiled(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            set_tiles(patch, *self.tiles)
            yield

    def options(self) -> dict[str, Any]:
        """Temperature and what belongs to the heads, by name."""
        own = {f"{m}_{name}": value for m in self.models for name, value in self.heads[m].items()}
        return {"temperature": self.settings["temperature"], **own}

    def sizes(self, of_rows: Tensor) -> Tensors:
        """The largest terms that a gradient sums: a row's, times the factor that it meets.

        That of the hidden states is PyTorch's sum over all columns, which loses a random walk of roundings in float32,
        too: of [1, 1000] times [1000, 1] up to 50 units, in whatever layout.
        """
        flowing = float(of_rows.max()) if of_rows.numel() else 1.0
        flowing = max(1.0, flowing) * max(1.0, abs(self.heads["student"].get("scale", 1.0)))
        views = {name: t.view() for name, t in self.given.items() if name in PARTS}
        largest = {name: float(t.abs().max()) if t.numel() else 1.0 for name, t in views.items()}
        met = {"student_hidden": "student_weight", "student_weight": "student_hidden"}
        count = max(1, int(torch.Size(self.rows).numel()))
        added = {"student_hidden": 1 + self.vocab**0.5 / 8}
        return {
            name: torch.tensor(
                flowing * max(1.0, largest[met[name]] if name in met else 1.0) * count**0.5 * added.get(name, 1.0)
            )
            for name in self.parts
        }

    def value_sizes(self) -> Tensor:
        plain = {name: t.view() for name, t in self.given.items()}
        models = {name: t for name, t in plain.items() if name.startswith(self.models)}
        if "teacher" not in self.models:
            models |= {name.replace("student", "teacher"): t for name, t in models.items()}
        return torch.full(self.rows, max(1.0, distance(models, self.options())), dtype=torch.float64)

    def case(self, operation: str, **fields: Any) -> Case:
        call, garbage = fields.pop("call"), fields.pop("garbage", self.garbage)

        def tiled(tensors: Tensors, backend: str | None) -> Tensors:
            with self.tiled():
                return call(tensors, backend)

        function, fixed = fields.pop("function"), fields.pop("fixed", {})

        def public(tensors: dict[str, Any], changed: dict[str, Any]) -> Any:
            given = self.arguments(tensors, False)
            return silently(lambda: function(**given, **{**fixed, **self.settings, **changed}))

        fields.setdefault("settings", {**self.settings, "heads": self.heads, "tiles": self.tiles, "Head": self.as_head})
        return Case(
            operation,
            call=tiled,
            given=self.given,
            computed=fields.pop("computed", self.computed),
            widened=tuple(name for name in self.given if name.startswith(("student", "teacher"))),
            kinds=["all"] * int(torch.Size(self.rows).numel()),
            rows=self.rows,
            leaves=self.parts,
            garbage=garbage if "mask" in self.given else None,
            mask="mask" if "mask" in self.given else None,
            float64_logits=self.computed == torch.float64,
            layout_matters=True,
            public=public,
            threads=drawn_threads(self.draw),
            terms=self.vocab + 33,
            value_sizes=lambda exact: dict.fromkeys(exact, self.value_sizes()),
            **fields,
        )


def linear_token_stats(draw: Draw) -> Case:
    heads = Heads(draw)
    saved = draw.choice("saved", ("recompute", "teacher", "tiles", "auto"))
    upstream = drawn_upstream(draw, DIFFERENTIABLE, heads.rows, heads.computed)
    heads.settings["saved"] = saved

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return cf.linear_token_stats(**heads.arguments(tensors), **heads.settings, backend=backend)._asdict()

    def truth(tensors: Tensors) -> Tensors:
        settings = {name: value for name, value in heads.settings.items() if name != "saved"}
        return reference.linear_token_stats(**heads.arguments(tensors, False), **settings)._asdict()

    def sizes(exact: Tensors) -> Tensors:
        return heads.sizes(gradient_size(exact, upstream, heads.settings["temperature"])["student_logits"])

    return heads.case(
        "linear_token_stats",
        function=cf.linear_token_stats,
        call=call,
        truth=truth,
        upstream=upstream,
        sizes=sizes,
        needs="linear_token_stats",
    )


def linear_divergence(draw: Draw) -> Case:
    heads = Heads(draw)
    heads.given.pop("tokens")
    kind = draw.choice("divergence of heads", reference.DIVERGENCES)
    heads.settings |= {"kind": kind, "beta": draw.choice("beta of heads", (0.5, 0.1, 0.9))}
    upstream = drawn_upstream(draw, ("value",), heads.rows, heads.computed)

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return {"value": cf.linear_divergence(**heads.arguments(tensors), **heads.settings, backend=backend)}

    def truth(tensors: Tensors) -> Tensors:
        return {"value": reference.linear_divergence(**heads.arguments(tensors, False), **heads.settings)}

    def sizes(exact: Tensors) -> Tensors:
        value, arriving = {"reverse_kl": exact["value"]}, {"reverse_kl": upstream["value"]}
        return heads.sizes(gradient_size(value, arriving, heads.settings["temperature"])["student_logits"])

    def garbage(tensors: Tensors) -> Tensors:
        out = heads.garbage({**tensors, "tokens": torch.zeros(heads.rows)})
        return {name: t for name, t in out.items() if name != "tokens"}

    return heads.case(
        "linear_divergence",
        function=cf.linear_divergence,
        call=call,
        truth=truth,
        upstream=upstream,
        sizes=sizes,
        garbage=garbage,
        needs="linear_divergence",
    )


def linear_topk_stats(draw: Draw) -> Case:
    heads = Heads(draw, models=("student",))
    teacher = draw.normal(*heads.rows, heads.vocab, scale=3.0)
    message(draw, teacher, heads.given, heads.settings, heads.vocab)
    logprobs = heads.given["topk_logprobs"].memory.dtype
    computed = torch.float64 if logprobs == torch.float64 else heads.computed
    upstream = drawn_upstream(draw, OF_TAILS, heads.rows, computed)

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return cf.linear_topk_stats(**heads.arguments(tensors), **heads.settings, backend=backend)._asdict()

    def truth(tensors: Tensors) -> Tensors:
        given = heads.arguments(tensors, False)
        parts = {name: given.pop(name) for name in tuple(given) if name.startswith("student")}
        hidden, weight = parts.pop("student_hidden"), parts.pop("student_weight")
        logits, _ = reference._project("student", hidden, weight, parts)
        if tensors["student_hidden"].dtype == torch.float64 and heads.computed != torch.float64:
            logits = _Rounded.apply(logits)  # the bounds are widened by the rounding of the dtype of the logits
        stats = topk_reference.topk_stats(logits, **given, **heads.settings)
        return stats._asdict()

    def sizes(exact: Tensors) -> Tensors:
        return heads.sizes(gradient_size(exact, upstream, heads.settings["temperature"])["student_logits"])

    case = heads.case(
        "linear_topk_stats",
        function=cf.linear_topk_stats,
        call=call,
        truth=truth,
        upstream=upstream,
        sizes=sizes,
        computed=computed,
        garbage=lambda tensors: without_sense(heads.garbage(tensors)),
        needs="linear_topk_stats",
    )
    case.precision = heads.computed
    return case


class _Rounded(torch.autograd.Function):
    """float64 logits as float32, and the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].double()


def linear_constrained_reward(draw: Draw) -> Case:
    completions = Completions(draw)
    if completions.shape[-1] > 13 or completions.sequences > 3:
        completions.shape, completions.packed, completions.sequences = (2, 3), False, 2
        completions.given.pop("cu_seqlens", None)
    completions.given.pop("mask", None)
    heads = Heads(draw, rows=completions.shape)
    completions.given.update(heads.given)
    completions.add_reward()
    settings = method_settings(draw, completions)
    completions.budget(settings)
    heads.given = completions.given
    upstream = drawn_upstream(draw, DIFFERENTIABLE, heads.rows, heads.computed)

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        given = heads.arguments(tensors)
        return named(
            silently(lambda: cf.linear_constrained_reward(**given, **settings, **heads.settings, backend=backend))
        )

    def also(tensors: Tensors, _: Tensors, backend: str) -> None:
        with heads.tiled():
            outputs = call(tensors, backend)  # of the same layout
        given = heads.arguments({name: t for name, t in tensors.items() if name in of_heads})
        with heads.tiled():
            stats = cf.linear_token_stats(**given, **heads.settings, backend=backend)
            given.pop("tokens")
            beta = settings.get("beta", 0.5)
            jsd = lambda: cf.linear_divergence(**given, beta=beta, **heads.settings, backend=backend)  # noqa: E731
            trace, reward = in_turn(stats, jsd, tensors, settings, backend)
        assert_same(outputs, named(cf.ConstrainedReward(stats, trace, reward)), "the operations in turn")

    of_heads = [name for name in heads.given if name not in ("task_reward", "budget", "cu_seqlens")]
    case = heads.case(
        "linear_constrained_reward",
        function=cf.linear_constrained_reward,
        fixed=settings,
        call=call,
        upstream=upstream,
        also=also,
        needs="linear_token_stats",
        garbage=lambda tensors: completions.garbage(heads.garbage(tensors)),
        settings={**settings, **heads.settings, "heads": heads.heads, "tiles": heads.tiles, "Head": heads.as_head},
    )
    case.free_shapes = ("first_violation",)
    return case
