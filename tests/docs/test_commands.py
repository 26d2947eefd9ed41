"""Every command of ours on a page is one that its parser takes, and files of settings are read as what they are.

Blocks of `bash` and `sh` are read as a shell reads them. `...` and `…` stand for what the page leaves out.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cmdp_fast.errors import InputError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from cmdp_fast.trainer.run_report.settings import ReportConfig, parse_report

for needed in ("transformers", "tyro"):
    pytest.importorskip(needed)

from cmdp_fast.bench.command import parser as bench_parser  # noqa: E402
from cmdp_fast.trainer.cache_teacher import CacheConfig, parse_cache  # noqa: E402
from cmdp_fast.trainer.comparison.plan import CompareConfig, parse_compare  # noqa: E402
from cmdp_fast.trainer.evaluate_student import EvaluateConfig, parse_evaluate  # noqa: E402
from cmdp_fast.trainer.parse import parse  # noqa: E402
from cmdp_fast.trainer.serve_teacher import ServeSettings, parse_teacher  # noqa: E402
from cmdp_fast.trainer.settings.config import TrainConfig  # noqa: E402
from cmdp_fast.trainer.settings.recipe import read_recipe  # noqa: E402

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "cmdp_fast", ROOT / "benchmarks", ROOT / ".github")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted(folder.rglob("*.md")))]
PAGES.remove(ROOT / ".github" / "CHANGELOG.md")  # of old versions, too
GUIDE = ROOT / "cmdp_fast" / "guide"
PARSERS = {
    "train": (parse, TrainConfig),
    "compare": (parse_compare, CompareConfig),
    "evaluate": (parse_evaluate, EvaluateConfig),
    "report": (parse_report, ReportConfig),
    "teacher": (parse_teacher, ServeSettings),
    "cache-teacher": (parse_cache, CacheConfig),
    "bench": (lambda given: bench_parser().parse_args(given), None),
}
WITHOUT_OPTIONS = ("info", "doctor")
ENDS = {"&&", "||", ";", "|", "&", ">", "2>&1", ")"}
LEFT_OUT = {"...", "…"}
ELSEWHERE = {"--extra-index-url", "--slow", "--no-deps", "--nproc_per_node", "--nnodes"}  # of pip, pytest and torchrun


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```([\w-]*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of ours in a text for the shell, each as its words behind `cmdp-fast`."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        if not re.search(r"cmdp-fast |cmdp_fast\.cli ", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        yield from _of_words(list(lexer))


def _of_words(words: list[str]) -> Iterator[list[str]]:
    for i, word in enumerate(words):
        if word in ("cmdp-fast", "cmdp_fast.cli"):
            rest = words[i + 1 :]
            end = next((j for j, other in enumerate(rest) if other in ENDS), len(rest))
            yield rest[:end]


def inline(page: Path) -> Iterator[str]:
    """What stands in single backticks on a page, and is no block."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        yield " ".join(found[1].split())


def option_names(kind: type | None) -> set[str]:
    if kind is None:
        return {name for action in bench_parser()._actions for name in action.option_strings}
    names = [field.name.replace("_", "-") for field in dataclasses.fields(kind)]
    return {f"--{start}{name}" for name in names for start in ("", "no-")} | {"--help"}


OPTIONS = {command: option_names(kind) for command, (_, kind) in PARSERS.items()}
WRITTEN = {
    tuple(words): block for block in BLOCKS if block.language in ("bash", "sh", "") for words in commands(block.text)
}


@pytest.mark.parametrize("words", WRITTEN, ids=lambda words: " ".join(words)[:60])
def test_a_command_is_taken(words, tmp_path, monkeypatch):
    """By its own parser, which checks values too; a run that goes on is asked for by its settings alone."""
    command, *given = (word for word in words if word not in LEFT_OUT)
    if command in WITHOUT_OPTIONS:
        return
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:  # files that a page has its reader write
        if block.page == WRITTEN[words].page and (name := re.match(r"# .*?(\w+\.toml)\n", block.text)):
            Path(name[1]).write_text(block.text, encoding="utf-8")
    if "--resume" in given:
        at = given.index("--resume")
        del given[at : at + 2]
    assert {word.partition("=")[0] for word in given if re.match(r"--[a-z][\w-]*(=|$)", word)} <= OPTIONS[command]
    run, _ = PARSERS[command]
    try:
        run(given)
    except SystemExit as error:
        assert error.code in (0, None), f"{WRITTEN[words].page}: {' '.join(words)}"
    except InputError:
        if not LEFT_OUT & set(words):
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_exist(page):
    everything = set.union(*OPTIONS.values()) | ELSEWHERE
    for code in inline(page):
        first = code.split()[0]
        if first == "cmdp-fast" and code != first:
            (words,) = _of_words(code.split())
            assert words and (words[0] in WITHOUT_OPTIONS or words[0] in PARSERS or words[0].startswith("-")), code
            known = OPTIONS.get(words[0], set()) if words else set()
            assert {word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2} <= known, code
        elif re.match(r"--[a-z]", first) and page.is_relative_to(GUIDE):
            assert first.partition("=")[0] in everything or first.endswith(("…", "-")), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_extras_exist(page):
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"].keys()
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"pip install [^\n`]*", text):
        for named in re.findall(r"(?:cmdp_fast|\.)\[([\w,-]+)\]", line):
            assert {name for name in named.split(",") if not name.isupper()} <= extras, line  # NAME stands for any


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.language in ("json", "toml", "jsonl")],
    ids=lambda block: f"{block.page.parent.name}/{block.page.name}:{block.line}",
)
def test_a_file_of_settings_is_read(block, tmp_path):
    if block.language == "toml":
        settings = tomllib.loads(block.text)
        if "situations" not in settings:  # which a study has, and a recipe has not
            (tmp_path / "recipe.toml").write_text(block.text, encoding="utf-8")
            read_recipe(str(tmp_path / "recipe.toml"), "")
        return
    for part in block.text.splitlines() if block.language == "jsonl" else [block.text]:
        json.loads(part)


def test_commands_are_found():
    text = "a && cmdp-fast train --budget 2 \\\n  --dry-run # why\nX=1 torchrun -m cmdp_fast.cli train ... | tee x\n"
    assert list(commands(text)) == [["train", "--budget", "2", "--dry-run"], ["train", "..."]]


def test_a_wrong_command_is_refused():
    with pytest.raises((SystemExit, InputError)):
        parse(["--no-such-option"])
    assert "--no-such-option" not in OPTIONS["train"]
