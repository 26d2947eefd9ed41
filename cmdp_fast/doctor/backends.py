"""The backends: which there are, which one a call gets, and whether each computes what float64 does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import cpu, native_module, reference
from cmdp_fast.ops import backends

from .row import NOTE, OK, PROBLEM, Row, failed

ROWS, COLUMNS = 6, 1000  # of the check of numbers
INTERPRETED = 130  # columns, where Triton's interpreter takes a numpy operation for each


def native_kernels() -> Iterator[Row]:
    """The native module, or why there is none."""
    native = cpu.native
    if native is None:
        level = NOTE if native_module.is_pure() else PROBLEM
        yield Row(level, "native kernels", f"{cpu.PROBLEM}; plain PyTorch serves CPU tensors, slower", cpu.CURE or "")
        return
    runs = [name for name, here in native.variants() if here]
    features = " ".join(native.cpu_features()) or "none looked for"
    yield Row(OK, "native kernels", f"{native.variant()} of {', '.join(runs)} (processor: {features})")
    if not native.OPENMP:
        yield Row(NOTE, "native kernels", "built without OpenMP: they use one thread")


def chosen() -> Iterator[Row]:
    """The backend that a call gets, by where its tensors are, and why the others are not there."""
    available = backends.available_backends()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are not there, which is said above
        says = f"CPU tensors: {backends.choose(None, torch.empty(1), 'token_stats')}"
        if torch.cuda.is_available():
            says += f"; GPU tensors: {backends.choose(None, torch.empty(1, device='cuda'), 'token_stats')}"
    yield Row(OK, "backend", says)
    for name in ("cuda", "triton"):
        if available[name] is not None:
            level = NOTE if torch.cuda.is_available() and name == "triton" else OK
            yield Row(level, f"backend {name}", f"not here: {available[name]}")


def numbers() -> Iterator[Row]:
    """Statistics, their gradient and an account, by each backend, against float64."""
    for name, problem in backends.available_backends().items():
        if problem is not None:
            continue
        try:
            worst = max(_errors(name), key=lambda error: error.found / error.limit)
        except Exception as error:  # of a driver, a compiler, a library
            yield Row(PROBLEM, f"numbers {name}", f"the check failed: {failed(error)}")
            continue
        if worst.found <= worst.limit:
            says = f"as float64 has them but for rounding ({worst.what} is off by {worst.found:.1e})"
            yield Row(OK, f"numbers {name}", says)
        else:
            says = f"{worst.what} is off by {worst.found:.3g}, where rounding explains {worst.limit:.1e}"
            yield Row(PROBLEM, f"numbers {name}", says, "report this; meanwhile backend='torch' computes without it")


class _Error(NamedTuple):
    """The largest difference from float64, and what it may be: twice that of plain PyTorch in the same precision, and
    eight units in the last place of the largest value."""

    what: str
    found: float
    limit: float


def _errors(backend: backends.BackendName) -> Iterator[_Error]:
    on_gpu = backend in backends.ON_GPU and not (backends.INTERPRETED and backend == "triton")
    columns = INTERPRETED if backend == "triton" and not on_gpu else COLUMNS
    device = "cuda" if on_gpu else "cpu"
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(ROWS, columns, generator=random, dtype=torch.float32) * 3 for _ in range(2))
    tokens = torch.randint(0, columns, (ROWS,), generator=random)
    budget = float(reference.token_stats(student.double(), teacher.double(), tokens).reverse_kl.sum()) / 2
    outcomes = [
        _outcome(None, student.double(), teacher.double(), tokens, budget),
        _outcome(None, student, teacher, tokens, budget),
        _outcome(backend, student.to(device), teacher.to(device), tokens.to(device), budget),
    ]
    for what in outcomes[0]:
        exact, eager, ours = (outcome[what].detach().double().cpu() for outcome in outcomes)
        rounding = 8 * torch.finfo(torch.float32).eps * max(1.0, float(exact.abs().max()))
        yield _Error(what, _distance(ours, exact), 2 * _distance(eager, exact) + rounding)


def _distance(found: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite where one of the two is no number."""
    difference = (found - exact).abs().max()
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def _outcome(
    backend: backends.BackendName | None, student: Tensor, teacher: Tensor, tokens: Tensor, budget: float
) -> dict[str, Tensor]:
    """Statistics, gradient and account by a backend, or (None) by the formulas themselves."""
    student = student.clone().requires_grad_()
    statistics = reference.token_stats if backend is None else partial(cf.token_stats, backend=backend)
    stats = statistics(student, teacher, tokens)
    (gradient,) = torch.autograd.grad(stats.reverse_kl.sum() + stats.logprob.sum(), student)
    cost = stats.reverse_kl.detach()[None]
    account = reference.budget_trace if backend is None else partial(cf.budget_trace, backend=backend)
    trace = account(cost, budget)
    named = {name: getattr(stats, name) for name in stats._fields}
    return {**named, "gradient": gradient, "cumulative cost": trace.cumulative, "excess": trace.excess}
