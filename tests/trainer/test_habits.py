"""The ways in which built-in models write a sum, and how often: the tasks of the studies rest on them."""

from __future__ import annotations

import random
import re

import pytest

from cmdp_fast.trainer.models import builtin
from cmdp_fast.trainer.tasks.step_verifiers import arithmetic_chain
from cmdp_fast.trainer.tasks.sums import HABITS, worked_solution

FIXED = {  # those that draw nothing, of 3 + 8 + 7 + 2 + 9
    "careful": "3+8=11;11+7=18;18+2=20;20+9=29;A29",
    "faulty": "3+8=10;10+7=16;16+2=18;18+9=26;A26",
    "merged": "3+8+7=18;18+2+9=29;A29",
    "direct": "A29",
    "bare": "29",
}
SLIP = r"3\+8=\d+;\d+\+7=\d+;\d+\+2=\d+;\d+\+9=(\d+);A\1"


def test_each_habit_is_described_and_written():
    assert HABITS.keys() == FIXED.keys() | {"slip"}
    rng = random.Random(0)
    state = rng.getstate()
    for habit, text in FIXED.items():
        assert worked_solution("3 + 8 + 7 + 2 + 9", habit, rng) == text
    assert rng.getstate() == state
    written = {worked_solution("3 + 8 + 7 + 2 + 9", "slip", rng) for _ in range(50)}
    assert len(written) > 4 and all(re.fullmatch(SLIP, text) for text in written)
    assert not any(text.endswith("A29") for text in written)


def test_the_merged_way_takes_a_last_term_alone():
    assert worked_solution("1 + 2 + 3 + 4", "merged") == "1+2+3=6;6+4=10;A10"
    assert worked_solution("9 - 2 - -3", "merged") == "9-2--3=10;A10"


@pytest.mark.parametrize(("second", "short_by"), [(6, 0), (7, 1), (8, 1), (9, 1)])
def test_the_fault_is_of_the_second_term_alone(second, short_by):
    assert worked_solution(f"9 + {second}", "faulty") == f"9+{second}={9 + second - short_by};A{9 + second - short_by}"


def test_only_the_careful_way_has_every_step_right():
    rng = random.Random(0)
    about = {"prompt": "", "metadata": {"expression": "3 + 8 + 7"}}
    for habit in HABITS:
        text = worked_solution("3 + 8 + 7", habit, rng)
        assert arithmetic_chain(completion=text, **about) == (habit == "careful")


def test_habits_of_short_sums():
    """They have shares of their own where a recipe says so; all others keep theirs."""
    recipe = builtin.Recipe(1, 1, {"careful": 1.0}, habits_of_short={"direct": 1.0})
    rng = random.Random(0)
    assert builtin._habits(recipe, ["3 + 4", "3 + 4 + 5 + 6", "-3 - -14 + 1"], rng) == ["direct", "careful", "direct"]
    alike = builtin.Recipe(1, 1, {"direct": 1.0})
    assert builtin._habits(alike, ["3 + 4", "3 + 4 + 5"], rng) == ["direct", "direct"]


def test_shares_of_habits():
    """Counts of 20,000 draws within 4 standard errors of the shares."""
    recipe = builtin.RECIPES["builtin:study-faulty-student"]
    drawn = builtin._habits(recipe, ["3 + 4 + 5"] * 20_000, random.Random(0))
    for habit, share in recipe.habits.items():
        assert abs(drawn.count(habit) - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5


def test_every_recipe_has_habits_that_there_are():
    for recipe in builtin.RECIPES.values():
        for shares in (recipe.habits, recipe.habits_of_short):
            assert shares.keys() <= HABITS.keys()
            assert not shares or sum(shares.values()) == pytest.approx(1.0)
