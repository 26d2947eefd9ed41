"""How a kernel is launched: tensors as rows with at most two strides, and the table of launch settings.

The settings depend on the dtypes and on V alone, never on the number of rows: a row is split over programs in the same
way in every batch, which makes its result bitwise the same in every batch.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cmdp_fast.arrays import settled, settled_rows
from cmdp_fast.kernels.shapes import Listed, Logits, Rows
from cmdp_fast.layout import ListedRows, Pair, row_axes, unit_stride

# Asked for by hand only: a choice at run time may change the order of additions from one run to the next.
AUTOTUNE = os.environ.get("CMDP_FAST_AUTOTUNE") == "1"


MOST_ROWS = 2**31 - 1  # as programs of a grid
KNOWN = 16  # what Triton knows of a number: whether it is divisible by it


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


Chosen = TypeVar("Chosen", Forward, Columns)


def forward_settings(vocab: int, *dtypes: torch.dtype) -> Forward:
    """One lane per thread. ``vector`` columns of the wider dtype are 128 bits, which one thread loads at once.

    A step of 16 columns takes 16.0 instructions per column (bfloat16, sm_90) and 64 registers; 8 columns take 18.8 and
    48; 32 save one more, but their 80 registers leave a third of the warps. Float32 columns need twice the registers
    and half the speed: 8 a step.
    """
    return _forward_settings(vocab, torch.float32 in dtypes, warp_size())


@functools.cache
def _forward_settings(vocab: int, wide: bool, warp: int) -> Forward:
    vector, step = (4, 8) if wide else (8, 16)
    if vocab < 1024:  # a narrow row: one warp, so that lanes without columns do not outnumber the others
        return Forward(warp, vector, step, 1024, 1)
    if vocab < 16384:  # a few tiles per row: fewer warps leave more programs to hide latency behind
        return Forward(128, vector, step, 16384, 128 // warp)
    # A language model's vocabulary. 32768 columns are 8 tiles: long enough that merging 256 lanes at the end costs a
    # fifth of them at most, short enough that a few rows of 151936 columns occupy many multiprocessors.
    return Forward(256, vector, step, 32768, 256 // warp)


def column_settings(vocab: int) -> Columns:
    """16 columns per thread and tile: two to four independent 128-bit loads of each model in flight. Four tiles per
    program share the row's coefficients, whose double arithmetic would otherwise cost as much as a tile."""
    return Columns(512, 512, 32, 1) if vocab < 1024 else Columns(2048, 8192, 128, 4)


