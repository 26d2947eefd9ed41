"""The arithmetic that `mixed_precision auto` stands for."""

from __future__ import annotations

import time

import pytest
import torch

from cmdp_fast.trainer import parse as parsing
from cmdp_fast.trainer.comparison import plan as planning
from cmdp_fast.trainer.comparison.plan import variant
from cmdp_fast.trainer.parse import parse
from cmdp_fast.trainer.settings import precision
from cmdp_fast.trainer.settings.config import TrainConfig


@pytest.fixture
def clock(monkeypatch):
    """A processor on which a product takes as many seconds as its dtype is given; on no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seconds, now = {}, [0.0]
    product = torch.Tensor.__matmul__

    def timed(left, right):
        now[0] += seconds[left.dtype]
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    precision.faster_precision.cache_clear()
    yield seconds
    precision.faster_precision.cache_clear()


@pytest.mark.parametrize(
    ("half", "expected"), [(0.5, "bf16"), (0.74, "bf16"), (0.76, "no"), (1.0, "no"), (500.0, "no")]
)
def test_a_cpu_takes_the_faster_one(half, expected, clock):
    clock.update({torch.float32: 1.0, torch.bfloat16: half})
    assert TrainConfig(mixed_precision="auto").precision == expected


def test_it_is_measured_once(clock):
    clock.update({torch.float32: 1.0, torch.bfloat16: 0.5})
    assert precision.faster_precision() == "bf16"
    clock[torch.bfloat16] = 2.0
    assert precision.faster_precision() == "bf16"


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "no")])
def test_a_gpu_takes_what_it_has(has, expected, clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert precision.faster_precision() == expected


@pytest.mark.parametrize("given", ["no", "bf16"])
def test_what_is_asked_for_is_not_measured(given, clock):
    assert TrainConfig(mixed_precision=given).precision == given


def test_a_run_keeps_what_it_began_with(clock, monkeypatch):
    """Whoever goes on with it does not measure again. One process meets no others."""
    monkeypatch.setattr(parsing, "meet", lambda: pytest.fail("there are no others"))
    clock.update({torch.float32: 1.0, torch.bfloat16: 0.5})
    words = ["--recipe=smollm2", "--student=a", "--teacher=b"]
    assert parse(words).mixed_precision == "bf16"
    assert variant("cmdp", "smollm2").config.mixed_precision == "bf16"
    precision.faster_precision.cache_clear()
    clock[torch.bfloat16] = 2.0
    assert parse(words).mixed_precision == "no"


def test_a_gpu_that_is_not_used_is_not_asked(clock, monkeypatch):
    clock.update({torch.float32: 1.0, torch.bfloat16: 2.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert precision.faster_precision() == "no"


def test_what_computes_beside_does_not_decide(clock, monkeypatch):
    """Turns alternate, on one thread, and the shortest counts: of ten of each, nine are ten times as long."""
    clock.update({torch.float32: 0.010, torch.bfloat16: 0.006})
    alone, turns, threads = dict(clock), [], []
    product = torch.Tensor.__matmul__

    def disturbed(left, right):
        turns.append(left.dtype)
        threads.append(torch.get_num_threads())
        clock[left.dtype] = alone[left.dtype] * (1 if turns.count(left.dtype) == 7 else 10)
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", disturbed)
    monkeypatch.setattr(precision, "ENOUGH", 100.0)
    chosen = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert precision.faster_precision() == "bf16"
    assert turns == [torch.float32, torch.bfloat16] * precision.ROUNDS[1]
    assert set(threads) == {1} and chosen == [2, 1, 2]


def test_it_takes_no_longer_where_bfloat16_is_emulated(clock):
    clock.update({torch.float32: 0.001, torch.bfloat16: 0.5})
    since = time.perf_counter()
    assert precision.faster_precision() == "no"
    assert time.perf_counter() - since == pytest.approx(3 * 0.501)


def test_a_comparison_that_goes_on_keeps_what_was_measured(clock, monkeypatch):
    clock.update({torch.float32: 1.0, torch.bfloat16: 2.0})
    finished = {"cmdp-seed0": {"config": {"mixed_precision": "bf16"}}}
    monkeypatch.setattr(planning, "finished_summary", lambda folder: finished.get(folder.name))
    config = planning.CompareConfig(
        recipe="smollm2", methods=("cmdp", "hinge", "grpo:mixed_precision=no"), seeds=(0, 1), output_dir="none"
    )
    assert [run.config.mixed_precision for run in planning.plan(config)] == ["bf16", "bf16", "no"] * 2
    finished.clear()
    assert {run.config.mixed_precision for run in planning.plan(config)} == {"no"}
    finished["grpo-mixed_precision=no-seed0"] = {"config": {"mixed_precision": "bf16"}}  # which nobody measured
    assert {run.config.mixed_precision for run in planning.plan(config)} == {"no"}


def test_processes_take_what_the_main_one_measures(clock, monkeypatch):
    clock.update({torch.float32: 1.0, torch.bfloat16: 2.0})
    monkeypatch.setattr(parsing, "launched", lambda: 2)
    monkeypatch.setattr(parsing, "meet", lambda: "met")
    monkeypatch.setattr(parsing, "of_main", lambda function, met: {"no": "bf16"}[function()])
    words = ["--recipe=smollm2", "--student=a", "--teacher=b"]
    assert parse(words).mixed_precision == "bf16"
    assert parse([*words, "--mixed-precision=no"]).mixed_precision == "no"
