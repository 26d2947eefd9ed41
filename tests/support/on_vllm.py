"""Tests with vLLM itself: the Python that has it, and models that it takes.

CMDP_FAST_VLLM_PYTHON names the Python of an environment with vLLM; .ci/vllm makes one for a CPU and runs these tests.
"""

from __future__ import annotations

import json
import os

import pytest
from tiny_pair import PROBLEMS, tiny_model

PYTHON = os.environ.get("CMDP_FAST_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(not PYTHON, reason="needs vLLM: CMDP_FAST_VLLM_PYTHON names no Python that has it")

EXACT = 1e-3  # nats; vLLM and transformers both compute in float32, in other orders


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """vLLM's attention on a CPU takes heads of 16, 32, ... numbers. The teacher's logits have more columns."""
    root = tmp_path_factory.mktemp("pair")
    problems = root / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    student = tiny_model(root / "1", seed=1, head_dim=32)
    teacher = tiny_model(root / "2", seed=2, layers=2, spare=3, head_dim=32)
    return {"student": student, "teacher": teacher, "dataset": str(problems)}
