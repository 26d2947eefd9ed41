r"""cmdp_fast: fused operations for distillation as a constrained Markov decision process.

    import cmdp_fast as cf
    out = cf.constrained_reward(student_logits, teacher_logits, tokens, task_reward, budget=2.0, mask=mask)

A token costs $c_t$, by default the exact reverse KL of student $\pi$ and teacher at that state, in nats. With $C_t$ the
cumulative cost, $d$ the budget, $v_t = 1$ from the first token with $C_t > d$ on, $e_t = 1$ at that token alone, $n$ a
penalty and $\beta$ a weight, the default modified reward is

$$ R_t = (1 - v_t) r_t - e_t n - \beta \Phi_t, \qquad \Phi_t = (C_t - d)^+ - (C_{t-1} - d)^+ $$

and the gradient of its expected sum has a score term and a direct term:

$$ \nabla J = \mathbb{E} \Big[ \sum_t \nabla \log \pi(a_t | s_t) A_t - \beta v_T \sum_t \nabla c_t \Big] $$

The operations of this page make statistics, account and reward. `cmdp_fast.objective` makes advantages, both
coefficients and the loss of them, and `cmdp_fast.reference` has the formulas of the statistics and of their gradients.
The view is that of arXiv 2509.22921; the excess $\Phi_t$ is this project's own definition.

Shapes are written with ``V`` for the vocabulary, ``H`` for a model's width, ``B`` for sequences of up to ``T`` tokens,
and ``N`` for packed tokens. The teacher never gets a gradient.
"""

from cmdp_fast import starting as starting  # before all that imports torch
from cmdp_fast.constraint import Constraint
from cmdp_fast.field_docs import documented
from cmdp_fast.heads import Head, head_of, last_hidden_state
from cmdp_fast.ops import operator
from cmdp_fast.ops.backends import available_backends
from cmdp_fast.ops.budget import budget_trace, discounted_budget, modified_reward
from cmdp_fast.ops.constrained import constrained_reward
from cmdp_fast.ops.cost import token_cost
from cmdp_fast.ops.divergence import divergence
from cmdp_fast.ops.linear import linear_token_stats
from cmdp_fast.ops.linear_constrained import linear_constrained_reward
from cmdp_fast.ops.linear_divergence import linear_divergence
from cmdp_fast.ops.linear_topk import linear_topk_stats
from cmdp_fast.ops.token_state import TokenState
from cmdp_fast.ops.token_stats import dropped_teacher_mass, token_stats
from cmdp_fast.ops.topk_stats import topk_stats
from cmdp_fast.ops.verdict import BudgetVerdict, budget_verdict
from cmdp_fast.reference import BudgetTrace, ConstrainedReward, TokenStats
from cmdp_fast.topk_bounds import TopkStats

operator.seal()
for _kind in (TokenStats, BudgetTrace, ConstrainedReward):  # of a module that imports nothing of ours
    documented(_kind)

__version__ = "0.2.0"  # of the wheel, too: pyproject.toml reads it here

__all__ = [
    "BudgetTrace",
    "BudgetVerdict",
    "ConstrainedReward",
    "Constraint",
    "Head",
    "TokenState",
    "TokenStats",
    "TopkStats",
    "available_backends",
    "budget_trace",
    "budget_verdict",
    "constrained_reward",
    "discounted_budget",
    "divergence",
    "dropped_teacher_mass",
    "head_of",
    "last_hidden_state",
    "linear_constrained_reward",
    "linear_divergence",
    "linear_token_stats",
    "linear_topk_stats",
    "modified_reward",
    "token_cost",
    "token_stats",
    "topk_stats",
]
