"""A run that goes on notices other problems or models under the same path, and may take less memory."""

from __future__ import annotations

import json
from datetime import date

import numpy
import pytest
import torch
from test_resume import command, metrics
from tiny_pair import PROBLEMS, arguments, settings, tiny_model

from cmdp_fast.cli import main
from cmdp_fast.digest import read_sealed, write_sealed
from cmdp_fast.trainer import material
from cmdp_fast.trainer.records import origin
from cmdp_fast.trainer.records.report import Report


@pytest.fixture
def stopped(pair, tmp_path):
    """(the words of a run that has two of three steps behind it, its folder, its dataset and its teacher)."""
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    teacher = tiny_model(tmp_path / "teacher", seed=9)
    given = {**pair, "teacher": teacher, "dataset": str(path)}
    words = arguments(given, tmp_path, checkpoint_every=1, eval_every=0, lr_schedule="constant")
    assert main(words) == 0
    return tmp_path / "r", path, tmp_path / "teacher"


def goes_on(run):
    return main(["train", f"--resume={run}", "--steps=3"])


def test_what_it_began_with_may_not_change(stopped, capsys):
    run, dataset, teacher = stopped
    lines = dataset.read_text().splitlines(keepends=True)
    dataset.write_text("".join(lines[::-1]))  # the same problems in another order are taken in another order
    assert goes_on(run) == 2
    assert "the problems of --dataset" in (error := capsys.readouterr().err) and error.count("\n") == 1
    dataset.write_text("".join(lines))
    tiny_model(teacher, seed=10)
    assert goes_on(run) == 2
    assert "the files of --teacher" in (error := capsys.readouterr().err) and "begin another run" in error
    assert main(["train", f"--resume={run}", "--steps=3", "--dry-run"]) == 2
    assert "the files of --teacher" in capsys.readouterr().err
    tiny_model(teacher, seed=9)
    assert goes_on(run) == 0


def test_another_student_is_noticed_and_another_file_beside_it_is_not(pair, tmp_path, capsys):
    student = tiny_model(tmp_path / "student", seed=3)
    words = arguments({**pair, "student": student}, tmp_path, checkpoint_every=1, eval_every=0, lr_schedule="constant")
    assert main(words) == 0
    (tmp_path / "student" / "notes.json").write_text("{}")
    assert goes_on(tmp_path / "r") == 0
    tiny_model(tmp_path / "student", seed=4)
    assert main(["train", f"--resume={tmp_path / 'r'}", "--steps=4"]) == 2
    assert "the files of --student" in capsys.readouterr().err


def test_weights_that_come_with_the_first_run_count_from_then_on(pair, monkeypatch):
    """Those of a hub's model are not there before it is loaded."""
    loaded = []
    load_pair, origin_of = material.load_pair, material.origin_of
    monkeypatch.setattr(material, "load_pair", lambda *given: loaded.append(True) or load_pair(*given))
    monkeypatch.setattr(material, "origin_of", lambda *given: origin_of(*given) if loaded else pytest.fail("too early"))
    assert material.load(settings(pair), Report()).origin.keys() == {"problems", "student", "teacher"}


def test_every_value_of_a_row_counts():
    rows = [
        {"prompt": "1", "x": x} for x in (b"a", b"b", (1, 2), {(1, 2): 3}, {(1, 2): 4}, date(2026, 1, 2), torch.ones)
    ]
    rows += [{"prompt": "1", "x": numpy.arange(n)} for n in (2, 3)]
    digests = [origin.origin_of({}, [[row]])["problems"] for row in rows]
    assert len(set(digests)) == len(rows)
    assert digests == [origin.origin_of({}, [[row]])["problems"] for row in rows]


def test_a_run_that_recorded_nothing_goes_on(stopped, capsys):
    run, _, teacher = stopped
    config = read_sealed(run / "config.json")
    del config["origin"]
    write_sealed(run / "config.json", config)
    tiny_model(teacher, seed=10)
    assert goes_on(run) == 0
    assert "recorded no digests" in capsys.readouterr().out


def test_any_piece_of_a_file_of_weights_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "PIECE", 8)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    whole = bytes(range(256)) * 4
    starts = origin._starts(len(whole))
    assert starts[0] == 0 and starts[-1] == len(whole) - 8 and len(starts) == origin.PIECES

    def digest(content):
        (folder / "model.safetensors").write_bytes(content)
        return origin.origin_of({"teacher": str(folder)}, [])["teacher"]

    changed = [bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]]) for at in (start + 7 for start in starts)]
    found = {digest(content) for content in (whole, whole + b"more", *changed)}
    assert len(found) == 2 + len(starts)
    for beside in ("optimizer.pt", "consolidated.safetensors"):
        (folder / beside).write_bytes(b"no part of what transformers reads")
        assert digest(whole) in found


def test_the_files_that_an_index_names_count(tmp_path):
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = []
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(20))
        found.append(origin.origin_of({"teacher": str(tmp_path)}, [])["teacher"])
    assert found[0] != found[1] == found[2]


def test_a_run_goes_on_with_less_memory(pair, tmp_path):
    """The rest of its figures are the same but for the rounding of float32, whose sums are taken in another order."""
    roundings = 100 * torch.finfo(torch.float32).eps  # of gradients, which two steps of the optimiser carry on
    assert main(command(pair, tmp_path, steps=3, checkpoint_every=1)) == 0
    assert main(command(pair, tmp_path, steps=3, checkpoint_every=1, name="s", micro_batch_size=12)) == 0
    more = [f"--resume={tmp_path / 's'}", "--steps=5", "--micro-batch-size=2", "--micro-batch-tokens=40"]
    more += ["--rollout-batch-size=0", "--teacher-cache-mb=0", "--gradient-checkpointing", "--padding-free"]
    assert main(["train", *more]) == 0
    assert main(["train", f"--resume={tmp_path / 'r'}", "--steps=5"]) == 0
    for one, other in zip(metrics(tmp_path / "r")[3:], metrics(tmp_path / "s")[3:], strict=True):
        for name in ("loss", "grad_norm", "reward", "cmdp/mean_cumulative"):
            assert other[name] == pytest.approx(one[name], rel=roundings), name
