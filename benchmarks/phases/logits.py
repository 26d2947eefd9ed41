"""How fast are the operations on logits? Each beside the floors, both GPU backends and the other libraries."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.bench.case import Case, Op, Shape, Work, cast
from cmdp_fast.bench.ops import OPS
from cmdp_fast.bench.ops.budget_trace import BUDGET, LENGTH, BudgetTraceOp
from cmdp_fast.bench.ops.constrained_reward import budget
from cmdp_fast.bench.ops.divergence import BETA
from cmdp_fast.bench.ops.token_stats import TERMS, statistics_by
from cmdp_fast.bench.variant import Absent, Inputs, Values, Variant, differentiable
from cmdp_fast.ops.backends import OF_CUDA
from phases import processes, tools
from phases.record import Part
from phases.setting import GPU_BACKENDS, Setting
from phases.timing import Measurement

VOCAB = 151936
ROWS = (8192, 1024, 64, 256)  # the most important first
BATCHES = ((8, 1024), (1, 8192), (64, 128), (8, 128), (4, 64), (4, 16))  # sequences and their length
PEERS = ("eager", "kl_div", "liger_kl_div", "trl_logprob", "trl_pipeline", "verl_pipeline")
COMPILED_ROWS = 1024  # torch.compile is slow to start: it is there at one size, and at the largest for the main case
COMPILING = 35  # seconds that it takes, for the check and for the case


class ModifiedRewardOp(BudgetTraceOp):
    """`modified_reward` of given traces, a term per token."""

    name = "modified_reward"

    def work(self, case: Case) -> Work:
        tokens = case.shape.rows * LENGTH
        return Work(read=tokens * (4 + 4 + 4 + 1 + 1), written=tokens * 4)

    def make(self, case: Case, seed: int) -> Inputs:
        inputs = super().make(case, seed)
        trace = reference.budget_trace(inputs["cost"], BUDGET, mask=inputs["mask"])
        return inputs | trace._asdict() | {"reward": torch.randn_like(inputs["cost"])}

    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        return _reward_by(reference.modified_reward)(cast(inputs, dtype))


def _reward_by(operation: Callable[..., torch.Tensor], **settings: Any) -> Callable[[Inputs], Values]:
    def function(inputs: Inputs) -> Values:
        trace = reference.BudgetTrace(**{name: inputs[name] for name in reference.BudgetTrace._fields})
        return {"reward": operation(inputs["reward"], inputs["cost"], trace, mask=inputs["mask"], **settings)}

    return function


def _constrained(backend: str) -> Callable[[Inputs], Values]:
    def function(inputs: Inputs) -> Values:
        given = [inputs[name] for name in ("student", "teacher", "tokens", "reward")]
        out = cf.constrained_reward(*given, budget(inputs), mask=inputs["mask"], backend=backend)
        return out.stats._asdict() | out.trace._asdict() | {"modified_reward": out.reward}

    return function


def _statistics_alone(backend: str) -> Callable[[Inputs], Values]:
    return lambda i: cf.token_stats(i["student"], i["teacher"], i["tokens"], mask=i["mask"], backend=backend)._asdict()


def _jsd(backend: str) -> Callable[[Inputs], Values]:
    return lambda i: {"jsd": cf.divergence(i["student"], i["teacher"], "jsd", beta=BETA, backend=backend)}


def _of(backend: str, case: Case) -> Variant:
    """Our variant of a case on a backend. Raises Absent, with the variant's name, where there is none."""
    name = f"{case.op}, {backend}"
    if (problem := cf.available_backends()[backend]) is not None:
        raise Absent(f"{name}: {problem}")
    if backend == "cuda" and case.op not in OF_CUDA:
        raise Absent(f"{name}: no CUDA C++ kernel for it")
    if case.op == "token_stats":
        settings = {"inplace_backward": True} if case.mode == "inplace" else {}
        return differentiable(case.mode, name, statistics_by(cf.token_stats, backend=backend, **settings), TERMS)
    if case.op == "divergence":
        return differentiable(case.mode, name, _jsd(backend), ("jsd",))
    if case.op == "budget_trace":
        return Variant(name, lambda i: cf.budget_trace(i["cost"], BUDGET, mask=i["mask"], backend=backend)._asdict())
    if case.op == "modified_reward":
        return Variant(name, _reward_by(cf.modified_reward, backend=backend))
    return Variant(name, _constrained(backend))


def _ours(case: Case) -> list[Callable[[], Variant]]:
    found: list[Callable[[], Variant]] = [lambda b=backend: _of(b, case) for backend in GPU_BACKENDS]
    if case.op == "constrained_reward":
        lacks = "no budget, no reward"
        found.append(lambda: Variant("token_stats alone, triton", _statistics_alone("triton"), lacks=lacks))
    return found


