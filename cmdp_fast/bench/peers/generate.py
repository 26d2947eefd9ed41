"""`generate` of transformers as it stands. The trainer's rollout may not be slower."""

from __future__ import annotations

from typing import Any

import torch

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.ops.trainer_step import GROUP, make_variant
from cmdp_fast.bench.variant import Inputs, Variant

OPS = ("trainer_step",)


def _generate(ppo: Any, inputs: Inputs) -> Any:
    prompts, sampling = inputs["prompts"].repeat_interleave(GROUP, 0), ppo.collector.sampling
    with torch.no_grad():
        return ppo.student.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(sampling.eos),
            pad_token_id=sampling.pad,
        )


def variants(case: Case) -> list[Variant]:
    if case.mode != "rollout":
        return []
    lacks = "no masks, no completions without their padding"
    return [make_variant(case, "plain generate", "tiled", _generate, lacks=lacks, peer="generate")]
