"""verl's correction for a rollout engine that samples from another distribution than the actor's, with a budget."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "verl", reason="verl 0.9 requires transformers<5.11, older than the one tested here; .ci/run installs it beside"
)

from verl.trainer.ppo.v1 import trainer_base
from verl_batch import Batch, composed, engine_outputs, loss_function, nested
from verl_store import meta, trainer_and_store

import cmdp_fast.integrations.verl as integration
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.verl.losses import SEQUENCE_WEIGHTS

IS = "algorithm.rollout_correction.rollout_is={}"
ALL = (0, 1, 2, 3)


def gap(batch: Batch) -> list[torch.Tensor]:
    """By how much the engine's log-probabilities are below the actor's."""
    generator = torch.Generator().manual_seed(9)
    return [0.3 * torch.randn(len(x), generator=generator) for x in batch.shift]


def corrected(monkeypatch, batch: Batch, level: str, *more: str):
    """The trainer's queue after it has made the advantages of a batch with a correction."""
    trainer, store, _ = trainer_and_store(monkeypatch, batch, IS.format(level), *more)
    old = store.fields["old_log_probs"].unbind()
    store.fields["rollout_log_probs"] = nested([x - d for x, d in zip(old, gap(batch), strict=True)])
    trainer._compute_advantage(meta(), {})
    return store


def loss_with(batch: Batch, weights: list[torch.Tensor] | None, rows=ALL, budget: float = 0.0, **sent):
    """verl's loss and its gradient by the logits, of some rows."""
    config = composed(f"algorithm.cmdp.budget={budget}", "algorithm.cmdp.discrepancy_weight=0.5")
    data = batch.data(list(rows), **sent)
    if weights is not None:
        data["rollout_is_weights"] = nested([weights[i] for i in rows])
    logits = [x.clone().requires_grad_() for x in batch.student]
    loss = loss_function(config)
    value, _ = loss(model_output=engine_outputs(batch, data, loss, [logits[i] for i in rows]), data=data)
    value.backward()
    return value.detach(), torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for x in logits])


@pytest.mark.parametrize("truncated_at", ["100.0", "1.05"])
def test_the_weight_of_a_completion_weighs_both_terms(monkeypatch, truncated_at: str) -> None:
    batch = Batch()
    threshold = f"algorithm.rollout_correction.rollout_is_threshold={truncated_at}"
    store = corrected(monkeypatch, batch, "sequence", threshold)
    weights = list(store.written["rollout_is_weights"].unbind())
    expected = torch.stack([d.sum() for d in gap(batch)]).exp().clamp(max=float(truncated_at))
    assert torch.allclose(torch.stack([w[0] for w in weights]), expected, atol=1e-5)
    assert (expected != 1).all() and ((expected == 1.05).any() is not (truncated_at == "100.0"))
    value, gradient = loss_with(batch, weights, **{SEQUENCE_WEIGHTS: True})
    alone = [loss_with(batch, None, (i,)) for i in ALL]
    assert torch.allclose(value, sum(w * v for w, (v, _) in zip(expected, alone, strict=True)), atol=1e-5)
    assert torch.allclose(gradient, sum(w * g for w, (_, g) in zip(expected, alone, strict=True)), atol=1e-6)


def test_the_weight_of_a_token_is_the_score_terms(monkeypatch) -> None:
    batch = Batch()
    store = corrected(monkeypatch, batch, "token")
    weights = list(store.written["rollout_is_weights"].unbind())
    assert torch.allclose(torch.cat(weights), torch.cat(gap(batch)).exp().clamp(max=2.0), atol=1e-5)
    both = loss_with(batch, weights)
    score = loss_with(batch, weights, budget=1e6)
    unweighted, within = loss_with(batch, None), loss_with(batch, None, budget=1e6)
    direct = [both - one for both, one in zip(unweighted, within, strict=True)]
    assert direct[0] > 0.1 and score[0] != within[0]
    for total, part, rest in zip(both, score, direct, strict=True):
        assert torch.allclose(total, part + rest, atol=1e-5)


