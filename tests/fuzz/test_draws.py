"""The cases of a usual run have in them what the fuzzer is for; counted in what was made, not in what was meant."""

import functools
import inspect
from collections import Counter

import pytest
import torch
from fuzzing import running
from fuzzing.case import Case
from fuzzing.chunks import USUAL, Chunk, chunks_of
from fuzzing.draws import Draw, seed_of

import cmdp_fast as cf
import cmdp_fast.objective

VALUES = {"TokenStats", "BudgetTrace", "BudgetVerdict", "ConstrainedReward", "TopkStats", "Constraint", "Head"}
OF_MODELS = {"head_of", "last_hidden_state", "available_backends"}  # which take no tensors that could be drawn
OF_THE_OBJECTIVE = ("objective", "advantage", "sampler_correction")  # where what it offers is written
RARE = 3  # a choice that a usual run should have offered this often before it must have been made


@functools.cache
def cases(backend: str = "cpu") -> tuple[Case, ...]:
    return tuple(running.case_of(seed_of(number), backend) for number in range(USUAL[backend]))


def test_every_operation_is_drawn() -> None:
    drawn = Counter(case.operation for case in cases())
    assert set(drawn) == set(cf.__all__) - VALUES - OF_MODELS
    assert min(drawn.values()) >= RARE, drawn


def test_every_function_of_the_objective_is_drawn() -> None:
    drawn = Counter(case.operation for case in cases(running.OBJECTIVE))
    functions = {name: f for name, f in vars(cf.objective).items() if inspect.isfunction(f) and name[0] != "_"}
    public = {name for name, f in functions.items() if f.__module__.split(".")[-1] in OF_THE_OBJECTIVE}
    assert set(drawn) == public
    assert min(drawn.values()) >= RARE, drawn


@pytest.mark.parametrize("backend", ["cpu", running.OBJECTIVE])
def test_every_choice_is_made(backend: str) -> None:
    """Of each thing that is drawn, nearly every option; a long run makes them all."""
    offered, made = Counter[tuple](), Counter[tuple]()
    for case in cases(backend):
        assert case.draw is not None
        offered.update(case.draw.offered)
        made.update(case.draw.made)
    never = sorted(str(option) for option, count in offered.items() if count >= 40 and not made[option])
    assert not never, never


def logits(case: Case) -> list[torch.Tensor]:
    return [t.view() for name, t in case.given.items() if name in ("student_logits", "teacher_logits")]


TRAITS = {
    "NaN": lambda x: x.isnan().any(),
    "+inf": lambda x: x.isposinf().any(),
    "-inf": lambda x: x.isneginf().any(),
    "a row of -inf": lambda x: x.isneginf().all(-1).any(),
    "the lowest number": lambda x: (x == torch.finfo(x.dtype).min).any(),
    "the highest number": lambda x: (x == torch.finfo(x.dtype).max).any(),
    "a row of the lowest number": lambda x: (x == torch.finfo(x.dtype).min).all(-1).any(),
    "subnormal": lambda x: ((x != 0) & (x.abs() < 1e-38)).any(),
    "ties": lambda x: x.shape[-1] > 2 and (x[..., 1:] == x[..., :1]).any(),
    "no rows": lambda x: x.numel() == 0,
    "one column": lambda x: x.shape[-1] == 1,
    "many columns": lambda x: x.shape[-1] > 9000,
    "stride 0": lambda x: any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)),
    "rows that overlap": lambda x: x.dim() > 1 and x.shape[-2] > 1 and 0 < x.stride(-2) < x.shape[-1] * x.stride(-1),
    "columns apart": lambda x: x.shape[-1] > 1 and x.stride(-1) > 1,
    "an offset": lambda x: x.storage_offset() > 0,
    "beyond 32 bits": lambda x: any(s > 2**31 for s in x.stride()),
    "nine axes": lambda x: x.dim() == 10,
    **{str(dtype): lambda x, dtype=dtype: x.dtype == dtype for dtype in (torch.float32, torch.float64)},
    **{str(dtype): lambda x, dtype=dtype: x.dtype == dtype for dtype in (torch.bfloat16, torch.float16)},
}


@pytest.mark.parametrize("trait", TRAITS)
def test_logits_have_what_kernels_break_at(trait: str) -> None:
    assert any(bool(TRAITS[trait](x)) for case in cases() for x in logits(case) if x.numel() or trait == "no rows")


def test_gradients_masks_and_threads_vary() -> None:
    upstream = [g for case in cases() for g in case.upstream.values()]
    assert any(not g.any() for g in upstream) and any(g.dim() and not any(g.stride()) for g in upstream)
    assert any(not g.is_contiguous() for g in upstream)
    masks = [case.given[case.mask].view() for case in cases() if case.mask is not None]
    assert any(m.numel() and not m.any() for m in masks) and any(m.any() and not m.all() for m in masks)
    assert {case.threads[1] for case in cases()} == set(range(1, 9))
    assert any("cu_seqlens" in case.given for case in cases()) and any(case.overwrites for case in cases())


def test_a_seed_is_a_case() -> None:
    for number in range(20):
        one, again = (running.case_of(seed_of(number)) for _ in range(2))
        assert one.describe() == again.describe()
        for name, placed in one.given.items():
            assert torch.equal(placed.bits(), again.given[name].bits())
    assert len({seed_of(number) for number in range(10_000)}) == 10_000
    assert Draw(5).random.getrandbits(64) == Draw(5).random.getrandbits(64)


def test_a_short_run_is_the_beginning_of_a_long_one() -> None:
    def seeds(count: int) -> list[int]:
        return [seed for chunk in chunks_of("cpu", count, None) for seed in chunk.seeds()]

    assert seeds(1000)[:130] == seeds(130)
    assert chunks_of("cpu", None, 7) == [Chunk(0, 1, 7)] and chunks_of("cpu", None, 7)[0].seeds() == [7]
