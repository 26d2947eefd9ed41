"""`cmdp-fast doctor`: each line in a world that is made for it, the exit code, and that nothing secret is printed."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
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


# --------------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    "used, usable, given, level, cure",
    [
        (2, 2, None, OK, ""),
        (1, 4, None, OK, ""),
        (8, 2, "8", NOTE, "export OMP_NUM_THREADS=2"),
        (64, 2, None, NOTE, "export OMP_NUM_THREADS=2"),  # of a container, whose share of them torch does not see
        (1, 4, "1", NOTE, "unset OMP_NUM_THREADS"),
    ],
)
def test_threads(monkeypatch: Patch, used: int, usable: int, given: str | None, level: str, cure: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: used)
    monkeypatch.setattr(machine, "_usable_processors", lambda: usable)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    (row,) = machine.threads()
    assert (row.level, row.cure) == (level, cure) and row.says.startswith(f"{used} on {usable} usable")


@pytest.fixture
def world(monkeypatch: Patch, tmp_path: Path):
    """Writes files of /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_processors_of_a_container(world) -> None:
    assert machine._usable_processors() == 8
    world("proc/self/cgroup", "0::/a/b\n")
    assert machine._usable_processors() == 8
    world("cgroup/a/b/cpu.max", "max 100000\n")
    assert machine._usable_processors() == 8
    world("cgroup/a/cpu.max", "250000 100000\n")  # of a group above
    assert machine._usable_processors() == 3
    world("proc/self/cgroup", "4:cpu,cpuacct:/docker/x\n")  # version 1, whose folder a container sees as the root
    world("cgroup/cpu/cpu.cfs_quota_us", "150000\n")
    world("cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert machine._usable_processors() == 2
    world("cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert machine._usable_processors() == 8


def test_memory(world) -> None:
    (row,) = machine.memory()
    assert row.level == OK and "does not tell" in row.says
    world("proc/meminfo", f"MemTotal:  {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\nHugePages_Total: 0\n")
    (row,) = machine.memory()
    assert (row.level, row.says) == (OK, "8.0 GiB free of 16.0 GiB")
    world("proc/self/cgroup", "0::/\n")
    world("cgroup/memory.max", f"{2 * 2**30}\n")
    world("cgroup/memory.current", f"{3 * 2**29}\n")
    (row,) = machine.memory()
    assert (row.level, row.says) == (NOTE, "0.5 GiB free of 2.0 GiB that its container may use")
    world("cgroup/memory.stat", f"anon 1\ninactive_file {2**30}\n")  # what the kernel gives up counts as free
    assert only(machine.memory(), "memory") == Row(OK, "memory", "1.5 GiB free of 2.0 GiB that its container may use")
    world("cgroup/memory.current", f"{5 * 2**30}\n")  # it was lowered meanwhile
    assert only(machine.memory(), "memory").says == "0.0 GiB free of 2.0 GiB that its container may use"
    world("cgroup/memory.max", f"{12 * 2**30}\n")  # more than is free, most of it in use
    world("cgroup/memory.current", f"{11 * 2**30}\n")
    assert only(machine.memory(), "memory").says == "2.0 GiB free of 12.0 GiB that its container may use"
    world("proc/self/cgroup", "4:memory:/docker/x\n")  # version 1
    world("cgroup/memory/memory.limit_in_bytes", f"{4 * 2**30}\n")
    world("cgroup/memory/memory.usage_in_bytes", f"{3 * 2**30}\n")
    world("cgroup/memory/memory.stat", f"inactive_file 0\ntotal_inactive_file {2 * 2**30}\n")
    assert only(machine.memory(), "memory").says == "3.0 GiB free of 4.0 GiB that its container may use"


def test_openmp(world) -> None:
    assert not list(machine.openmp())
    line = "7f00-7f10 r-xp 00000000 08:01 42   {}\n"
    world("proc/self/maps", line.format("/lib/libgomp.so.1") * 2 + "7f20-7f30 rw-p 00000000 00:00 0\n")
    assert list(machine.openmp()) == [Row(OK, "openmp", "/lib/libgomp.so.1")]
    world("proc/self/maps", line.format("/lib/libgomp.so.1") + line.format("/opt/a b/libiomp5.so"))
    (row,) = machine.openmp()
    assert row.level == NOTE and row.says.endswith("/lib/libgomp.so.1, /opt/a b/libiomp5.so")
    world("proc/self/maps", "")
    assert only(machine.openmp(), "openmp").level == OK


def test_disk(monkeypatch: Patch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(0, 0, 5 * 2**30))
    models, hub, runs = machine.disk()
    assert models == Row(OK, "disk", f"5.0 GiB free at {tmp_path / 'cmdp_fast'}, for built-in models")
    assert hub.says == f"5.0 GiB free at {tmp_path / 'huggingface' / 'hub'}, for models of the Hub"
    assert runs == Row(OK, "disk of runs", f"5.0 GiB free at {tmp_path}, for runs")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
    assert [row.level for row in machine.disk()] == [NOTE] * 3
    monkeypatch.setenv("HF_HOME", "/of/hf")
    assert only(machine.disk(), "disk of the Hub").says.endswith("at /of/hf/hub, for models of the Hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/of/cache")
    row = only(machine.disk(), "disk of the Hub")
    assert " at /of/cache, " in row.says and row.cure == "export HF_HUB_CACHE=FOLDER"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert [row.level for row in machine.disk()] == [PROBLEM, NOTE, NOTE]
    assert "XDG_CACHE_HOME" in only(machine.disk(), "disk").cure


@pytest.mark.parametrize("kind", ["a file", "a device", "a link to nothing"])
def test_a_place_that_is_no_folder(kind: str, monkeypatch: Patch, tmp_path: Path) -> None:
    """Whoever may write to it, there will be no folder in it."""
    place = tmp_path / "place"
    if kind == "a file":
        place.touch()
    elif kind == "a device":
        place = Path(os.devnull)
    else:
        place.symlink_to(tmp_path / "nothing")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    rows = list(machine.disk())
    assert rows[0] == Row(
        PROBLEM, "disk", f"{place}, for built-in models, is no folder", "export XDG_CACHE_HOME=FOLDER"
    )
    assert rows[1].level == NOTE and rows[1].says == f"{place}, for models of the Hub, is no folder"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "~/cache"},
        {"XDG_CACHE_HOME": "$HOME/cache"},
        {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "$HOME/hf"},
        {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "~/old"},
        {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "~/new"},
    ],
)
def test_the_cache_of_the_hub_is_where_huggingface_hub_has_it(variables: dict[str, str], monkeypatch: Patch) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    theirs = runpy.run_path(huggingface_hub.constants.__file__)["HF_HUB_CACHE"]  # it reads them when it is imported
    assert machine._hub_cache()[0] == Path(theirs)


