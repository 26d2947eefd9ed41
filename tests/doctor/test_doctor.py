"""`cmdp-fast doctor`: each line in a world that is made for it, the exit code, and that nothing secret is printed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cmdp_fast as cf
from cmdp_fast import cpu, doctor, installation, native_module
from cmdp_fast.cli import main
from cmdp_fast.doctor import backends, importing, installed, machine
from cmdp_fast.doctor.row import NOTE, OK, PROBLEM, Row, lines, public

Patch = pytest.MonkeyPatch


def only(rows, what: str) -> Row:
    (row,) = [row for row in rows if row.what == what]
    return row


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_line_each_and_counts(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    def fine():
        yield Row(OK, "a", "as it is")

    def noted():
        yield Row(NOTE, "b", "odd", "do this")

    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", (fine, noted))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == (
        "ok       a: as it is\nnote     b: odd\n         cure: do this\nno problems, 1 note\n"
    )
    monkeypatch.setattr(doctor, "CHECKS", (fine, broken))
    assert main(["doctor"]) == 1
    assert (
        "problem  broken: cannot be looked at: RuntimeError: no such thing\n1 problem, 0 notes"
        in capsys.readouterr().out
    )


def test_this_machine_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    """What is here is whatever it is: every check says something, and none fails itself."""
    main(["doctor"])
    text = capsys.readouterr().out
    assert "cannot be looked at" not in text and str(Path.home()) + "/" not in text
    for what in ("cmdp_fast", "python", "backend", "numbers torch", "threads", "memory", "disk", "gpu", "compilers"):
        assert f" {what}: " in text


def test_lines_are_wrapped_at_a_terminal_and_cures_are_whole() -> None:
    row = Row(PROBLEM, "disk", "word " * 30, "pip install " + "x" * 90)
    shown = lines(row, 60)
    assert all(len(line) <= 60 for line in shown[:-1]) and shown[1].startswith(" " * 9 + "word")
    assert shown[-1] == "         cure: pip install " + "x" * 90
    assert len(lines(row, None)) == 2


def test_nothing_that_looks_secret_is_printed(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    shown = public("git+https://me:token@host.example/a\nb\x1b[31m in /home/somebody/x, CMDP_FAST_KEY=abc")
    assert shown == "git+https://***@host.example/a b\N{REPLACEMENT CHARACTER}[31m in ~/x, CMDP_FAST_KEY=***"
    row = Row(NOTE, "a", "in /home/somebody/x", "pip install git+https://me:token@host.example/a /home/somebody/x")
    assert lines(row, None) == ["note     a: in ~/x", "         cure: pip install git+https://***@host.example/a ~/x"]


def test_a_user_without_a_home_folder(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "CHECKS", (machine.disk,))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "problem  disk: there is no home folder" in said and "cure: export XDG_CACHE_HOME=FOLDER" in said
    assert "note     disk of the Hub: there is no home folder" in said


# --------------------------------------------------------------------------------------------------- the installation


def test_the_package(monkeypatch: Patch) -> None:
    monkeypatch.setattr(installed, "_noted_version", lambda: "0.0.1")
    rows = list(installed.package())
    assert cf.__version__ in rows[0].says and rows[-1].level == NOTE and "0.0.1" in rows[-1].says


REQUIRED = [
    "torch>=2.8",
    "transformers>=5.0; extra == 'train'",
    "tyro>=1.0; extra == 'train'",
    "landlock>=1; platform_system == 'Nowhere' and extra == 'train'",
    "cmdp_fast[lora]; extra == 'smollm2'",
    "trl<1.17,>=1.16; extra == 'trl'",
    "pytest>=99; extra == 'test'",
]


def bounds(monkeypatch: Patch, **versions: str) -> list[Row]:
    pytest.importorskip("packaging")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRED)
    extras = SimpleNamespace(get_all=lambda name: ["train", "smollm2", "trl", "test"])
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: extras)
    monkeypatch.setattr(installed, "version", lambda name: versions.get(name, "not installed"))
    return list(installed.versions())


def test_versions_within_their_bounds(monkeypatch: Patch) -> None:
    rows = bounds(monkeypatch, torch="2.13.0+cpu", transformers="5.1", tyro="1.0.1", pytest="8")
    assert [row.level for row in rows] == [OK, OK] and "all 2 packages" in rows[0].says
    assert rows[1].says == "torch 2.13.0+cpu, transformers 5.1, all within bounds"
    rows = bounds(monkeypatch, torch="2.14.0.dev20260101+cpu", transformers="5.2.0rc1", tyro="1.0.1")
    assert rows[1].says.endswith("all within bounds")  # those that are no releases yet are within them too


def test_versions_out_of_their_bounds(monkeypatch: Patch) -> None:
    rows = bounds(monkeypatch, torch="2.7.1", transformers="4.9", trl="1.20")
    assert only(rows, "version of torch") == Row(
        PROBLEM, "version of torch", "2.7.1, and cmdp_fast needs >=2.8", "pip install 'torch>=2.8'"
    )
    assert only(rows, "version of transformers").level == PROBLEM
    assert "cmdp_fast[train] needs >=5.0" in only(rows, "version of transformers").says
    assert only(rows, "version of trl").level == NOTE and only(rows, "extra train").level == PROBLEM
    assert only(rows, "extra train").says == "tyro not installed"
    rows = bounds(monkeypatch)
    assert only(rows, "extra train").level == NOTE and "[train]" in only(rows, "extra train").cure
    assert only(rows, "version of torch").says == "not installed"


def test_versions_without_metadata_or_packaging(monkeypatch: Patch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRED)
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    monkeypatch.setattr(installed, "version", lambda name: "1.0" if name == "tyro" else "not installed")
    extra, row = installed.versions()
    assert (extra.level, extra.says) == (PROBLEM, "transformers not installed")
    assert row.level == NOTE and row.cure == "pip install packaging"
    monkeypatch.setattr(importlib.metadata, "requires", absent)
    (row,) = installed.versions()
    assert row.level == NOTE and "from a folder that pip has not installed" in row.says


def test_other_copies(monkeypatch: Patch, tmp_path: Path) -> None:
    here = installation.PACKAGE.parent
    monkeypatch.setattr(sys, "path", [str(here), str(tmp_path)])
    monkeypatch.setattr(installation, "installations", lambda: [])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert [row.level for row in installed.others()] == [OK]
    (tmp_path / "cmdp_fast").mkdir()
    (tmp_path / "cmdp_fast" / "__init__.py").touch()
    monkeypatch.setattr(sys, "version_info", (3, 11, 0))
    (row,) = installed.others()
    assert row.level == NOTE and f"hides {tmp_path}: it is in the working directory" in row.says
    assert row.cure.startswith("run from another folder or with python -P")
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    assert "-P" not in only(installed.others(), "copies").cure
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/x", str(here)]))
    assert "PYTHONPATH names it" in only(installed.others(), "copies").says
    monkeypatch.setenv("PYTHONPATH", "/x")
    monkeypatch.setattr(sys, "path", ["/x", str(here), str(tmp_path)])
    row = only(installed.others(), "copies")
    assert "both are installed" in row.says and row.cure.startswith("pip uninstall")
    known = [({}, here), ({}, tmp_path), ({}, tmp_path / "elsewhere")]  # to pip: what it has installed to be edited
    monkeypatch.setattr(installation, "installations", lambda: known)
    says = only(installed.others(), "copies").says
    assert f"hides {tmp_path}, {tmp_path / 'elsewhere'}: " in says


def test_imports_that_fail(monkeypatch: Patch, tmp_path: Path) -> None:
    """Each with its cause, and what it keeps from being imported with it not once more."""
    (tmp_path / "broken_one").mkdir()
    (tmp_path / "broken_one" / "__init__.py").write_text("raise ImportError('no libfoo.so.1')\n")
    (tmp_path / "lazy_one.py").write_text(
        "def __getattr__(name):\n"
        "    try:\n        import broken_one\n"
        "    except ImportError as error:\n        raise RuntimeError('look above') from error\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["json", "broken_one", "broken_one.part", "absent_one", "lazy_one", "lazy_one:Model"]
    assert importing.failures(names) == {
        "broken_one": "ImportError: no libfoo.so.1",
        "absent_one": "ModuleNotFoundError: No module named 'absent_one'",
        "lazy_one": "ImportError: no libfoo.so.1",
    }


def test_imports(monkeypatch: Patch) -> None:
    asked: list[str] = []

    def rows(code: int, out: str = "", err: str = "", late: bool = False) -> list[Row]:
        def run(command: list[str], **settings: object) -> SimpleNamespace:
            asked[:] = command
            if late:
                raise subprocess.TimeoutExpired(command, 120)
            return SimpleNamespace(returncode=code, stdout=out, stderr=err)

        monkeypatch.setattr(installed.subprocess, "run", run)
        return list(installed.imports())

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [*REQUIRED, "math-verify>=1; extra == 'train'"])
    here = {"transformers": "5.1", "math-verify": "1"}
    monkeypatch.setattr(installed, "_installed", here.get)
    assert [row.level for row in rows(0, "of a start of Python\n{}")] == [OK]
    assert (
        asked[-7:-5] == ["transformers", "math_verify"] and "cmdp_fast.trainer.run" in asked
    )  # and not what is absent
    (row,) = rows(0, '{"tokenizers": "ImportError: no libfoo.so.1"}\n')
    assert row == Row(PROBLEM, "import of tokenizers", "ImportError: no libfoo.so.1", row.cure) and row.cure
    (row,) = rows(-11, err="Fatal Python error: Segmentation fault\n\n")
    assert row.level == PROBLEM and row.says.endswith("ended the process: Fatal Python error: Segmentation fault")
    (row,) = rows(0, late=True)
    assert row.level == NOTE and "has not ended after 120 seconds" in row.says
    here.clear()
    assert rows(1) == []  # without the extra there is nothing to import


def test_variables(monkeypatch: Patch) -> None:
    for name in [name for name in os.environ if name.startswith("CMDP_FAST")]:
        monkeypatch.delenv(name)
    assert not list(installed.variables())
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", "4096")
    monkeypatch.setenv("CMDP_FAST_TITLE_BYTES", "secret")
    rows = list(installed.variables())
    assert rows[0] == Row(NOTE, "variable", "CMDP_FAST_TILE_BYTES=4096 is set")
    assert (
        rows[1].level == PROBLEM
        and "did you mean CMDP_FAST_TILE_BYTES?" in rows[1].says
        and "secret" not in rows[1].says
    )


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("CMDP_FAST_TILE_BYTES", "banana", "CMDP_FAST_TILE_BYTES must be a positive number of bytes, got 'banana'"),
        ("CMDP_FAST_PATIENCE", "-3", "CMDP_FAST_PATIENCE is '-3', expected how many seconds a process waits"),
        ("CMDP_FAST_TEACHER_RANK", "x", "CMDP_FAST_TEACHER_RANK=x: invalid literal for int()"),
        ("CMDP_FAST_TRACEBACK", "yes", "CMDP_FAST_TRACEBACK=yes does nothing: 1 switches it on"),
        ("CMDP_FAST_BACKEND", "torch", "CMDP_FAST_BACKEND is set, and nothing reads it"),
        ("CMDP_FAST_FOO", "1", "CMDP_FAST_FOO is set, and nothing reads it"),
        ("cmdp_fast_tile_bytes", "1", "cmdp_fast_tile_bytes is set, and nothing reads it, did you mean CMDP_FAST_TILE"),
    ],
)
def test_variables_that_end_a_command_or_do_nothing(name: str, value: str, says: str, monkeypatch: Patch) -> None:
    for each in [each for each in os.environ if each.startswith("CMDP_FAST")]:
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, value)
    (row,) = installed.variables()
    assert row.level == PROBLEM and row.says.startswith(says) and ("did you mean" in row.says) == ("did you" in says)


def test_the_list_of_variables_is_what_is_read() -> None:
    root = installation.PACKAGE.parent
    sources = [*installation.PACKAGE.rglob("*.py"), *(root / "tests").rglob("*.py"), root / "setup.py"]
    texts = [path.read_text(encoding="utf-8") for path in sources if path.is_file() and path.name != "installed.py"]
    asked = [name for name in installed.VARIABLES if any(f'"{name}"' in text for text in texts)]
    assert asked == list(installed.VARIABLES)


# -------------------------------------------------------------------------------------------------------- the backends


def test_the_native_kernels(monkeypatch: Patch) -> None:
    native = SimpleNamespace(
        variant=lambda: "v2", variants=lambda: [("v2", True), ("v3", False)], cpu_features=lambda: ["avx"], OPENMP=False
    )
    monkeypatch.setattr(cpu, "native", native)
    first, second = backends.native_kernels()
    assert first == Row(OK, "native kernels", "v2 of v2 (processor: avx)") and second.level == NOTE
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(cpu, "PROBLEM", "the native module was not built: no C++ compiler was found")
    monkeypatch.setattr(cpu, "CURE", "install one")
    monkeypatch.setattr(native_module, "is_pure", lambda: False)
    (row,) = backends.native_kernels()
    assert row.level == PROBLEM and "no C++ compiler was found" in row.says and row.cure == "install one"
    monkeypatch.setattr(native_module, "is_pure", lambda: True)
    assert [row.level for row in backends.native_kernels()] == [NOTE]


def test_the_backend_that_a_call_gets(monkeypatch: Patch) -> None:
    found = {"cpu": None, "cuda": "not built", "triton": "no triton", "torch": None}
    monkeypatch.setattr(backends.backends, "available_backends", lambda: found)
    monkeypatch.setattr(backends.backends, "choose", lambda backend, tensor, operation: "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = list(backends.chosen())
    assert rows[0].says == "CPU tensors: cpu" and [row.level for row in rows] == [OK, OK, OK]
    assert rows[2].says == "not here: no triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device="cpu": None)
    rows = list(backends.chosen())
    assert rows[0].says.endswith("GPU tensors: cpu") and only(rows, "backend triton").level == NOTE


def test_numbers(monkeypatch: Patch) -> None:
    monkeypatch.setattr(backends.backends, "available_backends", lambda: {"cpu": "none", "torch": None})
    (row,) = backends.numbers()
    assert row.level == OK and row.what == "numbers torch"
    right = cf.token_stats

    def wrong(*given, **settings):
        stats = right(*given, **settings)
        return stats._replace(forward_kl=stats.forward_kl + 1e-4)

    monkeypatch.setattr(cf, "token_stats", wrong)
    (row,) = backends.numbers()
    assert row.level == PROBLEM and row.says.startswith("forward_kl is off by 0.0001") and "report" in row.cure
    monkeypatch.setattr(cf, "token_stats", lambda *given, **settings: 1 / 0)
    monkeypatch.setattr(backends.backends, "available_backends", lambda: {"cpu": None, "triton": "none", "torch": None})
    rows = list(backends.numbers())  # one that fails keeps no other from being looked at
    assert [row.what for row in rows] == ["numbers cpu", "numbers torch"]
    assert all(row.level == PROBLEM and "ZeroDivisionError" in row.says for row in rows)


@pytest.mark.parametrize("differentiable", ["reverse_kl", "logprob"])
def test_a_gradient_that_is_wrong(monkeypatch: Patch, differentiable: str) -> None:
    """Of values that are right."""
    right = cf.token_stats

    def wrong(*given, **settings):
        stats = right(*given, **settings)
        value = getattr(stats, differentiable)
        return stats._replace(**{differentiable: value.detach() + 1.01 * (value - value.detach())})

    monkeypatch.setattr(backends.backends, "available_backends", lambda: {"torch": None})
    monkeypatch.setattr(cf, "token_stats", wrong)
    (row,) = backends.numbers()
    assert row.level == PROBLEM and row.says.startswith("gradient is off by")


def test_a_number_that_is_none_is_wrong(monkeypatch: Patch) -> None:
    right = cf.budget_trace

    def wrong(*given, **settings):
        trace = right(*given, **settings)
        return trace._replace(excess=trace.excess * float("nan"))

    monkeypatch.setattr(backends.backends, "available_backends", lambda: {"torch": None})
    monkeypatch.setattr(cf, "budget_trace", wrong)
    (row,) = backends.numbers()
    assert row.level == PROBLEM and row.says.startswith("excess is off by inf")
