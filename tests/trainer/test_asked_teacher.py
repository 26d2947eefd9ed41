"""Runs whose teacher is on a server: the figures of a run that holds the teacher itself, and what ends otherwise."""

from __future__ import annotations

import json
import os
import threading
from itertools import count
from pathlib import Path

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from tiny_pair import arguments, learner_of, settings, tiny_model, untimed
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_processes import in_two_processes, run_command, run_sharded
from vllm_stand_in import StandIn

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.served.client import ServedTeacher
from cmdp_fast.teachers.served.server import TeacherServer
from cmdp_fast.trainer.records.origin import model_digest
from cmdp_fast.trainer.settings.unread import check_read
from cmdp_fast.trainer.stops import end_tokens

OF_ASKING = ("teacher/bytes_per_token", "timing_s/teacher")


def served(folder: str, **places) -> TeacherServer:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ends = end_tokens(model, tokenizer)
    teacher = TeacherInProcess(model.requires_grad_(False), tokenizer, "a teacher", model_digest(folder), ends)
    return TeacherServer(teacher, teacher.vocabulary(), **places).start()


@pytest.fixture
def server(pair):
    server = served(pair["teacher"])
    yield server
    server.close()


@pytest.fixture
def asking(pair, server):
    """The pair, with the teacher on the server."""
    return {**pair, "teacher": f"served:{server.url}"}


def metrics(folder) -> list[dict[str, float]]:
    return [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cost": "jsd", "baseline": "gae", "teacher_cache_mb": 0, "budget": 0.5, "rewards": ("brevity",)},
        {"algorithm": "gkd", "jsd_beta": 0.3, "teacher_temperature": 1.3},
        {"algorithm": "minillm", "teacher_mix": 0.0},
        {"kind": "pid", "micro_batch_tokens": 40},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()) or "cmdp",
)
def test_steps_are_those_with_the_teacher_itself(changes, pair, asking):
    """To the last digit."""
    runs = []
    for models in (pair, asking):
        learner, rows, prompts = learner_of(settings(models, **changes))
        steps = [learner.step(rows, prompts) for _ in range(2)]
        runs.append([untimed(step) for step in steps])
        if models is asking:
            assert all(step["timing_s/teacher"] > 0 for step in steps)
            assert all(16 * 4 <= step["teacher/bytes_per_token"] < 16 * 4 + 200 for step in steps)
    for own, asked in zip(*runs, strict=True):
        assert {name: value for name, value in asked.items() if name not in OF_ASKING} == own


def test_with_logits_the_steps_are_those_but_for_rounding(pair, asking):
    """A teacher that is asked reads without an attention mask; one that makes its logits here has one."""
    runs = []
    for models in (pair, asking):
        learner, rows, prompts = learner_of(settings(models, logits="full"))
        runs.append(untimed(learner.step(rows, prompts)))
    for name, value in runs[0].items():
        assert runs[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_run_has_the_figures_of_one_with_the_teacher_itself(pair, asking, tmp_path):
    """From beginning to end, in whole files; the teacher alone is not evaluated, since nobody can sample it."""
    assert main(arguments(pair, tmp_path, name="own")) == 0
    assert main(arguments(asking, tmp_path, name="asked")) == 0
    for own, asked in zip(metrics(tmp_path / "own"), metrics(tmp_path / "asked"), strict=True):
        assert {name: value for name, value in asked.items() if name not in OF_ASKING} == own
    own, asked = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("own", "asked"))
    assert own["teacher"] and asked["teacher"] is None
    assert all(own[who] == asked[who] for who in ("student_before", "student_after"))
    assert (tmp_path / "asked" / "curves.png").stat().st_size > 0
    evaluate = [f"--resume={tmp_path / 'own'}", f"--json={tmp_path / 'own.json'}"]
    assert main(["evaluate", *evaluate]) == 0
    assert main(["evaluate", f"--resume={tmp_path / 'asked'}", f"--json={tmp_path / 'asked.json'}"]) == 2  # its place
    evaluate = [f"--resume={tmp_path / 'asked'}", f"--json={tmp_path / 'asked.json'}"]
    assert main(["evaluate", *evaluate, f"--teacher={asking['teacher']}"]) == 0
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "asked")]
    for each in found:
        del each["student"], each["teacher"]
    assert found[0] == found[1]


