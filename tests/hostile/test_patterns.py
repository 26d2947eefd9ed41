"""The regular expressions that read what others wrote take a time in proportion to its length."""

from __future__ import annotations

import ast
import importlib
import re
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cmdp_fast"

HOSTILE = {  # modules of patterns, by how a pattern is used where it is not searched for everywhere
    "errors": {},
    "masking": {"_OPTION": "fullmatch"},
    "terminal": {},
    "trainer/engine/server": {},
    "trainer/run_report/markdown": {},
    "trainer/tasks/equations": {"_WITHIN": "match", "_GOES_ON": "match"},
    "trainer/tasks/prompts": {"_FIELD": "fullmatch", "_MESSAGES": "match"},
}
OURS = {"field_docs", "guide/docstrings", "guide/markdown", "guide/mathml"}  # which read this package's own texts
WORDS = {"trainer/comparison/plan", "trainer/settings/several"}  # and the words of a command
CHECKED = {"trainer/settings/config", "trainer/comparison/study/plan"}  # whether a user's pattern is one
USERS = {"trainer/tasks/data", "trainer/tasks/rewards"}  # a user's pattern, which has a time (`last_group`)

UNITS = (
    *(" ", "1", "a", "_", "(", ")", "$", "-", "--", "\\", "=", "x", "*", ".", ",", ":", "/", "?", "@", "[", "]", "{"),
    *("}", "'", '"', "`", "|", "\n", "\t", "\x00", "1,", "1,111", "1.", "– ", "− ", ")) ", "( ", "1 ", " 1", "a."),
    *("key", "key=", "key= ", "--key ", "--key '", "api_key ", "'key':", '"key": "', '\\"key\\":', "://", "://a?"),
    *(
        "Bearer ",
        "sk-",
        "hf_",
        "token-",
        "password",
        "\\left",
        "\\,",
        " ÷ ",
        " x ",
        "$(",
        "of ",
        "w.",
        "[a](",
        "![",
        ": ",
    ),
    *(": a=b ", ": pip ", '{"content":', "[{", "['role':", "1+1=", "**", "Error: "),
)
SHORT, LONG = 2000, 8000


def patterns(module: str) -> dict[str, re.Pattern[str]]:
    named = vars(importlib.import_module("cmdp_fast." + module.replace("/", ".")))
    found = {name: value for name, value in named.items() if isinstance(value, re.Pattern)}
    for name, value in named.items():
        for number, each in enumerate(value if isinstance(value, tuple) else ()):
            if isinstance(each, tuple) and each and isinstance(each[0], re.Pattern):
                found[f"{name}[{number}]"] = each[0]
    return found


def seconds(pattern: re.Pattern[str], use: str, text: str) -> float:
    since = time.process_time()
    if use:
        getattr(pattern, use)(text)
    else:
        pattern.sub("", text)
    return time.process_time() - since


@pytest.mark.parametrize("module", HOSTILE)
def test_no_text_takes_a_pattern_long(module):
    """Four times the text takes four times as long, sixteen times where the work is quadratic: counted where it is
    more than a blink, and the shortest of three."""
    for name, pattern in patterns(module).items():
        use = HOSTILE[module].get(name, "")
        for unit in UNITS:
            for end in ("", "!"):
                short, long = ((unit * size)[:size] + end for size in (SHORT, LONG))
                if seconds(pattern, use, long) > 0.04:
                    took = min(seconds(pattern, use, long) for _ in range(3))
                    before = min(seconds(pattern, use, short) for _ in range(3))
                    assert took < 0.04 or took < 10 * before, f"{name} on {unit!r}: {before:.3f} s, then {took:.3f} s"


def test_every_pattern_of_the_package_is_one_of_these():
    compiling = set()
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)) if "compile(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("re.compile", "regex.compile"):
                compiling.add(path.relative_to(PACKAGE).with_suffix("").as_posix())
    assert compiling == {*HOSTILE, *OURS, *WORDS, *CHECKED, *USERS}
