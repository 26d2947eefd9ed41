"""TRL's GRPO with vLLM, which is stood in for: its weights reach the direct term and the estimates for the student."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import torch
from trl_pair import grpo, logged, trained
from trl_vllm import stand_in

from cmdp_fast import objective
from cmdp_fast.errors import InputError

VLLM = {"use_vllm": True, "scale_rewards": "none", "budget": 1.0}
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.fixture
def sampler(pair, monkeypatch):
    return stand_in(monkeypatch, pair["student"])


@pytest.mark.parametrize("vllm_mode", ["server", "colocate"])
def test_both_modes_train_on_the_weights_of_the_step(pair, tmp_path, sampler, vllm_mode):
    trainer = trained(grpo, pair, tmp_path, vllm_mode=vllm_mode, **VLLM)
    names = {name for name, _ in trainer.model.named_parameters()}
    assert sampler.loaded == names and sampler.loads == 3 * len(names)
    for name in ("cmdp/mean_cumulative", "sampling/sampling_logp_difference/mean", "loss/direct"):
        figures = logged(trainer, name)
        assert len(figures) == 3 and all(map(math.isfinite, figures)), name


@pytest.mark.parametrize("changes", [{}, {"discrepancy_weight": 0.0}, {"vllm_importance_sampling_correction": False}])
def test_an_infinite_budget_is_grpo_with_vllm(pair, tmp_path, monkeypatch, changes):
    """Step by step, its importance sampling and its metrics of that."""
    both = {"use_vllm": True, "learning_rate": 1e-3, "vllm_importance_sampling_mode": "token_truncate"}
    theirs_alone = {k: v for k, v in changes.items() if k != "discrepancy_weight"}
    found = []
    for plain in (True, False):
        stand_in(monkeypatch, pair["student"])
        own = theirs_alone if plain else {"budget": math.inf, **changes}
        found.append(trained(grpo, pair, tmp_path, plain=plain, max_steps=6, **both, **own))
    theirs, ours = found
    names = [name for name in theirs.state.log_history[0] if name.startswith("sampling/sampling_logp")]
    for name in ("loss", "grad_norm", *names):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-5, rel=1e-5), name
    assert len(names) == (0 if theirs_alone else 2)


@pytest.mark.parametrize("mode", [*MODES, None])
def test_weights_reach_the_direct_term_and_the_estimates(pair, tmp_path, sampler, mode):
    changes = {"vllm_importance_sampling_mode": mode} if mode else {"vllm_importance_sampling_correction": False}
    trainer = grpo(
        pair, tmp_path, per_device_train_batch_size=8, vllm_importance_sampling_clip_max=1.5, **VLLM, **changes
    )
    trainer.model.train()
    seen = {}
    account = trainer.scoring.account
    trainer.scoring.account = lambda *a, **k: seen.setdefault("account", account(*a, **k))
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    stats, trace, *_ = seen["account"]
    mask = batch["completion_mask"].bool()
    expected = objective.direct_coefficient(trace, trainer.constraint, mask=mask)
    ratio = torch.where(mask, stats.logprob - batch["sampling_per_token_logps"], 0.0).sum(1).exp()
    assert (ratio > 1.5).any() and (ratio < 1.5).any()
    if mode == "sequence_truncate":
        expected = expected * ratio.clamp(max=1.5)[:, None]
    elif mode == "sequence_mask":
        expected = expected * torch.where(ratio > 1.5, 0.0, ratio)[:, None]
    torch.testing.assert_close(batch["direct"], expected, rtol=1e-4, atol=1e-6)
    cost = torch.where(mask, stats.reverse_kl, 0.0).sum(1)
    weight = ratio.clamp(max=1.5) if mode else torch.ones_like(ratio)
    metrics = trainer._metrics["train"]
    mean = (weight * cost).sum() / weight.sum()
    assert metrics["cmdp/mean_cumulative"] == pytest.approx([mean.item()], rel=1e-4)
    if mode:
        effective = weight.sum() ** 2 / (len(weight) * (weight**2).sum())
        assert metrics["sampling/effective_sample_ratio"] == pytest.approx([effective.item()], rel=1e-4)
        assert metrics["sampling/importance_sampling_ratio/clipped_ratio"][0] > 0.0
    else:
        assert not [name for name in metrics if name.startswith("sampling/")]


def test_a_token_whose_log_probability_vllm_does_not_know(pair, tmp_path, sampler):
    """Its None is a NaN in TRL's batch, and no weight of ours."""
    draw = sampler.draw
    sampler.draw = lambda *given: (lambda drawn: (drawn[0], [None, *drawn[1][1:]]))(draw(*given))
    trainer = trained(
        grpo, pair, tmp_path, vllm_mode="server", **VLLM, vllm_importance_sampling_mode="sequence_truncate"
    )
    for name in ("loss", "cmdp/mean_cumulative", "sampling/effective_sample_ratio"):
        assert all(map(math.isfinite, logged(trainer, name))), name


def test_a_mode_that_there_is_not(pair, tmp_path):
    with pytest.raises(InputError, match=r"^vllm_importance_sampling_mode must be one of .*, got 'word'"):
        grpo(pair, tmp_path, vllm_importance_sampling_mode="word", **VLLM)


def test_a_bound_that_truncates_what_needs_no_correction(pair, tmp_path):
    with pytest.raises(InputError, match=r"^vllm_importance_sampling_clip_max must be None or at least 1.*got 0\.5"):
        grpo(pair, tmp_path, vllm_importance_sampling_clip_max=0.5, **VLLM)


def test_pid_sees_the_cost_of_the_student(pair, tmp_path, sampler):
    trainer = trained(
        grpo, pair, tmp_path, kind="pid", coefficient=0.3, vllm_importance_sampling_mode="token_truncate", **VLLM
    )
    controller = objective.PIDController(kp=0.1, ki=0.01, kd=0.01, initial_integral=0.3)
    expected = [controller.update(cost, 1.0) for cost in logged(trainer, "cmdp/mean_cumulative")]
    assert logged(trainer, "cmdp/lambda") == pytest.approx(expected, rel=1e-5)
