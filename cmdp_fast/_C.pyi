"""Types of the native module (csrc/bindings.cpp): addresses, sizes and strides in, no framework."""

from collections.abc import Sequence

SAVED: int
STATE: int
OPENMP: bool
SOURCES: str  # a hash of the files that it was built from: fingerprint() in cmdp_fast/native_module.py
CUDA_NOTE: str  # why cmdp_fast._cuda was not built with this module; empty if it was

class Matrix:
    def __init__(self, address: int, dtype: str, sizes: Sequence[int], strides: Sequence[int], width: int) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def width(self) -> int: ...

class TokenState:
    def __init__(self) -> None: ...
    def push(self, x: float, y: float) -> None: ...
    def push_block(self, x: Sequence[float], y: Sequence[float]) -> None: ...
    def label(self, x: float, y: float) -> None: ...
    def raise_to(self, m: float, n: float) -> None: ...
    def merge(self, other: TokenState) -> None: ...
    def finish(self) -> list[float]: ...
    def fields(self) -> list[float]: ...

class Deadline:  # not on Windows
    def __init__(self, seconds: float, line: bytes, code: int) -> None: ...
    def call_off(self) -> None: ...

def end_in(seconds: float, code: int) -> None: ...  # not on Windows
def token_stats(
    student: Matrix,
    teacher: Matrix,
    tokens: int,
    mask: int,
    vocab: int,
    temperature: float,
    statistics: Sequence[int],
    wide: bool,
    saved: int,
    threads: int,
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
    threads: int,
    first_column: int = 0,
) -> None: ...
def mixture(
    student: Matrix,
    teacher: Matrix,
    mask: int,
    vocab: int,
    temperature: float,
    b: float,
    c_teacher: float,
    c_student: float,
    saved: int,
    value: int,
    mean: int,
    threads: int,
) -> None: ...
def mixture_backward(
    student: Matrix,
    teacher: Matrix,
    mask: int,
    vocab: int,
    temperature: float,
    b: float,
    c_teacher: float,
    c_student: float,
    saved: int,
    mean: int,
    upstream: int,
    out: Matrix,
    threads: int,
) -> None: ...
def update_states(
    student: Matrix,
    teacher: Matrix,
    tokens: int,
    first_column: int,
    temperature: float,
    states: int,
    threads: int,
    mask: int = 0,
) -> None: ...
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
    threads: int,
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
    threads: int,
) -> None: ...
def budget_trace(
    cost: int,
    wide: bool,
    mask: int,
    offsets: int,
    count: int,
    total: int,
    limits: int | float,
    budget: tuple[float, bool, bool],
    trace: Sequence[int],
    reward: tuple[str, bool, float, float, float, float] | None,
    task_reward: int,
    result: int,
    threads: int,
) -> None: ...
def modified_reward(
    task_reward: int,
    cost: int,
    wide: bool,
    mask: int,
    offsets: int,
    count: int,
    total: int,
    trace: Sequence[int],
    reward: tuple[str, bool, float, float, float, float],
    result: int,
) -> None: ...
def advise_huge_pages(address: int, bytes: int) -> bool: ...
def variants() -> list[tuple[str, bool]]: ...
def variant() -> str: ...
def set_variant(name: str) -> None: ...
def cpu_features() -> list[str]: ...
def forked_late() -> bool: ...
