"""Scoring against a teacher that answers with its k most likely tokens: the cost is a lower bound of the divergence.

The lower bound is that of `cf.topk_stats`, a KL of its own: that from the teacher whose tail is shaped like the
student's. So it is differentiated and budgeted like the exact one, and a budget that it keeps may be exceeded by the
exact one; `certified` has the upper bound too, with which `cf.budget_verdict` says what is proven.

What a teacher has said of a token, k ids, k log-probabilities and the least of all, is one row of float64 numbers, so
that it is laid out, kept and cut like hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.constraint import Constraint
from cmdp_fast.errors import InputError
from cmdp_fast.heads import head_of, whole_head
from cmdp_fast.ops.budget import budget_trace, modified_reward
from cmdp_fast.ops.cost import token_cost
from cmdp_fast.ops.linear_topk import linear_topk_stats
from cmdp_fast.ops.topk_stats import topk_stats
from cmdp_fast.reading import TokenBatch, completion_hidden, completion_logits
from cmdp_fast.reference import ConstrainedReward, CostName, TokenStats
from cmdp_fast.teachers.teacher import Teacher, TeacherOutputs
from cmdp_fast.topk_bounds import TopkStats

Models = tuple[Any, Any]  # student (or the policy in its place) and teacher: modules, or a `Teacher` that is asked
Outputs = tuple[Tensor, Tensor]  # of both
COSTS = ("reverse_kl", "forward_kl")  # of which k columns give bounds


@dataclass
class FromTopK:
    """The policy's outputs are hidden states ``[B, T, H]``, or logits ``[B, T, V]`` with ``logits`` "full"; the
    teacher's rows ``[B, T, 2k + 1]``."""

    logits: str
    vocab_size: int  # columns that count
    temperature: float
    padding_free: bool = False

    def outputs(self, model: Any, completions: TokenBatch) -> Tensor:
        """Those of one model."""
        if isinstance(model, Teacher):
            return self.of_answer(model.of_completions(completions))
        read = completion_logits if self.logits == "full" else completion_hidden
        return read(model, completions, self.padding_free)

    def of_answer(self, answer: TeacherOutputs) -> Tensor:
        """Those that a teacher has answered with. Raises TypeError where that is something else."""
        if answer.topk is None:
            raise TypeError("this teacher answers with no log-probabilities; expected its most likely tokens")
        ids, logprobs, floor = answer.topk
        least = torch.full_like(logprobs[..., 0], -torch.inf) if floor is None else floor
        return torch.cat([ids.double(), logprobs.double(), least[..., None].double()], -1)

    def certified(
        self,
        models: Models,
        outputs: Outputs,
        tokens: Tensor,
        task_reward: Tensor,
        *,
        mask: Tensor,
        constraint: Constraint,
    ) -> tuple[ConstrainedReward, Tensor]:
        """`cf.constrained_reward` by the lower bound of the constraint's cost, and its upper bound [B, T] in nats."""
        stats = self._bounds(models, outputs, tokens, mask)
        lower, upper = getattr(stats, constraint.cost), getattr(stats, f"{constraint.cost}_upper")
        trace = budget_trace(lower, constraint=constraint, mask=mask)
        reward = modified_reward(task_reward.to(lower.dtype), lower, trace, constraint=constraint, mask=mask)
        return ConstrainedReward(_token_stats(stats), trace, reward), upper

    def constrained_reward(self, *given: Any, **settings: Any) -> ConstrainedReward:
        """`certified` without the upper bound."""
        return self.certified(*given, **settings)[0]

    def token_stats(
        self,
        models: Models,
        outputs: Outputs,
        tokens: Tensor,
        mask: Tensor,
        *,
        inplace: bool = True,
    ) -> TokenStats:
        """Statistics of tokens [B, T]: log-probability and entropy, which are exact, and the lower bounds of both KLs.
        NaN for the teacher's log-probability and entropy, which it has not said."""
        return _token_stats(self._bounds(models, outputs, tokens, mask))

    def divergence(self, models: Models, outputs: Outputs, mask: Tensor, beta: float) -> Tensor:
        """The lower bound of forward KL for ``beta`` 0, of reverse KL for 1, [B, T] in nats; no other is bounded."""
        kinds: dict[float, CostName] = {0.0: "forward_kl", 1.0: "reverse_kl"}
        if beta not in kinds:
            raise InputError(f"a teacher's most likely tokens bound forward and reverse KL, not JSD({beta:g})")
        return token_cost(
            self.token_stats(models, outputs, torch.zeros_like(mask, dtype=torch.long), mask), kinds[beta]
        )

    def _bounds(self, models: Models, outputs: Outputs, tokens: Tensor, mask: Tensor) -> TopkStats:
        policy, said = outputs
        k = said.shape[-1] // 2
        about: dict[str, Any] = {"mask": mask, "temperature": self.temperature, "vocab_size": self.vocab_size}
        # float32, as which they were computed: it says how exact they are
        about["min_logprob"] = said[..., -1].float()
        message = said[..., :k].long(), said[..., k : 2 * k].float(), tokens
        if self.logits == "full":
            return topk_stats(policy, *message, **about)
        head = whole_head(head_of(models[0]))
        head = head._replace(weight=head.weight.to(policy.dtype))
        with torch.autocast(policy.device.type, enabled=False):
            return linear_topk_stats(policy, head, *message, **about)


def _token_stats(stats: TopkStats) -> TokenStats:
    unknown = torch.full_like(stats.logprob, torch.nan).detach()
    return TokenStats(stats.logprob, unknown, stats.entropy, unknown, stats.reverse_kl, stats.forward_kl)
