"""What a disk, a copy or a stranger has changed in a run's folder or in the cache is named, and never used."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from tiny_pair import arguments, learner_of, settings

from cmdp_fast import digest
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import parse
from cmdp_fast.trainer.models import builtin, cache
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records import checkpoint as run_checkpoints
from cmdp_fast.trainer.records.checkpoint import MANIFEST
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.settings.config import TrainConfig


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory, one_thread) -> Path:
    """With a checkpoint of the first step and one of the second."""
    output = tmp_path_factory.mktemp("run")
    assert main(arguments(pair, output, checkpoint_every=1)) == 0
    assert [path.name for path in run_checkpoints.checkpoints(output / "r")] == ["step-000001", "step-000002"]
    return output / "r"


@pytest.fixture(scope="module")
def learner(pair, one_thread):
    return learner_of(settings(pair))[0]


def check_taken_before(learner, folder: Path, named: str, capsys) -> None:
    """The last checkpoint of the folder is refused, the file named, and the one before loaded."""
    capsys.readouterr()
    loaded = run_checkpoints.load_checkpoint(learner.accelerator, learner.trained, folder, Report())
    shown = capsys.readouterr().out.splitlines()
    assert loaded["step"] == 1 and len(shown) == 2
    assert "step-000002 cannot be read: " in shown[0] and named in shown[0] and "step-000001" in shown[1]
    assert [path.name for path in run_checkpoints.checkpoints(folder)] == ["step-000001"]


def flip(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def zero(content: bytearray, chance: random.Random) -> None:
    while True:  # until there was something else
        start = chance.randrange(len(content))
        size = min(chance.choice((1, 16, 4096)), len(content) - start)
        if any(content[start : start + size]):
            content[start : start + size] = bytes(size)
            return


def cut(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def grow(content: bytearray, chance: random.Random) -> None:
    content += chance.randbytes(chance.choice((1, 4096)))


def test_no_damage_of_a_checkpoint_is_read(run, learner, tmp_path, capsys):
    files = sorted(path.name for path in (run / "checkpoints" / "step-000002").iterdir())
    assert {"model.bin", "optimizer.bin", "random_states.bin", MANIFEST} <= set(files)
    for name in files:
        for number, damage in enumerate((flip, zero, cut, grow) * 4):
            folder = tmp_path / f"{name}-{number}"
            shutil.copytree(run, folder)
            path = folder / "checkpoints" / "step-000002" / name
            content = bytearray(path.read_bytes())
            damage(content, random.Random(number))
            assert content != path.read_bytes()
            path.write_bytes(content)
            check_taken_before(learner, folder, name, capsys)


def test_no_file_of_another_checkpoint_is_read(run, learner, tmp_path, capsys):
    for name in sorted(path.name for path in (run / "checkpoints" / "step-000002").iterdir()):
        folder = tmp_path / name
        shutil.copytree(run, folder)
        of_one, of_two = (folder / "checkpoints" / step / name for step in ("step-000001", "step-000002"))
        assert of_one.read_bytes() != of_two.read_bytes()
        shutil.copy(of_one, of_two)
        check_taken_before(learner, folder, name, capsys)


CONTENTS = {
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"step": "\xff"}',
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "deep": b"[" * 100_000,
    "no sha256": b'{"step": 2}',
    "a sha256 that is none": b'{"step": 2, "sha256": 1}',
    "a folder": None,
}


@pytest.mark.parametrize("case", CONTENTS)
def test_whatever_stands_in_a_manifest(case, run, learner, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    path = tmp_path / "r" / "checkpoints" / "step-000002" / MANIFEST
    path.unlink()
    content = CONTENTS[case]
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    check_taken_before(learner, tmp_path / "r", MANIFEST, capsys)


SEALED = {
    "no files": (lambda about: about.pop("files"), "list of its files"),
    "files that are a list": (lambda about: about.update(files=["model.bin"]), "list of its files"),
    "files without a digest": (lambda about: about["files"].update({"model.bin": None}), "model.bin"),
    "a file outside": (lambda about: about["files"].update({"../step-000001/run.json": "0"}), "inside the folder"),
    "an absolute name": (lambda about: about["files"].update({"/etc/hostname": "0"}), "inside the folder"),
    "a name with a zero": (lambda about: about["files"].update({"a\0b": "0"}), "not there, or cannot be read"),
    "a file that is not there": (lambda about: about["files"].update({"more": "0"}), "more is not there"),
    "a file too few": (lambda about: about["files"].pop("optimizer.bin"), "optimizer.bin does not belong there"),
    "a step that is none": (lambda about: about.update(step="2"), "step 2"),
    "another step": (lambda about: about.update(step=3), "step 3"),
}


@pytest.mark.parametrize("case", SEALED)
def test_a_manifest_that_somebody_wrote(case, run, learner, tmp_path, capsys):
    """With the right sha256 of itself: anybody can compute that."""
    shutil.copytree(run, tmp_path / "r")
    path = tmp_path / "r" / "checkpoints" / "step-000002" / MANIFEST
    about = digest.read_sealed(path)
    change, expected = SEALED[case]
    change(about)
    digest.write_sealed(path, about)
    check_taken_before(learner, tmp_path / "r", expected, capsys)


def test_a_checkpoint_of_an_earlier_version_is_named_as_one(run, learner, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    folder = tmp_path / "r" / "checkpoints" / "step-000002"
    (folder / "model.bin").rename(folder / "model.safetensors")
    about = digest.read_sealed(folder / MANIFEST)
    about["files"]["model.safetensors"] = about["files"].pop("model.bin")
    digest.write_sealed(folder / MANIFEST, about)
    check_taken_before(learner, tmp_path / "r", "an earlier version of cmdp_fast wrote it", capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"ppo": "nothing"},
        {"metrics": None},
        {"metrics": [{}]},
        {"metrics": []},
        {"evaluations": [1]},
        {"results": {}},
        {"samples": {"a": [1]}},
        {"seconds": 5},
        {"seconds": {"rollout": "x"}},
        {"schedule": {"optimizer": "x"}},
        {"metrics": [{"step": 1}, {"step": 2}]},
        {"ppo": {"steps_done": 2, "tokens_seen": "x"}},
        {"ppo": {"steps_done": 2, "tokens_seen": "x", "method": {}}},
    ],
    ids=str,
)
def test_a_state_that_somebody_wrote(changes, run, pair, tmp_path, capsys):
    """Sealed, with all of its files, and of no run of this program: one line."""
    shutil.copytree(run, tmp_path / "r")
    for checkpoint in run_checkpoints.checkpoints(tmp_path / "r"):
        about = digest.read_sealed(checkpoint / MANIFEST)
        digest.write_sealed(checkpoint / MANIFEST, {**about, **changes})
    (tmp_path / "r" / "summary.json").unlink()
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 2
    error = capsys.readouterr().err
    assert "not one of such a run" in error and error.count("\n") == 1


def test_a_state_without_that_of_the_method(run, pair, tmp_path, capsys):
    """As versions before 0.2.0 wrote it: they did not count the reward in its range."""
    shutil.copytree(run, tmp_path / "r")
    for checkpoint in run_checkpoints.checkpoints(tmp_path / "r"):
        about = digest.read_sealed(checkpoint / MANIFEST)
        del about["ppo"]["method"]
        digest.write_sealed(checkpoint / MANIFEST, about)
    (tmp_path / "r" / "summary.json").unlink()
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 2
    assert "an earlier version of cmdp_fast wrote it, with which its run can be ended" in capsys.readouterr().err


def test_what_lies_beside_or_behind_a_link_is_not_read(run, learner, tmp_path, capsys):
    for name in ("pytorch_model.bin", "more/model.bin"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(run, folder)
        path = folder / "checkpoints" / "step-000002" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        check_taken_before(learner, folder, f"{name} does not belong there", capsys)
    folder = tmp_path / "linked"
    shutil.copytree(run, folder)
    path = folder / "checkpoints" / "step-000002" / "model.bin"
    path.rename(tmp_path / "model.bin")
    path.symlink_to(tmp_path / "model.bin")
    check_taken_before(learner, folder, "model.bin does not belong there", capsys)


def test_a_whole_checkpoint_stays_where_it_cannot_be_loaded(run, learner, tmp_path, monkeypatch):
    """Memory may be short, for one."""
    shutil.copytree(run, tmp_path / "r")

    def short(file, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(run_checkpoints.torch, "load", short)
    with pytest.raises(InputError, match=r"step-000002 cannot be loaded, .* as they were written: out of memory"):
        run_checkpoints.load_checkpoint(learner.accelerator, learner.trained, tmp_path / "r", Report())
    assert [path.name for path in run_checkpoints.checkpoints(tmp_path / "r")] == ["step-000001", "step-000002"]


@pytest.mark.parametrize("file", ["model.bin", "optimizer.bin", "random_states.bin"])
def test_a_checkpoint_that_is_a_program_is_neither_run_nor_advised(file, run, learner, tmp_path):
    """Sealed like one of ours. torch's own error says how such a file would be read all the same."""

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    shutil.copytree(run, tmp_path / "r")
    folder = tmp_path / "r" / "checkpoints" / "step-000002"
    torch.save({"x": Runs()}, folder / file)
    about = digest.read_sealed(folder / MANIFEST)
    digest.write_sealed(folder / MANIFEST, {**about, "files": {**about["files"], file: digest.sha256(folder / file)}})
    with pytest.raises(
        InputError, match="step-000002 holds more than numbers: no checkpoint of this program"
    ) as raised:
        run_checkpoints.load_checkpoint(learner.accelerator, learner.trained, tmp_path / "r", Report())
    assert "weights_only" not in str(raised.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("model.safetensors", lambda content: content[:-1], "not fully covered"),
        ("model.safetensors", lambda content: b"", "header too small"),
        ("model.safetensors", lambda content: bytes(len(content)), "no causal language model"),
        ("config.json", lambda content: content.replace(b'"hidden_size": 16', b'"hidden_size": 32'), "weight is [1"),
        ("config.json", lambda content: content.replace(b'"hidden_size": 16', b'"hidden_size": "a"'), "'hidden_size'"),
        ("tokenizer.json", lambda content: b"[1]", "no causal language model"),
    ],
)
def test_a_model_with_a_damaged_file(role, file, damage, named, pair, tmp_path):
    """One line, whichever library finds it."""
    shutil.copytree(pair[role], tmp_path / role)
    path = tmp_path / role / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"--{role} .*{re.escape(named)}"):
        load_pair(settings({**pair, role: str(tmp_path / role)}), [], Report())


