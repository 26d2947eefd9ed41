"""`cmdp-fast cache-teacher` and training on what it has stored: the same as with the teacher that said it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_pair import PROBLEMS, learner_of, settings, tiny_model, untimed
from tiny_pair import arguments as arguments_of_train
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmdp_fast.cli import main
from cmdp_fast.digest import sha256
from cmdp_fast.errors import InputError
from cmdp_fast.teachers.cached import CachedTeacher
from cmdp_fast.teachers.cached import writer as cache_writer
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.open import open_teacher
from cmdp_fast.teachers.served.server import TeacherServer
from cmdp_fast.trainer.cache_teacher import CacheConfig, cache_teacher
from cmdp_fast.trainer.rollout import encode_prompts
from cmdp_fast.trainer.stored import chosen
from cmdp_fast.trainer.tasks.data import load_problems


def config_of(pair: dict[str, str], folder: Path, **changes) -> CacheConfig:
    """The settings of `settings`, for a cache of which every completion is read by itself."""
    base = vars(settings({**pair, "teacher": "t"}, micro_batch_size=1, minibatch_size=6, algorithm="kd"))
    config = CacheConfig(**{**base, **pair, "output": str(folder), **changes})
    config.validate()
    return config


def arguments(pair: dict[str, str], folder: Path, **changes) -> list[str]:
    values = {**pair, "task": "", "prompt_template": "", "answer_pattern": "", "holdout_fraction": 0.3}
    values |= {"max_new_tokens": 6, "num_generations": 4, "prompts_per_step": 3, "output": folder, **changes}
    return ["cache-teacher", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


def tokenizer_of(pair: dict[str, str]):
    return AutoTokenizer.from_pretrained(pair["student"])


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def stored(pair, tmp_path_factory) -> CachedTeacher:
    folder = cache_teacher(config_of(pair, tmp_path_factory.mktemp("stored") / "cache"))
    teacher = open_teacher(f"cached:{folder}")
    assert isinstance(teacher, CachedTeacher)
    return teacher


def steps_with(learner, prompts, rows, teacher, completions) -> list[dict]:
    """Two steps of a learner that has this teacher, on stored completions."""
    learner.method.teacher = learner.collector.teacher = teacher
    learner.method.stored = lambda some: chosen(completions, some, 4, learner.collector.passes)
    return [untimed(learner.step(rows, prompts)) for _ in range(2)]


RUNS = {
    "sft": {},
    "kd": {},
    "kd, asked again": {"teacher_cache_mb": 0},
    "kd, bf16": {"mixed_precision": "bf16"},
    "gkd": {"jsd_beta": 0.3},
    "gkd, from logits": {"logits": "full", "jsd_beta": 0.3},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_stored_outputs_is_that_with_the_loaded_teacher(name, pair, stored, tmp_path):
    """Metrics and student, to the last bit: both teachers' numbers are of completions that are read one by one."""
    changes = {"algorithm": name.partition(",")[0], "micro_batch_size": 1, **RUNS[name]}
    if "mixed_precision" in changes:
        AcceleratorState._reset_state(reset_partial_state=True)  # or the first precision of the process would stay
        stored = open_teacher(f"cached:{cache_teacher(config_of(pair, tmp_path / 'c', **changes))}")
        assert stored.about.dtype == "bfloat16"
    ends = []
    for asked in (False, True):
        learner, rows, prompts = learner_of(settings(pair, **changes))
        learner.collector.problem_count = len(prompts)
        teacher = stored if asked else learner.teacher
        ends.append((steps_with(learner, prompts, rows, teacher, stored.completions), learner.student.state_dict()))
    (metrics, student), (expected, loaded) = ends
    assert metrics == expected
    assert all(torch.equal(student[name], loaded[name]) for name in loaded)
    assert metrics[0] != metrics[1]


