"""The course of the learning rate."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from tiny_pair import learner_of, settings
from torch import nn

from cmdp_fast.trainer.optimization import make_optimizer, make_scheduler
from cmdp_fast.trainer.settings.config import TrainConfig

STEPS = 10


def rates(schedule: str, warmup: int) -> list[float]:
    """The learning rate that the optimizer has in each step, as a share of the peak."""
    config = TrainConfig(learning_rate=0.5, lr_schedule=schedule, lr_warmup_steps=warmup, steps=STEPS)
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": config.learning_rate}]
    optimizer = make_optimizer(config, groups)
    scheduler, used = make_scheduler(config, optimizer), []
    for _ in range(STEPS):
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        used.append(optimizer.param_groups[0]["lr"] / config.learning_rate)
        optimizer.step()
        scheduler.step()
    return used


AFTER = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}


@pytest.mark.parametrize("schedule", AFTER)
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.filterwarnings("error")
def test_the_rate_rises_to_its_peak_and_no_step_is_without_one(schedule, warmup):
    rising = [(step + 1) / (warmup + 1) for step in range(warmup)]
    falling = [AFTER[schedule](step / (STEPS - warmup)) for step in range(STEPS - warmup)]
    used = rates(schedule, warmup)
    assert used == pytest.approx(rising + falling, rel=1e-12)
    assert used[warmup] == 1.0 and min(used) > 0.0


@pytest.mark.parametrize("schedule", AFTER)
def test_a_run_shorter_than_its_warm_up_keeps_rising(schedule):
    assert all(0.0 < before < after < 1.0 for before, after in pairwise(rates(schedule, STEPS + 2)))


def test_the_metric_is_the_rate_that_the_step_had(pair):
    """Adam's first update has the size of the rate, and the default schedule has a warm-up too."""
    config = settings(pair, lr_warmup_steps=3, learning_rate=1e-2, epochs=1, minibatch_size=12)
    learner, rows, prompts = learner_of(config)
    before = [p.detach().clone() for p in learner.student.parameters()]
    metrics = learner.step(rows, prompts)
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(before, learner.student.parameters(), strict=True))
    assert metrics["learning_rate"] == pytest.approx(0.25e-2)
    assert moved == pytest.approx(metrics["learning_rate"], rel=1e-2)
    assert learner.step(rows, prompts)["learning_rate"] == pytest.approx(0.5e-2)
