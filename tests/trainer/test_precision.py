"""The arithmetic that `mixed_precision auto` stands for."""

from __future__ import annotations

import time

import pytest
import torch

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


def test_a_run_keeps_what_it_began_with(clock, tmp_path):
    """Whoever goes on with it, or is another process of it, does not measure again."""
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
