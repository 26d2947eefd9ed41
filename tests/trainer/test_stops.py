"""What ends a completion: tokens of both models, tokens and strings of the user's; and one that does not end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from chain import chain_model
from tiny_pair import learner_of, settings, tiny_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmdp_fast.errors import InputError
from cmdp_fast.trainer import stops
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.models.saving import save_student
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.rollout import encode_prompts, generate
from cmdp_fast.trainer.user_rollout import call_rollout

RIGHT = {"=": "9", "9": ";", ";": "7", "7": "7"}  # the answer, its end, and what follows an end that is not known


@pytest.fixture(scope="module")
def chains(pair, tmp_path_factory):
    """A teacher that answers right and ends with `;`, and a student that never ends."""
    root = tmp_path_factory.mktemp("chains")
    return {
        **pair,
        "student": chain_model(root / "student", {"=": "1", "1": "+", "+": "2", "2": "="}),
        "teacher": chain_model(root / "teacher", RIGHT, end=";"),
    }


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("where", ["generation_config", "tokenizer"])
def test_a_teacher_that_ends_with_a_token_of_its_own(where, chains, tmp_path):
    """It was sampled past its end, and no answer of its was right."""
    folder = chains["teacher"]
    if where == "tokenizer":
        folder = chain_model(tmp_path, RIGHT)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = ";"
        tokenizer.save_pretrained(folder)
    config = settings({**chains, "teacher": folder}, answer_pattern=r"^(\d+);?$")
    learner, rows, _ = learner_of(config)
    figures, samples = evaluate(learner.collector, learner.teacher, rows, Clock())
    assert figures["accuracy"] == 1.0 and figures["truncated"] == 0.0 and figures["mean_length"] == 2.0
    assert {sample["completion"] for sample in samples} <= {"9;", "9"}


@pytest.mark.parametrize("algorithm", ["sft", "kd"])
def test_a_student_of_its_text_learns_that_end(algorithm, chains, tmp_path):
    """And none of the text behind it; the student's `generate`, once it is saved, knows the token."""
    learner, rows, prompts = learner_of(settings(chains, algorithm=algorithm))
    experience = learner.method.collect(rows, prompts, learner.constraint())
    semicolon = ids_of(learner.collector.tokenizer, ";")[0]
    assert [ids[-1] for ids in experience.rollout.completion_ids()] == [semicolon] * len(rows)
    assert experience.rollout.mask.sum(1).tolist() == [2] * len(rows) and experience.rollout.finished.all()
    save_student(learner.student, learner.collector.tokenizer, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert set(saved.generation_config.eos_token_id) == {learner.collector.tokenizer.eos_token_id, semicolon}
    assert not saved.generation_config._from_model_config


def test_models_that_end_alike_are_left_as_they_are(pair):
    learner, _, _ = learner_of(settings(pair))
    assert learner.student.generation_config.eos_token_id == 2 and learner.collector.sampling.eos == (2,)


def test_an_end_of_minus_one_is_none(pair, tmp_path):
    """It was a token of its own, and the saved student's too."""
    folder = tiny_model(tmp_path, 0)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps(json.loads((tmp_path / name).read_text()) | {"eos_token_id": -1}))
    learner, _, _ = learner_of(settings({**pair, "student": folder}))
    assert learner.collector.sampling.eos == (2,) and learner.student.generation_config.eos_token_id == [2]


def test_stop_tokens_by_name(chains):
    learner, _, prompts = learner_of(settings(chains, stop_tokens=("+",)))
    rollout = generate(learner.student, prompts, learner.collector.sampling)
    texts = learner.collector.tokenizer.batch_decode(rollout.completion_ids())
    assert texts == ["1+"] * len(prompts) and rollout.finished.all()
    for name in ("<|im_end|>", "12"):
        with pytest.raises(InputError, match=r"--stop-tokens .* is no token of the student's tokenizer"):
            learner_of(settings(chains, stop_tokens=(name,)))
    with pytest.raises(InputError, match="take no empty text"):
        settings(chains, stop_strings=("",))


