"""Token statistics and budgets for distillation, beyond the decoder: what comes after the logits.

- `token_stats`: log-probabilities, entropies and both KL divergences of every token, from two rows of logits.
- `linear_token_stats`: the same from hidden states and two language-model heads, without either model's logits.
- `constrained_reward`: the statistics, the account of a KL budget and the modified reward, in one call.

All three are differentiable with respect to the student and work under ``torch.compile(fullgraph=True)``. Shapes,
units (nats), errors and special values stand in their docstrings. Docstrings name other files of this folder as
modules of `cmdp_fast`, the package that they come from.
"""

from cmdp_fast.constraint import Constraint
from cmdp_fast.heads import Head, head_of
from cmdp_fast.ops import operator
from cmdp_fast.ops.backends import available_backends
from cmdp_fast.ops.constrained import constrained_reward
from cmdp_fast.ops.linear import linear_token_stats
from cmdp_fast.ops.token_stats import token_stats
from cmdp_fast.reference import BudgetTrace, ConstrainedReward, TokenStats

operator.seal()

__all__ = [
    "BudgetTrace",
    "ConstrainedReward",
    "Constraint",
    "Head",
    "TokenStats",
    "available_backends",
    "constrained_reward",
    "head_of",
    "linear_token_stats",
    "token_stats",
]
