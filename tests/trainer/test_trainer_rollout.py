"""Rollouts: in batches of like length, from a part of the softmax, or by a function of the user's own."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from tiny_pair import arguments, learner_of, settings

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.rollout import generate
from cmdp_fast.trainer.user_rollout import call_rollout


def test_batches_of_like_length_come_back_in_order(pair):
    """With one candidate a token, a completion depends on its prompt alone: neither on its batch nor on padding."""
    learner, _, prompts = learner_of(settings(pair))
    prompts = [ids * repeat for repeat in (5, 1, 3) for ids in prompts]
    greedy = dataclasses.replace(learner.collector.sampling, top_k=1)
    alone = [generate(learner.student, [ids], greedy).completion_ids()[0] for ids in prompts]
    assert len(set(map(tuple, alone))) > 2
    shapes = []
    embed = learner.student.get_input_embeddings()
    handle = embed.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    together = generate(learner.student, prompts, dataclasses.replace(greedy, batch_size=4))
    handle.remove()
    assert together.completion_ids() == alone
    assert [ids[mask].tolist() for ids, mask in zip(together.prompt_ids, together.prompt_mask, strict=True)] == prompts
    lengths = sorted(len(ids) for ids in prompts)
    assert [shape for shape in shapes if shape[1] > 1] == [(4, lengths[3]), (4, lengths[7]), (1, lengths[8])]


def test_generation_keeps_a_cache(pair):
    learner, _, prompts = learner_of(settings(pair))
    widths = []
    embed = learner.student.get_input_embeddings()
    handle = embed.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    rollout = generate(learner.student, prompts, learner.collector.sampling)
    handle.remove()
    assert widths == [rollout.prompt_ids.shape[1]] + [1] * (rollout.tokens.shape[1] - 1)


def test_top_p_draws_from_the_likely_tokens_only(pair):
    learner, _, prompts = learner_of(settings(pair, top_p=0.5))
    assert learner.collector.sampling.top_p == 0.5
    with torch.no_grad():
        p = learner.student(torch.tensor(prompts[:1])).logits[0, -1].softmax(-1)
    ranked, order = p.sort(descending=True)
    nucleus = set(order[ranked.cumsum(0) - ranked < 0.5].tolist())
    drawn = set(generate(learner.student, prompts[:1] * 500, learner.collector.sampling).tokens[:, 0].tolist())
    assert drawn == nucleus and len(nucleus) < len(p)


def test_temperature_0_takes_the_most_likely_token(pair):
    """And nothing else is set that a greedy search has no use for."""
    learner, _, prompts = learner_of(settings(pair, top_k=3, top_p=0.5))
    sampling = dataclasses.replace(learner.collector.sampling, temperature=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [drawn] = {tuple(ids) for ids in generate(learner.student, prompts[:1] * 20, sampling).completion_ids()}
    ids = list(prompts[0])
    for token in drawn:
        assert token == int(learner.student(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


SERVER = """
def rollout(prompts, sampling, policy):
    completions = [[ids[0], ids[-1], sampling.eos[0]] if i % 2 else [ids[0]] for i, ids in enumerate(prompts)]
    return {"completion_ids": completions, "logprobs": [[-2.0] * len(ids) for ids in completions]}