@pytest.mark.parametrize(
    ("string", "expected", "finished"),
    [("+2", "1+2", True), ("=1", "1+2=1", True), ("3", "1+2=1+", False), ("2=1+2=1", "1+2=1+", False)],
)
def test_stop_strings_are_those_of_the_completion(string, expected, finished, chains):
    """The prompts end with `=`, so that `=1` would end every completion at once if they counted."""
    learner, rows, prompts = learner_of(settings(chains, stop_strings=(string, "A")))
    completions = learner.collector.complete(learner.student, rows, prompts, Clock())
    assert completions.texts == [expected] * len(rows)
    assert completions.rollout.finished.tolist() == [finished] * len(rows)
    assert completions.rollout.mask.sum(1).tolist() == [len(expected)] * len(rows)


def test_generation_ends_with_its_last_stop_string(chains):
    learner, _, prompts = learner_of(settings(chains, max_new_tokens=30, stop_strings=("+2",)))
    calls = []
    learner.student.register_forward_pre_hook(lambda *_: calls.append(1))
    generate(learner.student, prompts, learner.collector.sampling)
    assert len(calls) == 3


def test_rows_that_end_at_different_tokens(chains):
    """What `generate` fills a row with after its stop string is no part of it."""
    learner, _, _ = learner_of(settings(chains, stop_strings=("+2",)))
    tokenizer = learner.collector.tokenizer
    prompts = [ids_of(tokenizer, text) for text in ("9=", "1", "9+")]
    rollout = generate(learner.student, prompts, learner.collector.sampling)
    assert tokenizer.batch_decode(rollout.completion_ids()) == ["1+2", "+2", "2=1+2"] and rollout.finished.all()


def test_what_the_last_token_has_behind_a_string_is_no_text(chains):
    learner, rows, prompts = learner_of(settings(chains, stop_strings=("+2",)))
    learner.collector.tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: ["1+2=7"] * len(ids))
    completions = learner.collector.complete(learner.student, rows, prompts, Clock())
    assert completions.texts == ["1+2"] * len(rows)


