"""TRL's GRPO with the controller of `pid`: what it is compared with, and a run that goes on."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

from transformers import set_seed
from trl_pair import grpo, logged, trained

from cmdp_fast.errors import InputError
from cmdp_fast.integrations.trl import CMDPGRPOConfig
from cmdp_fast.objective import PIDController

GAINS = (0.1, 0.02, 0.05)
PID = {"kind": "pid", "pid_gains": [*GAINS], "scale_rewards": "none"}


def controller(initial: float) -> PIDController:
    kp, ki, kd = GAINS
    return PIDController(kp=kp, ki=ki, kd=kd, initial_integral=initial)


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficient": 0.0, "budget": 0.5},  # there is a direct term from the moment that lambda is above 0
        {"coefficient": 1.0, "budget": 9.0},
        {"coefficient": 0.3, "budget": 0.1, "budget_per_token": True},
        {"budget": 0.5, "cost": "k1", "cost_clamp": 0.4},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_lambda_follows_from_the_completions_that_it_is_used_for(pair, tmp_path, changes):
    trainer = trained(grpo, pair, tmp_path, **PID, **changes)
    by_hand, lambdas = controller(changes.get("coefficient", 0.001)), logged(trainer, "cmdp/lambda")
    costs = logged(trainer, "cmdp/mean_cumulative")
    for step, cost in enumerate(costs):
        length = logged(trainer, "completions/mean_length")[step] if changes.get("budget_per_token") else 1.0
        assert lambdas[step] == pytest.approx(by_hand.update(cost, changes["budget"] * length), rel=1e-5, abs=1e-9)
        expected = logged(trainer, "reward")[step] - lambdas[step] * cost
        assert logged(trainer, "cmdp/modified_reward")[step] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({*lambdas}) == 3
    direct = logged(trainer, "loss/direct")
    assert len(direct) == (0 if changes.get("cost") == "k1" else 3)
    assert all(value > 0 for value in direct)


def test_an_evaluation_leaves_the_controller_alone(pair, tmp_path):
    trainer = grpo(pair, tmp_path, **PID, budget=0.5, trainer={"eval_dataset": [{"prompt": "1+2="}] * 4})
    before = trainer.controller.numbers
    trainer.evaluate()
    assert trainer.controller.numbers == before and trainer.constraint.coefficient == 0.001


@pytest.mark.parametrize("restored", [False, True])
def test_a_run_goes_on_as_if_it_had_not_stopped(pair, tmp_path, restored):
    """Whether transformers restores callbacks or not."""
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "budget": 0.5, "coefficient": 0.3, **PID}
    whole = trained(grpo, pair, tmp_path, **changes)
    stored = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert stored["ConstraintController"]["args"]["kd"] == 0.05
    set_seed(3)  # another state of the random numbers than the run had
    again = grpo(pair, tmp_path, restore_callback_states_from_checkpoint=restored, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name in ("cmdp/lambda", "cmdp/mean_cumulative", "loss", "loss/direct", "grad_norm"):
        assert logged(again, name)[2:] == logged(whole, name)[2:], name
    assert again.controller.numbers == whole.controller.numbers


def test_a_checkpoint_without_a_controller(pair, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "scale_rewards": "none"}
    trained(grpo, pair, tmp_path, **changes)
    with pytest.raises(InputError, match=r"^kind='pid': the checkpoint of step 1 holds no controller"):
        grpo(pair, tmp_path, **changes | PID).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_an_infinite_cost_is_named(pair, tmp_path):
    trainer = grpo(pair, tmp_path, **PID)
    with pytest.raises(InputError, match=r"^kind pid: the mean cost of the completions is inf nats"):
        trainer.controller.pid.update(math.inf, 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pid_gains": [1.0, 2.0]}, "pid_gains must be three numbers, got [1.0, 2.0]"),
        ({"pid_gains": [1.0, 2.0, "x"]}, "pid_gains must be a number"),
        ({"pid_gains": [1.0, 2.0, math.inf]}, "pid_gains must be finite numbers"),
        ({"budget": math.inf}, "it must be finite"),
        ({"coefficient": -1.0}, "coefficient must be finite and not negative"),
    ],
)
def test_controllers_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        CMDPGRPOConfig(str(tmp_path), **{"budget": 2.0, "use_cpu": True, "bf16": False, **PID, **changes})
    assert message in str(caught.value)
