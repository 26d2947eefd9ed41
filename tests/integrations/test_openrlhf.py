"""The advantage hook: on experiences of the documented shapes, and on OpenRLHF's own where it is installed."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmdp_fast import objective, reference
from cmdp_fast.constraint import Constraint
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.openrlhf import advantage_hook, constrain

REASON = "pip install --no-deps 'openrlhf>=0.11.2,<0.12' pylatexenc: its requirements need a GPU's compiler"
K1 = Constraint(budget=0.5, cost="k1", discrepancy_weight=2.0)


def experience(index: list[int], rewards: list[float], kl: list[list[float]], mask: list[list[int]]) -> Any:
    """Fields of OpenRLHF 0.11's `Experience` that its advantages are made from, by their documented shapes."""
    return SimpleNamespace(
        index=index,
        rewards=torch.tensor(rewards),
        kl=torch.tensor(kl),
        action_mask=torch.tensor(mask),
        advantages=None,
        returns=None,
        info={"reward": torch.tensor(rewards)},
    )


def test_worked_example_with_its_prompt_in_front() -> None:
    """method: returns to go -2 -2 -2 -.875 -.375 with a cost of the sampled token; the other one costs nothing."""
    one = experience([0], [1.0], [[9.0, 0.125, 0.0625, 0.375, 0.25, 0.1875]], [[0, 1, 1, 1, 1, 1]])
    other = experience([1], [0.0], [[9.0, 0.0, 0.0]], [[0, 1, 1]])
    constrain([one, other], K1, samples_per_prompt=2)
    returns = torch.tensor([[0.0, -2.0, -2.0, -2.0, -0.875, -0.375]])
    assert torch.equal(one.returns, returns) and torch.equal(one.advantages, returns)
    assert torch.equal(other.advantages, torch.tensor([[0.0, 2.0, 2.0]])) and not other.returns.any()
    assert [x.info["cmdp/cumulative"].item() for x in (one, other)] == [1.0, 0.0]
    assert [x.info["cmdp/feasible"].item() for x in (one, other)] == [0.0, 1.0]
    assert [x.info["return"].item() for x in (one, other)] == [-2.0, 0.0]
    assert one.kl is None and other.kl is None


