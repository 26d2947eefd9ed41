"""A run that is killed, at whatever moment: it goes on to the same end, bit for bit, and nothing else is left.

A kill leaves what the folder holds at that moment, so one run shows all of its moments: its folder is copied before
each of its changes. `--slow` goes on from every copy, and kills processes at moments that a seed gives; `-s` prints how
many of each.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from faults import command, differences, in_child, result, some, states_of, tree

from cmdp_fast.cli import main


@pytest.fixture(scope="module")
def states(pair, tmp_path_factory, one_thread, undrawn) -> list[Path]:
    """What a kill may leave of a run."""
    folder = tmp_path_factory.mktemp("run")
    return states_of(lambda: main(command(pair, folder)), folder, folder.parent / "states")


def goes_on(pair, state: Path) -> list[str]:
    """The command with which a user goes on."""
    there = (state / "r").exists()
    return ["train", f"--resume={state / 'r'}"] if there else command(pair, state)


def fault(pair, state: Path, expected) -> str:
    """What is wrong with the way from there to the end of a run that never stopped; empty if nothing is."""
    for scratch in state.glob(".cmdp-fast-*"):
        os.utime(scratch, (0, 0))  # a younger one may be somebody's
    if code := main(goes_on(pair, state)):
        return f"{state.name}: exit code {code}"
    others = {name: "not alone" for name in os.listdir(state) if name != "r"}
    wrong = differences(result(state / "r"), expected) | others
    return f"{state.name}: {list(wrong)} {str(wrong)[:300]}" if wrong else ""


def check_all(pair, states: list[Path], folder: Path, expected) -> None:
    faults = []
    folder.mkdir(exist_ok=True)
    for state in states:
        shutil.copytree(state, folder / state.name)
        faults.append(fault(pair, folder / state.name, expected))
        shutil.rmtree(folder / state.name)
    assert not any(faults), "\n".join(filter(None, faults))
    print(f"{len(faults)} states of a killed run")


def test_killed(pair, states, expected, tmp_path, pytestconfig):
    assert len(states) > 50
    check_all(pair, states if pytestconfig.getoption("--slow") else some(states, 6), tmp_path, expected)


def test_killed_before_it_had_a_folder_and_again_when_it_had(pair, states, expected, tmp_path):
    """What the first kill left beside the run goes as the run goes on; what may be somebody else's, now, stays."""
    early = [scratch for state in states for scratch in state.glob(".cmdp-fast-*")]
    state = shutil.copytree(next(state for state in states if (state / "r").exists()), tmp_path / "state")
    for number, scratch in enumerate(some(early, 3)):
        shutil.copytree(scratch, state / f".cmdp-fast-{number:08d}")
    assert not fault(pair, state, expected)
    young = state / ".cmdp-fast-00000000"
    young.mkdir()
    assert main([*goes_on(pair, state), "--steps=3"]) == 0
    assert young.exists()


def test_torn_files(pair, states, expected, tmp_path, pytestconfig):
    """Of what was being written a part is there alone, as of native code, which nobody hears. What has its last name is
    whole: the same change under it would be damage, which is another test's."""
    torn, before = [], {}
    for state in states:
        now = tree(state)
        grown = [name for name, value in now.items() if value and before.get(name) != value and is_part(name)]
        torn += [(state, name) for name in grown]
        before = now
    assert len(torn) > 20
    faults = []
    for state, name in torn if pytestconfig.getoption("--slow") else some(torn, 2):
        folder = tmp_path / f"{state.name}-{name.replace('/', '-')}"
        shutil.copytree(state, folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        faults.append(fault(pair, folder, expected))
    assert not any(faults), "\n".join(filter(None, faults))
    print(f"{len(faults)} torn files")


def is_part(name: str) -> bool:
    """Whether a file stands under a hidden name, or in a folder that has one."""
    return any(part.startswith(".") and part != ".lock" for part in Path(name).parts)


def test_killed_while_it_goes_on(pair, states, expected, tmp_path, pytestconfig):
    """And again while it goes on from there: at each change that a run makes after a kill, and after two."""
    slow = pytestconfig.getoption("--slow")
    firsts = some([state for state in states if (state / "r").exists()], 8 if slow else 2)
    for first in firsts[: 8 if slow else 1]:
        folder = tmp_path / first.name
        shutil.copytree(first, folder)
        seconds = states_of(lambda: main(goes_on(pair, folder)), folder, tmp_path / f"{first.name}-again")  # noqa: B023
        check_all(pair, seconds if slow else some(seconds, 2), tmp_path / f"{first.name}-seconds", expected)
        third = tmp_path / f"{first.name}-third"
        shutil.copytree(seconds[len(seconds) // 2], third)
        thirds = states_of(lambda: main(goes_on(pair, third)), third, tmp_path / f"{first.name}-thrice")  # noqa: B023
        check_all(pair, some(thirds, 5 if slow else 1), tmp_path / f"{first.name}-thirds", expected)


def test_killed_at_a_moment_of_a_seed(pair, expected, tmp_path, pytestconfig):
    """From outside, whatever it does just then; every third one is killed again as it goes on."""
    began = time.monotonic()
    assert in_child(lambda: main(command(pair, tmp_path / "whole"))) == 0
    lasts, seed = time.monotonic() - began, 20_250_922
    moments = random.Random(seed)
    faults, killed = [], 0
    for number in range(50 if pytestconfig.getoption("--slow") else 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(1 + (number % 3 == 0)):
            killed += killed_after(moments.random() * lasts, goes_on(pair, folder))
        faults.append(fault(pair, folder, expected))
    assert not any(faults), f"seed {seed}: " + "\n".join(filter(None, faults))
    print(f"{killed} kills")


def killed_after(seconds: float, words: list[str]) -> bool:
    """Whether a process that runs the command has lived so long, and is killed."""

    def child() -> int:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles SIGALRM: the kernel ends the process at once
        return main(words)

    code = in_child(child)
    assert code in (0, -signal.SIGALRM)
    return code != 0