def test_no_gpu(monkeypatch: Patch) -> None:
    def row(drivers: str = "", **visible: str) -> Row:
        for name in machine._HIDES:
            monkeypatch.delenv(name, raising=False)
        for name, value in visible.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(machine, "_output", lambda *command: drivers)
        return only(machine.gpu(), "gpu")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert row() == Row(OK, "gpu", "none (torch for CPUs, no NVIDIA driver)")
    assert row("570.1\n570.1\n", CUDA_VISIBLE_DEVICES="").level == NOTE and "pytorch.org" in row("570.1").cure
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert row() == Row(OK, "gpu", "none (torch built for CUDA 13.0, no NVIDIA driver)")
    for seen in ({}, {"CUDA_VISIBLE_DEVICES": "1,7"}, {"CUDA_VISIBLE_DEVICES": "GPU-1"}, {"HIP_VISIBLE_DEVICES": ""}):
        found = row("570.1\n570.1\n", **seen)
        assert found.level == PROBLEM and "built for CUDA 13.0" in found.says and "update the driver" in found.cure
        assert "older CUDA" in found.cure
    for value in ("", "-1", "2", "none"):
        found = row("570.1\n570.1\n", CUDA_VISIBLE_DEVICES=value)
        assert found.level == NOTE and f"CUDA_VISIBLE_DEVICES={value} hides them" in found.says
        assert found.cure.startswith("unset CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "torch built for ROCm 7.0" in row().says
    assert "ROCR_VISIBLE_DEVICES= hides them" in row(ROCR_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="0").says


def test_gpus(monkeypatch: Patch) -> None:
    monkeypatch.setattr(machine, "_output", lambda *command: "570.1\n570.1\n")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    kinds = (("H", 9, 0), ("V", 7, 5), ("A", 8, 0))
    about = [SimpleNamespace(name=name, major=major, minor=minor) for name, major, minor in kinds]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**30, 2**31))
    first, second, third = machine.gpu()
    capability = "compute capability 9.0, driver 570.1"
    assert first == Row(OK, "gpu 0", f"H, {capability}, 1.0 GiB free of 2.0 GiB, torch built for CUDA 12.8")
    assert second.level == NOTE and second.says.endswith("too old for the CUDA kernels")
    assert third.level == OK and "compute capability 8.0" in third.says  # the oldest that they are for


