"""The runner on a tiny source, what it compiles of C++, and the lists that there are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lists
import pytest
import switches
from lists import Mutant

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CXX = os.environ.get("CXX") or shutil.which("c++")

TINY = """
tests = ["tests/test_tiny.py"]
mutants = [
    { old = 'a < b', new = 'a > b' },
    { old = 'a < b', new = 'a <= b', reason = 'equivalent: of equals either is the least' },
    { old = 'else «b»', new = 'a' },
    { old = 'max', new = 'min' },
]
"""


def test_a_tiny_source(tmp_path):
    (tmp_path / "tests" / "mutants" / "cmdp_fast").mkdir(parents=True)
    (tmp_path / "tests" / "mutants" / "cmdp_fast" / "tiny.py.toml").write_text(TINY)
    (tmp_path / "tests" / "test_tiny.py").write_text(
        "from cmdp_fast.tiny import least\ndef test(): assert least(1, 2) == least(1, 1) == 1\n"
    )
    (tmp_path / "cmdp_fast").mkdir()
    (tmp_path / "cmdp_fast" / "__init__.py").touch()
    tiny = tmp_path / "cmdp_fast" / "tiny.py"
    tiny.write_text("def least(a, b): return a if a < b else b\n")
    command = [sys.executable, HERE / "run.py", "cmdp_fast/tiny.py", "--root", tmp_path]
    quiet = os.environ | {"CI": "true", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert done.returncode == 1 and rows == [
        ["2", "a < b → a <= b", "survives: equivalent: of equals either is the least"],
        ["3", "else «b» → a", "SURVIVES WITHOUT A REASON"],
        ["4", "max → min", "gone"],
    ], done.stderr
    assert "cmdp_fast/tiny.py: 1 killed, 1 survive with a reason, 1 without, 1 gone" in done.stdout
    assert "a < b" in tiny.read_text()

    done = subprocess.run([*command, "--only", "2"], capture_output=True, text=True, env=quiet)
    assert done.returncode == 0 and "1 passed" in done.stdout  # the tests' own words
    tiny.write_text("def least(a, b): return b if a < b else a\n")
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    assert done.returncode == 1 and "the tests fail without a mutant" in done.stdout


SOURCE = """
int half(int n) { return n / 2; }
int state = 0;
int twice(int n, int times) {
  state = n;
  while (times-- > 0) n += n;
  return n;
}
"""
MUTANTS = [
    Mutant(1, "n / 2", "n / 3"),
    Mutant(2, "n / 2", "n / 4"),
    Mutant(3, "state = n;", "", kind="statement", function="int twice(int n, int times) {"),
    Mutant(4, "times-- > 0", "--times > 0", function="int twice(int n, int times) {"),
    Mutant(5, "int state = 0;", "int state = (@) ? 7 : 0;", kind="raw"),
    Mutant(6, "no such text", ""),
]


@pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")
def test_a_number_chooses_a_mutant_when_the_program_runs(tmp_path):
    main = """#include <cstdio>
    int main() {
      const int start = state, more = twice(3, 2);
      std::printf("%d %d %d %d", start, half(12), more, state);
    }"""
    text = switches.switched(SOURCE, [(10 + mutant.number, mutant) for mutant in MUTANTS])
    (tmp_path / "main.cpp").write_text(text + switches.DEFINED + main)
    subprocess.run([CXX, "-o", tmp_path / "main", tmp_path / "main.cpp"], check=True)
    printed = ("0 6 12 3", "0 4 12 3", "0 3 12 3", "0 6 12 0", "0 6 6 3", "7 6 12 3")
    for number, expected in zip((0, 11, 12, 13, 14, 15), printed, strict=True):
        environment = os.environ | {switches.VARIABLE: str(number)}
        done = subprocess.run([tmp_path / "main"], env=environment, capture_output=True, text=True)
        assert done.stdout == expected, number


def test_mutants_that_overlap_are_refused():
    with pytest.raises(ValueError, match="mutant 1 overlaps another"):
        switches.switched(SOURCE, [(1, MUTANTS[0]), (2, Mutant(2, "return n / 2", "return 0"))])


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.toml")), ids=lambda path: path.stem)
def test_a_list_can_be_read_and_its_files_are_there(path):
    of = lists.read(ROOT, str(path.relative_to(HERE).with_suffix("")))
    text = (ROOT / of.source).read_text("utf-8")
    assert of.mutants and any(mutant.choice(text) for mutant in of.mutants)
    assert all((ROOT / test.partition("::")[0]).is_file() for test in of.tests)
    assert len({(mutant.old, mutant.new) for mutant in of.mutants}) == len(of.mutants)
    assert {mutant.kind for mutant in of.mutants} <= {"expression", "statement", "raw"}