"""


def test_a_rollout_of_the_users_own_is_scored_again(pair, tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    spec = f"{tmp_path / 'server.py'}:rollout"
    learner, rows, prompts = learner_of(settings(pair, rollout=spec))
    rows, prompts = ([item for item in items for _ in range(4)] for items in (rows, prompts))
    experience = learner.method.collect(rows, prompts, learner.constraint())
    eos = learner.collector.sampling.eos[0]
    assert experience.rollout.completion_ids()[:2] == [[prompts[0][0]], [prompts[1][0], prompts[1][-1], eos]]
    assert experience.rollout.finished.tolist() == [False, True] * 6
    mask = experience.rollout.mask
    off = (experience.stats.logprob + 2.0).abs()[mask]
    metrics = learner.collector.measure(experience, learner.constraint())
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(off.mean().item(), rel=1e-5)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(off.max().item(), rel=1e-5)
    assert metrics["completions/clipped_ratio"] == 0.5
    teachers = learner.collector.collect(learner.teacher, rows, prompts, learner.constraint(), learner.clock)
    assert teachers.rollout.sampler_logprob is None  # the function samples for the student alone
    assert main(arguments(pair, tmp_path, rollout=spec)) == 0


def test_logprobs_of_some_calls_alone_are_compared_with_nothing(pair):
    """The batches of an evaluation were joined by the first: 'NoneType' object has no attribute 'shape'."""
    learner, rows, _ = learner_of(settings(pair, num_generations=2, prompts_per_step=1, baseline="rloo"))
    given = iter([[[-1.0, -1.0]] * 2, None, [[-1.0, -1.0]] * 2, None])
    learner.collector.rollout = lambda **_: {"completion_ids": [[4, 5]] * 2, "logprobs": next(given)}
    figures, samples = evaluate(learner.collector, learner.student, rows[:1] * 2, Clock())
    assert len(samples) == 6 and figures["mean_length"] == 2.0


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ([], "must return a dict with completion_ids"),
        (None, "must return a dict with completion_ids, it returned NoneType"),
        ({"completion_ids": [[3]]}, "1 completions for 2 prompts"),
        ({"completion_ids": None}, "returned a NoneType, expected 2 completions"),
        ({"completion_ids": [[3], None]}, "no list of integers, expected tokens from 0 to 16"),
        ({"completion_ids": [[3], ["3"]]}, "no list of integers"),
        ({"completion_ids": [[3], [3.5]]}, "no list of integers"),
        ({"completion_ids": [[3], []]}, "a completion of 0 tokens"),
        ({"completion_ids": [[3], [3] * 7]}, "a completion of 7 tokens, expected 1 to 6"),
        ({"completion_ids": [[3], [3, 2, 3]]}, "after an end of sequence"),
        ({"completion_ids": [[3], [17]]}, "returned token 17, expected tokens from 0 to 16"),
        ({"completion_ids": [[3], [-1]]}, "returned token -1"),
        ({"completion_ids": [[3], [10**5000]]}, "returned token <int>, expected tokens from 0 to 16"),
        (
            {"completion_ids": [[3], [3, 2]], "logprobs": [[-1.0], [-1.0]]},
            "logprobs of other lengths .* 1 numbers for 2",
        ),
        ({"completion_ids": [[3], [3, 2]], "logprobs": [[-1.0]]}, "1 rows of logprobs for 2 prompts"),
        ({"completion_ids": [[3], [3]], "logprobs": [[-1.0], None]}, "a NoneType, expected 1 numbers"),
        ({"completion_ids": [[3], [3]], "logprobs": [[-1.0], [None]]}, "returned None among its logprobs"),
        ({"completion_ids": [[3], [3]], "logprobs": [[-1.0], [math.nan]]}, "returned nan among its logprobs"),
        ({"completion_ids": [[3], [3]], "logprobs": [[-1.0], ["x"]]}, "returned 'x' among its logprobs"),
        ({"completion_ids": [[3], [3]], "logprobs": 1.0}, "a float, expected 2 rows of logprobs"),
    ],
)
def test_what_a_rollout_may_not_return(result, expected, pair):
    learner, _, prompts = learner_of(settings(pair))
    assert learner.collector.sampling.eos == (2,)
    with pytest.raises(InputError, match=f"^--rollout mine .*{expected}"):
        call_rollout(lambda **_: result, "mine", prompts[:2], learner.collector.sampling, learner.student)


def test_a_rollout_that_raises(pair):
    learner, _, prompts = learner_of(settings(pair))

    def down(**_):
        raise ConnectionError("no server\nat this address")

    with pytest.raises(
        InputError, match=r"^--rollout mine raised ConnectionError: no server \(.*test_trainer_rollout.py:\d+\)$"
    ):
        call_rollout(down, "mine", prompts, learner.collector.sampling, learner.student)


def test_a_rollout_may_return_arrays_and_tensors(pair):
    learner, _, prompts = learner_of(settings(pair))
    result = {
        "completion_ids": [torch.tensor([3, 4]), np.array([5])],
        "logprobs": [torch.tensor([-1.0, -2.0]), np.array([-3.0])],
    }
    rollout = call_rollout(lambda **_: result, "mine", prompts[:2], learner.collector.sampling, learner.student)
    assert rollout.completion_ids() == [[3, 4], [5]] and rollout.sampler_logprob.tolist() == [[-1.0, -2.0], [-3.0, 0.0]]
