"""Distillation under a KL budget in verl 0.9, for models that take more than one machine.

Importing this module registers ``cmdp`` with verl: a trainer, an advantage estimator, a policy loss and a distillation
loss. verl imports it in every process it starts if `VERL_USE_EXTERNAL_MODULES=cmdp_fast.integrations.verl`. The file
`cmdp.yaml` beside this one is a configuration for verl's launcher, with the command in its header.

**Workers.** The student is trained by verl's actor workers: FSDP, or Megatron with costs of the sampled token
(a token's logits are not in one process there). Completions come from vLLM or SGLang on the same
GPUs. The teacher is a vLLM or SGLang server in a resource pool of its own (`distillation.n_gpus_per_node`); it scores
each completion as a prompt, while others are still being sampled. The controller makes the advantages. Nothing of the
teacher is ever on a student's GPU.

| step | where | result |
| --- | --- | --- |
| completions, task rewards | rollout and reward workers | verl's own |
| teacher scores | teacher pool | a log-probability of each sampled token, or of the teacher's k most likely tokens |
| token costs | actor workers, scoring pass | `ScoringWorker`: KL of the k tokens and a bucket, of the logits |
| budget, modified reward, advantages | controller | estimator `cmdp`: `objective.score_coefficient`, `position_rloo` |
| score term | actor workers | policy loss `cmdp`: `objective.ppo_loss` |
| direct term | actor workers | distillation loss `cmdp`: `objective.direct_coefficient` times that cost, made anew |

**Messages.** Exact divergences need the teacher's whole distribution at every token. Two ways to move
it are bearable: its hidden states, with the head once (Qwen2.5-Math-7B: 3,584 numbers per token, where the logits are
152,064), which `cf.linear_token_stats` turns into exact statistics on the student's GPU; or its k most likely tokens
and one bucket for all others. verl's servers send the second, k numbers and k ids per token, or the log-probability of
the sampled token alone. So here the costs are

- ``forward_kl``, KL(teacher‖student) of the k tokens and the bucket. It is a *lower bound* of the forward KL: a bucket
  hides every difference inside it (log-sum inequality), so a student that meets the budget may exceed it in truth.
  `cf.topk_stats` gives an upper bound as well: ``distillation/cmdp_certified`` and ``distillation/cmdp_refuted`` log
  of how many completions the two prove that they keep the budget, or that they do not; the others are unknown. What is
  lost falls with the teacher's mass outside its k tokens, 1 - ``distillation/teacher_mass``. verl's own
  `forward_kl_topk` leaves the bucket out, which is no divergence and bounds nothing. Nor are its masses used: in
  float32 1 less a mass is rounding where the student is sure, and with `use_chunked_topk` a mass has the dtype of the
  logits. `cf.topk_stats` sums the student's tail itself, from logits of any dtype, in one pass. So verl's
  `use_chunked_topk` and `chunked_topk_chunk_size` have no effect here. For training it keeps one copy of the logits in
  their dtype, the size of the log-softmax that verl keeps without `use_chunked_topk`.
- ``k1`` (its sum is log student/teacher of the completion, its expectation the exact reverse KL), ``k3`` and ``nll``,
  from the sampled token. They depend on the action, so there is no direct term; set `loss_mode: cmdp_sampled`.

``reverse_kl`` and ``jsd`` are refused: over the *teacher's* k tokens they would say nothing of where the student went.

**Lambda.** For ``kind: pid`` the controller of `algorithm.cmdp.pid_gains`, whose integral starts from ``coefficient``,
sets lambda by the mean cost of a step's completions before they are priced, as `cmdp_fast.trainer` does; the workers
get it with the batch. `cmdp_pid.json` in verl's checkpoints, beside `data.pt`, has the controller's state.

**Rollout correction.** verl's importance weights of the rollout (`algorithm.rollout_correction.rollout_is`) weigh the
score term. Those of whole completions (``sequence``) weigh the direct term too; a token's weight corrects the choice of
that token, on which its divergence does not depend. ``rollout_rs`` may reject completions (``seq_*``) and is refused
where it rejects tokens: what they cost would be missing from the account. Lambda and the metrics ``cmdp/`` are of all
completions that were sampled, unweighted; those of the workers leave rejected ones out. ``bypass_mode`` is refused.

**Whose costs.** The advantages charge the policy before the update, as PPO's rewards do. The direct term charges the
policy that is being updated, at the states that were sampled, including which completions are over budget.

**Run**, on a CPU: verl 0.9.1's launcher with `cmdp.yaml`, Ray 2.60 and random models, for ``forward_kl`` with ``cmdp``
and with ``pid``, with a checkpoint and a run that goes on from it (`tests/integrations/test_verl_training.py`), and for
``k1`` with a validation.
`tests/support` puts in what verl has for GPUs alone: a platform and its process group, since verl has none for a CPU;
and behind verl's interface of vLLM a model of transformers, which samples, scores for the teacher and takes the weights
through Ray. It hides TRL, whose 1.x stops verl. The README's section has the command and the lines of verl where a CPU
ends.

**Tested**, with verl's own data structures and configuration classes and without Ray: the estimator through verl's
`compute_advantage`, the losses through verl's `distillation_ppo_loss` on the outputs of its FSDP engine's
`prepare_model_outputs`, their values and gradients against `cmdp_fast.reference`, micro-batches against the whole, the
trainer's own steps with a dict in TransferQueue's place, and that each key of `cmdp.yaml` is one of verl's.

**Not tested**: a GPU, SGLang, several nodes; Megatron; multi-turn agents; the asynchronous trainers, which have no
``cmdp``.

verl 0.9 wants transformers < 5.11; this package's other parts are tested with a newer one and accept both. So install
it into an environment of its own: ``pip install '.[verl]'`` in the checkout.
"""

from cmdp_fast import installation
from cmdp_fast.integrations.packages import require

require("verl", at_least="0.9.1", below="0.10", install=installation.extra("verl"))

from .advantage import compute_cmdp_advantage  # noqa: E402
from .config import PolicyLoss, check_config  # noqa: E402
from .losses import compute_cmdp_direct_term, compute_cmdp_sampled, compute_policy_loss_cmdp  # noqa: E402
from .trainer import ConstrainedTrainer, ConstrainedWorker, ScoringWorker  # noqa: E402

__all__ = [
    "ConstrainedTrainer",
    "ConstrainedWorker",
    "PolicyLoss",
    "ScoringWorker",
    "check_config",
    "compute_cmdp_advantage",
    "compute_cmdp_direct_term",
    "compute_cmdp_sampled",
    "compute_policy_loss_cmdp",
]
