"""The constraint in OpenRLHF 0.11: an advantage hook for its experience maker, and its reward functions.

    # ppo_with_budget.py: OpenRLHF's `python -m openrlhf.cli.train_ppo_ray`, with a budget
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from cmdp_fast import Constraint
    from cmdp_fast.integrations.openrlhf import advantage_hook

    RemoteExperienceMaker.compute_advantages_and_returns = advantage_hook(Constraint(budget=8.0, cost="k1"))

OpenRLHF has no registry of advantage estimators, so the hook takes the place of the one method that makes them. It has
to be set in the process that builds the trainer, which is a Ray actor: put the lines above into the module that defines
your trainer actor, or name a function with them as Ray's ``worker_process_setup_hook``. Reward functions need no hook:
`cmdp_fast.integrations.rewards.to_openrlhf` makes one for ``--reward.remote_url``.

OpenRLHF samples with vLLM, trains with DeepSpeed, and scores with a reference model, which is the teacher here. It
sends back the teacher's log-probability of each sampled token and nothing else. So the cost is ``k1``, the log-ratio of
the sampled token (its sum is log pi/q of the completion, its expectation the exact reverse KL), or, with a function for
``cost_of``, another that your experience carries. Such costs depend on the action: there is no direct term and the
advantage is the whole method.

Mind: release 0.11.2 loads the reference model from ``--actor.model_name_or_path``. For a teacher that is another
model, change that argument of ``ref_model.async_init_model_from_pretrained`` in your copy of ``cli/train_ppo_ray.py``.
``--algo.kl.estimator k1`` and a positive ``--algo.kl.init_coef`` make it score at all; the hook charges the budget, not
that coefficient. OpenRLHF clamps log-ratios to +-10 nats, so a token counts 10 at most.

Tested: on OpenRLHF's own `Experience` and length penalties on a CPU, without Ray, DeepSpeed, vLLM or a GPU, and on
stand-ins with the same fields where OpenRLHF is absent. Not tested: a training run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cmdp_fast import batches, credit
from cmdp_fast.constraint import Constraint
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.constraint import check_supported
from cmdp_fast.integrations.packages import require

INSTALL = "pip install 'openrlhf[vllm]>=0.11.2,<0.12'"


def sampled_log_ratio(experience: Any) -> Tensor:
    """``experience.kl``, which under OpenRLHF's estimator k1 is log pi(a)/q(a) of every token [B, A], in nats."""
    return experience.kl


def advantage_hook(
    constraint: Constraint, cost_of: Callable[[Any], Tensor] = sampled_log_ratio
) -> Callable[[Any, list[Any]], list[Any]]:
    """A method ``compute_advantages_and_returns(self, experiences)`` for OpenRLHF's ``RemoteExperienceMaker``.

    ``cost_of`` gives the token costs [B, A] of an experience, in nats. The hook applies OpenRLHF's length penalties and
    reward clip as its own method does, and leaves the algorithm's KL coefficient out: the budget is for that cost.
    Raises InputError for a constraint that OpenRLHF cannot hold (`check_supported`), PackageError without OpenRLHF 0.11
    and, when called, InputError for arguments under which ``experience.kl`` is not the log-ratio.
    """
    check_supported(constraint)
    require("openrlhf", at_least="0.11.2", below="0.12", install=INSTALL)

    @torch.no_grad()
    def compute_advantages_and_returns(self: Any, experiences: list[Any]) -> list[Any]:
        from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties

        args = self.strategy.args
        if cost_of is sampled_log_ratio and (args.algo.kl.use_loss or args.algo.kl.estimator != "k1"):
            raise InputError(
                f"--algo.kl.estimator {args.algo.kl.estimator} with use_loss={args.algo.kl.use_loss}: the cost is read "
                "from the log-ratios, expected --algo.kl.estimator k1 without --algo.kl.use_loss"
            )
        for experience in experiences:
            experience.rewards = experience.rewards.float()
        apply_length_penalties(experiences, args)
        return constrain(
            experiences,
            constraint,
            samples_per_prompt=args.rollout.n_samples_per_prompt,
            cost_of=cost_of,
            clip_range=args.reward.clip_range,
        )

    return compute_advantages_and_returns


def constrain(
    experiences: list[Any],
    constraint: Constraint,
    *,
    samples_per_prompt: int,
    cost_of: Callable[[Any], Tensor] = sampled_log_ratio,
    clip_range: Sequence[float] | None = None,
) -> list[Any]:
    """Puts advantages and returns of the modified reward into experiences, and the spent budget into their ``info``.

    An experience holds B completions: ``index`` (places in the rollout batch, where the completions of a prompt are
    neighbours), ``rewards`` [B], ``action_mask`` [B, A] and the fields that ``cost_of`` reads. Sets ``advantages`` and
    ``returns`` [B, A], ``info["return"]``, ``info["cmdp/cumulative"]`` (nats), ``info["cmdp/feasible"]`` (C_T <= d) and
    ``info["cmdp/never_violated"]`` (C_t <= d at every token) [B], and clears ``kl`` as OpenRLHF does. The baseline is
    that of `credit.less_others`: the sums of other completions of the prompt from the same position on, without a
    division by a deviation. A completion without an action keeps its place and gets zeros. Raises InputError for a
    ``constraint`` whose cost has a gradient: an experience carries none, so the direct term would be lost.
    """
    check_supported(constraint)
    if not constraint.action_dependent:
        raise InputError(
            f"cost={constraint.cost!r} has a direct term, which OpenRLHF's loss has no place for; use 'k1'"
        )
    mask, cost = batches.joined([(e.action_mask.bool(), cost_of(e).float()) for e in experiences])
    if constraint.cost_clamp is not None:
        cost = cost.clamp(-constraint.cost_clamp, constraint.cost_clamp)
    rewards = batches.joined([e.rewards for e in experiences]).float()
    if clip_range:
        rewards = rewards.clamp(*clip_range)
    groups = [place // samples_per_prompt for place in chain.from_iterable(e.index for e in experiences)]

    worth = credit.constrained_advantage(
        credit.at_last_token(rewards, mask), cost, constraint, groups=groups, mask=mask
    )
    spent = credit.of_last_token(worth.trace.cumulative, mask)
    feasible = (credit.of_last_token(worth.trace.remaining, mask) >= 0).float()
    violated = (worth.trace.violated & mask).any(1)
    start = 0
    for experience in experiences:
        those, columns = slice(start, start + len(experience.index)), experience.action_mask.shape[1]
        start = those.stop
        experience.advantages = worth.advantage[those, :columns]
        experience.returns = worth.returns[those, :columns]
        experience.info["return"] = worth.reward[those].sum(1)
        experience.info["cmdp/cumulative"] = spent[those]
        experience.info["cmdp/feasible"] = feasible[those]
        experience.info["cmdp/never_violated"] = (~violated[those]).float()
        experience.kl = None
    return experiences
