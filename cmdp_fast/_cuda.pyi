"""Types of the CUDA module (csrc/cuda/bindings.cpp): addresses of device memory, sizes, strides and a stream in."""

from collections.abc import Sequence

DEVICE: str
PARTIAL: int
SAVED: int
TAIL_FIELDS: int

_Layout = tuple[int, bool, int, int, int]
_BudgetRule = tuple[float, bool, bool]
_RewardRule = tuple[str, bool, float, float, float, float]

class Matrix:
    def __init__(self, address: int, dtype: str, sizes: Sequence[int], strides: Sequence[int], width: int) -> None: ...

def segments(vocab: int) -> int: ...
def token_stats(
    student: Matrix,
    teacher: Matrix,
    tokens: int,
    mask: int,
    vocab: int,
    temperature: float,
    statistics: Sequence[int],
    saved: int,
    partial: int,
    arrived: int,
    stream: int,
) -> None: ...
def token_stats_backward(
    student: Matrix,
    teacher: Matrix,
    tokens: int,
    mask: int,
    vocab: int,
    temperature: float,
    upstream: Sequence[int],
    saved: int,
    out: Matrix,
    first_column: int,
    stream: int,
) -> None: ...
def tail_segments(vocab: int) -> int: ...
def update_tails(
    student: Matrix,
    ids: int,
    listed: int,
    tokens: int,
    mask: int,
    vocab: int,
    temperature: float,
    first_column: int,
    states: Sequence[int],
    partial: int,
    arrived: int,
    stream: int,
) -> None: ...
def tail_backward(
    student: Matrix,
    ids: int,
    listed: int,
    tokens: int,
    mask: int,
    vocab: int,
    temperature: float,
    first_column: int,
    gradient: Sequence[int],
    out: Matrix,
    stream: int,
) -> None: ...
def constrained_reward(
    student: Matrix,
    teacher: Matrix,
    tokens: int,
    mask: int,
    vocab: int,
    temperature: float,
    statistics: Sequence[int],
    saved: int,
    partial: int,
    arrived: int,
    cost: str,
    layout: _Layout,
    limits: tuple[int, bool, int, float, bool],
    budget_rule: _BudgetRule,
    reward_rule: _RewardRule,
    trace: Sequence[int],
    task_reward: int,
    reward: int,
    stream: int,
) -> None: ...
def budget_trace(
    cost: int,
    wide: bool,
    mask: int,
    layout: _Layout,
    limits: int,
    budget_rule: _BudgetRule,
    trace: Sequence[int],
    reward_rule: _RewardRule | None,
    task_reward: int,
    reward: int,
    stream: int,
) -> None: ...
def modified_reward(
    cost: int,
    wide: bool,
    mask: int,
    layout: _Layout,
    trace: Sequence[int],
    reward_rule: _RewardRule,
    task_reward: int,
    reward: int,
    stream: int,
) -> None: ...
