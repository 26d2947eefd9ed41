"""The figures that TRL's trainers log of a budget, where TRL masks completions."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import torch
from accelerate import Accelerator
from helpers import make_logits, make_tokens
from transformers import AutoTokenizer
from trl_pair import grpo, logged, trained

import cmdp_fast as cf
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.trl import CMDPGRPOConfig
from cmdp_fast.integrations.trl.metrics import constraint_metrics
from cmdp_fast.integrations.trl.sampler import Drawn


def figures(mask: torch.Tensor, drawn: Drawn | None = None) -> dict[str, float]:
    rows = len(mask)
    x, y = make_logits(4, 3, 9)[:rows], make_logits(4, 3, 9, seed=1)[:rows]
    stats = cf.token_stats(x, y, make_tokens(4, 3, vocab=9)[:rows], mask=mask)
    trace = cf.budget_trace(stats.reverse_kl, 1.0, mask=mask)
    reward = torch.arange(3.0 * rows).view(rows, 3) * mask + 100.0 * ~mask.any(1, keepdim=True)
    given = {"trace": trace, "budget": 1.0, "reward": reward, "drawn": drawn}
    return constraint_metrics(Accelerator(cpu=True), stats, stats.reverse_kl, mask, **given)


def test_a_masked_completion_dilutes_no_figure() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
    everything, alone = figures(mask), figures(mask[:2])
    assert everything == alone and "cmdp/never_violated" in alone
    unlikely = torch.tensor([[-50.0, -50.0, -50.0], [-50.0, -100.0, 0.0], [0.0] * 3, [0.0] * 3])  # of the student's
    weighed, alone = (figures(mask[:n], Drawn(unlikely[:n], "sequence", 2.0)) for n in (4, 2))
    assert weighed == alone and all(map(math.isfinite, alone.values()))
    assert figures(torch.zeros_like(mask)) == {}  # TRL would take the mean of a NaN with the other batches' figures


def test_a_step_whose_completions_were_all_truncated_logs_no_budget(pair, tmp_path) -> None:
    end = AutoTokenizer.from_pretrained(pair["student"]).eos_token_id
    settings = {
        "max_steps": 1,
        "mask_truncated_completions": True,
        "scale_rewards": "none",
        "generation_kwargs": {"suppress_tokens": [end]},
    }
    trainer = trained(grpo, pair, tmp_path, **settings)
    assert logged(trainer, "completions/clipped_ratio") == [1.0]
    assert not any(name.startswith("cmdp/") for entry in trainer.state.log_history for name in entry)
    assert logged(trainer, "loss") == [0.0]


def test_the_costs_of_sampled_tokens_may_be_clamped(pair, tmp_path) -> None:
    clamped = trained(grpo, pair, tmp_path, max_steps=1, cost="k3", cost_clamp=0.01)
    plain = trained(grpo, pair, tmp_path, max_steps=1, cost="k3")
    assert logged(clamped, "cmdp/max_token_cost") == [pytest.approx(0.01)]
    assert logged(plain, "cmdp/max_token_cost")[0] > 0.02
    assert logged(clamped, "cmdp/mean_cumulative")[0] <= 0.06 < logged(plain, "cmdp/mean_cumulative")[0]
    with pytest.raises(InputError, match=r"cost_clamp=5\.0 with cost='reverse_kl'"):
        CMDPGRPOConfig(str(tmp_path), budget=math.inf, cost_clamp=5.0, use_cpu=True, bf16=False)
