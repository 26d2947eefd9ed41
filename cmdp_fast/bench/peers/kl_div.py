"""`torch.nn.functional.kl_div` on log-probabilities: reverse KL, and the JSD as in TRL's GKD (modelled on 1.16)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.peers.eager import LACKS_FIVE
from cmdp_fast.bench.variant import Inputs, Values, Variant, differentiable

OPS = ("token_stats", "divergence")


def _log_softmax(inputs: Inputs) -> list[torch.Tensor]:
    return [F.log_softmax(inputs[name].float(), -1) for name in ("student", "teacher")]


def reverse_kl(inputs: Inputs) -> Values:
    p, w = _log_softmax(inputs)
    return {"reverse_kl": F.kl_div(w, p, reduction="none", log_target=True).sum(-1)}


def jsd(inputs: Inputs) -> Values:
    p, w = _log_softmax(inputs)
    mixture = torch.logsumexp(torch.stack([p - math.log(2), w - math.log(2)]), dim=0)
    teacher, student = (F.kl_div(mixture, of, reduction="none", log_target=True) for of in (w, p))
    return {"jsd": (0.5 * teacher + 0.5 * student).sum(-1)}


def variants(case: Case) -> list[Variant]:
    if case.op == "divergence":
        return [differentiable(case.mode, "F.kl_div", jsd, ("jsd",), peer="kl_div")]
    return [differentiable(case.mode, "F.kl_div", reverse_kl, ("reverse_kl",), lacks=LACKS_FIVE, peer="kl_div")]
