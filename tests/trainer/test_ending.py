"""A run is finished when all of its end is there: stopped at any of the files that it writes, it is made again."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from tiny_pair import arguments, untimed

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import training
from cmdp_fast.trainer.models import saving
from cmdp_fast.trainer.records.ending import finished_summary, write_summary

WRITES = ((os, "replace"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree"), (os, "unlink"))


def command(pair: dict[str, str], output: Path, **changes) -> list[str]:
    return arguments(pair, output, lr_schedule="constant", **changes)


def stop_at(call: int, stop, patch, begin_after: str) -> None:
    """From where a method of `Run` has returned on, `stop` is called before the so-many-th change of a folder."""
    calls, begun, method = 0, not begin_after, getattr(training.Training, begin_after or "begin")

    def beginning(*args):
        nonlocal begun
        method(*args)
        begun = True

    def counted(original):
        def change(*args, **options):
            nonlocal calls
            calls += begun
            if begun and calls == call:
                stop()
            return original(*args, **options)

        return change

    if begin_after:
        patch(training.Training, begin_after, beginning)
    for owner, name in WRITES:
        patch(owner, name, counted(getattr(owner, name)))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def killed_at(call: int, words: list[str], begin_after: str) -> bool:
    """Whether a child that runs the command came to that change, where it is killed."""

    def child() -> None:
        stop_at(call, kill, setattr, begin_after)
        os._exit(main(words))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def left_by(folder: Path) -> dict[str, object]:
    """What a finished run says, and its student."""
    summary = finished_summary(folder)
    assert summary is not None
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {
        "steps": [untimed(json.loads(line)) for line in lines],
        "after": summary["student_after"],
        "student": (folder / "student" / "model.safetensors").read_bytes(),
        "samples": (folder / "samples.jsonl").read_bytes(),
        "names": {path.name for path in folder.iterdir()} - {"checkpoints"},
    }


@pytest.fixture(scope="module")
def expected(pair, tmp_path_factory, one_thread):
    output = tmp_path_factory.mktemp("expected")
    assert main(command(pair, output)) == 0
    assert not (output / "r" / "checkpoints").exists()  # none was asked for
    return left_by(output / "r")


def test_killed_at_every_change_of_the_end(pair, tmp_path, expected):
    for call in itertools.count(1):
        output = tmp_path / str(call)
        if not killed_at(call, command(pair, output), "_train"):
            break
        assert main(["train", f"--resume={output / 'r'}"]) == 0
        assert left_by(output / "r") == expected, call
    assert call > 10


def test_interrupted_at_every_change_of_the_end(pair, tmp_path, expected, monkeypatch):
    """By a signal that does not wait, such as a second Ctrl-C."""
    for call in itertools.count(1):
        output = tmp_path / str(call)
        with monkeypatch.context() as patched:
            stop_at(call, interrupt, patched.setattr, "_train")
            code = main(command(pair, output))
        if code == 0:
            break
        assert code == 130
        assert main(["train", f"--resume={output / 'r'}"]) == 0
        assert left_by(output / "r") == expected, call
    assert call > 10


def test_killed_at_every_change_of_the_beginning(pair, tmp_path, expected):
    """There is no folder yet, and its name is free, or one with which the run goes on."""
    for call in itertools.count(1):
        output = tmp_path / str(call)
        words = command(pair, output)
        if not killed_at(call, words, ""):
            break
        there = (output / "r").exists()
        assert main(["train", f"--resume={output / 'r'}"] if there else words) == 0
        assert left_by(output / "r") == expected, call
        if there:
            break  # from here on it is a run that goes on
    assert call > 2 and there


def test_an_end_that_is_made_again_takes_the_place_of_an_older_one(pair, tmp_path, expected, monkeypatch):
    """The student is exchanged last but one: at no moment does the summary of the one stand beside the other."""
    folder = tmp_path / "r"
    assert main(command(pair, tmp_path, steps=1, checkpoint_every=1)) == 0
    monkeypatch.setattr(training, "write_summary", lambda *_: interrupt())
    assert main(["train", f"--resume={folder}", "--steps=2"]) == 130
    monkeypatch.undo()
    assert main(["train", f"--resume={folder}"]) == 0
    assert left_by(folder) == expected


def test_one_interrupt_lets_the_writing_end(pair, tmp_path, expected, monkeypatch):
    original = training.save_student

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        original(*args)

    monkeypatch.setattr(training, "save_student", interrupted)
    assert main(command(pair, tmp_path)) == 0
    assert left_by(tmp_path / "r") == expected


def test_a_student_that_is_not_exchanged_stays(pair, tmp_path, monkeypatch):
    """Interrupted or killed between the two renames of the exchange."""

    class Model:
        def __init__(self, text: str) -> None:
            self.text = text

        def save_pretrained(self, folder: Path, **_) -> None:
            folder.mkdir(exist_ok=True)
            (folder / self.text).touch()

    def names() -> set[str]:
        return {path.name for path in (tmp_path / "student").iterdir()}

    tokenizer, rename = Model("tokenizer"), os.rename
    saving.save_student(Model("one"), tokenizer, tmp_path)

    def interrupted(source, target):
        if source.name == ".student.part":
            interrupt()
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            saving.save_student(Model("two"), tokenizer, tmp_path)
    assert names() == {"one", "tokenizer"}
    rename(tmp_path / "student", tmp_path / ".student.old")  # as a kill leaves it
    with monkeypatch.context() as patched:
        patched.setattr(Model, "save_pretrained", lambda *_, **__: interrupt())
        with pytest.raises(KeyboardInterrupt):
            saving.save_student(Model("two"), tokenizer, tmp_path)
    assert names() == {"one", "tokenizer"}
    saving.save_student(Model("two"), tokenizer, tmp_path)
    assert names() == {"two", "tokenizer"} and len(list(tmp_path.iterdir())) == 1


def test_a_file_of_the_end_that_is_damaged_or_gone(pair, tmp_path, expected, capsys):
    folder = tmp_path / "r"
    assert main(command(pair, tmp_path, checkpoint_every=1)) == 0
    for name in ("student/model.safetensors", "samples.jsonl", "metrics.jsonl", "summary.json"):
        for damage in (lambda path: path.unlink(), flip):
            if name == "summary.json" and damage is not flip:
                continue  # without one it has not ended, which is not said
            damage(folder / name)
            capsys.readouterr()
            assert main(["train", f"--resume={folder}"]) == 0
            assert f"{name} " in capsys.readouterr().out
            assert left_by(folder) == expected
    shutil.rmtree(folder / "checkpoints")
    flip(folder / "student" / "model.safetensors")
    assert main(["train", f"--resume={folder}"]) == 2
    error = capsys.readouterr().err
    assert "student/model.safetensors" in error and "no checkpoint" in error


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_file_of_the_end_that_cannot_be_written(pair, tmp_path, expected, monkeypatch, capsys):
    original = training.save_student

    def full(*args):
        with saving.writing(tmp_path / "r" / "student"):
            raise OSError("no space")

    monkeypatch.setattr(training, "save_student", full)
    assert main(command(pair, tmp_path)) == 2
    assert "student could not be written: no space" in capsys.readouterr().err
    assert finished_summary(tmp_path / "r") is None
    monkeypatch.setattr(training, "save_student", original)
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 0
    assert left_by(tmp_path / "r") == expected


def test_an_older_student_that_stays_has_its_own_step(pair, tmp_path, monkeypatch):
    folder = tmp_path / "r"
    assert main(command(pair, tmp_path, steps=1, checkpoint_every=1)) == 0
    student = (folder / "student" / "model.safetensors").read_bytes()

    def full(*_):
        raise InputError("no space")

    monkeypatch.setattr(training, "save_student", full)
    assert main(["train", f"--resume={folder}", "--steps=2"]) == 2
    assert (folder / "student" / "model.safetensors").read_bytes() == student
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["student_step"], summary["error"]) == (2, 1, "no space")


def test_of_which_step_an_older_student_is(tmp_path):
    def step_of_next(step: int | None = None) -> object:
        write_summary(tmp_path, {"student_step": step})
        return json.loads((tmp_path / "summary.json").read_text())["student_step"]

    weights = tmp_path / "student" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("of step 3")
    assert step_of_next() is None  # nothing says so
    assert step_of_next(3) == step_of_next() == step_of_next() == 3
    (tmp_path / "samples.txt").touch()
    assert step_of_next() == 3
    weights.write_text("of another")
    assert step_of_next() is None
    step_of_next(4)
    shutil.rmtree(weights.parent)
    assert step_of_next() is None
    for older in ('{"student_step": 3, "files": {}}', "3", "{"):
        step_of_next(4)
        (tmp_path / "summary.json").write_text(older)
        assert step_of_next() is None


@pytest.mark.parametrize("how", ["two interrupts", "a full disk"])
def test_stopped_before_the_first_checkpoint_it_begins_again(how, pair, tmp_path, expected, monkeypatch, capsys):
    """As after a kill: what it has left says that it did not come to its end."""
    words = command(pair, tmp_path)

    def full(*_):
        raise InputError("it does not fit")

    with monkeypatch.context() as patch:
        if how == "two interrupts":
            patch.setattr(training.Learner, "step", lambda *_: interrupt())
        else:
            patch.setattr(training, "save_checkpoint", full)
        assert main(words) == (130 if how == "two interrupts" else 2)
    assert (tmp_path / "r" / "summary.json").exists() and not (tmp_path / "r" / "checkpoints").exists()
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 0, capsys.readouterr().err
    assert left_by(tmp_path / "r") == expected


def test_a_checkpoint_that_nobody_asked_for_goes_with_the_next_resume(pair, tmp_path, monkeypatch):
    """A run that was killed after its marker, and before it could remove what it no longer needs."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "remove_checkpoints", lambda _: None)
        assert main(command(pair, tmp_path)) == 0
    assert (tmp_path / "r" / "checkpoints").exists()
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 0
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_tokenizer_that_does_not_fit_on_the_disk(pair, tmp_path, monkeypatch, capsys):
    """Its library raises a bare Exception."""
    from transformers import PreTrainedTokenizerBase

    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert main(command(pair, tmp_path)) == 2
    assert "student could not be written: No space left on device" in capsys.readouterr().err
