"""What `cmdp-fast evaluate` evaluates: all that it is given, several sets and seeds, greedily or with samples."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from test_evaluate import command
from tiny_pair import arguments, settings
from transformers import AutoModelForCausalLM

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import material
from cmdp_fast.trainer.evaluate import of_several
from cmdp_fast.trainer.evaluate_student import _together, parse_evaluate
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.tasks import data

ROWS = [{"prompt": f"{i}+{j}=", "answer": str(i + j)} for i in range(4) for j in range(5)]


def written(path, rows=ROWS):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def figures(pair, tmp_path, *words, **changes):
    file = tmp_path / "figures.json"
    changes = {"student": pair["teacher"], "eval_generations": 1, "teacher": "", "json": file, **changes}
    assert main([*command(pair, **changes), *words]) == 0
    return json.loads(file.read_text())


def test_all_that_is_given_is_evaluated(pair, tmp_path):
    whole = written(tmp_path / "all.jsonl")
    assert figures(pair, tmp_path, dataset=whole)["examples"] == 20  # 4, the held-out fifth
    assert figures(pair, tmp_path, dataset=whole, eval_prompts=7)["examples"] == 7
    many = written(tmp_path / "many.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(300)])
    assert figures(pair, tmp_path, dataset=many)["examples"] == 300  # a training's evaluations have 256 at most
    twice = written(tmp_path / "twice.jsonl", ROWS[:3] * 2)
    assert figures(pair, tmp_path, dataset=twice)["examples"] == 6
    assert figures(pair, tmp_path, "--held-out", dataset=whole)["examples"] < 20


def test_no_part_to_train_on_is_needed(pair, tmp_path):
    written(tmp_path / "folder" / "test.jsonl", ROWS[:6])
    assert figures(pair, tmp_path, dataset=tmp_path / "folder")["examples"] == 6
    written(tmp_path / "folder" / "train.jsonl", ROWS[6:9])
    assert figures(pair, tmp_path, dataset=tmp_path / "folder", eval_split="test")["examples"] == 6
    assert figures(pair, tmp_path, dataset=tmp_path / "folder")["examples"] == 3


def test_a_file_has_one_split(pair, tmp_path, capsys):
    whole = written(tmp_path / "all.jsonl")
    for start in (command(pair, dataset=whole), arguments(pair, tmp_path, dataset=whole)):
        assert main([*start, "--eval-split", "test"]) == 2
        assert "it has one split, not 'test'; --eval-dataset takes another file" in capsys.readouterr().err


def test_several_sets(pair, tmp_path, capsys):
    one, other = written(tmp_path / "one.jsonl", ROWS[:4]), written(tmp_path / "other.jsonl", ROWS[4:9])
    found = figures(pair, tmp_path, "--eval-dataset", f"small={one}", other)
    assert {name: each["examples"] for name, each in found["sets"].items()} == {"small": 4, other: 5}
    assert "on small" in capsys.readouterr().out
    assert main([*command(pair), "--eval-dataset", f"a={one}", f"a={other}"]) == 2
    assert "two have one name" in capsys.readouterr().err


def test_the_file_is_written_though_nobody_reads_the_figures(pair, tmp_path, monkeypatch, capsys):
    """And that is said: neither the lines before, which nobody misses, nor the table end it."""
    reading, writing = os.pipe()
    os.close(reading)
    one, other = written(tmp_path / "one.jsonl", ROWS[:4]), written(tmp_path / "other.jsonl", ROWS[4:9])
    file = tmp_path / "figures.json"
    changes = {"student": pair["teacher"], "eval_generations": 1, "teacher": "", "json": file}
    with os.fdopen(writing, "w", encoding="utf-8") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main([*command(pair, **changes), "--eval-dataset", f"small={one}", other]) == 141
    assert capsys.readouterr().err == (
        f"cmdp-fast: error: nobody reads the output any more; the figures are in {file}\n"
    )
    assert {name: each["examples"] for name, each in json.loads(file.read_text())["sets"].items()} == {
        "small": 4,
        other: 5,
    }


def test_figures_that_could_go_nowhere(pair, tmp_path, monkeypatch, capsys):
    """Without a standard output a file is enough, and without both nothing is begun."""
    whole = written(tmp_path / "all.jsonl", ROWS[:3])
    monkeypatch.setattr(sys, "stdout", None)
    assert figures(pair, tmp_path, dataset=whole)["examples"] == 3
    assert main(command(pair, dataset=whole)) == 2
    assert "the standard output is closed, and --json names no file" in capsys.readouterr().err


def test_a_file_of_figures_says_nothing_of_the_home_folder(pair, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    shutil.copytree(pair["teacher"], tmp_path / "models" / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    sets = [written(tmp_path / "sets" / f"{i}.jsonl", ROWS[i : i + 2]) for i in range(2)]
    found = figures(pair, tmp_path, "--eval-dataset", *sets, student=tmp_path / "models" / "mine")
    assert found["student"] == "~/models/mine" and list(found["sets"]) == ["~/sets/0.jsonl", "~/sets/1.jsonl"]


def test_a_training_is_evaluated_on_a_set_of_its_own(pair, tmp_path):
    other = written(tmp_path / "other.jsonl", [{"prompt": "0+9=", "answer": "9"}, *ROWS[:2]])
    problems = data.load_problems(settings(pair, eval_dataset=(other,)))
    assert {row["prompt"] for row in problems.held_out} == {"0+9=", "0+0=", "0+1="}
    assert len(problems.train) == 9 and "0+9=" not in {row["prompt"] for row in problems.train}
    with pytest.raises(InputError, match="a training takes one"):
        data.load_problems(settings(pair, eval_dataset=(other, f"more={other}")))


def test_greedy_and_seeds(pair, tmp_path):
    whole = written(tmp_path / "all.jsonl")
    changes = {"dataset": whole, "temperature": 0, "teacher": pair["student"]}
    greedy = [figures(pair, tmp_path, "--seeds", seed, **changes) | {"seeds": None} for seed in "12"]
    assert greedy[0] == greedy[1] and greedy[0]["mean_cumulative_kl"] > 0
    one, two = (figures(pair, tmp_path, "--seeds", seed, dataset=whole)["mean_length"] for seed in "12")
    both = figures(pair, tmp_path, "--seeds", "1", "2", dataset=whole)
    assert one != two and both["mean_length"] == pytest.approx((one + two) / 2) and both["seeds"] == [1, 2]
    assert both["standard_deviation"]["mean_length"] == pytest.approx(abs(one - two) / 2**0.5)


def test_a_held_out_part_is_one_of_a_dataset(pair, tmp_path, capsys):
    assert main([*command(pair), "--held-out", "--eval-split", "test"]) == 2
    assert "--held-out is a part of --dataset" in capsys.readouterr().err


def test_greedy_is_one_completion(pair, tmp_path, capsys):
    assert main(command(pair, temperature=0, eval_generations=2)) == 2
    assert "--temperature 0 gives the same completion each time" in capsys.readouterr().err


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n):
    counts = [0, 1, n // 2, n]
    samples = [{"correct": i < c} for c in counts for i in range(n)]
    found = of_several(samples, n)
    assert found.pop(f"mean@{n}") == pytest.approx(sum(counts) / (n * len(counts)))
    assert list(found) == [f"pass@{k}" for k in sorted({n, 2, 4} - {k for k in (2, 4) if k > n})]
    for name, value in found.items():
        k = int(name.removeprefix("pass@"))
        hits = [[any(i < c for i in chosen) for chosen in combinations(range(n), k)] for c in counts]
        expected = sum(Fraction(sum(each), len(each)) for each in hits) / len(hits)
        assert value == pytest.approx(float(expected), abs=1e-12)


def test_of_a_run_it_is_the_student_that_was_trained(pair, tmp_path, capsys):
    """It was the one that the run began with, on the problems that it was trained on as well."""
    assert main(arguments(pair, tmp_path, steps=1, eval_every=0)) == 0
    run, file = tmp_path / "r", tmp_path / "figures.json"
    expected = json.loads((run / "summary.json").read_text())["student_after"]
    assert main(["evaluate", f"--resume={run}", f"--json={file}"]) == 0
    assert expected.items() <= json.loads(file.read_text()).items()
    other = written(tmp_path / "other.jsonl", ROWS[:3])
    words = ["--eval-dataset", other, "--student", pair["student"], "--temperature", "0", "--eval-generations", "1"]
    assert parse_evaluate([f"--resume={run}", *words]).student == pair["student"]
    shutil.rmtree(run / "student")
    assert main(["evaluate", f"--resume={run}"]) == 2
    assert f"there is no {run / 'student'}; --student names another" in capsys.readouterr().err


def test_a_recipe_says_how_much_of_its_own_dataset(pair, tmp_path):
    whole, recipe = written(tmp_path / "all.jsonl"), tmp_path / "mine.toml"
    recipe.write_text(f'student = "a"\ndataset = "{whole}"\neval_prompts = 7\n')
    other = written(tmp_path / "other.jsonl", ROWS[:9])
    for words, expected in (((), 7), (("--eval-dataset", other), 0), (("--dataset", other), 0)):
        assert parse_evaluate(["--recipe", str(recipe), *words]).eval_prompts == expected
    assert parse_evaluate(["--recipe", "smollm2", "--task=", "--dataset", whole]).eval_prompts == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--seeds -1", "--seeds must be in [0, 2147483648), not -1"),
        (f"--seeds {2**70}", "--seeds must be at most 2147483647, not 1180591620717411303424"),
        ("--dry-run", "--dry-run is for cmdp-fast train"),
        ("--json .", "--json . is a folder, expected a file"),
    ],
)
def test_refused_before_a_model_is_read(words, expected, pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(material, "find_pair", None)
    assert main([*command(pair), *words.split()]) == 2
    assert expected in capsys.readouterr().err


def test_students_are_saved_on_the_way(pair, tmp_path):
    words = arguments(pair, tmp_path, steps=6, save_student_every=1, keep=2, checkpoint_every=2, eval_every=0)
    assert main(words) == 0
    run = tmp_path / "r"
    assert sorted(path.name for path in (run / "students").iterdir()) == ["step-000004", "step-000005"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    models = [AutoModelForCausalLM.from_pretrained(run / name) for name in ("students/step-000005", "student")]
    states = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert 0 < (states[0] - states[1]).abs().max() < 0.1  # a step apart
    student = str(run / "students" / "step-000005")
    assert figures(pair, tmp_path, student=student)["examples"] == 10
    assert main(["train", f"--resume={run}"]) == 0  # it is whole, and finished


def test_data_is_refused_before_a_model_is_read(pair, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: read.append(a))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    long = written(tmp_path / "long.jsonl", [*ROWS, {"prompt": "1" * 60, "answer": "1"}])
    for changes, expected in (
        ({"dataset": str(empty)}, "no rows"),
        ({"dataset": long}, "do not fit the 64 positions"),
        ({"chat": True}, "no chat template"),
    ):
        with pytest.raises(InputError, match=expected):
            material.load(settings(pair, **changes), Report())
    assert not read


def test_seeds_of_which_figures_differ():
    runs = [{"accuracy": 1.0, "reasoning_success": math.nan, "examples": 3}, {"accuracy": 0.5, "unjudged": 0.5}]
    found = _together([run | {"examples": 3, "reasoning_success": math.nan} for run in runs])
    assert found["unjudged"] == 0.25 and found["examples"] == 3 and found["accuracy"] == 0.75
    assert math.isnan(found["reasoning_success"]) and math.isnan(found["standard_deviation"]["reasoning_success"])


def test_sets_alone_and_sets_without_answers(pair, tmp_path, capsys):
    one, bare = written(tmp_path / "one.jsonl", ROWS[:4]), written(tmp_path / "bare.jsonl", [{"prompt": "1+1="}])
    found = figures(pair, tmp_path, f"--eval-dataset={one}", dataset="")
    assert found["examples"] == 4
    for reward in ("exact_answer", "brevity", "math_verify"):
        assert main([*command(pair, teacher=""), "--rewards", reward, "--eval-dataset", one, bare]) == 2
        expected = f"--rewards {reward} needs the column 'answer', there are only prompt in {bare}\n"
        assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize("keep", [1, 2])  # without another checkpoint the run begins again
def test_students_of_another_future_go(keep, pair, tmp_path):
    """And that of the very step which it goes on from stays."""
    words = arguments(pair, tmp_path, steps=6, save_student_every=5, keep=keep, checkpoint_every=3, eval_every=0)
    assert main([*words, "--lr-schedule=constant"]) == 0
    run = tmp_path / "r"
    (run / "students" / "step-000005").rename(run / "students" / "step-000006")
    (run / "students" / ".step-000006.part").mkdir()
    (run / "students" / "step-000003").mkdir()
    for path in (run / "checkpoints" / "step-000006", run / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["train", f"--resume={run}"]) == 0
    left = sorted(path.name for path in (run / "students").iterdir())
    assert left == (["step-000005"] if keep == 1 else ["step-000003", "step-000005"])