class Pieces:
    """A tokenizer whose tokens are texts of any length."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


def test_a_completion_is_cut_after_the_token_that_completes_a_string():
    tokenizer = Pieces("ab", "c\n", "\nd", "e", "</s>")
    assert stops.cut_tokens([0, 1, 2, 3, 1, 2], ["\n\n"], tokenizer) == [0, 1, 2]
    assert stops.cut_tokens([0, 1, 2, 3], ["dx", "ed"], tokenizer) == [0, 1, 2, 3]
    assert stops.cut_tokens([0, 1, 2, 3], ["e", "bc"], tokenizer) == [0, 1]
    assert stops.cut_tokens([0, 4, 3], ["</s>"], tokenizer) == [0, 4]
    assert stops.ends_with_string([0, 1, 2], ["\n\n"], tokenizer) and not stops.ends_with_string([0], [], tokenizer)
    assert stops.cut_text("abc\n\nd", ["\n\n"]) == "abc\n\n"
    assert stops.cut_text("abc\n\nd", ["\n\n", "b"]) == "ab" and stops.cut_text("abc", ["d"]) == "abc"
    criterion = stops.string_criterion(["\n\n"], tokenizer, 2)
    rows = torch.tensor([[1, 2, 0, 0], [0, 0, 1, 2], [0, 1, 2, 3]])  # of the last the string begins in the prompt
    assert criterion(rows, None).tolist() == [False, True, False]


def test_a_rollout_of_the_users_own_is_cut(chains):
    learner, _, prompts = learner_of(settings(chains, stop_strings=("+2",)))
    ids = ids_of(learner.collector.tokenizer, "1+2=")
    result = {"completion_ids": [ids, ids[:1]], "logprobs": [[-1.0, -2.0, -3.0, -4.0], [-5.0]]}
    rollout = call_rollout(lambda **_: result, "mine", prompts[:2], learner.collector.sampling, learner.student)
    assert rollout.completion_ids() == [ids[:3], ids[:1]] and rollout.finished.tolist() == [True, False]
    assert rollout.sampler_logprob.tolist() == [[-1.0, -2.0, -3.0], [-5.0, 0.0, 0.0]]


def test_end_tokens_beyond_the_columns_are_told(pair, tmp_path, caplog):
    folder = tiny_model(tmp_path, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    learner_of(settings({**pair, "student": folder}))
    assert "beyond the 17 columns" in caplog.text and "the student ends with token" in caplog.text
    caplog.clear()
    learner, _, _ = learner_of(settings({**pair, "student": folder}, stop_tokens=(";",)))
    assert ids_of(tokenizer, ";")[0] in learner.collector.sampling.eos and "beyond" not in caplog.text


def test_an_end_behind_the_prompt_is_not_part_of_it(pair):
    tokenizer = AutoTokenizer.from_pretrained(pair["student"])
    rows = [{"prompt": "1+2="}, {"prompt": ";"}]
    plain = encode_prompts(rows, tokenizer)
    [begin] = ids_of(tokenizer, "A")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="A $A ; ;", special_tokens=[("A", begin), (";", ids_of(tokenizer, ";")[0])]
    )
    assert tokenizer("1")["input_ids"][-2:] == ids_of(tokenizer, ";;")
    assert encode_prompts(rows, tokenizer) == [[begin, *ids] for ids in plain]


# ------------------------------------------------------------------------------------- completions without an end


def truncating(pair, **changes):
    """A learner on four completions of a prompt of which two do not end."""
    spec = {"rewards": ("exact_answer",), "baseline": "rloo", "minibatch_size": 4, "epochs": 1, "prompts_per_step": 1}
    learner, rows, prompts = learner_of(settings(pair, **{**spec, **changes}))
    one, two = ids_of(learner.collector.tokenizer, "9"), ids_of(learner.collector.tokenizer, "12")
    eos = learner.collector.sampling.eos[0]
    completions = [[*one, eos], [*one * 6], [*two, eos], [*two, *one]]
    learner.collector.rollout = lambda **_: {"completion_ids": completions}
    return learner, rows, prompts


def weights(learner):
    return torch.cat([parameter.detach().flatten() for parameter in learner.student.parameters()])


@pytest.mark.parametrize("kind", ["hinge", "lagrangian"])
def test_masked_completions_count_for_the_comparison_and_give_no_gradient(kind, pair):
    """As in TRL: advantages are those of the whole group, the loss has none of the truncated, through neither term."""
    changes = {"kind": kind, "coefficient": 0.5, "budget": 0.5}
    learner, rows, prompts = truncating(pair, mask_truncated_completions=True, **changes)
    metrics = learner.step(rows, prompts)
    other, rows, prompts = truncating(pair, **changes)
    targets = other.method.targets

    def without(experience, constraint):
        everything = targets(experience, constraint)
        assert all(tensor[1].any() for tensor in everything.values())
        return {name: tensor * experience.rollout.finished[:, None] for name, tensor in everything.items()}

    other.method.targets = without
    theirs = other.step(rows, prompts)
    assert torch.allclose(weights(learner), weights(other), rtol=0, atol=1e-6)
    for name in ("reward", "completions/mean_length", "completions/clipped_ratio", "cmdp/mean_cumulative"):
        assert metrics[name] == theirs[name]
    plain, rows, prompts = truncating(pair, **changes)
    plain.step(rows, prompts)
    assert not torch.allclose(weights(learner), weights(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["ppo", "gkd", "minillm"])
def test_a_step_without_a_finished_completion_changes_nothing(algorithm, pair):
    learner, rows, prompts = truncating(pair, mask_truncated_completions=True, algorithm=algorithm)
    one = ids_of(learner.collector.tokenizer, "9")
    learner.collector.rollout = lambda **_: {"completion_ids": [one] * 4}
    before = weights(learner)
    learner.collector.complete = _without_mixture(learner.collector.complete)
    metrics = learner.step(rows, prompts)
    assert metrics["grad_norm"] == 0.0 and metrics["loss"] == 0.0 and torch.equal(weights(learner), before)


def _without_mixture(complete):
    return lambda policy, rows, prompts, clock, mixed_with=None, *others: complete(policy, rows, prompts, clock)


def test_the_penalty_of_a_missing_end(pair):
    learner, rows, prompts = truncating(pair, missing_eos_penalty=0.75)
    experience = learner.method.collect([*rows] * 4, [*prompts] * 4, learner.constraint())
    assert experience.task_reward.tolist() == [1.0, -0.75, 0.0, -0.75]
    assert experience.named_rewards["exact_answer"].tolist() == [1.0, 0.0, 0.0, 0.0]
