"""Liger-Kernel's chunked `LigerFusedLinearJSDLoss` (adapted to 0.8.5), as `liger_linear_jsd`: PyTorch, any device.

It computes the gradients in its forward pass, whether they are asked for or not.
"""

from __future__ import annotations

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.ops.linear_token_stats import LINEAR
from cmdp_fast.bench.peers import liger_linear_jsd
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, Inputs, Values, Variant, differentiable

OPS = liger_linear_jsd.OPS


def variants(case: Case) -> list[Variant]:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    beta, value, lacks = liger_linear_jsd.part_of(case)
    # Without the loss on labels. Not compiled: that is the peer `compile`, and Liger's own chunks are what this one is.
    divergence = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)

    def function(inputs: Inputs) -> Values:
        return {value: divergence(*(inputs[name] for name in LINEAR), inputs["tokens"])}

    name, peer = "Liger LigerFusedLinearJSDLoss", "liger_chunked_jsd"
    return [differentiable(case.mode, name, function, (value,), HIDDEN_AND_HEAD, lacks=lacks, peer=peer)]
