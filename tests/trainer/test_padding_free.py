"""`--padding-free`: the statistics, losses and gradients of padded micro-batches, and refusals of models that mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_micro_batches import METHODS, unlike
from tiny_models import gradients
from tiny_pair import learner_of, settings, tiny_model

from cmdp_fast import batches
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.dry_run import dry_run
from cmdp_fast.trainer.micro_batches import Lengths, lengths_of, split, split_into

CASES = {
    **{f"llama, {name}": ("llama", changes) for name, changes in METHODS.items()},
    "qwen2, cmdp": ("qwen2", METHODS["cmdp"]),
    "gpt2, cmdp": ("gpt2", METHODS["cmdp"]),
    "adapter": ("llama", {"lora_rank": 2, "lora_target": ("q_proj", "v_proj"), "gradient_checkpointing": True}),
    "bootstrap": ("llama", {"baseline": "gae", "bootstrap_truncated": True}),
}


def test_places_are_real_tokens():
    lengths = Lengths([2, 5, 1, 1, 2], [3, 3, 9, 1, 3])
    parts = split(range(5), lengths, count=9, tokens=18, packed=True)
    assert [(part.rows, part.tokens, part.padded) for part in parts] == [([2, 1], 18, 18), ([0, 4, 3], 12, 12)]
    assert [part.rows for part in split(range(5), lengths, count=2, tokens=18, packed=True)] == [[2, 1], [0, 4], [3]]
    assert [part.rows for part in split(range(5), lengths, count=9, tokens=1, packed=True)] == [[2], [1], [0], [4], [3]]
    halved = split_into(3, parts, lengths)
    assert [(part.rows, part.padded) for part in halved] == [([2], 10), ([1], 8), ([0, 4, 3], 12)]


@pytest.fixture(scope="module")
def pairs(pair, tmp_path_factory):
    """Students and teachers of a family."""
    made: dict[str, dict[str, str]] = {}

    def of(family: str) -> dict[str, str]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            roles = enumerate(("student", "teacher"))
            made[family] = pair | {
                role: tiny_model(folder / role, seed, layers=2, family=family) for seed, role in roles
            }
        return made[family]

    return of


def figures(learner: Any, scored: Any, order: torch.Tensor, constraint: Any) -> tuple[Any, torch.Tensor, dict]:
    """Statistics of a batch, loss and gradients of a minibatch."""
    trained = torch.nn.ModuleList([learner.student, *filter(None, [learner.method.value_head])])
    targets = learner.method.targets(scored, constraint)
    loss = learner._accumulate(scored, targets, constraint, order, lengths_of(scored.rollout))["loss"]
    return (scored.stats, scored.trace, scored.reward, scored.value, targets), loss, gradients(trained)


@pytest.mark.parametrize("case", CASES)
def test_statistics_loss_and_gradient_are_those_with_padding(case, pairs):
    family, changes = CASES[case]
    changes = {"teacher_cache_mb": 0, "micro_batch_tokens": 30, **changes}
    given = pairs(family)
    if "lora_rank" in changes:  # the teacher is the student without its adapter
        given = {**given, "teacher": given["student"]}
    found = []
    for free in (False, True):
        learner, rows, prompts = learner_of(settings(given, padding_free=free, **changes))
        prompts = [ids[-n:] for n, ids in zip((1, 3, 99), prompts, strict=True)]
        learner.collector.rollout = unlike
        torch.manual_seed(0)
        for model in (learner.student, learner.teacher):
            model.double()
        for name, weight in learner.student.named_parameters():
            if "lora_B" in name:  # which begins with zeros
                torch.nn.init.normal_(weight)
        if learner.method.value_head is not None:
            torch.nn.init.normal_(learner.method.value_head.linear.weight)
        constraint = learner.constraint()
        group = [[item for item in items for _ in range(4)] for items in (rows, prompts)]
        experience = learner.method.collect(*group, constraint)
        assert len(set(lengths_of(experience.rollout).completions)) > 1
        read: set[int] = set()  # rows at once
        for model in (learner.student, learner.teacher):
            model.get_input_embeddings().register_forward_hook(lambda _, x, __, read=read: read.add(len(x[0])))
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        found.append(figures(learner, experience, order, constraint))
        splitter = learner.collector.splitter
        assert splitter.padded_tokens == splitter.real_tokens if free else splitter.padded_tokens > splitter.real_tokens
        assert (read == {1}) == free
    (padded, loss, expected), (packed, other, actual) = found
    batches.united([padded, packed], lambda both: torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=1e-7))
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)
    assert expected.keys() == actual.keys() != set()
    for weight, gradient in expected.items():
        # A value head is float32, and so are the advantages that it has a part in
        near = 1e-9 if learner.method.value_head is None else 1e-6 * gradient.abs().max().item()
        torch.testing.assert_close(actual[weight], gradient, rtol=1e-6, atol=near)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("role", "logits"), [("student", "full"), ("teacher", "tiled")])
def test_a_model_that_mixes_is_refused(role, logits, precision, pair, tmp_path):
    given = {**pair, role: tiny_model(tmp_path, seed=1, layers=2, family="bloom")}
    changes = {"logits": logits, "mixed_precision": precision}
    for work in (learner_of, dry_run):
        with pytest.raises(InputError, match=f"the {role} cannot be used with --padding-free: BloomForCausalLM mixes"):
            work(settings(given, padding_free=True, **changes))
    learner_of(settings(given, **changes))
    dry_run(settings(pair, padding_free=True, **changes))
