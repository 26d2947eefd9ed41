"""TRL's trainers with a teacher that is asked: the figures of a run whose teacher is a model beside the student."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import torch
from datasets import Dataset
from likeliest import Likeliest
from test_trl_grpo import ROUNDING
from tiny_pair import tiny_model
from transformers import AutoTokenizer
from trl_pair import distillation, grpo, logged, student

from cmdp_fast import http_client
from cmdp_fast.errors import InputError
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.served.server import TeacherServer
from cmdp_fast.teachers.teacher import Teacher, TeacherOutputs

PROMPTS = Dataset.from_list([{"prompt": prompt} for prompt in ("1=", "1+2+3+4=", "1+2=", "1+2+3=", "9=")])
FIGURES = ("loss", "grad_norm", "entropy", "cmdp/cumulative_kl", "completions/mean_length")


@pytest.fixture(autouse=True)
def asked_once(monkeypatch):
    """A server that does not answer is not waited for."""
    monkeypatch.setattr(http_client, "WAITS", ())


def asked(folder: str, **options) -> TeacherInProcess:
    return TeacherInProcess(student(folder, **options), AutoTokenizer.from_pretrained(folder), "a teacher")


@pytest.fixture
def served(pair):
    """The pair's teacher on a server, and its name."""
    teacher = asked(pair["teacher"])
    server = TeacherServer(teacher, teacher.vocabulary()).start()
    yield SimpleNamespace(name=f"served:{server.url}", close=server.close)
    server.close()


class Counting(Teacher):
    """Another teacher, whose questions are counted."""

    def __init__(self, teacher: TeacherInProcess) -> None:
        self.teacher, self.about, self.head, self.rows = teacher, teacher.about, teacher.head, 0

    def answer(self, rows, wanted) -> TeacherOutputs:
        self.rows += len(rows)
        return self.teacher.answer(rows, wanted)

    def vocabulary(self) -> dict[str, int]:
        return self.teacher.vocabulary()


def figures(make, pair, folder, teacher, **changes):
    """The figures of a short run, by step, of prompts of different length."""
    given = {"teacher_model": teacher, "train_dataset": PROMPTS}
    trainer = make(pair, folder, trainer=given, **{"max_steps": 4, "num_generations": 4, **changes})
    trainer.train()
    return {name: logged(trainer, name) for name in FIGURES}


CASES = [
    (grpo, {"num_iterations": 2}),
    (grpo, {"cost": "k1", "kind": "lagrangian", "coefficient": 0.3}),
    (grpo, {"teacher_cache_mb": 0, "scale_rewards": "none", "mask_truncated_completions": True}),
    (grpo, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "beta": 0.1}),
    (distillation, {"beta": 0.5}),
    (distillation, {"beta": 1.0, "budget": 1.0}),
]


@pytest.mark.parametrize(
    ("make", "changes"), CASES, ids=lambda case: getattr(case, "__name__", None) or "-".join(map(str, case))
)
def test_the_figures_are_those_of_a_teacher_beside_the_student(pair, tmp_path, served, make, changes):
    """Up to rounding: that one reads the padding of TRL's batches, one that is asked never does. Served and in this
    process they are the same to the last digit."""
    beside = figures(make, pair, tmp_path, student(pair["teacher"]), **changes)
    here = figures(make, pair, tmp_path, asked(pair["teacher"]), **changes)
    assert figures(make, pair, tmp_path, served.name, **changes) == here
    for name, expected in beside.items():
        assert here[name] == pytest.approx(expected, **ROUNDING), name
    assert len(beside["loss"]) == 4 and any(beside["grad_norm"]) and beside["cmdp/cumulative_kl"]


@pytest.mark.parametrize("make", [grpo, distillation])
def test_a_table_of_positions_and_another_width(tmp_path, make):
    """A student whose positions are counted for it, and a teacher with more columns and more positions."""
    pair = {
        "student": tiny_model(tmp_path / "s", seed=1, family="gpt2"),
        "teacher": tiny_model(tmp_path / "t", seed=2, family="gpt2", spare=3, positions=96),
    }
    settings = {"disable_dropout": True}
    beside = figures(make, pair, tmp_path, student(pair["teacher"]), **settings)
    here = figures(make, pair, tmp_path, asked(pair["teacher"]), **settings)
    for name, expected in beside.items():
        assert here[name] == pytest.approx(expected, **ROUNDING), name


