"""What a whole `linear_token_stats` launches, moves and computes, and how long a GPU would take for it: PREDICTED.

A plan is the list of launches that some code makes at one shape, forward and backward, and `launch_model.py` says how
long each of them takes. Ours is cut into tiles by `cmdp_fast.ops.tile_size` itself, asked as on a GPU, and
`static_gpu.py`, which prints this, counts the kernels that fold a tile. tests/kernels/test_launch_plan.py holds the
list against the calls that the loop of `cmdp_fast/ops/linear.py` makes. The plans of others are in `peer_plans.py`.
Nothing here is measured but the two rates of a GPU in `devices.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from launch_model import FLOAT, GPUS, HALF, HOST_TRITON, Pass, Plan, Product, Shape, Step, pieces, total
from peer_plans import peer_plans

from cmdp_fast.ops.tile_size import tile_shape

KEPT = {"recompute": (), "teacher": ("teacher",), "tiles": ("student", "teacher")}  # logits that stay


QWEN = Shape(8192, 1536, 3584, 151936)


# --------------------------------------------------------------------------------------------------------------
# Ours


def tile_on_a_gpu(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tile on an H100 whose memory is half taken: float32, as products leave the logits."""
    properties = SimpleNamespace(L2_cache_size=50 * 2**20, total_memory=80 * 2**30, multi_processor_count=132)
    pretended: dict[str, Any] = {
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (40 * 2**30, 80 * 2**30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }
    with mock.patch.multiple(torch.cuda, **pretended):
        return tile_shape(shape.rows, shape.vocab, 2 * FLOAT, torch.device("cuda", 0))


def linear_plan(
    shape: Shape, tile: tuple[int, int], saved: str = "recompute", update_launches: int = 1, divergences: bool = True
) -> Plan:
    """The loop of `cmdp_fast/ops/linear.py`: both directions of a call.

    Logits come out of a product in float32; a teacher's that stay alone are kept in the factors' dtype, a pair that
    stays as it came out. ``update_launches``: kernels that fold a tile into the states of its rows. ``divergences``:
    whether one of them has a gradient; if none has, the backward pass leaves the teacher out. What is done once per
    call (states, statistics, casts of a row's numbers) is left out.
    """
    stays = KEPT[saved]
    teacher_size = HALF if stays == ("teacher",) else FLOAT
    forward: list[Step] = []
    backward: list[Step] = []
    for columns, rows, first in tiles(shape, tile):
        student = Product(rows, columns, shape.student_hidden, FLOAT)
        teacher = Product(rows, columns, shape.teacher_hidden, teacher_size)
        logits = {"student": rows * columns * FLOAT, "teacher": rows * columns * teacher_size}
        fold = Pass(sum(logits.values()), 0, host=HOST_TRITON)
        merge = Pass(0, 0, host=HOST_TRITON)  # of the states of a tile's segments, which are few
        forward += [student, teacher, fold] + [merge] * (update_launches - 1)
        read = {"student": student, "teacher": teacher} if divergences else {"student": student}
        backward += [product for model, product in read.items() if model not in stays]
        backward.append(Pass(sum(logits[model] for model in read), rows * columns * HALF, host=HOST_TRITON))
        backward += gradient_products(rows, columns, shape.student_hidden, first)
        if first + rows == shape.rows:  # a piece of the head's gradient is whole: float32 to the head's dtype
            backward.append(Pass(columns * shape.student_hidden * FLOAT, columns * shape.student_hidden * HALF))
    kept = sum({"student": FLOAT, "teacher": teacher_size}[model] for model in stays) * shape.rows * shape.vocab
    name = f"ours, saved={saved}, tiles of {tile[0]} x {tile[1]}"
    beside = [f"keeps {kept / 1e9:.1f} GB of logits"] if kept else []
    beside += [] if divergences else ["gradients of log-probability and entropy alone"]
    return Plan(name, forward, backward, ", ".join(beside))


def tiles(shape: Shape, tile: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """(columns, rows, first row) of every tile, in the order of the loop."""
    height, width = tile
    for columns in pieces(shape.vocab, width):
        for rows in pieces(shape.rows, height):
            yield columns.stop - columns.start, rows.stop - rows.start, rows.start


def gradient_products(rows: int, columns: int, hidden: int, first: int) -> list[Step]:
    """Those of the hidden states, which are summed over columns, and of the head, which are summed over rows."""
    of_hidden = Product(rows, hidden, columns, FLOAT, adds=True)
    return [of_hidden, Product(columns, hidden, rows, FLOAT, adds=first > 0)]


def cache_sized_plan(shape: Shape) -> Plan:
    """Tiles sized for the L2 cache, as they were: two launches for a tile's statistics, and a pass that casts."""
    plan = linear_plan(shape, (1024, 4608), update_launches=2)
    backward: list[Step] = []
    for step in plan.backward:
        backward.append(step)
        if isinstance(step, Pass) and step.host == HOST_TRITON:  # the gradient, in float32 over the student's logits
            columns = step.read // (2 * FLOAT)
            backward[-1] = step._replace(written=columns * FLOAT)
            backward.append(Pass(columns * FLOAT, columns * HALF))
    return Plan("tiles of 1024 x 4608 (sized for L2)", plan.forward, backward, "the design that was")


def floor(shape: Shape) -> Plan:
    """The products alone, in one piece each, with the projections again in the backward pass."""
    projections: list[Step] = [
        Product(shape.rows, shape.vocab, hidden, HALF) for hidden in (shape.student_hidden, shape.teacher_hidden)
    ]
    gradients: list[Step] = [
        Product(shape.rows, shape.student_hidden, shape.vocab, HALF),
        Product(shape.vocab, shape.student_hidden, shape.rows, HALF),
    ]
    return Plan("floor: the bare products", projections, projections + gradients, "no statistics")


def our_plans(shape: Shape, update_launches: int) -> list[Plan]:
    tile = tile_on_a_gpu(shape)
    by_saved = [linear_plan(shape, tile, saved, update_launches) for saved in KEPT]
    alone = linear_plan(shape, tile, update_launches=update_launches, divergences=False)
    return [cache_sized_plan(shape), *by_saved, alone]


# --------------------------------------------------------------------------------------------------------------
# The operations on logits


def logits_forward(rows: int, vocab: int) -> list[Step]:
    """`token_stats` of bfloat16 logits: fold, finish."""
    return [Pass(rows * vocab * 2 * HALF, 0, host=HOST_TRITON), Pass(0, 0, host=HOST_TRITON)]


def logits_backward(rows: int, vocab: int) -> list[Step]:
    return [Pass(rows * vocab * 2 * HALF, rows * vocab * HALF, host=HOST_TRITON)]


LOGITS_ROWS = (64, 256, 1024, 8192)


# --------------------------------------------------------------------------------------------------------------
# As a record for JSON, and as a text


def record(update_launches: int, shape: Shape = QWEN) -> dict[str, Any]:
    """All figures by plain names; milliseconds and microseconds are predicted."""
    plans = [floor(shape), *our_plans(shape, update_launches), *peer_plans(shape)]
    directions = [(plan, *each) for plan in plans for each in (("forward", plan.forward), ("backward", plan.backward))]
    operations = [
        (name, rows, steps(rows, shape.vocab))
        for rows in LOGITS_ROWS
        for name, steps in (("token_stats", logits_forward), ("token_stats, backward", logits_backward))
    ]
    return {
        "shape": shape._asdict(),
        "linear_token_stats": [_of_plan(*direction) for direction in directions],
        "logits": [_of_logits(*operation) for operation in operations],
    }


def _of_plan(plan: Plan, direction: str, steps: list[Step]) -> dict[str, Any]:
    whole = total(steps)
    return {
        "plan": plan.name,
        "direction": direction,
        "launches": whole.launches,
        "bytes": whole.bytes,
        "flops": whole.flops,
        "host_ms": round(whole.host * 1e3, 2),
        "ms": {gpu.name: round(whole.seconds(gpu.name) * 1e3, 2) for gpu in GPUS},
        "beside": plan.beside,
    }


def _of_logits(operation: str, rows: int, steps: list[Step]) -> dict[str, Any]:
    whole = total(steps)
    at_best = {gpu.name: whole.bytes / gpu.terabytes / 1e12 for gpu in GPUS}
    return {
        "operation": operation,
        "rows": rows,
        "launches": whole.launches,
        "bytes": whole.bytes,
        "us": {name: round(seconds * 1e6, 1) for name, seconds in whole.device.items()},
        "share_of_bandwidth": {name: round(at_best[name] / seconds, 3) for name, seconds in whole.device.items()},
    }


def show(found: dict[str, Any]) -> None:
    shape = ", ".join(f"{name} {size}" for name, size in found["shape"].items())
    print(f"\nPREDICTED, NOT MEASURED: linear_token_stats, bfloat16, {shape}")
    names = list(found["linear_token_stats"][0]["ms"])
    row = "{:44} {:8} {:>8} {:>8} {:>8} {:>8} " + "{:>10} " * len(names) + " {}"
    print(
        row.format("plan", "", "launches", "GB", "TFLOP", "host ms", *(f"{name} ms" for name in names), "beside ours")
    )
    for line in found["linear_token_stats"]:
        size = (line["launches"], f"{line['bytes'] / 1e9:.1f}", f"{line['flops'] / 1e12:.2f}", f"{line['host_ms']:.1f}")
        times = [f"{ms:.1f}" for ms in line["ms"].values()]
        print(row.format(line["plan"], line["direction"], *size, *times, line["beside"]))
    print(
        "\nPREDICTED, NOT MEASURED: operations on logits, bfloat16: time on the device, and the share of the data sheet"
    )
    row = "{:24} {:>6} {:>8} {:>8} " + "{:>16} " * len(names)
    print(row.format("operation", "rows", "launches", "MB", *(f"{name} us" for name in names)))
    for line in found["logits"]:
        times = [f"{line['us'][name]:.1f} ({line['share_of_bandwidth'][name]:.0%})" for name in names]
        print(row.format(line["operation"], line["rows"], line["launches"], f"{line['bytes'] / 1e6:.1f}", *times))