def test_completions_of_a_prompt_may_lie_in_any_micro_batch() -> None:
    torch.manual_seed(0)
    order, rows = [2, 0, 3, 1], torch.rand(4, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    rewards = torch.randn(4)
    experiences = [
        experience([i], [rewards[i].item()], [rows[i, :width].tolist()], [mask[i, :width].tolist()])
        for i, width in zip(order, (3, 5, 4, 5), strict=True)
    ]
    constrain(experiences, Constraint(budget=1.0, cost="k1", kind="hinge"), samples_per_prompt=2)
    task = torch.zeros(4, 5).scatter(1, mask.sum(1, keepdim=True) - 1, rewards[:, None])
    trace = reference.budget_trace(rows, 1.0, mask=mask.bool())
    modified = reference.modified_reward(task, rows, trace, kind="hinge", mask=mask.bool())
    score = objective.returns_to_go(modified, mask=mask.bool())
    expected = objective.position_rloo(score, 2, mask.bool())
    for i, got in zip(order, experiences, strict=True):
        width = got.action_mask.shape[1]
        assert torch.allclose(got.advantages[0], expected[i, :width], atol=1e-6)
        assert torch.allclose(got.returns[0], score[i, :width], atol=1e-6)


def test_without_a_budget_it_is_leave_one_out() -> None:
    """What OpenRLHF's estimator `rloo` gives completions of one length: reward less the mean of the others'."""
    rewards = [1.0, 0.0, 0.25]
    batch = experience([0, 1, 2], rewards, [[0.1, 0.2]] * 3, [[1, 1]] * 3)
    constrain([batch], Constraint(budget=1e9, cost="k1"), samples_per_prompt=3)
    expected = torch.tensor([r - (sum(rewards) - r) / 2 for r in rewards])
    assert torch.allclose(batch.advantages, expected[:, None].expand(3, 2), atol=1e-6)


def test_rewards_are_clipped_and_a_completion_without_an_action_gets_nothing() -> None:
    batch = experience([0, 1], [50.0, 1.0], [[0.0, 0.0]] * 2, [[1, 1], [0, 0]])
    constrain([batch], Constraint(budget=1.0, cost="k1"), samples_per_prompt=2, clip_range=(-10, 10))
    assert batch.advantages.tolist() == [[10.0, 10.0], [0.0, 0.0]]


def test_a_cost_of_ones_own() -> None:
    batch = experience([0, 1], [0.0, 0.0], [[0.0], [0.0]], [[1], [1]])
    batch.teacher_nll = torch.tensor([[2.0], [1.0]])
    constraint = Constraint(budget=1.5, cost="nll", kind="hinge")
    constrain([batch], constraint, samples_per_prompt=2, cost_of=lambda e: e.teacher_nll)
    assert batch.info["cmdp/cumulative"].tolist() == [2.0, 1.0]
    assert batch.advantages.tolist() == [[-0.5], [0.5]]


def test_a_cost_may_be_clamped_and_a_violation_made_good() -> None:
    """Costs .75 and -.5: over the budget of .5, within it at the end; clamped to .25 it never was."""
    for clamp, violated, spent in ((None, True, 0.25), (0.25, False, 0.0)):
        batch = experience([0, 1], [1.0, 0.0], [[0.75, -0.5], [0.0, 0.0]], [[1, 1], [1, 1]])
        constrain([batch], Constraint(budget=0.5, cost="k1", cost_clamp=clamp), samples_per_prompt=2)
        assert batch.info["cmdp/never_violated"].tolist() == [float(not violated), 1.0]
        assert batch.info["cmdp/feasible"].tolist() == [1.0, 1.0]
        assert batch.info["cmdp/cumulative"].tolist() == [spent, 0.0]


def test_a_cost_with_a_gradient_is_refused() -> None:
    with pytest.raises(InputError, match="cost='reverse_kl' has a direct term"):
        constrain([], Constraint(budget=1.0, cost="reverse_kl"), samples_per_prompt=2)


# ----------------------------------------------------------------------------------------------------- with OpenRLHF


def arguments(**kl: Any) -> Any:
    """OpenRLHF's arguments that the hook and the length penalties read."""
    return SimpleNamespace(
        algo=SimpleNamespace(kl=SimpleNamespace(**{"use_loss": False, "estimator": "k1", **kl})),
        rollout=SimpleNamespace(n_samples_per_prompt=2, max_new_tokens=8),
        reward=SimpleNamespace(clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=0.0),
    )


def own_experience(index: int, reward: float, kl: list[float], truncated: bool) -> Any:
    from openrlhf.trainer.ppo_utils.experience import Experience

    size = len(kl)
    return Experience(
        index=[index],
        sequences=torch.arange(size + 1)[None],
        attention_mask=torch.ones(1, size + 1, dtype=torch.long),
        action_mask=torch.tensor([[0] + [1] * (size - 1)]),
        kl=torch.tensor([kl]),
        rewards=torch.tensor([reward]),
        response_length=torch.tensor([size - 1]),
        truncated=torch.tensor([truncated]),
        info={"reward": torch.tensor([reward])},
    )


def test_hook_on_openrlhfs_own_experience_and_penalties() -> None:
    pytest.importorskip("openrlhf", reason=REASON)
    from openrlhf.trainer.ppo_utils.experience import Experience

    one = own_experience(0, 1.0, [9.0, 0.125, 0.0625, 0.375, 0.25, 0.1875], truncated=False)
    other = own_experience(1, 1.0, [9.0, 0.0, 0.0], truncated=True)
    both = Experience.concat_experiences([one, other], pad_token_id=0)
    maker = SimpleNamespace(strategy=SimpleNamespace(args=arguments()))
    (result,) = advantage_hook(K1)(maker, [both])
    assert result.rewards.tolist() == [1.0, 0.0]  # OpenRLHF's own penalty on the truncated one
    assert torch.equal(result.advantages[0], torch.tensor([0.0, -2.0, -2.0, -2.0, -0.875, -0.375]))
    assert result.advantages.shape == both.action_mask.shape and result.info["cmdp/feasible"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kl", [{"estimator": "k3"}, {"use_loss": True}])
def test_hook_refuses_other_estimators(kl: dict[str, Any]) -> None:
    pytest.importorskip("openrlhf", reason=REASON)
    maker = SimpleNamespace(strategy=SimpleNamespace(args=arguments(**kl)))
    with pytest.raises(InputError, match=r"expected --algo\.kl\.estimator k1 without"):
        advantage_hook(K1)(maker, [])


def test_openrlhf_is_what_this_was_written_against() -> None:
    """By its source: importing the experience maker needs DeepSpeed."""
    pytest.importorskip("openrlhf", reason=REASON)
    spec = importlib.util.find_spec("openrlhf.trainer.ppo_utils.experience_maker")
    assert spec is not None and spec.origin is not None, "openrlhf.trainer.ppo_utils.experience_maker is gone"
    tree = ast.parse(Path(spec.origin).read_text())
    makers = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RemoteExperienceMaker"]
    assert makers, "there is no class RemoteExperienceMaker"
    methods = {node.name: node for node in makers[0].body if isinstance(node, ast.FunctionDef)}
    method = methods.get("compute_advantages_and_returns")
    assert method is not None, "RemoteExperienceMaker.compute_advantages_and_returns is gone"
    assert [argument.arg for argument in method.args.args] == ["self", "experiences"]
    text = ast.unparse(method)
    read = [
        "experience.index",
        "experience.kl",
        "experience.action_mask",
        "experience.rewards",
        "apply_length_penalties",
    ]
    read += ["args.rollout.n_samples_per_prompt", "args.reward.clip_range", "experience.info['return']"]
    gone = [name for name in read if name not in text]
    assert not gone, f"compute_advantages_and_returns no longer uses {gone}"
