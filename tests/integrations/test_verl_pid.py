"""`kind: pid` in verl: what sets lambda, what it weighs, and that a checkpoint carries it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip(
    "verl", reason="verl 0.9 requires transformers<5.11, older than the one tested here; .ci/run installs it beside"
)

from verl.trainer.ppo.v1 import trainer_base
from verl_batch import RESPONSES, Batch, composed, loss_of, padded
from verl_store import UID, meta, trainer_and_store

import cmdp_fast.integrations.verl as integration
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.verl import multiplier
from cmdp_fast.objective import PIDController

GAINS = (0.1, 0.02, 0.05)
PID = ("algorithm.cmdp.kind=pid", "algorithm.cmdp.coefficient=0.3", f"algorithm.cmdp.pid_gains={list(GAINS)}")
MASK = padded([torch.ones(r, dtype=torch.bool) for r in RESPONSES])


def by_hand() -> PIDController:
    kp, ki, kd = GAINS
    return PIDController(kp=kp, ki=ki, kd=kd, initial_integral=0.3)


def fixed(coefficient: float):
    """The configuration that has this lambda at every step."""
    kind = ("algorithm.cmdp.kind=lagrangian", f"algorithm.cmdp.coefficient={coefficient!r}")
    return composed("algorithm.cmdp.budget=4.0", *kind)


def advantages(trainer, store) -> tuple[torch.Tensor, dict[str, float]]:
    trainer._compute_advantage(meta(), metrics := {})
    return store.written["advantages"].to_padded_tensor(0.0), metrics


def test_lambda_follows_from_the_completions_that_it_is_used_for(monkeypatch) -> None:
    trainer, store, rewards = trainer_and_store(monkeypatch, Batch(), *PID)
    controller = by_hand()
    for _ in range(2):
        got, metrics = advantages(trainer, store)
        expected = controller.update(metrics["cmdp/mean_cumulative"], 4.0)
        assert metrics["cmdp/lambda"] == expected != 0.3
        cost = padded(Batch().response(list(store.fields["cmdp_cost"].unbind())))
        right, _ = integration.compute_cmdp_advantage(
            rewards, MASK, np.array(UID, dtype=object), fixed(expected).algorithm, cost=cost
        )
        assert torch.allclose(got, right, atol=1e-6) and got.any()


def test_rows_that_fill_up_a_batch_set_no_lambda(monkeypatch) -> None:
    trainer, store, _ = trainer_and_store(monkeypatch, Batch(), *PID)
    store.fields["response_mask"] = store.fields["response_mask"] * 0
    _, metrics = advantages(trainer, store)
    assert "cmdp/lambda" not in metrics and trainer.controller.state_dict() == by_hand().state_dict()


def test_the_workers_get_the_lambda_of_the_step(monkeypatch) -> None:
    trainer, store, _ = trainer_and_store(monkeypatch, Batch(), *PID)
    _, metrics = advantages(trainer, store)
    monkeypatch.setattr(trainer_base.PPOTrainer, "_update_actor", lambda self, batch, metrics: batch)
    sent = trainer._update_actor(meta(), {}).extra_info
    batch = Batch()
    pid = composed("algorithm.cmdp.budget=4.0", *PID)
    loss, figures = loss_of(batch, pid, batch.student, **sent)
    expected, _ = loss_of(batch, fixed(metrics["cmdp/lambda"]), batch.student)
    assert torch.equal(loss, expected)
    assert figures["distillation/loss"].values[0] > 0
    with pytest.raises(InputError, match=r"no lambda of this step, expected trainer\.v1\.trainer_mode=cmdp"):
        loss_of(batch, pid, batch.student)


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_a_resumed_run_goes_on_with_the_same_lambda(monkeypatch, tmp_path: Path, mode: str) -> None:
    """Three steps of one run; two of them, a checkpoint and the third in another. verl's part of it is not made."""
    wrote = []
    monkeypatch.setattr(
        trainer_base.PPOTrainer, "_save_checkpoint", lambda self: wrote.append(list(tmp_path.rglob(multiplier.FILE)))
    )
    monkeypatch.setattr(trainer_base.PPOTrainer, "_load_checkpoint", lambda self: setattr(self, "global_steps", 2))
    kept = (*PID, f"trainer.default_local_dir={tmp_path}")
    whole, store, _ = trainer_and_store(monkeypatch, Batch(), *kept)
    for step in (1, 2):
        _, metrics = advantages(whole, store)
        whole.global_steps = step
        whole._save_checkpoint()
        assert wrote[-1] == [tmp_path / f"global_step_{n}" / "cmdp_pid.json" for n in range(1, step + 1)]
    _, third = advantages(whole, store)
    if mode == "resume_path":
        kept = (*PID, f"trainer.resume_from_path={tmp_path}/global_step_2")
    resumed, store, _ = trainer_and_store(monkeypatch, Batch(), *kept, f"trainer.resume_mode={mode}")
    resumed._load_checkpoint()
    assert resumed.controller.coefficient == metrics["cmdp/lambda"]
    _, again = advantages(resumed, store)
    assert again["cmdp/lambda"] == third["cmdp/lambda"] != metrics["cmdp/lambda"]


def test_a_new_run_has_nothing_to_load(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer_base.PPOTrainer, "_load_checkpoint", lambda self: setattr(self, "global_steps", 0))
    trainer, _, _ = trainer_and_store(monkeypatch, Batch(), *PID, f"trainer.default_local_dir={tmp_path}")
    trainer._load_checkpoint()
    assert trainer.controller.state_dict() == by_hand().state_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no cmdp_pid.json"), ("{", "is no state"), ("[]", "is no state"), ('{"integral": 1}', "is no state")],
)
def test_a_checkpoint_without_a_whole_state_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / multiplier.FILE).write_text(content)
    with pytest.raises(InputError, match=message):
        multiplier.load(by_hand(), tmp_path)


def test_the_state_is_written_exactly(tmp_path: Path) -> None:
    controller = by_hand()
    for cost in (1.1, 7.3):
        controller.update(cost, 2.0)
    multiplier.save(controller, tmp_path / "new")
    assert json.loads((tmp_path / "new" / multiplier.FILE).read_text()) == controller.state_dict()
    multiplier.load(other := by_hand(), tmp_path / "new")
    assert other == controller


def test_an_infinite_cost_is_named() -> None:
    trainer = integration.ConstrainedTrainer(composed(*PID))
    with pytest.raises(InputError, match="mean cost of the completions is inf nats"):
        multiplier.priced(trainer.constraint, trainer.controller, float("inf"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("algorithm.cmdp.kind=pid",), "needs coefficient="),
        ((*PID, "algorithm.cmdp.pid_gains=[0.1, 0.01]"), r"pid_gains=\[0.1, 0.01\], expected three numbers"),
        ((*PID, "algorithm.cmdp.pid_gains=[0.1, 0.01, .nan]"), "expected three numbers"),
        ((*PID, "algorithm.cmdp.pid_gains=[0.1, 0.01, true]"), "expected three numbers"),
        ((*PID, "algorithm.cmdp.pid_gains=0.1"), "pid_gains=0.1, expected three numbers"),
        (("algorithm.cmdp.pid_gains=[0.1, 0.01, 0.01]",), "with kind=cmdp, which has no controller"),
    ],
)
def test_settings_of_the_controller_are_checked_first(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        integration.ConstrainedTrainer(composed(*overrides))