def test_a_teacher_on_vllm_gives_the_steps_of_the_teacher_itself(pair):
    """But for rounding, since it reads each completion alone."""
    with StandIn(pair["teacher"]).served() as stand_in:
        runs = []
        for models in (pair, {**pair, "teacher": f"vllm:{stand_in.url}"}):
            learner, rows, prompts = learner_of(settings(models))
            runs.append(untimed(learner.step(rows, prompts)))
    for name, value in runs[0].items():
        assert runs[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert runs[1]["teacher/bytes_per_token"] > 16 * 4  # the prompts' too


def test_a_server_that_is_gone_ends_the_run_which_goes_on_elsewhere(
    pair, asking, server, tmp_path, capsys, monkeypatch
):
    """With a checkpoint, and a line that names the server; then with the same teacher elsewhere, and no other."""
    plain = {"checkpoint_every": 1, "steps": 4, "rewards": "exact_answer", "teacher_timeout": 20.0}
    assert main(arguments(asking, tmp_path, name="whole", **plain)) == 0
    gone, answer = threading.Event(), TeacherInProcess.answer

    def until_two_steps_are_done(teacher, rows, wanted):
        if (tmp_path / "r" / "metrics.jsonl").exists() and len(metrics(tmp_path / "r")) == 2 and not gone.is_set():
            gone.set()
            threading.Thread(target=server.close).start()
        return answer(teacher, rows, wanted)

    monkeypatch.setattr(TeacherInProcess, "answer", until_two_steps_are_done)
    capsys.readouterr()
    assert main(arguments(asking, tmp_path, **plain)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"cmdp-fast: error: the teacher at {server.url} cannot be reached: ")
    assert len(metrics(tmp_path / "r")) in (2, 3)

    resume = ["train", f"--resume={tmp_path / 'r'}"]
    assert main(resume) == 2
    assert "--teacher=served:" in capsys.readouterr().err
    other = served(pair["student"])
    assert main([*resume, f"--teacher=served:{other.url}"]) == 2
    assert "not what the run began with" in capsys.readouterr().err
    assert main([*resume, f"--teacher=served:{other.url}", "--teacher-wire=int8"]) == 2
    assert "began with nothing, and a run goes on as it began" in capsys.readouterr().err
    other.close()
    again = served(pair["teacher"], path=str(tmp_path / "socket"))
    assert main([*resume, f"--teacher=served:{again.url}"]) == 0
    again.close()
    keep = ("loss", "reward", "cmdp/mean_cumulative", "grad_norm")
    for whole, resumed in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "r"), strict=True):
        assert [whole[name] for name in keep] == [resumed[name] for name in keep]


def second_is_not_answered(sharded: bool, words: list[str], shown: Path) -> None:
    """A run of which the second process gets no answer from some question on."""
    number, answer = count(), ServedTeacher.answer

    def failing(teacher, rows, wanted):
        if os.environ["RANK"] == "1" and next(number) > 6:
            raise InputError("the teacher has not answered")
        return answer(teacher, rows, wanted)

    ServedTeacher.answer = failing
    (run_sharded if sharded else run_command)(words, shown, 2)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo")
@pytest.mark.parametrize("sharded", [False, True])
def test_one_process_that_is_not_answered_says_so_and_ends_the_others(sharded, asking, tmp_path):
    """They wait for it in the middle of a step, where it cannot tell them why; nor can they put a student together."""
    AcceleratorState._reset_state(reset_partial_state=True)
    in_two_processes(second_is_not_answered, sharded, arguments(asking, tmp_path, eval_every=0), tmp_path / "shown")
    first, second = ((tmp_path / f"shown-{rank}").read_text() for rank in range(2))
    assert second == "cmdp-fast: error: the teacher has not answered\n"
    assert "error: another process is gone" in first
    assert not (tmp_path / "r" / "student").exists()


