"""Breaks sources on purpose, one small change at a time, and tells which changes no test notices.

    python tests/mutants/run.py SOURCE... [--only N]

`lists.py` says what a list of mutants is. Works in a copy of the checkout. A mutant of Python is a file written anew;
all mutants of C++ are compiled together (`switches.py`), and the tests run on the native kernels alone. Each has a
process of its own, and a first one has none: the tests run to the first that fails. Whatever takes many times longer
than without a mutant is noticed, too. The exit code is 1 if a mutant survives without a reason, or if the tests fail
without any.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lists
import pytest
import switches
from lists import Mutant, Mutants
from rich.console import Console
from rich.progress import track
from rich.table import Table

COPIED = ("cmdp_fast", "csrc", "tests", "setup.py", "pyproject.toml", "README.md")
NATIVE_ALONE = "not torch and not triton and not cuda"
KILLED, SURVIVES, UNREASONED, GONE = "killed", "survives", "SURVIVES WITHOUT A REASON", "gone"


def copied(root: Path, to: Path) -> Path:
    to.mkdir()
    for path in filter(Path.exists, (root / name for name in COPIED)):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, to / path.name)
    return to


def build(checkout: Path, sources: dict[str, list[switches.Numbered]]) -> None:
    """The native module with all of these mutants. Raises SystemExit with the compiler's errors."""
    for source, mutants in sources.items():
        path = checkout / source
        path.write_text(switches.switched(path.read_text("utf-8"), mutants), "utf-8")
    with (checkout / "csrc" / "bindings.cpp").open("a", encoding="utf-8") as bindings:
        bindings.write(switches.DEFINED)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"CMDP_FAST_REQUIRE_NATIVE": "1", "CMDP_FAST_CUDA": "0"}
    built = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if built.returncode:
        errors = [line for line in (built.stdout + built.stderr).splitlines() if "error" in line]
        raise SystemExit("\n".join(["the mutants do not compile", *errors[:20]]))


def exit_code(child: int, seconds: float) -> int:
    """That of a process; -9 of one that needs longer. All that it has started, and not ended, is killed."""
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def is_fork(numbers: Sequence[int], choose: Callable[[int], object], report: int) -> bool:
    """Forks for no mutant (0) and then for each: True in a fork, which goes on to the tests. In the process itself
    False, after all of them; it writes a line `number exit_code` of each."""
    seconds = 3600.0
    for number in (0, *numbers):
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            choose(number)
            return True
        code = exit_code(child, seconds)
        os.write(report, f"{number} {code}\n".encode())
        if number == 0:
            seconds = 30 + 5 * (time.monotonic() - began)
            if code:
                break
    return False


class AfterCollection:
    """pytest imports and collects once, and forks before the first test."""

    def __init__(self, numbers: Sequence[int], report: int) -> None:
        self.numbers, self.report = numbers, report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool | None:
        library = ctypes.CDLL(sys.modules["cmdp_fast._C"].__file__)
        chosen = ctypes.c_int.in_dll(library, "cmdp_mutant")
        return None if is_fork(self.numbers, lambda number: setattr(chosen, "value", number), self.report) else True


def run_tests(checkout: Path, of: Mutants, mutants: dict[int, Mutant], report: int) -> int:
    """pytest in a copy of the checkout, in forks of this process; each returns its exit code."""
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    os.environ |= {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # it would be taken for that of another text of one size and second
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *of.tests]
    path = checkout / of.source
    text = path.read_text("utf-8")

    def choose(number: int) -> None:
        os.environ[switches.VARIABLE] = str(number)
        if number and path.suffix == ".py":
            path.write_text(mutants[number].applied(text), "utf-8")

    for module in of.preload:
        importlib.import_module(module)
    if path.suffix != ".py":
        arguments += ["-k", NATIVE_ALONE]
        if not of.preload:
            return pytest.main(arguments, plugins=[AfterCollection(list(mutants), report)])
    return pytest.main(arguments) if is_fork(list(mutants), choose, report) else 0


