"""Is everything right here? Versions, the device's ceilings, a check against float64, then the tests on this GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import shutil
import sys
import sysconfig
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import cmdp_fast as cf
from phases import ceilings, checks, processes
from phases.record import Part
from phases.setting import Setting, need_package

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "trl", "liger-kernel", "cut-cross-entropy")
PACKAGES += ("tyro", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "tensorboard")
PROGRAMS = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump", "g++", "gcc")
FOLDERS = [str(ROOT / "tests" / name) for name in ("ops", "kernels", "csrc")]
ON_GPU = str(ROOT / "tests" / "kernels" / "test_gpu.py")
FEW = str(ROOT / "tests" / "ops" / "test_write_gradient.py")
RESERVE = 25.0  # seconds that a run of tests leaves to what comes after it
EACH = 120  # seconds that one test may take
MOST = (150.0, math.inf)  # seconds that the runs may take; the last takes what is left
SHOWN = 40  # failures of a run that are quoted


def parts(setting: Setting) -> list[Part]:
    """The most important first: the tests take what time is left."""
    marked = sorted(map(str, (ROOT / "tests").glob("test_*.py")))
    if setting.small:
        tests = [(FEW, "-m", "triton or cuda")]
        names = ["tests: a few, interpreted"]
    else:
        tests = [(ON_GPU,), (*FOLDERS, *marked, f"--ignore={ON_GPU}", "-m", "triton or cuda")]
        names = ["tests: test_gpu.py", "tests: triton or cuda"]
    return [
        Part("versions", 10, _versions),
        *ceilings.parts(setting),
        *checks.parts(setting),
        *(
            Part(name, 30, lambda n=n, s=s: _tests(setting, n, tests[n], s), s + RESERVE)
            for n, (name, s) in enumerate(zip(names, MOST[-len(names) :], strict=True))
        ),
    ]


def _versions() -> dict[str, Any]:
    """What is installed, and which backends work. Missing programs are part of the answer."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    programs = {name: shutil.which(name) for name in PROGRAMS}
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"  # of which Triton compiles its launcher
    programs[header.name] = str(header) if header.exists() else None
    backends = cf.available_backends()
    absent = [name for name, found in (packages | programs).items() if found is None]
    return {
        "packages": packages,
        "programs": programs,
        "backends": backends,
        "cuda": torch.version.cuda,
        "package": str(Path(cf.__file__).parent),
        "summary": f"backends {', '.join(k for k, v in backends.items() if v is None)}; absent {', '.join(absent)}",
    }


def _tests(setting: Setting, number: int, selection: Sequence[str], most: float) -> dict[str, Any]:
    """Runs tests in processes beside this one, and reads what became of them from the JUnit file that is kept."""
    need_package("pytest")
    setting.free()
    junit = setting.log.with_name(f"tests-{number}.xml")
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *selection, "-q", "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", f"--junit-xml={junit}", f"--rootdir={ROOT}"]
    if importlib.util.find_spec("xdist") is not None and not setting.small:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command.append(f"--timeout={EACH}")
    limit = max(5.0, min(most, setting.left() - RESERVE))
    # As tests are run elsewhere: without the folder of this script, whose modules have names like theirs.
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != str(ROOT / "benchmarks")]
    # A process per test run, each with threads and compilers of its own, would be ten times as many as there are cores.
    few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = {**os.environ, **few, "PYTHONPATH": os.pathsep.join(paths)}
    ended = processes.run(command, limit, setting.log, environment)
    counts, failures = _outcome(junit)
    problems = []
    if ended.code is None:
        problems.append(f"the tests had not ended after {limit:.0f} s")
    elif ended.code not in (0, 5):  # 5: none was selected
        problems.append(f"pytest ended with {ended.code}")
    problems += [f"{failure['test']}: {failure['error']}" for failure in failures[:SHOWN]]
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    return {
        "command": command[1:],
        "code": ended.code,
        "counts": counts,
        "failures": failures,
        "problems": problems,
        "tail": ended.tail(4),
        "summary": said or "no test has ended",
    }


def _outcome(junit: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    """(how many tests passed, failed, were skipped; the failures with their first lines) of a JUnit file."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    if not junit.exists():
        return {}, []
    try:
        cases = list(xml.parse(junit).getroot().iter("testcase"))
    except xml.ParseError:
        return {}, []
    for case in cases:
        bad = next((e for e in case if e.tag in ("failure", "error")), None)
        if bad is not None:
            lines = (bad.get("message") or bad.text or "").strip().splitlines()
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            failures.append({"test": name, "error": lines[0][:300] if lines else ""})
            counts["failed"] += 1
        elif any(e.tag == "skipped" for e in case):
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, failures