@pytest.mark.parametrize("link", [".config.json", ".lock", "metrics.jsonl", "student", "checkpoints"])
def test_a_folder_with_links_is_not_written_to(link, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    mine = tmp_path / "mine"
    mine.write_text("mine")
    path = tmp_path / "r" / link
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(mine)
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 2
    assert f"{link} is a link" in capsys.readouterr().err
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", ".lock", "student/more"])
def test_a_folder_with_a_pipe_is_not_gone_on_with(name, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "r" / name)
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 2
    assert f"{name} is no file, and a run's folder has no such thing" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- config.json


def test_no_damage_of_a_configuration_is_read(run, tmp_path, capsys):
    content = (run / "config.json").read_bytes()
    (tmp_path / "r").mkdir()
    for seed in range(40):
        for damage in (flip, zero, cut, grow):
            damaged = bytearray(content)
            damage(damaged, random.Random(seed))
            (tmp_path / "r" / "config.json").write_bytes(damaged)
            with pytest.raises(InputError, match=r"no run that can be resumed: config\.json"):
                parse.parse([f"--resume={tmp_path / 'r'}"])


def test_a_run_of_an_earlier_version(run, tmp_path, capsys):
    """Its files have no sha256."""
    shutil.copytree(run, tmp_path / "r")
    values = json.loads((run / "config.json").read_text())
    (tmp_path / "r" / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "sha256"}))
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 2
    assert "an earlier version of cmdp_fast wrote it" in capsys.readouterr().err