def exit_codes(checkout: Path, of: Mutants, mutants: dict[int, Mutant], log: Path | None) -> Iterator[tuple[int, int]]:
    """The number and the exit code of the tests without a mutant (0), and with each. What they say goes to the log."""
    reader, report = os.pipe()
    session = os.fork()
    if session == 0:
        code = 1
        try:
            for stream in (1, 2) if log else ():
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            code = run_tests(checkout, of, mutants, report)
        finally:
            os._exit(code)
    os.close(report)
    with open(reader) as lines:
        for line in lines:
            number, code = map(int, line.split())
            yield number, code
    os.waitpid(session, 0)


def tried(checkout: Path, of: Mutants, mutants: dict[int, Mutant], log: Path | None, quiet: bool) -> dict[Mutant, str]:
    """The outcome of each mutant that is in the source; of none if the tests fail without one."""
    outcomes = {}
    console = Console(stderr=True)
    codes = exit_codes(checkout, of, mutants, log)
    for number, code in track(codes, of.source, len(mutants) + 1, console=console, disable=quiet, transient=True):
        if number:
            survives = SURVIVES if mutants[number].reason else UNREASONED
            outcomes[mutants[number]] = KILLED if code else survives
    return outcomes


def shown(of: Mutants, outcomes: dict[Mutant, str], all_of_them: bool) -> Table:
    """What became of the mutants: of those that need no attention only if all are wanted."""
    rows = Table("N", of.source, "outcome")
    for mutant, outcome in sorted(outcomes.items()):
        said = [outcome, *[mutant.reason] * (outcome == SURVIVES)]
        if outcome == KILLED and mutant.reason:
            said.append(f"although {mutant.reason}")
        if all_of_them or said != [KILLED]:
            rows.add_row(str(mutant.number), f"{mutant.old} → {mutant.new}", ": ".join(said))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a path in the checkout, such as csrc/budget.h")
    parser.add_argument("--only", type=int, metavar="N", help="one mutant, by its place in the list; shows its tests")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="another checkout")
    given = parser.parse_args()
    quiet = bool(os.environ.get("CI"))
    os.environ |= {"CI": "true", "OMP_NUM_THREADS": "1"}  # Hypothesis draws the same each time; a fork has one thread
    console, failed = Console(highlight=False, markup=False), False
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = copied(given.root, Path(folder) / "checkout")
        log = None if given.only else Path(folder) / "log"
        all_of, switch = [], 0
        for source in given.sources:
            of = lists.read(given.root, source)
            text = (checkout / source).read_text("utf-8")
            wanted = [mutant for mutant in of.mutants if given.only in (None, mutant.number)]
            there = {switch + mutant.number: mutant for mutant in wanted if mutant.choice(text)}
            for mutant in there.values() if source.endswith(".py") else ():
                compile(mutant.applied(text), f"mutant {mutant.number} of {source}", "exec")
            all_of.append((of, text, wanted, there))
            switch += len(of.mutants)
        native = {of.source: list(there.items()) for of, _, _, there in all_of if not of.source.endswith(".py")}
        if native:
            build(checkout, native)
        for of, text, wanted, there in all_of:
            outcomes = tried(checkout, of, there, log, quiet)
            if len(outcomes) < len(there):
                console.print(f"{of.source}: the tests fail without a mutant")
                console.print(log.read_text("utf-8", "replace")[-3000:] if log else "")
            failed |= len(outcomes) < len(there) or UNREASONED in outcomes.values()
            outcomes |= {mutant: GONE for mutant in wanted if mutant not in there.values()}
            rows = shown(of, outcomes, all_of_them=given.only is not None)
            if rows.rows:
                console.print(rows)
            killed, survive, unreasoned, gone = (
                list(outcomes.values()).count(kind) for kind in (KILLED, SURVIVES, UNREASONED, GONE)
            )
            counted = f"{killed} killed, {survive} survive with a reason, {unreasoned} without, {gone} gone"
            console.print(f"{of.source}: {counted}")
            if of.source not in native:
                (checkout / of.source).write_text(text, "utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
