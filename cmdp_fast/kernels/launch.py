"""How a kernel is launched: tensors as rows with at most two strides, and the table of launch settings.

The settings depend on the dtypes and on V alone, never on the number of rows: a row is split over programs in the same
way in every batch, which makes its result bitwise the same in every batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from cmdp_fast.kernels.shapes import Logits, Rows
from cmdp_fast.layout import Pair, addressable, row_axes

# Asked for by hand only: a choice at run time may change the order of additions from one run to the next.
AUTOTUNE = os.environ.get("CMDP_FAST_AUTOTUNE") == "1"


class Forward(NamedTuple):
    """Settings of the kernels that fold a row: a lane loads ``vector`` columns at once, and raises its references every
    ``step`` columns; a program folds ``segment`` columns."""

    lanes: int
    vector: int
    step: int
    segment: int
    warps: int


class Columns(NamedTuple):
    """Settings of the kernels that write a column for every column they read: a program writes ``span`` of them, a
    ``tile`` at a time, or ``careful`` at a time in a row that needs double precision."""

    tile: int
    span: int
    careful: int
    warps: int


def forward_settings(vocab: int, *dtypes: torch.dtype) -> Forward:
    """One lane per thread. ``vector`` columns of the wider dtype are 128 bits, which one thread loads at once.

    A step of 16 columns takes 16.0 instructions per column (bfloat16, sm_90) and 64 registers; 8 columns take 18.8 and
    48; 32 save one more, but their 80 registers leave a third of the warps. Float32 columns need twice the registers
    and half the speed: 8 a step.
    """
    vector, step = (4, 8) if torch.float32 in dtypes else (8, 16)
    warp = warp_size()
    if vocab < 1024:  # a narrow row: one warp, so that lanes without columns do not outnumber the others
        return Forward(warp, vector, step, 1024, 1)
    if vocab < 16384:  # a few tiles per row: fewer warps leave more programs to hide latency behind
        return Forward(128, vector, step, 16384, 128 // warp)
    # A language model's vocabulary. 32768 columns are 8 tiles: long enough that merging 256 lanes at the end costs a
    # fifth of them at most, short enough that a few rows of 151936 columns occupy many multiprocessors.
    return Forward(256, vector, step, 32768, 256 // warp)


_fastest: dict[tuple[object, ...], Forward] = {}


def tuned(settings: Forward, key: tuple[object, ...], run: Callable[[Forward], object]) -> Forward:
    """The settings of the table; under CMDP_FAST_AUTOTUNE=1 the fastest of a few around them, measured once per key.

    The first call with a key must not be captured in a graph. Segments stay as they are: memory depends on them.
    """
    if not AUTOTUNE:
        return settings
    if key not in _fastest:
        steps = (s for s in (settings.step // 2, settings.step, settings.step * 2) if s >= settings.vector)
        choices = [
            settings._replace(step=s, lanes=settings.lanes // n, warps=settings.warps // n)
            for s in steps
            for n in (1, 2)
            if settings.warps >= n
        ]
        _fastest[key] = min(choices, key=lambda choice: triton.testing.do_bench(lambda: run(choice)))
    return _fastest[key]


def column_settings(vocab: int) -> Columns:
    """16 columns per thread and tile: two to four independent 128-bit loads of each model in flight. Four tiles per
    program share the row's coefficients, whose double arithmetic would otherwise cost as much as a tile."""
    return Columns(512, 512, 32, 1) if vocab < 1024 else Columns(2048, 8192, 128, 4)


def compiled_for(warps: int) -> dict[str, object]:
    """How a kernel is compiled. Multiplications and additions fuse only where a kernel says so: left to the compiler,
    the same formula could round differently in two kernels whose results are promised to be the same."""
    return {"num_warps": warps, "enable_fp_fusion": False}


def segments(vocab: int, settings: Forward) -> int:
    return -(-vocab // settings.segment)


def scale_of(temperature: float) -> float:
    """log2(e)/temperature rounded to float32: the kernels multiply logits by it.

    It is computed on the CPU, also where the default device is a GPU: a number read back from a GPU would stall it, and
    end a graph's capture.
    """
    return float(torch.tensor(math.log2(math.e) / temperature, dtype=torch.float32, device="cpu"))


def aligned(logits: Logits, vector: int) -> bool:
    """Whether every row of both models begins where ``vector`` columns can be loaded at once, at a multiple of their
    size."""
    student = _aligned(logits.student, logits.student_rows, vector)
    return student and _aligned(logits.teacher, logits.teacher_rows, vector)


def _aligned(t: Tensor, rows: Rows, vector: int) -> bool:
    return t.data_ptr() % 16 == 0 and rows.stride % vector == 0 and rows.outer_stride % vector == 0


def speaks_ptx() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU that has every instruction they name (sm_80 on: Turing compares no
    two numbers at once); neither AMD's compiler nor the interpreter takes its assembly."""
    if knobs.runtime.interpret:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= 80


def warp_size() -> int:
    """Threads of a warp: 64 on AMD's data centre GPUs."""
    return 32 if knobs.runtime.interpret else driver.active.get_current_target().warp_size


def rows_of(t: Tensor) -> tuple[Tensor, Rows]:
    """A tensor and where its rows begin; one with more than two strides is copied."""
    if not addressable(t):
        t = t.contiguous()
    axes = row_axes(t)
    (_, outer_stride), (inner, stride) = [(1, 0), (1, 0), *axes][-2:]
    # A single row: as good as two to an axis. An integer of 1 within a tuple within a tuple is None in Triton 3.6.
    return t, Rows(max(inner, 2), stride, outer_stride)


def logits_of(pair: Pair) -> Logits:
    """A pair as the kernels address it."""
    student, student_rows = rows_of(pair.student)
    teacher, teacher_rows = rows_of(pair.teacher)
    tokens = None if pair.tokens is None else pair.tokens.contiguous()
    scale = scale_of(pair.temperature)
    return Logits(student, teacher, tokens, flags(pair.mask), student_rows, teacher_rows, pair.width, scale)


def count_rows(t: Tensor) -> int:
    return math.prod(t.shape[:-1])


def flags(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes that it is in memory."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def on(t: Tensor):
    """Launches within go to the tensor's device, whichever is the current one."""
    return torch.cuda.device_of(t)
