"""Triton kernels, one file per operation: functions of tensors that know neither autograd nor checks of arguments. The
module has the shape of `cmdp_fast.ops.backends.Backend`.

How memory is read once. The six statistics come from a state that streams and merges (`csrc/token_state.h`). One
program folds one segment of a row (`token_stats.py`); within it every thread, a lane, folds columns of its own with
128-bit loads and never looks at another lane (`fold.py`), so that the loop has no barrier. The lanes are merged once at
the end, the segments of a row by a second small kernel in a fixed order (`finish.py`). Into how many segments a row is
cut depends on V alone: a decode batch of a few rows occupies the device, and a row's result is bitwise the same in
every batch. Moved per row: 2 V elements forward, 72 bytes per segment, six statistics; 2 V read and V written backward.

Why it is exact. A state is exact relative to any finite reference, maxima only keep powers in range. Exponentials are
powers of two with log2(e)/temperature folded into one fused multiply-add; differences of the two models are taken
relative to the references before anything is multiplied, so that a common shift costs no precision. The loop assumes
ordinary numbers; any other (-inf, NaN, an abyss of -3e38) makes a sum that is not finite, and the segment is folded
again by a loop that knows every special value. The backward pass splits the normalisers (`..._backward.py`).

Speed is predicted: `benchmarks/static_gpu.py` reads the machine code that the compiler writes for GPUs that need not be
there. Values are measured, in Triton's interpreter (TRITON_INTERPRET=1), by the whole test suite. No speed has been
measured on a GPU.

`constrained.py` is the whole method in three launches, `scan.py` the budget's scan, `reward.py` the modified reward,
`sequences.py` where sequences lie and how they are summed, `mixture.py` JSD and skewed divergences (a second pass),
`token_state.py` a tile of the vocabulary, `tail.py` and `tail_backward.py` a row without the columns that a teacher has
listed, `launch.py` the launch settings, `shapes.py` the values that kernels are given, `shared.py` the algebra of
partial states.
"""

from cmdp_fast.kernels.constrained import COSTS, constrained_pass
from cmdp_fast.kernels.mixture import mixture, mixture_backward
from cmdp_fast.kernels.reward import modify_rewards
from cmdp_fast.kernels.scan import trace_budgets
from cmdp_fast.kernels.tail import update_tails
from cmdp_fast.kernels.tail_backward import tail_backward
from cmdp_fast.kernels.token_state import update_states
from cmdp_fast.kernels.token_stats import token_stats
from cmdp_fast.kernels.token_stats_backward import token_stats_backward

__all__ = [
    "COSTS",
    "constrained_pass",
    "mixture",
    "mixture_backward",
    "modify_rewards",
    "tail_backward",
    "token_stats",
    "token_stats_backward",
    "trace_budgets",
    "update_states",
    "update_tails",
]
