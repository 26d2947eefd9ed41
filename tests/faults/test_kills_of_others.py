"""The commands that write beside a training, killed at each change: a teacher's cache and a report. No file that is
half written replaces one that is whole, and the same command comes to the same bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from faults import in_place, some, states_of, tree
from tiny_pair import arguments_for
from written_runs import write_run

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.teachers.cached.format import INDEX, read_index, read_shard, read_vocabulary
from cmdp_fast.teachers.open import open_teacher
from cmdp_fast.trainer.cache_teacher import CacheConfig


def storing(pair, output: Path, **changes) -> list[str]:
    words = {"prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 4, **changes}
    return [*arguments_for(CacheConfig, "cache-teacher", pair, **words), f"--output={output}", "--shard-mb=1"]


def files(folder: Path) -> dict[str, bytes | None]:
    """Without hidden ones, such as the lock, and what is in them."""
    hidden = [name for name in tree(folder) if any(part.startswith(".") for part in Path(name).parts)]
    return {name: value for name, value in tree(folder).items() if name not in hidden}


@pytest.fixture
def shards(monkeypatch, one_thread):
    monkeypatch.setattr("cmdp_fast.trainer.cache_teacher.MIB", 1)  # a shard for each chunk


@pytest.mark.parametrize("kind", ["hidden states", "log-probabilities"])
def test_a_cache_of_a_teacher(kind, pair, tmp_path, shards, pytestconfig):
    words = {"logprobs": 3} if kind == "log-probabilities" else {}
    folder = tmp_path / "out"
    folder.mkdir()
    states = states_of(lambda: main(storing(pair, folder / "c", **words)), folder, tmp_path / "states")
    whole = files(folder / "c")
    assert len(states) > 25 and len(whole) > 4
    assert not in_place(tmp_path / "states")
    indices = {state / "c" / INDEX for state in states if (state / "c" / INDEX).exists()}
    for path in indices:  # each is of what is there
        index = read_index(path.parent)
        read_vocabulary(path.parent, index)
        for number in range(len(index.shards)):
            read_shard(path.parent, index, number)
        if not index.whole:
            with pytest.raises(InputError, match="it is not finished"):
                open_teacher(f"cached:{path.parent}")
    for state in states:
        there = files(state / "c") if (state / "c").exists() else {}
        assert all(there[name] == whole[name] for name in there if name != INDEX), state.name
    for state in states if pytestconfig.getoption("--slow") else some(states, 2):
        for scratch in state.glob(".cmdp-fast-*"):
            os.utime(scratch, (0, 0))  # a younger one may be somebody's
        assert main(storing(pair, state / "c", **words)) == 0, state.name
        assert files(state / "c") == whole, state.name
        assert {name for name in os.listdir(state / "c") if name.startswith(".")} <= {".lock"}, state.name


def test_a_cache_that_is_killed_again(pair, tmp_path, shards, pytestconfig):
    """While it goes on from a kill."""
    folder = tmp_path / "out"
    folder.mkdir()
    first = states_of(lambda: main(storing(pair, folder / "c")), folder, tmp_path / "states")
    again = first[len(first) // 2]
    states = states_of(lambda: main(storing(pair, again / "c")), again, tmp_path / "again")
    for state in states if pytestconfig.getoption("--slow") else some(states, 1):
        assert main(storing(pair, state / "c")) == 0
        assert files(state / "c") == files(folder / "c"), state.name


def test_a_report_over_an_older_one(tmp_path, monkeypatch, pytestconfig):
    """Each file is the older one or the newer one, whole."""
    drawn = "cmdp_fast.trainer.run_report.command.plot_png"  # which takes a second
    monkeypatch.setattr(drawn, lambda groups, ink: f"{len(repr(groups))} {ink.paper}".encode())
    for seed, name in enumerate(("one", "two")):
        write_run(tmp_path / "runs" / name, seed=seed)
    folder, words = tmp_path / "out", ["report", f"--output-dir={tmp_path / 'out' / 'r'}"]
    folder.mkdir()
    assert main([*words, str(tmp_path / "runs" / "one")]) == 0
    older = files(folder)
    command = [*words, str(tmp_path / "runs" / "one"), str(tmp_path / "runs" / "two")]
    states = states_of(lambda: main(command), folder, tmp_path / "states")
    newer = files(folder)
    assert not in_place(tmp_path / "states")
    assert len(states) > 10 and {name for name in newer if newer[name] != older[name]} == {*newer} - {"r"}
    for state in states:
        now = files(state)
        assert {*now} == {*newer} and all(value in (older[name], newer[name]) for name, value in now.items()), (
            state.name
        )
    for state in states if pytestconfig.getoption("--slow") else some(states, 2):
        shutil.rmtree(folder)
        shutil.copytree(state, folder)
        for scratch in folder.rglob(".cmdp-fast-*"):
            os.utime(scratch, (0, 0))
        assert main(command) == 0
        assert tree(folder) == newer, state.name
