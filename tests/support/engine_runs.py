"""Runs that sample on a stand-in for vLLM's server: fixtures, settings, steps."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from tiny_pair import learner_of, settings
from vllm_stand_in import StandIn


@pytest.fixture
def held():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def server(pair, held):
    return held.enter_context(StandIn(pair["teacher"]).served())  # it begins with weights that are not the student's


def engine_settings(pair, server, tmp_path, **changes):
    folder = {"rollout_folder": str(tmp_path), "rollout_url": (server.url,)}
    return settings(pair, **{"rollout": "vllm", "rollout_timeout": 20.0, **folder, **changes})


def stepper(config, held, **rewards):
    learner, rows, prompts = learner_of(config, held, **rewards)
    return learner, lambda: learner.step(rows, prompts)


def completion_requests(server):
    return [body for path, body in server.asked if path == "/v1/completions" and "prompt_logprobs" not in body]