def test_the_update_asks_again_for_what_there_was_no_room_to_keep(pair, tmp_path):
    """And comes to the same figures."""
    found = {}
    for size in (512, 0):
        teacher = Counting(asked(pair["teacher"]))
        run = figures(grpo, pair, tmp_path, teacher, teacher_cache_mb=size, num_iterations=2)
        found[size] = run, teacher.rows
    rows = 2 * 4  # of two batches of generations, each for two steps
    assert found[512] == (found[0][0], rows)
    assert found[0][1] == rows + 4 * 4


def test_a_server_that_goes_away_is_named(pair, tmp_path, served):
    given = {"teacher_model": served.name, "train_dataset": PROMPTS}
    trainer = grpo(pair, tmp_path, trainer=given, budget=math.inf, max_steps=1)
    served.close()
    with pytest.raises(InputError, match=r"^the teacher at http://[^\n]*$"):
        trainer.train()


def test_what_does_not_fit_is_refused_before_anything_is_trained(pair, tmp_path, served):
    def refused(message, teacher=None, make=grpo, **changes):
        given = {"teacher_model": teacher or served.name}
        with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
            make(pair, tmp_path, trainer=given, num_generations=4, **changes)

    refused("served: names no teacher that can be asked", "served:")
    refused("there is no revision for a teacher that is asked", teacher_model_init_kwargs={"revision": "main"})
    refused("seconds must be a float, got '9'", teacher_model_init_kwargs={"seconds": "9"})
    refused("token_file must be a str, got True", teacher_model_init_kwargs={"token_file": True})
    refused("is loaded already", asked(pair["teacher"]), teacher_model_init_kwargs={"seconds": 9})
    for make in (grpo, distillation):
        refused("share a tokenizer, but token", asked(tiny_model(tmp_path / "o", 3, alphabet="0123456789+=;B")), make)
        short = tiny_model(tmp_path / "short", 3, positions=6)
        refused("max_completion_length=6 leaves no room .* teacher_model has positions for 6", asked(short), make)
        headless = asked(pair["teacher"])
        headless.head = None
        refused("teacher_model cannot be used: the teacher a teacher has no head", headless, make)


def test_a_prompt_and_completion_too_long_for_the_teacher(tmp_path):
    """Is refused as for a model beside the student."""
    pair = {"student": tiny_model(tmp_path / "s", seed=1), "teacher": tiny_model(tmp_path / "t", 2, positions=13)}
    with pytest.raises(InputError, match="but teacher_model has positions for 13 alone"):
        figures(grpo, pair, tmp_path, asked(pair["teacher"]), max_steps=5)


@pytest.mark.parametrize(
    ("make", "changes"),
    [(grpo, {"cost": "reverse_kl"}), (grpo, {"cost": "forward_kl"}), (distillation, {"beta": 1.0, "budget": 0.5})],
    ids=["grpo reverse", "grpo forward", "distillation"],
)
def test_its_most_likely_tokens_bound_the_cost(pair, tmp_path, make, changes):
    """Of all tokens they are the teacher itself, up to rounding; of two the cost is less."""
    whole = figures(make, pair, tmp_path, asked(pair["teacher"]), **changes)
    columns = asked(pair["teacher"]).about.vocab_size
    found = {}
    for k in (columns, 2):
        teacher = Likeliest(student(pair["teacher"]), AutoTokenizer.from_pretrained(pair["teacher"]), "a teacher", k=k)
        found[k] = figures(make, pair, tmp_path, teacher, **changes)
    for name in ("loss", "cmdp/cumulative_kl"):
        assert found[columns][name] == pytest.approx(whole[name], rel=1e-3, abs=1e-4), name
    assert found[2]["cmdp/cumulative_kl"][0] < 0.99 * whole["cmdp/cumulative_kl"][0]


def test_what_its_most_likely_tokens_do_not_bound_is_refused(pair, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pair["teacher"])
    teacher = Likeliest(student(pair["teacher"]), tokenizer, "a teacher", k=3)
    for make, changes, message in (
        (grpo, {"cost": "k1"}, "not k1 at temperature 1"),
        (grpo, {"temperature": 0.5}, "not reverse_kl at temperature 0.5"),
        (distillation, {"beta": 0.5}, r"not JSD\(0.5\) at temperature 1"),
    ):
        with pytest.raises(InputError, match=message):
            figures(make, pair, tmp_path, teacher, **changes)


def test_under_bfloat16_autocast(pair, tmp_path):
    """The hidden states stay in the dtype in which they come."""
    teacher = asked(pair["teacher"])
    run = figures(grpo, pair, tmp_path, teacher, bf16=True)
    assert all(map(math.isfinite, run["loss"])) and teacher.own_head().weight.dtype == torch.float32
