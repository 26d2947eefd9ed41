"""A step: rollout, advantages, update and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from ..methods import METHODS
from .ranges import ABOVE_0_UP_TO_1, AT_LEAST_1, FROM_0_BELOW_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE

if TYPE_CHECKING:
    Algorithm = str  # a type checker reads no choices out of a table
else:
    Algorithm = Literal[tuple(METHODS)]


@dataclass(frozen=True)
class StepSettings:
    """A step: rollout, advantages, update and optimizer."""

    algorithm: Algorithm = "ppo"
    """ppo: the modified reward, by policy gradient and through the divergence; kl_loss: the task's reward, with k3 in
    the loss. The others distil without a reward: gkd by a divergence on the student's own text, minillm by the policy
    gradient of reverse KL, sft and kd on the teacher's text by likelihood and by forward KL."""
    steps: Annotated[int, POSITIVE] = 200
    """How many times to roll out and update."""
    prompts_per_step: Annotated[int, POSITIVE] = 16
    """Prompts rolled out per step, by each process."""
    num_generations: int = 8
    """Completions per prompt: the group whose members are compared with one another."""
    max_new_tokens: Annotated[int, POSITIVE] = 256
    """Longest completion in tokens; the end-of-sequence token counts. One without it is counted as clipped."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Temperature of the policy that is sampled, trained, measured and evaluated; the teacher has the same, if it has
    none of its own (`teacher_temperature`)."""
    teacher_temperature: Annotated[float, NOT_NEGATIVE] = 0.0
    """Temperature of the teacher, as it is compared with in costs and losses, sampled and evaluated. 0: the student's.
    At a `temperature` of 0.7 the cost is KL(student at 0.7 ‖ teacher at 0.7); with 1 here KL(student at 0.7 ‖ teacher
    at 1)."""
    top_k: Annotated[int, NOT_NEGATIVE] = 0
    """Sample from the so many most likely tokens. 0: from all. Anything but the whole softmax is sampled off-policy."""
    top_p: Annotated[float, ABOVE_0_UP_TO_1] = 1.0
    """Sample from the most likely tokens of this total probability. The same warning holds."""
    rollout: str = ""
    """What samples instead of `generate`: `vllm`, or a function of yours, as `module:function` or
    `path/file.py:function`; see user_rollout.py. Its log-probabilities say how far it is from the student, for which
    there is a correction."""
    sampler_correction: Literal["auto", "token", "sequence", "off"] = "auto"
    """The importance weights of completions that another sampler than the student has drawn, by the log-probabilities
    that it reports (cmdp_fast/sampler_correction.py). token: a weight of each token, in the policy gradient alone;
    sequence: one of each completion, in all of the gradient, exact and noisier with the length. Both weigh the
    estimates of the budget, `cmdp/…` and the cost that `pid` sees, by completions. auto: token where the sampler
    reports log-probabilities. off: what it draws is taken for the student's."""
    sampler_clip: Annotated[float, AT_LEAST_1] = 2.0
    """The largest of these weights: a larger one is truncated to it."""
    rollout_batch_size: Annotated[int, NOT_NEGATIVE] = 0
    """Prompts that are sampled at once, sorted by length. 0: all of a step."""
    baseline: Literal["rloo", "grpo", "position_rloo", "gae"] = "rloo"
    """The comparison that an action's advantage comes from: with the mean return of the group's other completions
    (`rloo`; `position_rloo` compares the returns-to-go at each position), or of the whole group and in units of its
    deviation (`grpo`, whose divisor the direct term shares), or with the prediction of a value head (`gae`)."""
    gae_lambda: Annotated[float, FROM_0_TO_1] = 1.0
    """Lambda of generalised advantage estimation: 1 trusts the returns, 0 the value head. A reward reaches a token that
    is n tokens before it times lambda to the n: with 0.95, and 1000 tokens, as 6e-23 of itself."""
    bootstrap_truncated: bool = False
    """Whether the value head says what was still to come where `max_new_tokens` cut a completion off. If not, nothing
    was, as in TRL, verl and OpenRLHF: rewards, costs, budgets and evaluations end there, and no return ever corrects
    what the head says of the rest. With it for a limit that there is in training alone."""
    value_learning_rate: Annotated[float, POSITIVE] = 1e-3
    """Learning rate of the value head, a linear layer on the student's hidden states (which it does not change)."""
    teacher_mix: Annotated[float, FROM_0_BELOW_1] = 0.2
    """Share of the teacher in the policy that minillm samples from."""
    gamma: Annotated[float, ABOVE_0_UP_TO_1] = 1.0
    """Discount of the modified reward."""
    epochs: Annotated[int, POSITIVE] = 2
    """PPO passes over the completions of a step."""
    minibatch_size: Annotated[int, POSITIVE] = 32
    """Completions per optimizer step, of each process; the most where it does not divide their number, which is then
    split as equally as can be."""
    micro_batch_size: Annotated[int, POSITIVE] = 32
    """Completions that go through a model at once, at most; gradients of a minibatch are accumulated over them."""
    micro_batch_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """Tokens that go through a model at once, at most: prompts and completions, with the padding between completions of
    like length (with `padding_free` there is none). A completion that is longer goes alone. 0: any number."""
    padding_free: bool = False
    """Whether the completions of a micro-batch are read one after another in a single row, without padding. It is
    meant for an `attn_implementation` of flash attention; others compute, and mask, each token of the row against all
    others. Models that mix such sequences (Bloom, Mamba, OPT, …) are refused. Sampling has padding in any case."""
    teacher_cache_mb: Annotated[int, NOT_NEGATIVE] = 512
    """The teacher's hidden states (or logits) are kept from scoring to update for as many completions as fit in this;
    those of the others are computed, or asked for, again."""
    teacher_cache_cpu: bool = False
    """Keep them in the host's memory, which is pinned for a GPU."""
    logits: Literal["tiled", "full"] = "tiled"
    """tiled: scoring and update go from hidden states to statistics a tile of the vocabulary at a time, and hold no
    logits; full: both models' logits are made in full, for a model whose head is not a plain linear layer."""
    clip_low: Annotated[float, POSITIVE] = 0.2
    """PPO's clip below 1."""
    clip_high: Annotated[float, POSITIVE] = 0.2
    """PPO's clip above 1."""
    learning_rate: Annotated[float, POSITIVE] = 1e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after `lr_warmup_steps`; linear and cosine would be 0 in the step after the last."""
    lr_warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps before that of the peak, over which the learning rate rises: with 5 of them from 1/6 to 5/6 of it."""
    optim: str = "adamw_torch"
    """The optimizer, by transformers' name: adamw_torch, adamw_torch_fused, adamw_8bit or paged_adamw_8bit (both of
    bitsandbytes), adafactor, … The betas of Adam's kin are 0.9 and 0.95."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """The optimizer's weight decay."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """The gradient is scaled down to this norm; a value head's by itself."""