def forward_choices(settings: Forward, vocab: int) -> list[Forward]:
    """Settings around those of the table, which come first: half and twice the segment and the step, half the warps."""
    by_pieces: dict[int, int] = {}
    for segment in (settings.segment, settings.segment // 2, settings.segment * 2):
        by_pieces.setdefault(segments(vocab, settings._replace(segment=segment)), segment)
    steps = [s for s in (settings.step, settings.step // 2, settings.step * 2) if s >= settings.vector]
    return [
        settings._replace(lanes=settings.lanes // n, step=step, segment=segment, warps=settings.warps // n)
        for segment in by_pieces.values()
        for step in steps
        for n in (1, 2)
        if settings.warps >= n
    ]


def column_choices(settings: Columns) -> list[Columns]:
    """Settings around those of the table, which come first: half and twice the tile, twice the warps and the span."""
    return [
        Columns(tile, span, settings.careful, warps)
        for span in (settings.span, 2 * settings.span)
        for tile in (settings.tile, settings.tile // 2, settings.tile * 2)
        for warps in (settings.warps, 2 * settings.warps)
        if tile <= span
    ]


_chosen: dict[str, Forward | Columns] = {}


def choices() -> dict[str, Forward | Columns]:
    """What CMDP_FAST_AUTOTUNE=1 has chosen so far in this process, by kernel, columns, dtypes and device."""
    return dict(_chosen)


def tuned(
    table: list[Chosen], key: tuple[object, ...], logits: Tensor, prepared: Callable[[Chosen], Callable[[], object]]
) -> Chosen:
    """The fastest of a few settings, measured once per key and device; the first of them wins where they are equal.

    ``key`` has neither the number of rows nor their alignment: a row's result may not depend on them.
    ``prepared(settings)`` is a launch that can be repeated: it writes to nothing that the caller reads.

    Raises RuntimeError where a graph is being captured and the key is new: a measurement cannot be captured, and with
    the settings of the table the graph would round otherwise than the calls before and after it.
    """
    name = " ".join(str(part).removeprefix("torch.") for part in (*key, logits.device))
    if name not in _chosen:
        if capturing(logits):
            raise RuntimeError(
                f"CMDP_FAST_AUTOTUNE=1 has not measured {name!r} yet and cannot while a CUDA graph is being captured; "
                "run the step once before it is captured, or unset CMDP_FAST_AUTOTUNE"
            )
        times = [triton.testing.do_bench(prepared(settings)) for settings in table]
        _chosen[name] = table[times.index(min(times))]
    return cast(Chosen, _chosen[name])


def capturing(t: Tensor) -> bool:
    """Whether what is launched on a tensor's device goes into a graph."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


class Scratch(NamedTuple):
    """Memory for a measurement that stands for the first rows of a matrix."""

    out: Tensor
    rows: Rows
    count: int  # rows that there is room for


def scratch_for(out: Tensor, rows: Rows, count: int) -> Scratch:
    """Room for the first of ``count`` rows, aligned as those of ``out`` are: 128 MiB of them are enough to occupy any
    device, and the whole gradient might not fit beside the logits."""
    width, size = out.shape[-1], out.element_size()
    stride = width + (-rows.stride - width) % 16
    count = min(count, max(1, 2**27 // (stride * size)))
    begin = out.data_ptr() % 16 // size
    return Scratch(out.new_empty(begin + count * stride)[begin:], Rows(MOST_ROWS, -stride, 0), count)


def halved(settings: Columns) -> Columns:
    """8 columns per thread and tile: of rows that are not aligned, each of them a load, 16 take up to 146 registers
    (token_stats_backward, Triton 3.6, sm_90; 8 take 56)."""
    return settings._replace(tile=settings.tile // 2)


def compiled_for(warps: int) -> dict[str, object]:
    """How a kernel is compiled. Multiplications and additions fuse only where a kernel says so: left to the compiler,
    the same formula could round differently in two kernels whose results are promised to be the same."""
    return {"num_warps": warps, "enable_fp_fusion": False}


def segments(vocab: int, settings: Forward) -> int:
    return -(-vocab // settings.segment)


@functools.lru_cache(maxsize=64)
def scale_of(temperature: float) -> float:
    """log2(e)/temperature rounded to float32: the kernels multiply logits by it.

    It is computed on the CPU, also where the default device is a GPU: a number read back from a GPU would stall it, and
    end a graph's capture.
    """
    return float(torch.tensor(math.log2(math.e) / temperature, dtype=torch.float32, device="cpu"))


def aligned(logits: Logits, vector: int) -> bool:
    """Whether every row of both models begins where ``vector`` columns can be loaded at once, at a multiple of their
    size."""
    student = aligned_rows(logits.student, logits.student_rows, vector)
    return student and aligned_rows(logits.teacher, logits.teacher_rows, vector)


def aligned_rows(t: Tensor, rows: Rows, vector: int) -> bool:
    return t.data_ptr() % 16 == 0 and rows.stride % vector == 0 and rows.outer_stride % vector == 0


def speaks_ptx() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU that has every instruction they name (sm_80 on: Turing compares no
    two numbers at once); neither AMD's compiler nor the interpreter takes its assembly."""
    if knobs.runtime.interpret:
        return False
    target = _target()
    return target.backend == "cuda" and int(target.arch) >= 80


def warp_size() -> int:
    """Threads of a warp: 64 on AMD's data centre GPUs."""
    return 32 if knobs.runtime.interpret else _target().warp_size


def _target() -> GPUTarget:
    gpu = driver.active
    return _target_of(gpu, gpu.get_current_device())


@functools.lru_cache(maxsize=64)
def _target_of(gpu: Any, device: object) -> GPUTarget:
    """What a driver says of its current device: it asks the device for its properties each time."""
    return gpu.get_current_target()


def rows_of(t: Tensor) -> tuple[Tensor, Rows]:
    """A tensor and where its rows begin; one with more than two strides is copied."""
    rows = _rows(t.shape, t.stride())
    if rows is None:
        t = t.contiguous()
        rows = _rows(t.shape, t.stride())
        assert rows is not None
    return t, rows


def writable_rows(out: Tensor) -> Rows:
    """Where the rows of a gradient begin, which is written where it lies. Raises ValueError where that is nowhere."""
    target, rows = rows_of(out)
    if target is not out or unit_stride(out) is not out:
        raise ValueError(f"the gradient must be writable with at most two strides, got strides {out.stride()}")
    return rows


@functools.lru_cache(maxsize=1024)
def _rows(shape: torch.Size, strides: tuple[int, ...]) -> Rows | None:
    """Where the rows of a tensor begin, or None if it takes more than two strides to say so."""
    axes = row_axes(torch.empty_strided(shape, strides, device="meta"))
    if len(axes) > 2:
        return None
    if len(axes) == 2:
        (_, outer_stride), (inner, stride) = axes
        return Rows(inner, -stride, -outer_stride)
    # One axis, of any length: kernels are not compiled again for another number of rows.
    return Rows(MOST_ROWS, -axes[0][1] if axes else 0, 0)


def logits_of(pair: Pair) -> Logits:
    """A pair as the kernels address it."""
    pair = settled(pair, None)
    student, student_rows = rows_of(pair.student)
    teacher, teacher_rows = rows_of(pair.teacher)
    scale = scale_of(pair.temperature)
    return Logits(student, teacher, pair.tokens, flags(pair.mask), student_rows, teacher_rows, pair.width, scale)


def listed_of(rows: ListedRows) -> Listed:
    """Rows with listed columns as the kernels address them."""
    rows = settled_rows(rows, None)
    student, student_rows = rows_of(rows.student)
    mask, count = flags(rows.mask), rows.ids.shape[-1]
    return Listed(student, rows.ids, rows.tokens, mask, student_rows, count, rows.width, scale_of(rows.temperature))


def flags(mask: Tensor | None) -> Tensor | None:
    """A bool mask, an array, as the bytes that it is in memory."""
    return None if mask is None else mask.view(torch.uint8)


def on(t: Tensor):
    """Launches within go to the tensor's device, whichever is the current one."""
    return torch.cuda.device_of(t)
