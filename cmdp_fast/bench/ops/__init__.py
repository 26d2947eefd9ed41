"""The operations that are measured, by name."""

from cmdp_fast.bench.case import Op
from cmdp_fast.bench.ops.budget_trace import BudgetTraceOp
from cmdp_fast.bench.ops.constrained_reward import ConstrainedRewardOp
from cmdp_fast.bench.ops.divergence import DivergenceOp
from cmdp_fast.bench.ops.linear_divergence import LinearDivergenceOp
from cmdp_fast.bench.ops.linear_token_stats import LinearTokenStatsOp
from cmdp_fast.bench.ops.token_stats import TokenStatsOp
from cmdp_fast.bench.ops.topk_stats import TopkStatsOp
from cmdp_fast.bench.ops.trainer_step import TrainerStepOp

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        TokenStatsOp(),
        DivergenceOp(),
        BudgetTraceOp(),
        ConstrainedRewardOp(),
        LinearTokenStatsOp(),
        LinearDivergenceOp(),
        TopkStatsOp(),
        TrainerStepOp(),
    )
}
