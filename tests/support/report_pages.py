"""The page of `cmdp-fast report`, parsed, with an assertion for whatever it should not hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from cmdp_fast.cli import main
from cmdp_fast.trainer.run_report.groups import groups_of
from cmdp_fast.trainer.run_report.runs import read_runs

ALLOWED = {  # by element, the attributes that the page gives it
    **{name: set() for name in ("head", "title", "style", "body", "main", "h1", "h2", "figure", "picture", "table")},
    **{name: set() for name in ("thead", "tbody", "tr", "td", "bdi", "li", "br")},
    **{name: {"class"} for name in ("p", "div", "ul", "section", "article", "h3", "figcaption")},
    **{"html": {"lang"}, "meta": {"charset", "http-equiv", "content", "name"}, "th": {"scope"}},
    **{"source": {"media", "srcset"}, "img": {"src", "alt"}, "span": {"class", "title"}, "mark": {"class", "title"}},
}
EMPTY_ELEMENTS = {"meta", "source", "img", "br"}


class Page(HTMLParser):
    """A page that has been parsed: its structure, its text, and its completions' tokens. Whatever it should not hold is
    an assertion."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.structure: list[Any] = []
        self.text = ""
        self.cells: list[list[tuple[str, str, str, str]]] = []  # (element, class, title, text) of each token
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert tag in ALLOWED and given.keys() <= ALLOWED[tag] and len(given) == len(attrs), (tag, attrs)
        for name in ("src", "srcset"):
            assert given.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
        assert re.fullmatch(r"[a-z0-9 ]*", given.get("class", ""))
        self.structure.append((tag, {name: v for name, v in given.items() if name not in ("title", "src", "srcset")}))
        if tag == "div" and given.get("class") == "text":
            self.cells.append([])
        if self._in_text and "title" in given:
            self.cells[-1].append((tag, given.get("class", ""), given["title"], ""))
        if tag not in EMPTY_ELEMENTS:
            self._open.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag
        self.structure.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "style":
            return
        self.text += data
        if self._in_text and "title" in self._open[-1][1]:
            tag, kind, title, text = self.cells[-1][-1]
            self.cells[-1][-1] = (tag, kind, title, text + data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")

    @property
    def _in_text(self) -> bool:
        return any(given.get("class") == "text" for _, given in self._open)


def report(*runs: Path, output: Path, **options: Any) -> str:
    """The page that the command writes."""
    words = [f"--{name}={value}" for name, value in options.items()]
    assert main(["report", *map(str, runs), f"--output-dir={output}", *words]) == 0
    return (output / "samples.html").read_text(encoding="utf-8")


def quiet(_: str) -> None:
    pass


def groups(*folders: Path) -> list[Any]:
    return groups_of(read_runs([str(folder) for folder in folders], quiet))


def markdown_in(folder: Path) -> str:
    return (folder / "samples.md").read_text(encoding="utf-8")
