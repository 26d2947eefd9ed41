"""One process at a time in a run's folder, whatever becomes of the one that is there."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_resume import kill_at
from tiny_pair import arguments
from two_processes import in_two_processes, run_command

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import training
from cmdp_fast.trainer.methods.ppo import PPO
from cmdp_fast.trainer.records.lock import alone_in
from cmdp_fast.trainer.step import Learner

HOLDER = "import sys, fcntl; lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); print(); input()"


@contextmanager
def held_by_another_process(folder: Path):
    command = [sys.executable, "-u", "-c", HOLDER, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        yield process
        process.communicate("\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_another_process_goes_on_with(pair, tmp_path, capsys):
    folder = tmp_path / "r"
    command = arguments(pair, tmp_path, lr_schedule="constant", checkpoint_every=1)
    assert main(command) == 0
    before = contents(folder)
    with held_by_another_process(folder):
        for more in ([], ["--steps=3"]):
            assert main(["train", f"--resume={folder}", *more]) == 2
            error = capsys.readouterr().err
            assert str(folder) in error and "is at work here" in error and error.count("\n") == 1
    assert contents(folder) == before
    assert main(["train", f"--resume={folder}", "--steps=3"]) == 0


def test_a_new_run_has_its_folder_for_itself(pair, tmp_path, monkeypatch, capsys):
    """From its first checkpoint, step and metrics on; the message names the holder."""
    refused = []

    def resume_beside_it(*args):
        child = multiprocessing.get_context("fork").Process(
            target=lambda: os._exit(main(["train", f"--resume={tmp_path / 'r'}"]))
        )
        child.start()
        child.join(60)
        refused.append(child.exitcode)
        return original(*args)

    original = training.Training._log_evaluation
    monkeypatch.setattr(training.Training, "_log_evaluation", resume_beside_it)
    assert main(arguments(pair, tmp_path)) == 0
    assert refused == [2] * len(refused) and len(refused) >= 2
    with alone_in(tmp_path / "r", print), pytest.raises(InputError, match=rf"process {os.getpid()} on "):
        held_once_more(tmp_path / "r")


def held_once_more(folder: Path) -> None:
    with alone_in(folder, print):
        pass


def test_a_killed_process_leaves_no_lock(pair, tmp_path):
    """Nor do the processes that it has forked and that live on."""
    pids = multiprocessing.get_context("fork").SimpleQueue()

    def run() -> None:
        original = PPO.collect

        def with_a_child(*args):
            child = os.fork()
            if child == 0:
                signal.pause()
            pids.put(child)
            return original(*args)

        PPO.collect = with_a_child
        kill_at(Learner, "descend", 2)()
        main(arguments(pair, tmp_path, steps=1))

    process = os.fork()
    if process == 0:
        run()
        os._exit(1)
    _, status = os.waitpid(process, 0)
    child = pids.get()
    try:
        assert os.WTERMSIG(status) == signal.SIGKILL
        os.kill(child, 0)  # it lives
        assert main(["train", f"--resume={tmp_path / 'r'}"]) == 0
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_comparison_does_not_remove_a_run_that_goes_on(pair, tmp_path, capsys):
    from test_compare import words

    recipe = tmp_path / "tiny.toml"
    recipe.write_text("".join(f'{key} = "{value}"\n' for key, value in pair.items()))
    run = tmp_path / "out" / "runs" / "cmdp-seed0"
    run.mkdir(parents=True)
    with held_by_another_process(run):
        assert main(words(recipe, tmp_path / "out", "cmdp", "0")) == 2
    assert f"{run}: another process" in capsys.readouterr().err and run.is_dir()


def test_all_processes_of_a_run_say_so(pair, tmp_path):
    assert main(arguments(pair, tmp_path, checkpoint_every=1, prompts_per_step=4)) == 0
    with held_by_another_process(tmp_path / "r"):
        in_two_processes(run_command, ["train", f"--resume={tmp_path / 'r'}"], tmp_path / "shown", 2)
    assert (tmp_path / "shown-0").read_text().count("is at work here") == 1
    assert (tmp_path / "shown-1").read_text() == ""


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with alone_in(tmp_path, said.append):
        assert said == [f"{tmp_path}: no lock on this file system ([Errno 38] Function not implemented), nothing keeps "
                        "another process away"]  # fmt: skip


def test_a_folder_that_nobody_works_in_names_no_machine(tmp_path):
    with alone_in(tmp_path, print):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="could not be written"):
        held_once_more(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