def test_two_trainers_ask_one_teacher(asking):
    """At the same time, and each gets its own answers."""
    config = settings(asking)
    alone, rows, prompts = learner_of(config)
    expected = [untimed(alone.step(rows, prompts)) for _ in range(2)]
    learner, rows, prompts = learner_of(config)
    other, stop = learner_of(config)[0].teacher, threading.Event()

    def ask():
        while not stop.is_set():
            assert len(other.answer([[1, 2, 3], [4, 5]], [2, 1]).hidden) == 3

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        learner, rows, prompts = learner_of(config)
        steps = [untimed(learner.step(rows, prompts)) for _ in range(2)]
    finally:
        stop.set()
        thread.join()
    for ours, theirs in zip(steps, expected, strict=True):
        assert {n: v for n, v in ours.items() if n not in OF_ASKING} == {
            n: v for n, v in theirs.items() if n not in OF_ASKING
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "sft"}, "learns from the teacher's text"),
        ({"algorithm": "minillm"}, "minillm needs --teacher-mix 0"),
        (
            {"teacher": "folder", "teacher_device": "cpu", "algorithm": "sft"},
            "--teacher-device cpu: a teacher there is asked, and --algorithm sft samples it",
        ),
        ({"teacher": "folder", "teacher_device": "cpu", "algorithm": "minillm"}, "--algorithm minillm samples it"),
        ({"teacher_device": "cpu"}, "--teacher-device cpu: --teacher served:.* is not loaded here"),
        ({"teacher_quantization": "torchao-int8"}, "--teacher-quantization torchao-int8"),
    ],
)
def test_settings_that_an_asked_teacher_cannot_meet(changes, message, pair):
    with pytest.raises(InputError, match=message):
        settings({**pair, "teacher": "served:http://127.0.0.1:1"} | changes)


@pytest.mark.parametrize("teacher", ["builtin:arithmetic-teacher", "cached:folder"])
@pytest.mark.parametrize("name", ["teacher_wire", "teacher_token_file", "teacher_timeout"])
def test_settings_of_asking_are_for_a_teacher_on_a_server(name, teacher, pair):
    value = {"teacher_wire": "int8", "teacher_token_file": "word", "teacher_timeout": 5.0}[name]
    option = name.replace("_", "-")
    with pytest.raises(InputError, match=rf"--{option} .*is for a (--)?teacher on a server"):
        check_read(settings({**pair, "teacher": teacher}, algorithm="kd", **{name: value}), [name])


def test_another_tokenizer_is_refused_with_both_digests(pair, tmp_path, capsys):
    server = served(tiny_model(tmp_path / "other", seed=5, alphabet="0123456789+=;B"))
    assert main(arguments({**pair, "teacher": f"served:{server.url}"}, tmp_path)) == 2
    said = capsys.readouterr().err
    assert "must share a tokenizer" in said and "sha256 of the student's" in said
    assert not (tmp_path / "r").exists()
    server.close()


def test_a_dry_run_counts_the_head_alone(asking, tmp_path):
    assert main([*arguments(asking, tmp_path), "--dry-run"]) == 0
    assert not (tmp_path / "r").exists()


def test_a_teacher_on_the_cpu_is_asked_there(pair):
    """The steps are the same; where there is a GPU its head and its answers are there."""
    runs = []
    for device in ("", "cpu"):
        learner, rows, prompts = learner_of(settings(pair, teacher_device=device))
        runs.append({n: v for n, v in untimed(learner.step(rows, prompts)).items() if n not in OF_ASKING})
    assert runs[0] == runs[1]
    assert isinstance(learner.teacher, TeacherInProcess)
