"""How fast is `linear_token_stats`, and what memory does it take? Beside the bare products and other libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

import cmdp_fast as cf
from cmdp_fast.bench.case import Case, Shape
from cmdp_fast.bench.ops import OPS
from cmdp_fast.bench.ops.linear_token_stats import linear_by
from cmdp_fast.bench.ops.token_stats import TERMS
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, Absent, Function, Inputs, Values, Variant, differentiable
from cmdp_fast.errors import first_line
from phases import tools
from phases.record import Part
from phases.setting import Setting
from phases.timing import Measurement

OP = "linear_token_stats"
SHAPES = (
    Shape("Qwen2.5, 1.5B from 7B", 8192, 151936, 1536, 3584),
    Shape("Llama-3, 3B from 8B", 8192, 128256, 3072, 4096),
    Shape("hidden 4096", 8192, 151936, 4096, 4096),  # that of public tables
)
SAVED = ("recompute", "teacher", "tiles")  # "auto" is one of them; in a graph, where memory is unknown, the first
MEBIBYTES = (64, 256, 512, 1024, 2048)  # of a pair of tiles
PEERS = ("trl_divergence", "liger_linear_jsd", "cut_cross_entropy", "liger_chunked_jsd", "eager")
BYTES = "CMDP_FAST_TILE_BYTES"


@contextmanager
def _tile_bytes(size: int | None) -> Iterator[None]:
    """The budget of a pair of tiles; None: the library's own."""
    before = os.environ.pop(BYTES, None)
    if size is not None:
        os.environ[BYTES] = str(size)
    try:
        yield
    finally:
        os.environ.pop(BYTES, None)
        if before is not None:
            os.environ[BYTES] = before


def _variant(case: Case, name: str, size: int | None = None, saved: str = "recompute") -> Variant:
    """Ours with a size of tiles and a mode of `saved`. The backward pass reads the budget as well, so both run in it.
    Raises Absent, with its name, for a mode that this version does not know."""
    if (problem := cf.available_backends()["triton"]) is not None:
        raise Absent(f"{name}: {problem}")
    if saved != "recompute":
        try:
            _tiny(saved)
        except ValueError as error:
            raise Absent(f"{name}: {first_line(error)}") from error

    def run(function: Callable[..., Values]) -> Function:
        def within(inputs: Inputs) -> Values:
            with _tile_bytes(size):
                return function(inputs)

        return within

    ours = linear_by(cf.linear_token_stats, saved=saved, backend="triton")
    whole = differentiable(case.mode, name, ours, TERMS, HIDDEN_AND_HEAD)
    return Variant(name, run(whole.run), prepare=whole.prepare)


def _tiny(saved: str) -> None:
    """Raises ValueError if there is no such mode."""
    h, w = torch.zeros(1, 2), torch.zeros(3, 2)
    cf.linear_token_stats(h, w, h, w, torch.zeros(1, dtype=torch.int64), saved=saved, backend="torch")


def _default(case: Case) -> list[Callable[[], Variant]]:
    return [lambda: _variant(case, OP)]


def _modes(case: Case) -> list[Callable[[], Variant]]:
    """The default, what else can be saved, and the logits in full."""
    found = _default(case)
    if case.mode == "both":
        found += [lambda s=saved: _variant(case, f"{OP}, saved={s}", saved=s) for saved in SAVED[1:]]
    return [*found, *(lambda v=v: v for v in OPS[OP].ours(case) if v.name.startswith("logits in full"))]


def _sizes(sizes: Sequence[int]) -> Callable[[Case], list[Callable[[], Variant]]]:
    def variants(case: Case) -> list[Callable[[], Variant]]:
        named = ((f"{OP}, tiles of {size / 2**20:g} MiB", size) for size in sizes)
        return [*_default(case), *(lambda n=name, s=size: _variant(case, n, s) for name, size in named)]

    return variants


def parts(setting: Setting) -> list[Part]:
    """The pair of Qwen2.5 first: ours, the others, the tiles; then the other pairs; then the kernels."""
    shapes = (Shape("toy", 4, 250, 16, 24),) if setting.small else SHAPES
    sizes = [2**12] if setting.small else [size * 2**20 for size in MEBIBYTES]
    dtype, base = ("float32", 5) if setting.small else ("bfloat16", 25)
    found: list[Part] = []
    for number, shape in enumerate(shapes):
        for mode in ("both", "forward"):
            case = Case(OP, mode, shape, dtype, setting.device)
            ours, others, tiles = (
                Measurement(OPS[OP], case, variants, peers).take_in(setting)
                for variants, peers in ((_modes, ()), (_default, PEERS), (_sizes(sizes), ()))
            )
            found.append(Part(f"{mode}, {shape.name}", base, ours))
            found.append(Part(f"{mode}, {shape.name}, others", 1.6 * base, others))
            if number == 0 and (mode == "both" or not setting.small):
                found.append(Part(f"{mode}, {shape.name}, tiles", base, tiles))
    # A minute each, and of one kernel at a time: after all that is timed.
    rows, wide, vocab = (2, 2, 100) if setting.small else (1024, 4096, 151936)
    found.append(tools.profile_part(setting, "statistics and mixture", rows, vocab, "logits"))
    found.append(tools.profile_part(setting, "linear_token_stats", wide, vocab, "linear"))
    return found
