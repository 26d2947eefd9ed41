"""What `summary.json` says of versions, machine and command, for each session of a run, and what it does not say."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_ending import command
from tiny_pair import arguments

import cmdp_fast
from cmdp_fast.cli import main
from cmdp_fast.digest import read_sealed, write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.comparison import plan
from cmdp_fast.trainer.comparison.plan import SeededRun, Variant, finished_summary, summary_of
from cmdp_fast.trainer.parse import parse
from cmdp_fast.trainer.records import metrics_log, session
from cmdp_fast.trainer.records.run_folder import Beginning, write_config
from cmdp_fast.trainer.records.session import command_line, commit, earlier
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.recorded import shared
from cmdp_fast.trainer.step import Learner


def sessions(folder: Path) -> list[dict]:
    return json.loads((folder / "summary.json").read_text())["sessions"]


def test_each_session_has_an_entry(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = command(pair, tmp_path, checkpoint_every=1)
    assert main(words) == 0
    folder = tmp_path / "r"
    (only,) = sessions(folder)
    assert only["command"].startswith("cmdp-fast train --student=") and "--output-dir=~" in only["command"]
    assert only["packages"]["cmdp_fast"] == cmdp_fast.__version__ and only["packages"]["torch"] == torch.__version__
    assert {"transformers", "accelerate", "datasets"} < only["packages"].keys()
    assert (only["steps"], only["seed"], only["processes"], only["threads"]) == ([0, 2], 0, 1, torch.get_num_threads())
    assert (only["precision"], only["gpu"], only["gpus"]) == ("float32", None, 0) and only["processor"]
    assert only["backend"].split()[0] in cmdp_fast.available_backends()
    assert only["began"] <= only["ended"] and only["seconds"] > 0
    assert str(tmp_path) not in json.dumps(only) and socket.gethostname() not in json.dumps(only)
    assert main(["train", f"--resume={folder}", "--steps=3"]) == 0
    first, second = sessions(folder)
    assert first["steps"] == [0, 2] and second["steps"] == [2, 3] and "--steps=3" in second["command"]
    assert first["began"] == only["began"]


def test_runs_from_before_there_were_sessions(pair, tmp_path):
    """They are resumed, and compared, as before."""
    assert main(command(pair, tmp_path, checkpoint_every=1)) == 0
    folder = tmp_path / "r"
    for path in (folder / "summary.json", *folder.glob("checkpoints/*/run.json")):
        content = read_sealed(path)
        for name in ("sessions", "student_step", "sha256"):
            content.pop(name, None)
        write_sealed(path, content)
    assert finished_summary(folder)["steps"] == 2
    assert main(["train", f"--resume={folder}", "--steps=3"]) == 0
    assert [session["steps"] for session in sessions(folder)] == [[2, 3]]


def test_what_somebody_else_has_written_there():
    assert earlier(None) == earlier("x") == earlier({"a": 1}) == []
    assert earlier([1, {"a": 1}, None]) == [{"a": 1}]


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("--teacher=served:https://me:pass@host:80/x", "--teacher=served:https://***@host:80/x"),
        ("https://a:b@c@host/", "https://***@host/"),
        ("http://host/v1?model=m&api_key=abc&x=1", "http://host/v1?***"),
        ("--rollout-args=--api-key abc --port 1", "--rollout-args=--api-key *** --port 1"),
        ("hf_abcdefgh12345", "***"),
        ("{home}/runs", "~/runs"),
        ("--output-dir={home}", "--output-dir=~"),
        ("{home}less/runs", "{home}less/runs"),
        ("--max-new-tokens=5", "--max-new-tokens=5"),
        ("--stop-tokens=<|im_end|>", "--stop-tokens=<|im_end|>"),
        ("--teacher-token-file=t.txt", "--teacher-token-file=t.txt"),
    ],
)
def test_what_a_command_does_not_say(word, shown, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    quoted = command_line([shown.format(home=tmp_path)]) if "{home}less" not in shown else str(tmp_path) + "less/runs"
    assert command_line([word.format(home=tmp_path)]) == quoted


def test_a_secret_that_is_a_word_of_its_own():
    assert command_line(["x", "--api-key", "abc", "--steps", "3"]) == "x --api-key '***' --steps 3"


def test_settings_with_a_secret(pair, tmp_path, monkeypatch):
    """They are whole in `config.json`, for its owner alone, and masked in what is shown to others; the run goes on, and
    counts as finished with the same settings."""
    told = []
    monkeypatch.setattr(metrics_log, "_start_trackers", lambda accelerator, config, *_: told.append(shared(config)))
    given = "--stop-strings=TOKEN=abcde"
    assert main([*command(pair, tmp_path, checkpoint_every=1), given]) == 0
    folder = tmp_path / "r"
    began, ended = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
    assert began["stop_strings"] == ["TOKEN=abcde"]
    assert ended["config"]["stop_strings"] == told[0]["stop_strings"] == ["TOKEN=***"]
    assert "abcde" not in (folder / "summary.json").read_text()
    assert (folder / "config.json").stat().st_mode & 0o077 == 0
    config = parse([f"--resume={folder}", given])
    run = SeededRun(Variant("v", "cmdp", {}, config), replace(config, resume="", output_dir=str(tmp_path), name="r"))
    assert summary_of(run)["steps"] == 2


@pytest.mark.parametrize("past", [{"reward_timeout": 3.0}, {"teacher_timeout": 3.0, "checkpoint_every": 7}, None])
def test_a_limit_of_time_makes_no_other_run(past, tmp_path, monkeypatch):
    """Nor is one that an earlier version finished, which had no such setting."""
    config = TrainConfig(task="chain_sum", output_dir=str(tmp_path), name="r")
    run, recorded = SeededRun(Variant("v", "cmdp", {}, config), config), json.loads(json.dumps(shared(config)))
    known = {name: value for name, value in recorded.items() if past is not None or name != "reward_timeout"}
    monkeypatch.setattr(plan, "finished_summary", lambda folder: {"config": known | (past or {})})
    assert summary_of(run) is not None
    monkeypatch.setattr(plan, "finished_summary", lambda folder: {"config": {**known, "judge_timeout": 7.0}})
    with pytest.raises(InputError, match=r"other settings \(judge_timeout was 7.0 and is 3.0\)"):
        summary_of(run)


def test_an_error_with_a_secret(pair, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError(
            "GET https://bob:hunter2@judge.example/v1?signature=abcde failed: api_key=sk-abcdefgh12345678"
        )

    monkeypatch.setattr(Learner, "update", fails)
    monkeypatch.setattr(session, "_here", fails)
    with pytest.raises(RuntimeError):
        main(command(pair, tmp_path))
    said = (tmp_path / "r" / "summary.json").read_text()
    assert said.count("GET https://***@judge.example/v1?*** failed: api_key=***") == 2
    assert not any(secret in said for secret in ("bob", "hunter2", "abcde"))


def test_a_secret_of_any_kind_keeps_the_settings_to_their_owner(tmp_path):
    given = {"api_keys": ["sesame-1"], "api_key": {"v": "sesame-2"}, "args": ["--api-key", "sesame-3"], "token": 4711}
    for name, value in given.items():
        config = TrainConfig(chat_template_kwargs={name: value})
        write_config(tmp_path, config, Beginning({}, {}, 1))
        assert (tmp_path / "config.json").stat().st_mode & 0o077 == 0
        told = json.dumps(shared(config))
        assert "sesame" not in told and "4711" not in told


def test_other_settings_are_for_whom_the_umask_says(pair, tmp_path):
    assert main(command(pair, tmp_path)) == 0
    mode = (tmp_path / "r" / "config.json").stat().st_mode
    assert mode == (tmp_path / "r" / "summary.json").stat().st_mode


@pytest.mark.parametrize("words", ["--api-key abc", "--api_key=abc", "--port 1 --hf-token abc"])
def test_a_key_belongs_into_the_environment(words, capsys):
    assert main(["train", "--rollout=vllm", f"--rollout-args={words}"]) == 2
    said = capsys.readouterr().err
    assert ("VLLM_API_KEY" in said or "HF_TOKEN" in said) and "abc" not in said


def test_the_commit_of_a_checkout(tmp_path):
    assert commit(tmp_path) is None
    one, two = "a" * 40, "b" * 40
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text(f"{one}\n")
    assert commit(tmp_path) == one
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit(tmp_path) is None
    (git / "packed-refs").write_text(f"# pack-refs\n{one} refs/heads/other\n{two} refs/heads/main\n")
    assert commit(tmp_path) == two
    (git / "refs" / "heads" / "main").write_text(f"{one}\n")
    assert commit(tmp_path) == one
    (git / "refs" / "heads" / "main").write_text("not a commit\n")
    assert commit(tmp_path) is None
    worktree = tmp_path / "worktree"
    worktree.mkdir()
    (git / "worktrees" / "w").mkdir(parents=True)
    (worktree / ".git").write_text(f"gitdir: {git / 'worktrees' / 'w'}\n")
    (git / "worktrees" / "w" / "HEAD").write_text("ref: refs/heads/other\n")
    (git / "worktrees" / "w" / "commondir").write_text("../..\n")
    assert commit(worktree) == one


def test_a_training_that_a_program_starts_has_no_command(pair, tmp_path):
    from cmdp_fast.trainer.run import train

    folder = train(parse(arguments(pair, tmp_path, steps=1, eval_every=0)[1:]))
    assert sessions(folder)[0]["command"] is None


@pytest.mark.parametrize("name", ["command_line", "choose"])
def test_what_cannot_be_found_out_keeps_no_run_away(name, pair, tmp_path, monkeypatch):
    """`Path.home` raises RuntimeError for a user without a home; the others ask the machine."""

    def unknown(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(session, name, unknown)
    assert main(command(pair, tmp_path, checkpoint_every=1)) == 0
    (only,) = sessions(tmp_path / "r")
    assert only["error"] == "Could not determine home directory." and only["steps"] == [0, 2]
    assert ("seed" in only) == (name == "command_line") and (tmp_path / "r" / "student").is_dir()