@pytest.mark.parametrize(("level", "sent"), [("sequence", True), ("token", False), ("null", False)])
def test_the_workers_are_told_whose_weights_these_are(monkeypatch, level: str, sent: bool) -> None:
    monkeypatch.setattr(trainer_base.PPOTrainer, "_update_actor", lambda self, batch, metrics: batch)
    trainer = integration.ConstrainedTrainer(composed(IS.format(level)))
    assert trainer._update_actor(meta(), {}).extra_info[SEQUENCE_WEIGHTS] is sent


def test_a_rejected_completion_is_compared_with_none_and_trains_nothing(monkeypatch) -> None:
    batch = Batch()
    largest = torch.stack([(d**2 / 2).max() for d in gap(batch)])
    rejected, partner = int(largest.argmax()), (int(largest.argmax()) + 2) % 4  # of two prompts in turn
    limit = largest.sort().values[-2:].mean()
    rejecting = "algorithm.rollout_correction.rollout_rs"
    store = corrected(monkeypatch, batch, "null", f"{rejecting}=seq_max_k2", f"{rejecting}_threshold={limit}")
    kept = [bool(m.any()) for m in store.written["response_mask"].unbind()]
    assert kept == [i != rejected for i in ALL]
    advantages = store.written["advantages"].unbind()
    assert not advantages[rejected].any()
    uid = ["a", "b", "c", "d"]  # the partner as if it had none
    _, alone, _ = trainer_and_store(monkeypatch, batch)
    alone.fields["uid"] = uid
    integration.ConstrainedTrainer(composed("algorithm.cmdp.budget=4.0"))._compute_advantage(meta(), {})
    assert torch.equal(advantages[partner], alone.written["advantages"].unbind()[partner])


REJECTING = "algorithm.rollout_correction.rollout_rs={}"
LIMITED = "algorithm.rollout_correction.rollout_rs_threshold=3.0"


@pytest.mark.parametrize("options", ["token_k3", "seq_sum_k3, token_k3"])
def test_what_takes_tokens_out_of_an_account_is_refused(options: str) -> None:
    with pytest.raises(InputError, match=r"takes tokens out of a completion, .* expected options seq_"):
        integration.ConstrainedTrainer(composed(REJECTING.format(options), LIMITED))
    integration.ConstrainedTrainer(composed(REJECTING.format("seq_sum_k3"), LIMITED))


@pytest.mark.parametrize("correction", [IS.format("token"), REJECTING.format("seq_sum_k3")])
def test_a_correction_without_log_probabilities_is_refused(correction: str) -> None:
    silent = "actor_rollout_ref.rollout.calculate_log_probs=false"
    with pytest.raises(InputError, match=r"corrects nothing, expected .*calculate_log_probs=True"):
        integration.ConstrainedTrainer(composed(correction, LIMITED, silent))
    integration.ConstrainedTrainer(composed(silent))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("rollout_is=sequences",), "Invalid rollout_is: sequences"),
        (("rollout_is=sequence", "rollout_is_threshold=2.0_1.0"), "lower bound must be <= upper bound"),
        (("rollout_is=sequence", "rollout_is_threshold=null"), "makes no weights without a rollout_is_threshold"),
        (("rollout_rs=seq_sum_k3",), "rollout_rs_threshold must be explicitly provided"),
        (("rollout_rs=seq_sum_k4", "rollout_rs_threshold=3"), "Invalid rollout_rs option: seq_sum_k4"),
        (("rollout_rs=[seq_sum_k3]", "rollout_rs_threshold=3"), "rollout_rs must be a non-empty string"),
    ],
)
def test_what_verl_would_find_after_its_first_rollouts_is_refused_before(
    settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        integration.ConstrainedTrainer(composed(*(f"algorithm.rollout_correction.{x}" for x in settings)))