def _part(setting: Setting, op: Op, case: Case, peers: Sequence[str], seconds: float) -> Part:
    size = f"{case.shape.rows} {'sequences' if case.op in ('budget_trace', 'modified_reward') else 'rows'}"
    if case.op == "constrained_reward":
        size = f"{case.shape.sequences} x {case.shape.length}"
    name = " ".join(filter(None, (case.op, case.mode, size, case.dtype)))
    return Part(name, seconds, Measurement(op, case, _ours, peers).take_in(setting))


def parts(setting: Setting) -> list[Part]:
    """The operations, the largest sizes first; then the tools; then the sizes that launching decides."""
    vocab = 300 if setting.small else VOCAB
    rows = (2,) if setting.small else ROWS
    seconds = 5 if setting.small else 12

    def shape(count: int) -> Shape:
        return Shape("Qwen2.5" if not setting.small else "toy", count, vocab, 1536, 3584)

    def case(op: str, mode: str, count: int, dtype: str, length: int | None = None) -> Case:
        return Case(op, mode, replace(shape(count), completion=length), dtype, setting.device)

    modes = (("token_stats", "forward"), ("token_stats", "both"), ("token_stats", "inplace"), ("divergence", "both"))
    main, later = [], []
    for count in rows:
        for dtype in ("bfloat16",) if setting.small else ("bfloat16", "float32"):
            for op, mode in modes[1:] if setting.small else (*modes, ("divergence", "forward")):
                compiled = mode in ("forward", "both") and dtype == "bfloat16" and not setting.small
                compiled = compiled and (count == COMPILED_ROWS or (count == rows[0] and op == "token_stats"))
                peers = (*PEERS, "compile") if compiled else PEERS
                part = _part(setting, OPS[op], case(op, mode, count, dtype), peers, seconds + COMPILING * compiled)
                (main if count >= 1024 or setting.small else later).append(part)
    constrained = []
    for sequences, length in ((1, 2),) if setting.small else BATCHES:
        count = sequences * length
        for dtype in ("bfloat16",) if setting.small else ("bfloat16", "float32"):
            compiled = (sequences, length) == BATCHES[0] and dtype == "bfloat16"
            peers = (*PEERS, "compile") if compiled else PEERS
            at = case("constrained_reward", "forward", count, dtype, length)
            part = _part(setting, OPS[at.op], at, peers, seconds + COMPILING * compiled)
            (constrained if setting.small or (count == ROWS[0] and dtype == "bfloat16") else later).append(part)
    scans = []
    for count in (8,) if setting.small else (256, 16):  # sequences
        for op in (OPS["budget_trace"], ModifiedRewardOp()):
            scans.append(_part(setting, op, case(op.name, "forward", count, "float32"), PEERS, seconds))
    table = Part("autotune table", 45, lambda: _autotuned(setting))
    half = [part for part in main if "bfloat16" in part.name]
    single = [part for part in [*main, *later] if "bfloat16" not in part.name]
    few = [part for part in later if "bfloat16" in part.name]
    races = [part for part in tools.sanitizer_parts(setting) if part.name.endswith(("memcheck", "racecheck"))]
    others = [part for part in tools.sanitizer_parts(setting) if part.name not in {race.name for race in races}]
    return [*half[:5], *constrained, *scans, *half[5:], *few, *races, table, *others, *single]


AUTOTUNED = """
import json, sys, torch
from phases.operations import Batch
from cmdp_fast.kernels import launch
device = "cuda" if torch.cuda.is_available() else "cpu"
rows, vocab = int(sys.argv[1]), int(sys.argv[2])
for dtype in (torch.bfloat16, torch.float32)[: 2 if rows > 1 else 1]:
    batch = Batch(rows, vocab, dtype, device)
    for run in (batch.statistics, batch.mixture, batch.linear):
        run("triton")
        print("CHOICES " + json.dumps({key: str(value) for key, value in launch.choices().items()}), flush=True)
"""


def _autotuned(setting: Setting) -> dict[str, Any]:
    """What CMDP_FAST_AUTOTUNE=1 chooses, in a process of its own, since it decides when the package is imported."""
    setting.free()
    sizes = ("1", "100") if setting.small else ("1024", str(VOCAB))
    environment = {**os.environ, "CMDP_FAST_AUTOTUNE": "0" if setting.small else "1"}  # nothing to measure on a CPU
    command = [sys.executable, "-c", AUTOTUNED, *sizes]
    ended = processes.run(command, max(5.0, min(120.0, setting.left() - 20)), setting.log, environment)
    lines = [line for line in ended.output.splitlines() if line.startswith("CHOICES ")]
    if not lines:
        raise RuntimeError(processes.first(ended.tail(), "Error"))
    choices = json.loads(lines[-1].removeprefix("CHOICES "))
    problems = [] if ended.code == 0 else [f"it ended with {ended.code}, after {len(lines)} operations"]
    return {"choices": choices, "problems": problems, "summary": f"{len(choices)} settings were measured"}