def test_a_configuration_of_any_types(run, tmp_path, capsys):
    """Every setting with every kind of value: it is a setting's value, or the error is one line."""
    values = digest.read_sealed(run / "config.json")
    (tmp_path / "r").mkdir()
    names = [field.name for field in dataclasses.fields(TrainConfig)] + ["code", "no_such_setting"]
    for name in names:
        for value in (None, True, -1, 0.5, "", "os.system:x", [], [None], ["a", 1], [["a"]], {}, {"a": [None]}):
            digest.write_sealed(tmp_path / "r" / "config.json", {**values, name: value})
            try:
                parse.parse([f"--resume={tmp_path / 'r'}"])
            except InputError as error:
                assert str(error).count("\n") == 0, (name, value)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------- the cache


def make(folder: Path) -> None:
    (folder / "model").write_bytes(b"weights" * 100)
    (folder / "more").mkdir()
    (folder / "more" / "tokenizer").write_text("words")
    with open(folder.parent.parent / "made", "a") as log:
        log.write("+")
    time.sleep(0.2)


def test_a_cached_folder_that_was_damaged_is_made_again(tmp_path):
    said: list[str] = []
    folder = tmp_path / "cache" / "model-1"
    assert cache.made_once(folder, make, said.append) == folder and cache.damage(folder) is None and not said
    whole = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    damages = {
        "model": lambda: (folder / "model").write_bytes(b"weightz" * 100),
        "more/tokenizer": (folder / "more" / "tokenizer").unlink,
        "generation_config.json": lambda: (folder / "generation_config.json").write_text("{}"),
        "files.json": lambda: (folder / "files.json").write_text("{}"),
    }
    for name, damage in damages.items():
        damage()
        cache.made_once(folder, make, said.append)
        assert name in said[-1] and said[-1].endswith("made again")
        assert whole == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(said) == len(damages) and [path.name for path in folder.parent.iterdir() if path != folder] == [".lock"]


