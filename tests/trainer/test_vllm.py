"""Rollouts on vLLM, with vLLM: what the stand-in of the other tests takes for granted. All of a file share a server."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections import Counter

import psutil
import pytest
import torch
from on_vllm import EXACT, PYTHON, needs_vllm, pair
from tiny_pair import arguments, learner_of, settings

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.engine.client import Client
from cmdp_fast.trainer.engine.server import Server

__all__ = ["pair"]
pytestmark = needs_vllm


@pytest.fixture(scope="module")
def server(pair, tmp_path_factory):
    """One for all tests: a start takes half a minute. It takes whole models and adapters."""
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    config = settings(pair, rollout="vllm", rollout_python=PYTHON)
    options = ["--model", pair["student"], "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    options += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    options += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "1"]
    running = Server(config, options, log, on_cpu=True)
    try:
        running.wait(Client(running.url, 300.0), 300.0)
        begun = _family(running)
        yield running
    finally:
        running.close()
    assert len(begun) > 2 and not psutil.wait_procs(begun, timeout=10)[1]  # none is left


def _family(running):
    """The processes of a server: its keeper, vLLM, and what that has started."""
    keeper = psutil.Process(running._keeper.pid)
    return [keeper, *keeper.children(recursive=True)]


def on(server, pair, tmp_path, **changes):
    return settings(pair, rollout="vllm", rollout_url=(server.url,), rollout_folder=str(tmp_path), **changes)


def sampled(learner, prompts, step=0, **changes):
    """(completions, their log-probabilities by vLLM, those by the student as it samples)."""
    sampling = dataclasses.replace(learner.collector.sampling, **changes)
    rollout = learner.collector.engine.sample(learner.student, prompts, sampling, step)
    rows = []
    for prompt, ids in zip(prompts, rollout.completion_ids(), strict=True):
        with torch.no_grad():
            logits = learner.student(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        rows.append((ids, (logits / sampling.temperature).log_softmax(-1)))
    return rollout, rows


def test_an_adapter_is_sampled_with(server, pair, held, tmp_path):
    """The first test of the server: later ones change the weights that the adapter is for."""
    learner, rows, prompts = learner_of(on(server, pair, tmp_path, lora_rank=4), held)
    for _ in range(3):
        assert learner.step(rows, prompts)["sampling/sampling_logp_difference/max"] < EXACT


def test_each_step_is_sampled_with_its_own_weights(server, pair, held, tmp_path):
    learner, rows, prompts = learner_of(on(server, pair, tmp_path, temperature=0.8), held)
    for _ in range(3):
        metrics = learner.step(rows, prompts)
        assert metrics["sampling/sampling_logp_difference/max"] < EXACT
        assert metrics["sampling/effective_sample_ratio"] > 0.999


def test_completions_are_of_the_students_distribution(server, pair, held, tmp_path):
    """First tokens, by a chi-square statistic: 1 in 10^6 samples of the right one has more."""
    learner, _, prompts = learner_of(on(server, pair, tmp_path, temperature=0.7), held)
    torch.manual_seed(5)
    count = 3000
    rollout, rows = sampled(learner, prompts[:1] * count, max_new_tokens=2)
    expected = rows[0][1][0].exp() * count
    seen = torch.bincount(rollout.tokens[:, 0], minlength=len(expected)).double()
    often = expected > 5
    statistic = float(((seen - expected)[often] ** 2 / expected[often]).sum())
    degrees = int(often.sum())
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 12


def test_log_probabilities_are_those_of_what_was_drawn_from(server, pair, held, tmp_path):
    """With a part of the softmax they are of that part, which sums to one."""
    learner, _, prompts = learner_of(on(server, pair, tmp_path), held)
    for changes in ({"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6, "temperature": 1.3}):
        rollout, rows = sampled(learner, prompts * 3, **changes)
        for drawn, (ids, logprob) in zip(rollout.sampler_logprob, rows, strict=True):
            for t, token in enumerate(ids):
                p, order = logprob[t].exp().sort(descending=True)
                kept = torch.ones(len(p), dtype=torch.bool)
                kept[changes.get("top_k", len(p)) :] = False
                kept &= p.cumsum(0) - p < changes.get("top_p", 1.0)
                assert token in order[kept].tolist()
                assert float(drawn[t]) == pytest.approx(float(logprob[t, token] - p[kept].sum().log()), abs=EXACT)


def test_a_seed_repeats_what_it_drew(server, pair, held, tmp_path):
    learner, _, prompts = learner_of(on(server, pair, tmp_path), held)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(sampled(learner, [ids for ids in prompts for _ in range(4)])[0].completion_ids())
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({*map(tuple, drawn[0][:4])}) > 1  # of one prompt


def test_completions_end_where_they_should(server, pair, held, tmp_path):
    """At an end, a token of the user's, a string, the limit; at temperature 0 with the most likely tokens."""
    learner, _, prompts = learner_of(on(server, pair, tmp_path, stop_tokens=("A",)), held)
    tokenizer, ends = learner.collector.tokenizer, set(learner.collector.sampling.eos)
    torch.manual_seed(1)
    plain = [tokenizer.decode(ids) for ids in sampled(learner, prompts * 40)[0].completion_ids()]
    often = Counter(
        text[i : i + 2] for text in plain for i in range(len(text) - 1) if {*text[i : i + 2]} <= {*"0123456789+=;"}
    )
    string = often.most_common(1)[0][0]
    rollout, _ = sampled(learner, prompts * 40, max_new_tokens=5, stop_strings=(string,))
    texts = [tokenizer.decode(ids) for ids in rollout.completion_ids()]
    last = {text[-2:] if text.endswith(string) else text[-1] for text in texts}
    assert {"A", ".", string} <= last and len(ends) == 2
    assert all("A" not in text[:-1] and string not in text[:-1] for text in texts)
    for ids, text, finished in zip(rollout.completion_ids(), texts, rollout.finished.tolist(), strict=True):
        assert finished == (ids[-1] in ends or text.endswith(string)) and (finished or len(ids) == 5)
    greedy = dataclasses.replace(learner.collector.sampling, temperature=0.0, stop_strings=())
    likely = learner.collector.engine.sample(learner.student, prompts, greedy, 0)
    for prompt, ids in zip(prompts, likely.completion_ids(), strict=True):
        logits = learner.student(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        assert ids == logits.argmax(-1).tolist()


def test_a_run_samples_ahead_and_its_evaluations_do_not(server, pair, tmp_path):
    words = {"rollout_url": server.url, "rollout_folder": tmp_path, "rollout_ahead": 1, "steps": 3}
    assert main(arguments(pair, tmp_path / "runs", rollout="vllm", sampler_correction="sequence", **words)) == 0
    records = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    apart = [record["sampling/sampling_logp_difference/max"] for record in records]
    assert apart[0] < EXACT < min(apart[1:])
    assert all(0 < record["sampling/effective_sample_ratio"] < 1 + 1e-5 for record in records)


def test_an_engine_that_dies_is_named_in_time(server, pair, held, tmp_path):
    """The last test of the server: its core is killed. What is asked then ends with a line, and the server ends too.
    A call that vLLM has lost, and still says it is in health, is one without an answer in time."""
    learner, rows, prompts = learner_of(on(server, pair, tmp_path, rollout_timeout=20.0), held)
    learner.step(rows, prompts)
    [core] = [each for each in _family(server) if "EngineCore" in " ".join(each.cmdline())]
    core.kill()
    said = "answered|cannot be reached|is not there|has not answered in 20 s"
    with pytest.raises(InputError, match=f"the vLLM server at {server.url} ({said})"):
        learner.step(rows, prompts)


CALLS = """
import inspect
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine as Engine
ParamMeta("name", None, (1,))
about = NCCLTrainerInitInfo(master_address="127.0.0.1", master_port=1, world_size=2, rank=0)
assert about.is_sender
client = HTTPVLLMWeightSyncClient("http://x", timeout=1.0)
inspect.signature(Engine.trainer_init).bind(about, client=client, source=None)
inspect.signature(Engine.send_weights).bind(None)
"""


def test_the_calls_of_the_nccl_transfer_are_vllms():
    """No GPU is here to send from: that its classes take what engine/nccl.py gives them is all that is seen."""
    subprocess.run([PYTHON, "-c", CALLS], check=True, capture_output=True)