@pytest.mark.parametrize("algorithm", ["sft", "kd", "gkd"])
def test_training_by_the_command_line(algorithm, pair, stored, tmp_path, capsys):
    """From beginning to end: no figure compares the student's own text with the teacher, which has nothing on it. A run
    that goes on ends as one that was not stopped."""
    given = {**pair, "teacher": f"cached:{stored.folder}"}
    changes = {"algorithm": algorithm, "checkpoint_every": 1, "lr_schedule": "constant"}
    ends = []
    for name in ("whole", "resumed"):
        words = arguments_of_train(given, tmp_path, name=name, **changes, steps=2 if name == "whole" else 1)
        assert main(words) == 0
        if name == "resumed":
            assert main(["train", f"--resume={tmp_path / name}", "--steps=2"]) == 0
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        ends.append([untimed(record) for record in records if "loss" in record or "kl" in record])
    assert ends[0] == ends[1] and len(ends[0]) == 2
    printed = capsys.readouterr().out
    assert "not evaluated" in printed and "within budget" not in printed
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert "mean_cumulative_kl" not in summary["student_after"]
    assert 0 <= summary["student_after"]["accuracy"] <= 1


def test_a_run_does_not_go_on_with_other_completions(pair, tmp_path, capsys):
    """Nor with another teacher's; and its folder need not be named again."""
    folder = tmp_path / "cache"
    cache_teacher(config_of(pair, folder))
    given = {**pair, "teacher": f"cached:{folder}"}
    changes = {"algorithm": "kd", "checkpoint_every": 1, "lr_schedule": "constant"}
    assert main(arguments_of_train(given, tmp_path, **changes, steps=1)) == 0
    for name, changed in (("drawn", {"seed": 1}), ("spoken", {"teacher": tiny_model(tmp_path / "other", seed=5)})):
        folder.rename(tmp_path / name)
        cache_teacher(config_of(pair, folder, **changed))
        assert main(["train", f"--resume={tmp_path / 'r'}", "--steps=2"]) == 2
        assert "not what the run began with" in capsys.readouterr().err


def test_a_training_on_problems_that_are_not_stored_is_refused(pair, stored, tmp_path, capsys):
    more = [{**PROBLEMS[0], "prompt": f"{i}+{i}="} for i in range(9)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*PROBLEMS, *more]))
    given = {**pair, "teacher": f"cached:{stored.folder}", "dataset": str(data)}
    words = arguments_of_train(given, tmp_path, algorithm="kd")
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 2
        assert re.search(r" [1-9] of 1[0-9] problems have fewer than --num-generations 4", capsys.readouterr().err)
    assert not (tmp_path / "r").exists()
    stored_ones = arguments_of_train({**given, "dataset": pair["dataset"]}, tmp_path, algorithm="kd")
    assert main([*stored_ones, "--dry-run"]) == 0


def test_what_a_cache_cannot_give_is_refused_before_anything_is_read(pair, stored, tmp_path, capsys):
    """A comparison's figures, and of log-probabilities alone a cost that they do not bound."""
    name = f"cached:{stored.folder}"
    assert main(["compare", f"--output-dir={tmp_path}", "--methods", f"kd:teacher={name}"]) == 2
    assert "a comparison is of figures" in capsys.readouterr().err
    folder = cache_teacher(config_of(pair, tmp_path / "k", logprobs=3))
    words = arguments_of_train({**pair, "teacher": f"cached:{folder}"}, tmp_path, algorithm="kd")
    assert main([*words, "--cost=k1"]) == 2
    assert "its most likely tokens, which bound reverse_kl and forward_kl, not --cost k1" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == main(words) == 0
    steps = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= step["cmdp/certified"] + step["cmdp/refuted"] <= 1 for step in steps)


def test_off_policy_methods_take_what_the_teacher_has_stored(pair, stored):
    """By themselves, in turn: the second pass over the problems takes the next completions."""
    learner, rows, prompts = learner_of(settings(pair, algorithm="kd", num_generations=3))
    learner.method.teacher = learner.collector.teacher = stored
    learner.collector.problem_count = 3
    for steps, places in ((0, (0, 1, 2)), (1, (3, 0, 1))):
        learner.collector.steps_done = steps
        each = [item for item in prompts for _ in range(3)]
        experience = learner.method.collect([row for row in rows for _ in range(3)], each, learner.constraint())
        expected = [stored.completions.of(prompt)[place] for prompt in prompts for place in places]
        assert experience.rollout.completion_ids() == expected