def test_a_cached_folder_is_made_once_for_two_processes(tmp_path):
    fork = multiprocessing.get_context("fork")
    folder = tmp_path / "cache" / "model-1"
    children = [fork.Process(target=cache.made_once, args=(folder, make, print)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert (tmp_path / "made").read_text() == "+" and cache.damage(folder) is None


def test_a_damaged_built_in_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = {name: dataclasses.replace(r, steps=3, width=16, heads=2) for name, r in builtin.RECIPES.items()}
    monkeypatch.setattr(builtin, "RECIPES", small)
    command = ["train", "--dry-run"]
    assert main(command) == 0
    [weights] = (tmp_path / "cmdp_fast").glob("arithmetic-teacher-*/model.safetensors")
    whole = weights.read_bytes()
    damaged = bytearray(whole)
    damaged[-1] ^= 0x40
    weights.write_bytes(damaged)
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors is not as it was written" in shown and shown.count("first run: training") == 1
    assert weights.read_bytes() == whole
    assert main(command) == 0
    assert "first run" not in capsys.readouterr().out


def test_the_sha256_of_a_file_is_that_of_its_contents(tmp_path):
    import hashlib

    content = os.urandom(digest.CHUNK + 5)
    (tmp_path / "file").write_bytes(content)
    assert digest.digests(tmp_path) == {"file": hashlib.sha256(content).hexdigest()}


def test_json_of_any_depth_is_damaged(tmp_path):
    for depth in (500, 900, 100_000):
        (tmp_path / "x.json").write_text('{"a": ' + "[" * depth + "]" * depth + ', "sha256": "0"}')
        with pytest.raises(digest.Damaged):
            digest.read_sealed(tmp_path / "x.json")


def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        cache.made_once(tmp_path / "file" / "model", make, print)


def test_what_a_killed_process_left_of_a_cached_folder_goes(tmp_path):
    (tmp_path / ".model-abc").mkdir()
    cache.made_once(tmp_path / "model", make, print)
    assert not (tmp_path / ".model-abc").exists()
