"""A disk that is full, broken or read-only at whatever moment: one line says so, and with space the run goes on to the
same end."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from faults import command, differences, in_child, result, watch

from cmdp_fast.cli import main

NOT_ALLOWED = 77


def failing(number: int, at: int, for_good: bool) -> Callable[[str], None]:
    """An injection for `watch`: the so-many-th change fails, or it and all behind it; `off` ends it. A full disk still
    renames and removes."""
    calls = 0

    def fail(what: str) -> None:
        nonlocal calls
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
    there = (folder / "r").exists()
    wrong = ""
    if code:
        errors = [line for line in said.splitlines() if line.startswith("cmdp-fast: error: ")]
        wrong = f"exit code {code}, errors {errors}" if code != 2 or len(errors) != 1 or "Traceback" in said else ""
        for scratch in folder.glob(".cmdp-fast-*"):
            os.utime(scratch, (0, 0))  # where removing it was an error, too
        words = ["train", f"--resume={folder / 'r'}"] if there else command(pair, folder)
        if resumed := main(words):
            wrong += f", and resumed {resumed}"
    for scratch in folder.glob(".cmdp-fast-*"):
        wrong += f", {scratch.name} is left"
    wrong += "".join(f", {name} {str(why)[:200]}" for name, why in differences(result(folder / "r"), expected).items())
    return wrong


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
    for at in range(1, 110) if slow else (2, 12, 30, 50, 65, 80):
        for number, good in (kinds[at % len(kinds)], kinds[(at + 3) % len(kinds)])[: 2 if slow else 1]:
            name = f"{errno.errorcode[number]}-{at}{'-for-good' * good}"
            faults.append(check(with_error(number, at, good), tmp_path / name))
    assert not any(faults), "\n".join(filter(None, faults))
