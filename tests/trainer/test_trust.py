"""Whose code runs when a run goes on: what the command line names again, and that is still what it was."""

from __future__ import annotations

import json
import os
import py_compile
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_pair import arguments

from cmdp_fast import digest
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.imports import import_function, source_files
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.parse import parse, parse_as
from cmdp_fast.trainer.records import trust
from cmdp_fast.trainer.records.trust import CODE
from cmdp_fast.trainer.settings.config import TrainConfig

MINE = """
from pathlib import Path
(Path(__file__).parent / "ran").touch()

def reward(completions, **columns):
    return [1.0] * len(completions)

def verifier(prompt, completion, **columns):
    return True

def rollout(prompts, sampling, policy):
    return {"completion_ids": [[3, 4, 5] for _ in prompts]}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder with `mine.py`, in which one is; `ran` is there once that has been run."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget_modules()
    yield folder
    forget_modules()


def forget_modules() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "pack")]:
        del sys.modules[name]


SETTINGS = {
    "a reward": {"rewards": "mine.py:reward"},
    "a step verifier": {"step_verifier": "mine.py:verifier"},
    "a rollout": {"rollout": "mine.py:rollout"},
    "a module": {"rollout": "mine:rollout"},
    "two": {"rewards": "mine.py:reward", "rollout": "mine.py:rollout"},
}


def begun(pair, tmp_path: Path, **changes) -> list[str]:
    """A run of two steps is there; the words that go on with it, but for its code."""
    output = tmp_path / "runs"
    assert main(arguments(pair, output, lr_schedule="constant", checkpoint_every=1, **changes)) == 0
    return ["train", f"--resume={output / 'r'}", "--steps=3"]


def code(changes: dict[str, str]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]


@pytest.mark.parametrize("case", SETTINGS)
def test_a_run_goes_on_where_its_code_is_named_again(case, pair, tmp_path, mine, capsys):
    changes = SETTINGS[case]
    resume = begun(pair, tmp_path, **changes)
    (mine / "ran").unlink()
    forget_modules()
    for more in ([], ["--dry-run"], code(changes)[1:]):
        assert main([*resume, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (mine / "ran").exists() and "mine" not in sys.modules
    # the message has the whole command, and it works
    command = shlex.split(error.split("trust it: ")[1])
    assert command[0] == "cmdp-fast" and command[1 : len(resume) + 1] == resume
    assert main(command[1:]) == 0
    assert (mine / "ran").exists()


def test_a_package_that_the_code_is_in_has_changed(pair, tmp_path, mine, capsys):
    """It is imported first, so it is as much as the module what runs."""
    (mine / "pack").mkdir()
    above = mine / "pack" / "__init__.py"
    above.write_text("")
    shutil.copy(mine / "mine.py", mine / "pack")
    resume = begun(pair, tmp_path, rewards="pack.mine:reward")
    forget_modules()
    above.write_text(f"open({str(mine / 'imported')!r}, 'w')")
    assert main([*resume, "--rewards=pack.mine:reward"]) == 2
    assert "or a package that it is in has changed" in capsys.readouterr().err
    assert not (mine / "imported").exists()


def test_evaluate_asks_as_well(pair, tmp_path, mine, capsys):
    _, resume, _ = begun(pair, tmp_path, rewards="mine.py:reward")
    (mine / "ran").unlink()
    assert main(["evaluate", resume]) == 2
    assert f"cmdp-fast evaluate {resume} --rewards mine.py:reward" in capsys.readouterr().err
    assert not (mine / "ran").exists()
    assert main(["evaluate", resume, "--rewards", "mine.py:reward"]) == 0


@pytest.mark.parametrize("spec", ["mine.py:reward", "mine:reward", "pack.inner.mine:reward"])
def test_code_that_has_changed_is_not_run(spec, pair, tmp_path, mine, capsys):
    inner = mine / "pack" / "inner"
    inner.mkdir(parents=True)
    for folder in (mine / "pack", inner):
        (folder / "__init__.py").write_text(f"open({str(mine / 'imported')!r}, 'w')")
    shutil.copy(mine / "mine.py", inner)
    file = Path(source_files(spec)[-1])
    resume = begun(pair, tmp_path, rewards=spec)
    forget_modules()
    for trace in ("ran", "imported", "pack/inner/ran"):
        (mine / trace).unlink(missing_ok=True)
    file.write_text(MINE + "\n")
    for more in ([], ["--dry-run"]):
        assert main([*resume, f"--rewards={spec}", *more]) == 2
        error = capsys.readouterr().err
        assert f"--rewards {spec}: " in error and "mine.py is not the file" in error and error.count("\n") == 1
        for sha256 in (
            trust._sha256("rewards", spec),
            digest.read_sealed(tmp_path / "runs/r/config.json")["code"][spec],
        ):
            assert sha256 in error
        assert not any((mine / trace).exists() for trace in ("ran", "imported", "pack/inner/ran"))
    file.write_text(MINE)
    assert main([*resume, f"--rewards={spec}"]) == 0
    file.unlink()
    forget_modules()
    assert main([*resume[:-1], f"--rewards={spec}", "--steps=4"]) == 2
    assert f"--rewards {spec}: " in capsys.readouterr().err


def test_other_code_than_that_of_the_beginning(pair, tmp_path, mine, capsys):
    resume = begun(pair, tmp_path, rewards="mine.py:reward")
    (mine / "other.py").write_text("raise SystemExit(5)\n" + MINE)
    assert main([*resume, "--rewards=other.py:reward"]) == 2
    assert "began with ('mine.py:reward',)" in capsys.readouterr().err
    assert main([*resume, "--rewards=mine.py:reward", "--rollout=other.py:rollout"]) == 2
    assert "--rollout other.py:rollout" in capsys.readouterr().err
    assert main([*resume, "--rewards=mine.py:reward", "--trust-remote-code"]) == 2
    assert "--trust-remote-code True" in capsys.readouterr().err


def test_built_in_rewards_need_not_be_named_again(pair, tmp_path):
    assert main(begun(pair, tmp_path, step_verifier="equations")) == 0


def test_code_of_a_model_runs_only_where_it_is_named_again(pair, tmp_path, capsys):
    """Whatever the run's folder says, and whichever folder it takes for the student's."""
    resume = begun(pair, tmp_path)
    student = tmp_path / "student"
    shutil.copytree(pair["student"], student)
    (student / "code.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    about = json.loads((student / "config.json").read_text())
    about |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (student / "config.json").write_text(json.dumps(about))
    config = tmp_path / "runs" / "r" / "config.json"
    values = digest.read_sealed(config)
    digest.write_sealed(config, {**values, "student": str(student), "trust_remote_code": True})
    assert main(resume) == 2
    assert capsys.readouterr().err.endswith("--trust-remote-code\n")
    digest.write_sealed(config, {**values, "student": str(student)})
    assert main(resume) == 2
    assert "comes with code of its own" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_a_tracker_is_one_that_there_is(pair, tmp_path, mine, capsys):
    """`find_spec` imports what is above a module, so that its name would be enough."""
    resume = begun(pair, tmp_path)
    config = tmp_path / "runs" / "r" / "config.json"
    digest.write_sealed(config, {**digest.read_sealed(config), "trackers": ["mine.x"]})
    assert main(resume) == 2
    assert "--trackers must be some of tensorboard" in capsys.readouterr().err
    assert not (mine / "ran").exists()


def test_figures_go_to_a_tracker_where_it_is_named_again(pair, tmp_path, monkeypatch, capsys):
    """Its account is that of who resumes, and who wrote the folder may not be."""
    for name in ("wandb", "trackio"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    resume = begun(pair, tmp_path)
    config = tmp_path / "runs" / "r" / "config.json"
    values = digest.read_sealed(config)

    def trackers_of(words: list[str]) -> tuple[str, ...]:
        return parse(words[1:]).trackers

    digest.write_sealed(config, {**values, "trackers": ["tensorboard", "wandb"]})
    with pytest.raises(InputError, match=r"ask servers or trackers, .*--steps=3 --trackers tensorboard wandb$"):
        parse(resume[1:])
    assert trackers_of([*resume, "--trackers", "tensorboard", "wandb"]) == ("tensorboard", "wandb")
    assert trackers_of([*resume, "--trackers", "trackio"]) == ("trackio",)  # they may change
    assert trackers_of([*resume, "--trackers", "tensorboard"]) == ("tensorboard",)
    evaluation = parse_as(EvaluateConfig, resume[1:2], "cmdp-fast evaluate", "")
    assert evaluation.trackers == ("tensorboard",)  # which sends nothing to any
    digest.write_sealed(config, {**values, "trackers": []})
    assert trackers_of(resume) == ()


def test_what_cannot_be_typed_is_not_proposed(pair, tmp_path, mine, capsys):
    resume = begun(pair, tmp_path)
    config = tmp_path / "runs" / "r" / "config.json"
    digest.write_sealed(config, {**digest.read_sealed(config), "rollout": "mine.py:rollout\nrm -r ~"})
    assert main(resume) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be typed" in error


def test_settings_that_let_code_run_are_safe_by_default():
    config = TrainConfig()
    for name in CODE:
        assert getattr(config, name) in (False, "", ("exact_answer",))


# ------------------------------------------------------------------------------------- what is imported


def test_a_compiled_file_beside_a_file_is_not_run(mine):
    """It may be of another source than that which one reads, with the right time and size."""
    other = mine / "other.py"
    other.write_text(MINE.replace("1.0", "2.0"))
    compiled = Path(py_compile.compile(str(other), dfile="mine.py"))
    about = (mine / "mine.py").stat()
    os.utime(other, (about.st_atime, about.st_mtime))
    compiled = Path(py_compile.compile(str(other)))
    cached = compiled.with_name(compiled.name.replace("other", "mine"))
    compiled.rename(cached)
    assert import_function("--rewards", "mine.py:reward")(completions=["a"]) == [1.0]
    assert import_function("--rewards", "mine:reward")(completions=["a"]) == [1.0]


def test_the_file_of_a_module_is_found_without_running_anything(mine):
    (mine / "pack").mkdir()
    (mine / "pack" / "__init__.py").write_text("raise SystemExit(5)")
    (mine / "pack" / "inner.py").write_text("raise SystemExit(5)")
    assert source_files("mine:reward") == [mine / "mine.py"]
    assert source_files("pack:reward") == [mine / "pack" / "__init__.py"]
    assert source_files("pack.inner:reward") == [mine / "pack" / "__init__.py", mine / "pack" / "inner.py"]
    assert source_files("sys:exit") == []
    for spec in ("no_such:reward", "pack.no_such:reward", "pack.inner.no_such:reward", "mine.x:reward"):
        with pytest.raises(ImportError):
            source_files(spec)
    with pytest.raises(InputError, match=r"--rewards no_such:reward: No module named 'no_such'"):
        import_function("--rewards", "no_such:reward")
