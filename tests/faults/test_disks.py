"""A disk that is full, broken or read-only at whatever moment: one line says so, and with space the run goes on to the
same end."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import command, differences, in_child, make_read_only, make_writable, resize, result, small_disk, watch

from cmdp_fast.cli import main
from cmdp_fast.trainer.step import Learner

NOT_ALLOWED = 77


def failing(number: int, at: int, for_good: bool) -> Callable[[str], None]:
    """An injection for `watch`: the so-many-th change fails, or it and all behind it; `off` ends it. A full disk still
    renames and removes."""
    calls = 0

    def fail(what: str) -> None:
        nonlocal calls
        if what.startswith("os.truncate"):  # of the lock, which says who had it last: harmless
            return
        if number in (errno.ENOSPC, errno.EDQUOT) and what.startswith(("os.rename", "os.remove", "os.rmdir")):
            return
        calls += 1
        if not fail.off and (calls == at or (for_good and calls > at)):  # type: ignore[attr-defined]
            raise OSError(number, os.strerror(number))

    fail.off = False  # type: ignore[attr-defined]
    return fail


def ends(pair, folder: Path, expected, told: Path, stop: Callable[[], None], again: Callable[[], None]) -> str:
    """What is wrong with a run under `stop`, and with how it goes on after `again`; in a child, whose output is
    ``told``."""
    stop()
    code = main(command(pair, folder))
    again()
    said = told.read_text(errors="replace")
    wrong = ""
    if code:
        errors = [line for line in said.splitlines() if line.startswith("cmdp-fast: error: ")]
        wrong = f"exit code {code}, errors {errors}" if code != 2 or len(errors) != 1 or "Traceback" in said else ""
    return wrong + ends_well(pair, folder, expected)


def ends_well(pair, folder: Path, expected) -> str:
    """What is wrong with how a run goes on from a folder; empty if nothing is."""
    for scratch in folder.glob(".cmdp-fast-*"):
        os.utime(scratch, (0, 0))  # where removing it was an error, too
    code = main(["train", f"--resume={folder / 'r'}"] if (folder / "r").exists() else command(pair, folder))
    wrong = {name: "is left" for name in os.listdir(folder) if name != "r"} | differences(
        result(folder / "r"), expected
    )
    return (f", and resumed {code}" if code else "") + "".join(
        f", {name} {str(why)[:200]}" for name, why in wrong.items()
    )


def check(function: Callable[[Path], str], folder: Path) -> str | None:
    """What `function` says is wrong; None where this machine does not allow what it needs."""
    folder.mkdir(parents=True)
    told, said = folder / "told", folder / "wrong"
    (folder / "out").mkdir()

    def child() -> int:
        try:
            said.write_text(function(folder))
        except PermissionError as error:
            if error.filename is not None:
                raise
            return NOT_ALLOWED
        return 0

    code = in_child(child, told)
    if code == NOT_ALLOWED:
        return None
    wrong = said.read_text() if said.exists() else f"the child ended with {code}"
    return f"{folder.name}: {wrong}\n{told.read_text(errors='replace')[-1500:]}" if wrong else ""


def test_an_error_at_every_change(pair, tmp_path, expected, pytestconfig):
    kinds = [
        (number, good) for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS) for good in (True, False)
    ]

    def with_error(number: int, at: int, for_good: bool) -> Callable[[Path], str]:
        def run(folder: Path) -> str:
            fail = failing(number, at, for_good)

            def again() -> None:
                fail.off = True  # type: ignore[attr-defined]

            return ends(pair, folder / "out", expected, folder / "told", lambda: watch(folder / "out", fail), again)

        return run

    slow = pytestconfig.getoption("--slow")
    faults = []
    for at in range(1, 126) if slow else (12, 50, 80):
        for number, good in (kinds[at % len(kinds)], kinds[(at + 3) % len(kinds)])[: 2 if slow else 1]:
            name = f"{errno.errorcode[number]}-{at}{'-for-good' * good}"
            faults.append(check(with_error(number, at, good), tmp_path / name))
    assert not any(faults), "\n".join(filter(None, faults))
    print(f"{len(faults)} faults of a disk")


def test_a_disk_that_fills_up(pair, tmp_path, expected, pytestconfig):
    """Not injected: native code meets it, too. Of every size from none to enough, by the page."""

    def filled(pages: int) -> Callable[[Path], str]:
        def run(folder: Path) -> str:
            out = folder / "out"
            small_disk(out, f"{4 * pages}k")
            return ends(pair, out, expected, folder / "told", lambda: None, lambda: resize(out, "64m"))

        return run

    sizes = range(2, 80) if pytestconfig.getoption("--slow") else (20, 50)
    faults = [check(filled(pages), tmp_path / f"{pages}-pages") for pages in sizes]
    if None in faults:
        pytest.skip("no disk of its own is allowed here")
    assert not any(faults), "\n".join(filter(None, faults))
    print(f"{len(faults)} faults of a disk")


def test_files_of_a_limited_size(pair, tmp_path, expected, pytestconfig):
    """The kernel refuses in the middle of a file, or kills there."""

    def limited(size: int, kills: bool) -> Callable[[Path], str]:
        def run(folder: Path) -> str:
            out = folder / "out"

            def child() -> int:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                return main(command(pair, out))

            code = in_child(child, folder / "first")
            said = (folder / "first").read_text()
            wrong = "" if code in (2, -signal.SIGXFSZ) and "Traceback" not in said else f"exit code {code}: {said}"
            return wrong + ends_well(pair, out, expected)

        return run

    sizes = range(200, 30000, 700) if pytestconfig.getoption("--slow") else (900, 8000)
    faults = [check(limited(size, size % 200 == 0), tmp_path / f"{size}-bytes") for size in sizes]
    assert not any(faults), "\n".join(filter(None, faults))
    print(f"{len(faults)} faults of a disk")


def test_too_many_open_files(pair, tmp_path, expected, pytestconfig):
    def limited(count: int) -> Callable[[Path], str]:
        def run(folder: Path) -> str:
            out = folder / "out"

            def child() -> int:
                used = len(os.listdir("/proc/self/fd"))
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + count, used + count))
                return main(command(pair, out))

            code = in_child(child, folder / "first")
            said = (folder / "first").read_text()
            wrong = "" if code in (0, 2) and "Traceback" not in said else f"exit code {code}: {said}"
            return wrong + ends_well(pair, out, expected)

        return run

    counts = range(0, 10) if pytestconfig.getoption("--slow") else (2,)
    faults = [check(limited(count), tmp_path / f"{count}-files") for count in counts]
    assert not any(faults), "\n".join(filter(None, faults))
    print(f"{len(faults)} faults of a disk")


@pytest.mark.parametrize("what", ["vanishes", "is a file", "read-only"])
def test_a_folder_that_changes_under_a_run(what, pair, tmp_path, expected):
    """In the middle of a step."""

    def run(folder: Path) -> str:
        out = folder / "out"
        small_disk(out, "64m")
        original, calls = Learner.descend, 0

        def descend(self):
            nonlocal calls
            calls += 1
            if calls == 4:
                change()
            return original(self)

        def change() -> None:
            if what == "read-only":
                make_read_only(out / "r")
            else:
                os.rename(out / "r", out / "elsewhere")
                if what == "is a file":
                    (out / "r").write_text("")

        def again() -> None:
            Learner.descend = original
            if what == "read-only":
                make_writable(out / "r")
            else:
                if what == "is a file":
                    (out / "r").unlink()
                else:  # made again, for the student: of work that is done nothing is lost
                    assert (out / "r" / "student" / "model.safetensors").is_file()
                    shutil.rmtree(out / "r")
                os.rename(out / "elsewhere", out / "r")

        Learner.descend = descend
        return ends(pair, out, expected, folder / "told", lambda: None, again)

    wrong = check(run, tmp_path / "run")
    if wrong is None:
        pytest.skip("no disk of its own is allowed here")
    assert not wrong, wrong