@pytest.mark.parametrize(
    "cxx, said, level, says",
    [
        ("", "g++ (Debian 12.2.0-14) 12.2.0\n", OK, "g++ 12.2.0, no nvcc"),
        ("ccache g++", "g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0\n", OK, "ccache g++ 11.4.0, no nvcc"),
        ("g++", "g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-4)\n", NOTE, "g++ is GCC 8.5.0, older than GCC 11"),
        ("clang++ -m64", "Ubuntu clang version 13.0.1-2\n", NOTE, "clang++ -m64 is Clang 13.0.1, older than Clang 14"),
        ("clang++", "Apple clang version 13.0.0 (clang-1300.0.29.30)\n", OK, "clang++ 13.0.0"),
        ("g++", "g++ (Debian) of today\n", OK, "g++ of an unknown version"),
        ("g++", "true (GNU coreutils) 9.1\n", NOTE, "CXX=g++ does not say that it is GCC or Clang"),
        ("absent -O2", "", NOTE, "CXX=absent -O2 is no program"),
    ],
)
def test_compilers(monkeypatch: Patch, cxx: str, said: str, level: str, says: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name if name in ("g++", "clang++", "ccache") else None)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(machine, "_output", lambda *command: asked.append(command) or said)
    row = only(machine.compilers(), "compilers")
    assert row.level == level and row.says.startswith(says) and "cmake" not in row.says
    assert not asked or asked[0] == (*(cxx.split() or ["g++"]), "--version")
    assert (level == NOTE) == ("C++20" in row.cure)


def test_a_compiler_that_is_no_command(monkeypatch: Patch) -> None:
    monkeypatch.setenv("CXX", '"x')
    row = only(machine.compilers(), "compilers")
    assert row.level == NOTE and row.says == 'CXX="x is no command: No closing quotation'


def test_no_compiler(monkeypatch: Patch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(cpu, "native", None)
    row = only(machine.compilers(), "compilers")
    assert row.level == NOTE and row.says.startswith("no C++ compiler") and "C++20" in row.cure
    monkeypatch.setattr(cpu, "native", object())  # which needs none
    assert only(machine.compilers(), "compilers").level == OK


def test_a_program_that_hangs_or_is_none_says_nothing(monkeypatch: Patch) -> None:
    assert machine._output("/no/such/program") == "" == machine._output("/bin/false")
    assert machine._output("sh", "-c", "echo text; exit 9") == ""
    assert machine._output("sh", "-c", "echo text") == "text\n"
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, timeout, **other: run(*given, timeout=timeout / 1e6, **other))
    assert machine._output("sleep", "600") == ""
