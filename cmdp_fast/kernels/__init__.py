"""Triton kernels, one file an operation: plain functions of tensors that know neither autograd nor checks of arguments.

`shared.py` holds the algebra of partial states, `launch.py` the launch settings, `finish.py` what turns partial states
into statistics. Under ``TRITON_INTERPRET=1`` they run on CPU tensors.
"""

from cmdp_fast.kernels.constrained import COSTS, constrained_pass
from cmdp_fast.kernels.launch import addressable
from cmdp_fast.kernels.mixture import mixture, mixture_backward
from cmdp_fast.kernels.scan import modify_rewards, trace_budgets
from cmdp_fast.kernels.token_stats import token_stats
from cmdp_fast.kernels.token_stats_backward import token_stats_backward

__all__ = [
    "COSTS",
    "addressable",
    "constrained_pass",
    "mixture",
    "mixture_backward",
    "modify_rewards",
    "token_stats",
    "token_stats_backward",
    "trace_budgets",
]
