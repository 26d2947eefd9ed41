"""What others launch for the same two heads, read in their sources: PREDICTED, and best cases for them.

Each plan says what it computes less, or more, than `linear_token_stats`. A pass is charged its bytes at the bandwidth
of a copy, every tensor once, also where a library reads it twice.
"""

from __future__ import annotations

import math

import torch
from launch_model import FLOAT, HALF, HOST_TRITON, DotKernel, Pass, Plan, Product, Shape, Step, pieces
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmdp_fast.bench.peers.eager import linear_reverse_kl


def peer_plans(shape: Shape) -> list[Plan]:
    return [eager(shape), trl_divergence(shape), liger_linear_jsd(shape), cut_cross_entropy(shape)]


# --------------------------------------------------------------------------------------------------------------
# Eager PyTorch: recorded from the benchmark's own peer, on tensors without memory


class Recorder(TorchDispatchMode):
    """Every operation that writes a tensor, as a step; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        outputs = [t for t in (made if isinstance(made, (tuple, list)) else (made,)) if isinstance(t, Tensor)]
        returns = operation._schema.returns
        views = all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not views and outputs:
            inputs = [t for t in args if isinstance(t, Tensor)]
            if operation.overloadpacket == torch.ops.aten.mm:
                (rows, inner), columns = inputs[0].shape, inputs[1].shape[1]
                self.steps.append(Product(rows, columns, inner, outputs[0].itemsize, size=inputs[0].itemsize))
            else:
                self.steps.append(Pass(sum(map(_bytes, inputs)), sum(map(_bytes, outputs))))
        return made


def _bytes(t: Tensor) -> int:
    """Of the numbers that are there: an expanded axis counts once."""
    return t.itemsize * math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride != 0)


def eager(shape: Shape) -> Plan:
    """Logits in full, and the reverse KL by `log_softmax` in float32."""
    inputs = {}
    for model, hidden in (("student", shape.student_hidden), ("teacher", shape.teacher_hidden)):
        of_student = model == "student"
        for what, size in (("hidden", shape.rows), ("weight", shape.vocab)):
            tensor = torch.empty(size, hidden, dtype=torch.bfloat16, device="meta", requires_grad=of_student)
            inputs[f"{model}_{what}"] = tensor
    with Recorder() as forward:
        value = linear_reverse_kl(inputs)["reverse_kl"]
    upstream = torch.empty_like(value)
    with Recorder() as backward:
        torch.autograd.grad(value, [inputs["student_hidden"], inputs["student_weight"]], upstream)
    return Plan("eager, logits in full", forward.steps, backward.steps, "reverse KL alone, of logits in bfloat16")


# --------------------------------------------------------------------------------------------------------------
# TRL 1.16, trl/kernels/chunked_divergence.py

TRL_ROWS, TRL_COLUMNS, TRL_BLOCK = 4096, 32768, 1024
# Compiled for sm_90 by Triton 3.6 and 3.7: loads of 128 bits, but 21 barriers and 49 shuffles for 1024 columns.
TRL_FOLD_INSTRUCTIONS = 54.4  # a column


def trl_divergence(shape: Shape, chunk: tuple[int, int] = (TRL_ROWS, TRL_COLUMNS)) -> Plan:
    """`ChunkedDivergenceFunction` with beta 0 or 1. Rows are its outer loop."""
    forward: list[Step] = []
    backward: list[Step] = []
    head = shape.vocab * shape.student_hidden
    hidden = shape.rows * shape.student_hidden
    for rows in pieces(shape.rows, chunk[0]):
        for columns in pieces(shape.vocab, chunk[1]):
            r, c = rows.stop - rows.start, columns.stop - columns.start
            projections: list[Step] = [
                Product(r, c, width, FLOAT) for width in (shape.student_hidden, shape.teacher_hidden)
            ]
            forward += projections
            forward.append(Pass(2 * r * c * FLOAT, 0, TRL_FOLD_INSTRUCTIONS * r * c, HOST_TRITON))
            backward += projections
            backward.append(Pass(2 * r * c * FLOAT, r * c * FLOAT, host=HOST_TRITON))  # over the student's logits
            backward.append(Pass(r * c * FLOAT, r * c * HALF))  # .to(dtype)
            backward.append(Product(r, shape.student_hidden, c, FLOAT, adds=True))
            backward.append(Product(c, shape.student_hidden, r, FLOAT, adds=True))
    zeros = [Pass(0, hidden * FLOAT), Pass(0, head * FLOAT)]
    casts = [Pass(hidden * FLOAT, hidden * HALF), Pass(head * FLOAT, head * HALF)]
    beside = "one divergence and an entropy without gradient; its head's gradient is float32 until the end"
    return Plan(f"TRL 1.16, {chunk[0]} x {chunk[1]} float32", forward, [*zeros, *backward, *casts], beside)


# --------------------------------------------------------------------------------------------------------------
# Liger-Kernel 0.8.5, liger_kernel/ops/fused_linear_jsd.py


def liger_linear_jsd(shape: Shape) -> Plan:
    """`LigerFusedLinearJSD`: the gradients are made in the forward pass, a few rows of full width at a time.

    Passes over a chunk [r, V] of float32, in the order of its source: both divided by the temperature, two
    log_softmax, a softmax, the kernel (reads two, writes loss and gradient), the loss's sum, the gradient's row sum,
    times softmax, subtracted, divided by the temperature, cast.
    """
    growth = -(-shape.vocab // shape.student_hidden)  # before Blackwell its memory constant is 1
    height = min(1 << math.ceil(math.log2(-(-shape.rows // growth))), shape.rows)
    head, hidden = shape.vocab * shape.student_hidden, shape.rows * shape.student_hidden
    forward: list[Step] = [Pass(0, head * HALF), Pass(0, hidden * HALF)]
    for rows in pieces(shape.rows, height):
        r = rows.stop - rows.start
        whole = r * shape.vocab * FLOAT
        forward += [Product(r, shape.vocab, width, FLOAT) for width in (shape.student_hidden, shape.teacher_hidden)]
        forward += [Pass(whole, whole)] * 5
        forward.append(Pass(2 * whole, 2 * whole, host=HOST_TRITON))
        forward += [Pass(whole, 0), Pass(whole, 0), Pass(whole, whole), Pass(2 * whole, whole), Pass(whole, whole)]
        forward.append(Pass(whole, whole // 2))
        forward.append(Product(r, shape.student_hidden, shape.vocab, HALF))
        forward.append(Product(shape.vocab, shape.student_hidden, r, HALF, adds=True))
    backward: list[Step] = [Pass(4, 4), Pass(4, 4)]  # whether the upstream gradient is 1, which the host waits for
    beside = "a mean of one divergence; forward makes the gradients; the head's is summed in bfloat16"
    return Plan(f"Liger 0.8.5 fused linear JSD, {height} rows", forward, backward, beside)


# --------------------------------------------------------------------------------------------------------------
# cut-cross-entropy 25.1


def cut_cross_entropy(shape: Shape) -> Plan:
    """`linear_cross_entropy` without filtering: products stay in registers of a tl.dot kernel, and are made again in
    the backward pass. The locked additions of its gradients are not charged."""
    product = 2 * shape.rows * shape.vocab * shape.student_hidden
    once = (shape.rows + shape.vocab) * shape.student_hidden * HALF
    small = shape.rows * shape.student_hidden * HALF
    forward: list[Step] = [DotKernel(product, once), Pass(2 * small, 0, host=HOST_TRITON), Pass(0, 0)]
    backward: list[Step] = [Pass(0, once), DotKernel(3 * product, 2 * once)]
    beside = "log-probability alone, no teacher; gradients are summed in bfloat16"
    return Plan("cut-cross-entropy 25.1", forward, backward, beside)
