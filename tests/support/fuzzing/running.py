"""Which cases there are, and how one is run and told about."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cmdp_fast.cpu import native
from cmdp_fast.ops.backends import OF_CUDA, ON_GPU
from fuzzing import laws, of_budgets, of_heads, of_logits, of_methods, of_objective, of_topk, spoilt
from fuzzing.case import Case
from fuzzing.draws import Draw

OBJECTIVE = "objective"  # in a backend's place: its functions are PyTorch alone
SPOILT = 0.2  # of all cases
Maker = Callable[[Draw], Case]
OPERATIONS: dict[Maker, float] = {
    of_logits.token_stats: 6,
    of_logits.divergence: 4,
    of_logits.token_state: 2,
    of_logits.dropped_teacher_mass: 0.5,
    of_topk.topk_stats: 4,
    of_budgets.budget_trace: 3,
    of_budgets.modified_reward: 3,
    of_budgets.budget_verdict: 1,
    of_budgets.discounted_budget: 0.4,
    of_methods.token_cost: 0.6,
    of_methods.constrained_reward: 4,
    of_heads.linear_token_stats: 2.5,
    of_heads.linear_divergence: 1.5,
    of_heads.linear_topk_stats: 1.5,
    of_heads.linear_constrained_reward: 1.5,
}


def case_of(seed: int, backend: str = "") -> Case:
    """The case that a seed stands for: on every backend the same, and another of the objective."""
    draw = Draw(seed)
    if backend == OBJECTIVE:
        case = of_objective.objective_case(draw)
    else:
        case = draw.choice("operation", tuple(OPERATIONS), tuple(OPERATIONS.values()))(draw)
    case.draw = draw
    return case


def refusal(case: Case, backend: str) -> str | None:
    """What the error says by which a backend refuses a case, or None."""
    if backend == "cuda" and case.needs and case.needs not in OF_CUDA:
        return "has no kernel for"
    if case.needs and case.float64_logits and backend in ON_GPU:
        return "got float64"
    return None


def refused_otherwise(case: Case, backend: str, said: str) -> list[str]:
    try:
        case.call({name: placed.view() for name, placed in case.given.items()}, backend)
    except ValueError as error:
        return [] if said in str(error) else [f"expected an error with {said!r}, got {error}"]
    return [f"expected an error with {said!r}"]


@contextmanager
def variant(name: str | None) -> Iterator[None]:
    """The native kernels of one instruction set."""
    if name is None:
        yield
        return
    before = native.variant()
    native.set_variant(name)
    try:
        yield
    finally:
        native.set_variant(before)


def variants() -> list[str]:
    return [name for name, runs in native.variants() if runs]


def run(seed: int, backend: str) -> list[str]:
    """What is wrong with the case of a seed on a backend, on every instruction set."""
    case = case_of(seed, backend)
    refused = refusal(case, backend)
    draw = Draw(seed ^ 1)
    if refused is None and case.public is not None and draw.chance("spoilt", SPOILT):
        try:
            spoilt.hold(case, draw, backend)
        except AssertionError as error:
            return [told(seed, case, backend, str(error))]
        except Exception:
            return [told(seed, case, backend, traceback.format_exc(limit=-3))]
        return []
    if refused is not None:
        return [told(seed, case, backend, problem) for problem in refused_otherwise(case, backend, refused)]
    try:
        truth = laws.Truth(case)
    except Exception:
        return [told(seed, case, backend, "the truth itself fails:\n" + traceback.format_exc(limit=-3))]
    problems: dict[str, list[str]] = {}
    for name in variants() if backend == "cpu" else [None]:
        try:
            with variant(name):
                laws.hold(case, backend, truth)
        except AssertionError as error:
            problems.setdefault(str(error), []).append(name or backend)
        except Exception:
            problems.setdefault(traceback.format_exc(limit=-4), []).append(name or backend)
    return [told(seed, case, backend, f"{', '.join(on)}: {problem}") for problem, on in problems.items()]


def told(seed: int, case: Case, backend: str, problem: str) -> str:
    return f"seed {seed}\n{case.describe()}\n{problem}\nagain: pytest tests/fuzz -k {backend} --fuzz-seed {seed}"
