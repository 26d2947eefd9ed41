"""The doctor's look at the machine: threads, memory, disks, GPUs and compilers of worlds that are made for it."""

from __future__ import annotations

import os
import runpy
import subprocess
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch

from cmdp_fast import containers, cpu
from cmdp_fast.doctor import machine
from cmdp_fast.doctor.row import NOTE, OK, PROBLEM, Row

Patch = pytest.MonkeyPatch


def only(rows, what: str) -> Row:
    (row,) = [row for row in rows if row.what == what]
    return row


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
    monkeypatch.setattr(containers, "PROC", tmp_path / "proc")
    monkeypatch.setattr(containers, "CGROUPS", tmp_path / "cgroup")
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
