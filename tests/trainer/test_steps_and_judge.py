"""Step verifiers and the pairwise judge, called by themselves and through what uses them."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from tiny_pair import settings

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.tasks import equations as reading
from cmdp_fast.trainer.tasks.judge import Preferences, compare_pairs, load_judge
from cmdp_fast.trainer.tasks.rewards import call_rewards, load_rewards, trainer_state
from cmdp_fast.trainer.tasks.step_verifiers import arithmetic_chain, call_step_verifier, equations, load_step_verifier
from cmdp_fast.trainer.tasks.sums import worked_solution

SUM = {"prompt": "3 + 4 + 2=", "answer": "9", "metadata": {"expression": "3 + 4 + 2"}}


@pytest.mark.parametrize(
    "completion, sound",
    [
        ("3+4=7;7+2=9;A9", True),
        ("3 + 4 = 7; 7 + 2 = 9; A9", True),
        ("A9", False),  # no steps
        ("3+4=7;A9", False),  # a step skipped
        ("3+4=8;8+2=10;A10", False),  # an equation wrong
        ("3+4=7;7+2=9;A8", False),  # the answer is not the last result
        ("4+3=7;7+2=9;A9", False),  # another order
        ("3+4=7;5+4=9;A9", False),  # does not go on from the last result
        ("3+4=7;7+2=9;9+0=9;A9", False),  # a term that is not in the problem
        ("3+4=7;7+2=9;", False),
        ("", False),
    ],
)
def test_arithmetic_chain(completion, sound):
    assert arithmetic_chain(**{**SUM, "completion": completion}) is sound


def test_arithmetic_chain_agrees_with_the_teacher_s_way():
    about = {"prompt": "", "metadata": {"expression": "7 - -3 + 12 - 40"}}
    assert arithmetic_chain(completion=worked_solution("7 - -3 + 12 - 40"), **about)
    assert arithmetic_chain(completion="7--3=10;10+12=22;22-40=-18;A-18", **about)


EQUATIONS = {
    True: [
        "3+4=7;7+2=9;A9",
        "She pays 48 / 2 = $24 and 3 x 4 = 12.",
        "<<48/2=24>>24 clips, <<48+24=72>>72",
        "She has $1,000 x 2 = $2,000.",
        "10/3 = 3.33",  # rounded to what is written
        "2/3 = 0.7",
        "0.5*4=2.0",
        "(3+4)*2 = 14",
        "(3+4=7)",
        "((1+1)=2)",
        "12 - (3 - 1) = 10",
        "- 3 + 4 = 7\n- 5 apples",  # bullets are not signs
        "1. 3+4=7",
        "**3 + 4 = 7**",
        "3-5=-2, 3 × -2 = -6, 6 ÷ 4 = 1.5",
        "7 = 3 + 4",
        "3+4 = 7*1 = 7",
        "x = 3, so 3+4=7",
        "3+4=7,7+2=9",
        "1) 3+4=7",
        "US$5 + US$3 = x, $5 + $3 = $8",
        "(-3)+5=2, -(3+4)*2 = -14, 7--3=10",
        "Total(3+4=7)",
        "10/3 = (3.33)",
        "3+4=7=x",
        "\ud8003+4=7 and 3+4=7\x00\u202e",
        "1+" * 3000 + "1=3001",  # was too long to be looked at
        "(" * 30_000 + "1+1" + ")" * 30_000 + "=2",
        "1+1=" * 3000 + "2",
        # Each of these was wrong, or its multiplication not looked at
        r"\(2 \times 3 + 1 = 7\), 6 = 2 + 1 \cdot 4, 1 + 1 = 4 \div 2",
        "2 · 3 + 1 = 7, 2⋅3+1=7, 10 − 3 + 1 = 8, 1 + 1 = 4 – 2",
        r"\left(2 + 3\right) \times 2 = 10, \$2\,+\,\$2 = \$4",
        "3 + 4 = 7 (the sum of 3 + 4 = 7)",
    ],
    False: [
        "3+4=8",
        "3+4=7, then 7+2=10",
        "10/3=3.34",
        "10/3 = 3",
        "3+4=7+5=12",
        "8/0 = 3",
        "She has $1,000 x 2 = $2,100.",
        "**3 + 4 = 8**",
        "2 - (3 - 1) = 1",
        "1+" * 3000 + "1=3000",
        "1+1=" * 3000 + "3",
        "3+4) = 8",
        "((3+4) = 8)",
        r"2 \times 3 + 1 = 8",
        "2 · 3 = 5",
        "10 − 3 = 6",
        "the sum of 3 + 4 = 8",
    ],
    None: [
        "Step 1 – 3 + 4 = 7",  # a dash, or a minus
        "A9",
        "",
        "5 = 6",  # nothing is calculated
        "x + 3 + 4 = 9",
        "2x + 3 = 9",
        "2 + 3x = 9",
        "1 + 2**3 + 1 = 10",
        "2^3 + 1 = 9",
        "50/100 = 50%",
        "20% of 50 = 10",
        "3 + 4 = 7x",
        "3 + 4 = 7.5x",
        "3 + 4 = 7,000x",
        "(1" * 3000,
        "1" * 5000,
        # Parts of something longer, of which each was wrong
        r"√4 + 1 = 3, 10 mod 3 + 1 = 2, 4 + 4 = 3 (mod 5), 4 + 4 = 3 \pmod{5}",
        r"1 1/2 + 1 = 2 1/2, 1 + 1 1/2 = 2 1/2, 1 + 1.5 = 2\frac{1}{2}, 2 + 4 = 2(3), (2)(3) + 1 = 7",
        "12:30 + 1 = 13:30, half of 4 + 1 = 3, 20% of 50 + 1 = 11, 1/2 of 4 + 1 = 3, 3 choose 2 + 1 = 4",
        "17 / 5 = 3 R 2, 17 / 5 = 3 remainder 2",
        "2(3+4)=15",  # a product, of which the bracket alone tells nothing
        "f(3+4)=8",
        "(x+2)-1+1=2",
        "1+(2=3)",
        "-(1+1=3",
        "007+1=9",
        "9**9**9=1",
        "9^9^9+1=1",
        "٣+٤=٨",
        "²+1=2",
        "9" * 400 + "+1=2",
        "1." + "9" * 400 + "+1=2",
        "9*" * 1000 + "9=1",  # larger than any float
        "+".join(f"1/{n}" for n in range(1, 2000)) + "=8",  # a denominator of 3000 bits
        "((1+" * 3000 + "=2",
        "-(" * 3000 + "1=2",
    ],
}


@pytest.mark.parametrize("sound, text", [(sound, text) for sound, texts in EQUATIONS.items() for text in texts])
def test_equations(sound, text):
    assert equations("", text) is sound
    assert equations([], [{"role": "assistant", "content": text}]) is sound


@pytest.mark.parametrize(
    "text",
    [
        "((1+",
        "1+1=",
        "((1+1=",
        "-(-(",
        "(1 ",
        "1)+1=",
        "1,000",
        "1x1=",
        "$",
        "1/3+",
        "9*",
        "7=",
        "=",
        "- 1",
        "1.1.",
        "=)",
        r"1 \times ",
        "=1 1/1",
        "– 1–",
    ],
)
def test_equations_read_a_text_once(text, monkeypatch):
    """The work per character is bounded: of tokens that are read, of fractions, and of those that wait."""
    read, calculated = [], []
    takes, calculate = reading._Expression.takes, reading._Expression._calculate
    monkeypatch.setattr(reading._Expression, "takes", lambda *given: read.append(1) or takes(*given))
    monkeypatch.setattr(reading._Expression, "_calculate", lambda *given: calculated.append(1) or calculate(*given))
    for end in ("", "=1x", "1=1", ")=2"):
        whole = text * 5000 + end
        equations("", whole)
        assert len(read) <= 2 * len(whole) and len(calculated) <= 2 * len(whole)
        read.clear(), calculated.clear()


def test_numbers_that_are_calculated_with_stay_small(monkeypatch):
    sizes = []
    monkeypatch.setattr(reading, "Fraction", lambda *given: sizes.append(max(map(abs, given))) or Fraction(*given))
    assert equations("", "*".join(["9" * 300] * 500) + "=1;" + "9" * 10**6 + "=1+1;1." + "9" * 10**6 + "=1+1") is None
    assert 500 <= len(sizes) < 600 and max(sizes) < 10**309


def test_calling_a_verifier(tmp_path, pair):
    rows = [SUM, {**SUM, "prompt": [{"role": "user", "content": "3 + 4 + 2"}]}, SUM]
    one, zero, nothing = call_step_verifier(equations, rows, ["3+4=7", "3+4=8", "A9"])
    assert (one, zero) == (1.0, 0.0) and math.isnan(nothing)
    seen = []

    def verifier(prompt, completion, answer, metadata):
        seen.append((prompt, completion, answer))
        return None

    call_step_verifier(verifier, rows, ["a", "b", "c"])
    assert seen[1] == (rows[1]["prompt"], [{"role": "assistant", "content": "b"}], "9")
    with pytest.raises(InputError, match="returned 'yes': expected True, False or None"):
        call_step_verifier(lambda *_, **__: "yes", rows, ["a", "b", "c"])

    (tmp_path / "mine.py").write_text("def odd(prompt, completion, **columns):\n    return len(completion) % 2 == 1\n")
    mine = load_step_verifier(settings(pair, step_verifier=f"{tmp_path / 'mine.py'}:odd"), SUM)
    assert call_step_verifier(mine, [SUM, SUM], ["abc", "ab"]) == [1.0, 0.0]
    assert load_step_verifier(settings(pair), SUM) is None


@pytest.mark.parametrize(
    "spec, row, expected",
    [
        ("sums", SUM, "--step-verifier sums: neither one of arithmetic_chain, equations nor module:function"),
        ("arithmetic_chain", {"prompt": "3 + 4 + 2=", "answer": "9"}, "checks reasoning-gym's sums"),
        ("arithmetic_chain", {**SUM, "metadata": None}, "checks reasoning-gym's sums"),
        ("arithmetic_chain", {**SUM, "metadata": {"expression": "3 * 4"}}, "cannot solve '3 * 4'"),
        ("arithmetic_chain", {**SUM, "metadata": {"expression": "1+" + "9" * 5000}}, "cannot solve '1+999"),
    ],
)
def test_verifiers_that_do_not_fit(spec, row, expected, pair):
    with pytest.raises(InputError, match=re.escape(expected)):
        load_step_verifier(settings(pair, step_verifier=spec), row)


def test_brevity_pays_right_answers_alone(pair):
    config = settings(pair, rewards=("exact_answer", "brevity"), answer_pattern=r"A(-?\d+)$", max_new_tokens=20)
    texts, ids = ["A9", "3+4=7;7+2=9;A9", "A8", ""], [[1] * 3, [1] * 15, [1] * 3, [1]]
    values = call_rewards(load_rewards(config, SUM), [SUM] * 4, texts, ids, trainer_state(config)).rewards
    assert values["exact_answer"] == [1, 1, 0, 0]
    assert values["brevity"] == pytest.approx([0.2 * 17 / 20, 0.2 * 5 / 20, 0, 0])


# ---------------------------------------------------------------------------------------------------- the judge


def test_programmatic_judge_ranks_right_then_sound_then_brief(pair):
    config = settings(
        pair, rewards=("exact_answer", "brevity"), answer_pattern=r"A(-?\d+)$", step_verifier="arithmetic_chain"
    )
    judge = load_judge("programmatic", config, SUM)
    order = ["3+4=7;7+2=9;A9", "A9", "4+3=7;7+2=9;A9", "A8", "3+4=7;7+2=9;A8"]  # best first
    for i, one in enumerate(order):
        assert judge(first=one, second=one, **SUM) == "tie"
        for other in order[i + 1 :]:
            assert judge(first=one, second=other, **SUM) == "first"
            assert judge(first=other, second=one, **SUM) == "second"


def test_only_a_preference_that_survives_the_exchange_counts():
    asked = []

    def always_first(prompt, first, second, **columns):
        asked.append((first, second, columns["answer"]))
        return "first"

    assert compare_pairs(always_first, [SUM, SUM], "ab", "xy") == Preferences(0, 1, 0, 1)
    assert asked == [("a", "x", "9"), ("x", "a", "9"), ("b", "y", "9"), ("y", "b", "9")]

    def longer(prompt, first, second, **_):
        return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"

    found = compare_pairs(longer, [SUM] * 4, ["aa", "aa", "a", "a"], ["a", "a", "aa", "b"])
    assert found == Preferences(win=0.5, tie=0.25, loss=0.25, disagreement=0)

    def hesitant(prompt, first, second, **_):
        return "first" if first == "a" else "tie"

    assert compare_pairs(hesitant, [SUM], ["a"], ["b"]) == Preferences(0, 1, 0, 1)


@pytest.mark.parametrize("verdict", ["1st", 1, None, 0.5])
def test_a_verdict_that_is_none(verdict):
    with pytest.raises(InputError, match="expected 'first', 'second' or 'tie'"):
        compare_pairs(lambda *_, **__: verdict, [SUM], ["a"], ["b"])


def test_a_judge_from_a_file(tmp_path, pair):
    (tmp_path / "mine.py").write_text("def judge(prompt, first, second, **columns):\n    return 'tie'\n")
    judge = load_judge(f"{tmp_path / 'mine.py'}:judge", settings(pair), SUM)
    assert compare_pairs(judge, [SUM], ["a"], ["b"]).tie == 1
    with pytest.raises(InputError, match="--judge mine: neither one of programmatic nor module:function"):
        load_judge("mine", settings(pair), SUM)