def test_problems_without_stored_completions_are_counted_before_the_run(pair, stored):
    learner, _, prompts = learner_of(settings(pair, algorithm="kd"))
    learner.method.teacher = stored
    learner.method.check(prompts)
    with pytest.raises(InputError, match="1 of 4 problems have fewer than --num-generations 4"):
        learner.method.check([*prompts, prompts[0][:-1]])
    learner.method.config = dataclasses.replace(learner.config, num_generations=5)
    with pytest.raises(InputError, match=f"{len(prompts)} of {len(prompts)} problems .* 5 completions"):
        learner.method.check(prompts)
    learner.collector.sampling = dataclasses.replace(learner.collector.sampling, max_new_tokens=1)
    with pytest.raises(InputError, match="expected 1 to 1"):
        learner.method.check(prompts)


@pytest.mark.parametrize("algorithm", ["ppo", "minillm"])
def test_methods_on_the_students_text_refuse_it_before_anything_is_read(algorithm, pair):
    with pytest.raises(InputError, match=r"completions alone that it has stored.* --algorithm gkd or sft or kd"):
        settings({**pair, "teacher": "cached:nowhere"}, algorithm=algorithm)


def test_samples_are_the_teachers(pair, stored):
    """Of all problems that are trained on, and of none that is held out."""
    problems = load_problems(settings(pair))
    for rows, count in ((problems.train, 4), (problems.held_out, 0)):
        for prompt in encode_prompts(rows, tokenizer_of(pair)):
            assert len(stored.completions.of(prompt)) == count
    assert stored.about.model == pair["teacher"]
    assert len(stored.about.revision) == 64


# --------------------------------------------------------------------------------------------------------------
# Killed, and started again


def killed_at(config: CacheConfig, place: str) -> None:
    """In a process of its own: SIGKILL behind the first shard but before its index, or in the middle of the second."""
    torch.set_num_threads(1)
    write = cache_writer.CacheWriter._write_tensors
    shards = 0

    def dying(self, path, tensors):
        nonlocal shards
        shards += path.name.startswith("shard")
        if place == "within" and shards == 2:
            path.with_name(f".{path.name}").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, path, tensors)
        if place == "between" and shards == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    cache_writer.CacheWriter._write_tensors = dying
    cache_teacher(config)


@pytest.mark.parametrize("place", ["between", "within"])
def test_one_that_was_killed_goes_on_to_the_same_bytes(place, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cmdp_fast.trainer.cache_teacher.MIB", 1)  # a shard for each chunk
    whole, broken = (config_of(pair, tmp_path / name, prompts_per_step=2, shard_mb=1) for name in ("whole", "broken"))
    cache_teacher(whole)
    process = multiprocessing.get_context("fork").Process(target=killed_at, args=(broken, place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(InputError, match="not finished"):
        open_teacher(f"cached:{tmp_path / 'broken'}")
    cache_teacher(broken)
    assert (place == "within") == ("goes on after 2 of" in capsys.readouterr().out)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) > 3
    assert len({(tmp_path / "whole" / name).stat().st_mode for name in files(tmp_path / "whole")}) == 1
    cache_teacher(broken)
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0, and not 1"),
        ({"num_generations": 2}, "num_generations: 4, and not 2"),
        ({"logprobs": 3}, "answers: hidden, and not topk"),
        ({"dtype": "bfloat16"}, "dtype: float32, and not bfloat16"),
        ({"holdout_fraction": 0.6}, "prompts: "),
    ],
)
def test_a_folder_with_other_answers_is_left_alone(changes, message, pair, stored):
    before = files(stored.folder)
    with pytest.raises(InputError, match=message):
        cache_teacher(config_of(pair, stored.folder, **changes))
    assert files(stored.folder) == before


def test_another_teacher_is_not_mixed_in(pair, stored, tmp_path):
    other = tiny_model(tmp_path / "other", seed=5, layers=2)
    with pytest.raises(InputError, match="holds other answers"):
        cache_teacher(config_of({**pair, "teacher": other}, stored.folder))


