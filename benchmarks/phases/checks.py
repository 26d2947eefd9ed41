"""A minute of checks of a GPU backend: values and gradients against float64, streams, graphs.

The criterion is that of the tests, `assert_no_worse`: no less exact than twice eager PyTorch in the same precision.
Memory that is allocated and not written holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers import assert_no_worse, exact_and_eager, poisoned_memory
from torch import Tensor

from cmdp_fast import reference
from phases.operations import BUDGET, Batch
from phases.record import Part
from phases.setting import GPU_BACKENDS, Setting, need_backend

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Inputs(NamedTuple):
    """How the inputs of a check differ from others."""

    name: str
    rows: int
    vocab: int
    storage: int = 0
    masked: bool = False
    inplace: bool = False


SHAPES = (
    Inputs("aligned", 64, 151936),
    Inputs("odd", 33, 50257),
    Inputs("not aligned", 33, 50256, storage=50261),
    Inputs("masked", 64, 128256, masked=True),
    Inputs("in place", 48, 151936, masked=True, inplace=True),
    Inputs("narrow", 257, 1000),
)
SMALL = (
    Inputs("aligned", 4, 2048),
    Inputs("odd", 3, 1537, masked=True),
    Inputs("in place", 4, 1543, storage=1551, inplace=True),
)


def parts(setting: Setting) -> list[Part]:
    """Every check of both backends."""
    return [part for backend in GPU_BACKENDS for part in _of(setting, backend)]


def _of(setting: Setting, backend: str) -> list[Part]:
    def part(name: str, seconds: float, run: Callable[..., dict[str, Any]], *arguments: Any) -> Part:
        def checked() -> dict[str, Any]:
            need_backend(backend)
            setting.free()
            return run(setting, backend, *arguments)

        return Part(f"check {backend}: {name}", seconds, checked)

    shapes = SMALL if setting.small else SHAPES
    found = [part(f"{inputs.name} logits", 20, against_float64, inputs) for inputs in shapes]
    found.append(part("packed completions", 15, packed))
    if backend == "triton":
        found.append(part("jsd", 10, mixture))
    found.append(part("the same bits twice", 5, repeated))
    found.append(part("two streams", 5, two_streams))
    found.append(part("graph of forward and backward", 10, graph))
    return found


def against_float64(setting: Setting, backend: str, inputs: Inputs) -> dict[str, Any]:
    """`token_stats` in every dtype, with the largest error of each value."""
    errors, problems = {}, []
    for name, dtype in DTYPES.items():
        if setting.small and name == "float16":
            continue
        batch = Batch(inputs.rows, inputs.vocab, dtype, setting.device, storage=inputs.storage, masked=inputs.masked)
        with poisoned_memory():
            ours = batch.statistics(backend, inputs.inplace)
        settings = {} if batch.mask is None else {"mask": batch.mask}
        (exact, exact_gradient), (eager, eager_gradient) = exact_and_eager(
            batch.student, batch.teacher, batch.tokens, batch.weights, **settings
        )
        size = float((exact.reverse_kl.detach() * batch.weights["reverse_kl"]).abs().max())
        truth = exact._asdict() | {"gradient": exact_gradient}
        plain = eager._asdict() | {"gradient": eager_gradient.to(dtype)}
        found, wrong = _compared(ours, plain, truth, {"gradient": size}, inputs.vocab)
        errors[name], problems = found, problems + [f"{name} {problem}" for problem in wrong]
    worst = max(error for found in errors.values() for error in found.values())
    return {"errors": errors, "problems": problems, "summary": f"largest error {worst:.1e}"}


def _compared(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], sizes: dict[str, float], terms: int
) -> tuple[dict[str, float], list[str]]:
    """(the largest error of each value, those that are worse than eager PyTorch's)."""
    errors, problems = {}, []
    for name, value in ours.items():
        errors[name] = float((value.double() - exact[name].detach().double()).abs().max())
        if not value.isfinite().all():
            problems.append(f"{name} is not finite")
        try:
            assert_no_worse(value, eager[name], exact[name], name, size=sizes.get(name, 1.0), terms=terms)
        except AssertionError as error:
            problems.append(str(error))
    return errors, problems


def _batch(setting: Setting, rows: int, dtype: torch.dtype = torch.bfloat16, masked: bool = False) -> Batch:
    return Batch(4 if setting.small else rows, 1537 if setting.small else 50257, dtype, setting.device, masked=masked)


def _same(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> list[str]:
    """The values of the one that are not those of the other, bit for bit."""
    return [f"{name} {what}" for name, value in one.items() if not torch.equal(value, other[name])]


def packed(setting: Setting, backend: str) -> dict[str, Any]:
    """`constrained_reward` of packed completions is what the three operations give in turn; the trace against
    float64."""
    problems = []
    for masked in (False, True):
        batch = _batch(setting, 300, torch.float32, masked)
        with poisoned_memory():
            whole, turns = batch.constrained(backend), batch.in_turn(backend)
        problems += _same(turns, whole, "is not that of the three operations")
        settings = {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens}
        cost = whole["reverse_kl"]
        trace, plain = (reference.budget_trace(c, BUDGET, **settings) for c in (cost.double(), cost))
        fields = ("cumulative", "remaining", "excess")
        exact, eager = ({name: getattr(t, name) for name in fields} for t in (trace, plain))
        problems += _compared({name: whole[name] for name in fields}, eager, exact, {}, len(batch.tokens))[1]
    return {"problems": problems, "summary": "bitwise the three operations"}


def mixture(setting: Setting, backend: str) -> dict[str, Any]:
    """A divergence with a mixture, and its gradient."""
    errors, problems = {}, []
    for name in ("bfloat16", "float32"):
        batch = _batch(setting, 64, DTYPES[name], masked=True)
        with poisoned_memory():
            ours = batch.mixture(backend)
        found = []
        for dtype in (torch.float64, torch.float32):
            x = batch.student.detach().to(dtype).requires_grad_()
            value = reference.divergence(x, batch.teacher.to(dtype), "jsd", beta=0.3, mask=batch.mask)
            gradient = torch.autograd.grad((value * batch.weights["forward_kl"]).sum(), x)[0]
            found.append({"jsd": value.detach(), "gradient": gradient})
        exact, eager = found
        eager["gradient"] = eager["gradient"].to(batch.student.dtype)
        errors[name], wrong = _compared(ours, eager, exact, {}, batch.student.shape[-1])
        problems += [f"{name} {problem}" for problem in wrong]
    return {"errors": errors, "problems": problems, "summary": "jsd, beta 0.3"}


def repeated(setting: Setting, backend: str) -> dict[str, Any]:
    """The same call twice gives the same bits, and a row is the same in any batch."""
    batch = _batch(setting, 64)
    first, second = batch.statistics(backend), batch.statistics(backend)
    problems = _same(first, second, "differs from one call to the next")
    batch.student, batch.teacher, batch.tokens = batch.student[2:3], batch.teacher[2:3], batch.tokens[2:3]
    batch.weights = {name: weight[2:3] for name, weight in batch.weights.items()}
    alone = batch.statistics(backend)
    problems += _same(alone, {name: value[2:3] for name, value in first.items()}, "of a row depends on its batch")
    return {"problems": problems, "summary": "bitwise"}


def two_streams(setting: Setting, backend: str) -> dict[str, Any]:
    """Two calls under way at once do not see each other's memory."""
    one, other = _batch(setting, 64), _batch(setting, 65)
    expected = one.constrained(backend), other.constrained(backend)
    if setting.device != "cuda":
        return {"summary": "run without streams: no GPU"}
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found: list[dict[str, Tensor]] = [{}, {}]
    for _ in range(10):
        for i, (batch, stream) in enumerate(zip((one, other), streams, strict=True)):
            with torch.cuda.stream(stream):
                found[i] = batch.constrained(backend)
    torch.cuda.synchronize()
    problems = [problem for i in range(2) for problem in _same(found[i], expected[i], f"differs on stream {i}")]
    return {"problems": problems, "summary": "bitwise what one stream gives"}


def graph(setting: Setting, backend: str) -> dict[str, Any]:
    """A captured step, forward and backward, replayed on new logits gives what the eager step gives."""
    batch = _batch(setting, 64)
    if setting.device != "cuda":
        batch.constrained(backend)
        return {"summary": "run without a graph: no GPU"}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            batch.constrained(backend)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        made = batch.constrained(backend)
    problems = []
    for seed in range(3):
        batch.student.copy_(torch.randn_like(batch.student, dtype=torch.float32) * (1 + seed))
        captured.replay()
        torch.cuda.synchronize()
        problems += _same(made, batch.constrained(backend), f"of replay {seed} is not that of the eager call")
    return {"problems": problems, "summary": "three replays, bitwise the eager step"}
