"""cmdp_fast: fused operations for distillation as a constrained Markov decision process.

    import cmdp_fast as cf
    out = cf.constrained_reward(student_logits, teacher_logits, tokens, task_reward, budget=2.0, mask=mask)

The mathematics stands in `cmdp_fast.reference`, what PPO does with it in `cmdp_fast.objective`.
"""

from cmdp_fast.heads import Head, head_of, last_hidden_state
from cmdp_fast.ops.backends import available_backends
from cmdp_fast.ops.budget import budget_trace, modified_reward
from cmdp_fast.ops.constrained import constrained_reward, token_cost
from cmdp_fast.ops.divergence import divergence
from cmdp_fast.ops.linear import linear_token_stats
from cmdp_fast.ops.token_state import TokenState
from cmdp_fast.ops.token_stats import dropped_teacher_mass, token_stats
from cmdp_fast.reference import BudgetTrace, ConstrainedReward, TokenStats

__version__ = "0.1.0"

__all__ = [
    "BudgetTrace",
    "ConstrainedReward",
    "Head",
    "TokenState",
    "TokenStats",
    "available_backends",
    "budget_trace",
    "constrained_reward",
    "divergence",
    "dropped_teacher_mass",
    "head_of",
    "last_hidden_state",
    "linear_token_stats",
    "modified_reward",
    "token_cost",
    "token_stats",
]