# --------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_says_how_much_it_stores(pair, tmp_path, capsys):
    assert main(arguments(pair, tmp_path / "c", dtype="bfloat16")) == 0
    printed = capsys.readouterr().out
    assert "bytes per token" in printed and "0 s left" in printed
    assert main(arguments(pair, tmp_path / "c", dtype="bfloat16")) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(arguments(pair, tmp_path / "k", logprobs=3)) == 0
    about = open_teacher(f"cached:{tmp_path / 'k'}").about
    assert (about.answers, about.hidden_size, about.head) == ("topk", 0, "")


def test_completions_of_a_column(pair, tmp_path, capsys):
    """Texts get an end of sequence behind them, and all rows count, also several with one prompt."""
    rows = [{**row, "done": ["9", "12345678"]} for row in PROBLEMS]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[1], "done": ["3"]}]))
    given = {**pair, "dataset": str(data)}
    assert main(arguments(given, tmp_path / "c", completion_column="done")) == 0
    assert "10 completions were cut" in capsys.readouterr().out
    teacher = open_teacher(f"cached:{tmp_path / 'c'}")
    tokenizer = tokenizer_of(pair)

    def of(prompt: str) -> list[str]:
        return [tokenizer.decode(ids) for ids in teacher.completions.of(tokenizer(prompt)["input_ids"])]

    end = tokenizer.eos_token
    assert of(PROBLEMS[1]["prompt"]) == [f"9{end}", "123456", f"3{end}"]


@pytest.mark.parametrize(
    ("done", "message"),
    [
        ([[5, 99]], "row 1: .* returned token 99"),
        ([[]], "completion of 0 tokens"),
        (7, "has a int, expected a text"),
        (None, "has a NoneType"),
    ],
)
def test_a_completion_that_is_none_is_refused_with_its_row(done, message, pair, tmp_path):
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({**row, "done": done}) + "\n" for row in PROBLEMS))
    config = config_of({**pair, "dataset": str(data)}, tmp_path / "c", completion_column="done")
    with pytest.raises(InputError, match=message):
        cache_teacher(config)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": ""}, "--output is missing"),
        ({"resume": "r"}, "--resume: .* goes on by itself"),
        ({"teacher": "served:http://127.0.0.1:1"}, "cannot be sampled from: --completion-column"),
        ({"shard_mb": 0}, "--shard-mb must be a positive number"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"task": "x", "dataset": "", "completion_column": "c"}, "--completion-column is one of a --dataset"),
        ({"teacher": "cached:nowhere"}, "answers for the completions alone"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, pair, tmp_path):
    with pytest.raises(InputError, match=message):
        config_of({**pair}, tmp_path / "c", **changes)


def test_a_column_that_is_not_there_is_named(pair, tmp_path):
    with pytest.raises(InputError, match="there is no such column, only note, prompt, answer"):
        cache_teacher(config_of(pair, tmp_path / "c", completion_column="done"))


def test_a_folder_of_something_else_is_not_written_to(pair, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds something else \(thesis.tex\)"):
        cache_teacher(config_of(pair, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", ".lock"}


def test_a_teacher_on_a_server_fills_it_too(pair, tmp_path, monkeypatch):
    """With the same shard as the loaded one, of which the completions are those of a column."""
    asked = TeacherInProcess(AutoModelForCausalLM.from_pretrained(pair["teacher"]), tokenizer_of(pair), "far")
    server = TeacherServer(asked, asked.vocabulary(), port=0)
    server.start()
    folders = [tmp_path / "far", tmp_path / "here"]
    try:
        for folder, teacher in zip(folders, (f"served:{server.url}", pair["teacher"]), strict=True):
            cache_teacher(config_of({**pair, "teacher": teacher}, folder, completion_column="answer"))
    finally:
        server.close()
    there, here = (load_file(folder / "shard-00000.safetensors") for folder in folders)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    other = TeacherInProcess(asked.model, SimpleNamespace(get_vocab=lambda: {"a": 0}), "other")
    monkeypatch.setattr("cmdp_fast.trainer.models.pair.open_teacher", lambda name, asking: other)
    with pytest.raises(InputError, match="must share a tokenizer, but token 0"):
        cache_teacher(config_of({**pair, "teacher": "served:x"}, tmp_path / "o", completion_column="answer"))
