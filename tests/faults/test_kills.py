"""A run that is killed, at whatever moment: it goes on to the same end, bit for bit, and nothing else is left.

A kill leaves what the folder holds at that moment, so one run shows all of its moments: its folder is copied before
each of its changes. `--slow` goes on from every copy, and kills processes at moments that a seed gives.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from faults import command, differences, result, some, states_of

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
    for state in states:
        shutil.copytree(state, folder / state.name)
        faults.append(fault(pair, folder / state.name, expected))
        shutil.rmtree(folder / state.name)
    assert not any(faults), "\n".join(filter(None, faults))


def test_killed(pair, states, expected, tmp_path, pytestconfig):
    assert len(states) > 50
    check_all(pair, states if pytestconfig.getoption("--slow") else some(states, 8), tmp_path, expected)
