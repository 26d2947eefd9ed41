"""What type checkers see of the public functions: a script without a fault, and each typo in a name."""

import re
import sys
from pathlib import Path
from typing import get_args

import pytest

from cmdp_fast import constraint, reference
from cmdp_fast.ops import backends

api = pytest.importorskip("mypy.api")

SCRIPT = Path(__file__).parent / "support" / "users_script.py"

# Of torch only that it is there: to read all of it takes 10 s, and no name of ours is in it.
SETTINGS = f"""
[mypy]
strict = true
mypy_path = {SCRIPT.parents[2]}
cache_dir = /dev/null
[mypy-torch.*]
follow_imports = skip
[mypy-cmdp_fast.*]
follow_imports = silent
"""

# Each line has one fault, the value of this name.
TYPOS = """
import torch
import cmdp_fast as cf
def script(x: torch.Tensor, trace: cf.BudgetTrace) -> None:
    cf.Constraint(budget=1.0, kind="cdmp")
    cf.Constraint(budget=1.0, cost="kl")
    cf.Constraint(budget=1.0, penalty_at="always")
    cf.Constraint(budget=1.0, reduction="max")
    cf.Constraint(budget=1.0, edge="soft")
    cf.divergence(x, x, kind="js")
    cf.token_cost(cf.token_stats(x, x, x), kind="k2")
    cf.token_stats(x, x, x, backend="gpu")
    cf.linear_token_stats(x, x, x, x, x, saved="all")
    cf.constrained_reward(x, x, x, x, 1.0, kind="cdmp")
    cf.linear_constrained_reward(x, x, x, x, x, x, 1.0, cost="kl")
    cf.budget_trace(x, 1.0, edge="soft")
    cf.modified_reward(x, x, trace, kind="cdmp")
"""


@pytest.fixture(autouse=True)
def recursion_limit():
    """mypy raises it for its whole process, and other tests reach it on purpose."""
    before = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(before)


def mypy(tmp_path: Path, script: Path) -> list[str]:
    """What mypy says of a script, a line each."""
    settings = tmp_path / "mypy.ini"
    settings.write_text(SETTINGS)
    out, problem, _ = api.run(["--config-file", str(settings), "--no-error-summary", str(script)])
    assert not problem
    return out.splitlines()


def test_a_users_script_has_no_fault(tmp_path):
    assert mypy(tmp_path, SCRIPT) == []


def test_a_typo_in_a_name_is_found(tmp_path):
    script = tmp_path / "typos.py"
    script.write_text(TYPOS)
    lines = TYPOS.splitlines()
    expected = {i: re.search(r'(\w+)="(\w+)"\)', line) for i, line in enumerate(lines, 1) if line.startswith("    ")}
    found = mypy(tmp_path, script)
    for (number, typo), said in zip(expected.items(), found, strict=True):
        assert said.startswith(f"{script}:{number}: error: Argument "), said
        assert f'"{typo[1]}"' in said and f"Literal['{typo[2]}']" in said, said


def test_the_names_are_those_of_the_tables():
    assert get_args(constraint.KindName) == tuple(constraint.KINDS)
    assert get_args(constraint.CostName) == reference.COSTS
    assert get_args(reference.DivergenceName) == reference.DIVERGENCES
    assert get_args(backends.BackendName) == backends.NAMES == tuple(backends.available_backends())


@pytest.mark.parametrize(
    "field, names",
    [("penalty_at", constraint.PenaltyAt), ("reduction", constraint.Reduction), ("edge", constraint.Edge)],
)
def test_a_constraint_takes_the_names_of_its_types(field, names):
    for name in get_args(names):
        assert getattr(constraint.Constraint(budget=1.0, **{field: name}), field) == name
    with pytest.raises(ValueError, match=", ".join(get_args(names))):
        constraint.Constraint(budget=1.0, **{field: "other"})
