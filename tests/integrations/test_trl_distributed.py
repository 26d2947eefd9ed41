"""TRL's trainers of ours in two processes against one with the doubled batch; a group is spread over both."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from trl_pair import digits, distillation, grpo, logged
from trl_vllm import stand_in
from two_processes import PROCESSES, in_two_processes

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo"
)

COMPARED = (
    *("loss", "grad_norm", "reward", "cmdp/cumulative_kl", "cmdp/cvar", "cmdp/max_token_cost"),
    *("cmdp/constraint_satisfaction", "cmdp/modified_reward", "cmdp/mean_cumulative"),
)
CASES = [
    (grpo, {"scale_rewards": "none"}),
    (grpo, {"scale_rewards": "batch", "num_iterations": 2, "loss_type": "dr_grpo"}),
    (grpo, {"scale_rewards": "none", "baseline": "position_rloo"}),
    (
        grpo,
        {
            **{"scale_rewards": "none", "kind": "pid", "coefficient": 0.3},
            **{"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_mode": "sequence_truncate"},
        },
    ),
    (distillation, {"beta": 0.5, "budget": 2.0, "trainer": {"reward_funcs": digits}}),
]


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def completions(trainer, count: int) -> list[list[int]]:
    """Made up, by their place in the batch of all processes: sampling would differ."""
    first = trainer.accelerator.process_index * count
    generators = [torch.Generator().manual_seed(10 * trainer._step + first + i) for i in range(count)]
    return [torch.randint(2, 17, (1 + int(g.initial_seed()) % 6,), generator=g).tolist() for g in generators]


def rollout(prompts, trainer):
    ids = completions(trainer, len(prompts))
    tokenizer = trainer.processing_class
    logprobs = [[-2.0 - (token + len(tokens)) % 3 / 2 for token in tokens] for tokens in ids]
    return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": ids, "logprobs": logprobs}


def take_steps(make, pair, folder, processes: int, changes) -> dict[str, list[float]]:
    changes = {**changes, "num_generations": 4, "per_device_train_batch_size": 4 // processes, "max_steps": 3}
    if make is grpo:
        changes["trainer"] = {"rollout_func": rollout}
    trainer = make(pair, folder, **changes)
    if make is distillation:
        trainer._generate_single_turn = lambda prompt_ids, *_: completions(trainer, len(prompt_ids))
    trainer.train()
    return {name: logged(trainer, name) for name in COMPARED}


def same_steps(cases, pair, folder) -> None:
    for (make, changes), expected in cases:
        AcceleratorState._reset_state()
        found = take_steps(make, pair, folder, PROCESSES, changes)
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, abs=1e-5, rel=1e-4), (make.__name__, changes, name)


def test_steps_of_two_processes_are_those_of_one(pair, tmp_path, monkeypatch):
    stand_in(monkeypatch, pair["student"])  # gets the weights; `rollout` samples
    expected = [take_steps(make, pair, tmp_path, 1, changes) for make, changes in CASES]
    assert all(len(values) > 1 for found in expected for values in found.values())
    in_two_processes(same_steps, list(zip(CASES, expected, strict=True)), pair, tmp_path)
