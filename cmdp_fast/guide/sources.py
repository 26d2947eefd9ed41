"""The folder that Sphinx reads: every page of the table, with links and images that lead inside the site."""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cmdp_fast.guide import markdown
from cmdp_fast.guide.pages import INDEX, README, Page, pages_of, results_of

# Files that a guide links to and that are shown as they are, on pages of their own: their languages by their suffixes.
SHOWN = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".h": "cpp", ".cpp": "cpp", ".cu": "cuda", ".cuh": "cuda"}
FROM_README = "<!-- from README.md: {} -->"  # in a guide: the section of the README comes here


class Written(NamedTuple):
    """What has been written."""

    pages: dict[str, Page]  # by name
    shown: set[str]  # files of the repository with pages that show them


def write(root: Path, folder: Path) -> Written:
    """Writes the sources of all guides of a clone into a folder."""
    groups, results = pages_of(root), results_of(root)
    pages = [INDEX, *(page for group in groups.values() for page in group), *results]
    writer = _Writer(root, folder, pages)
    for page in pages:
        writer.write(page)
    for path in sorted(writer.shown):
        writer.show(path)
    captions = [_toctree(caption, [page.name for page in group]) for caption, group in groups.items()]
    _append(folder / "index.md", "\n".join([*captions, _toctree("", ["api/index"])]))
    _append(folder / "results" / "index.md", _toctree("", [page.name.removeprefix("results/") for page in results]))
    return Written({page.name: page for page in pages}, writer.shown)


class _Writer:
    def __init__(self, root: Path, folder: Path, pages: list[Page]) -> None:
        self.root, self.folder = root, folder
        self.sections = markdown.sections((root / README).read_text(encoding="utf-8"))
        self.pages = {page.path: page.name for page in pages if page.path != README} | {README: "index"}
        self.places = {title: page for page in pages for title in page.sections}
        self.titles = {markdown.slug(title): title for title in self.places}
        # guides that stand in the place of sections, and do not show them
        texts = {page.path: (root / page.path).read_text(encoding="utf-8") for page in pages if page.sections}
        self.instead = {path for path, text in texts.items() if path != README and "<!-- from README.md:" not in text}
        self.shown: set[str] = set()
        if lost := self.sections.keys() - self.places.keys():
            raise ValueError(
                f"{README}: no page of the site has {sorted(lost)}; cmdp_fast/guide/pages.py gives them one"
            )
        if gone := self.places.keys() - self.sections.keys():
            raise ValueError(f"{README}: it has no section {sorted(gone)}, which cmdp_fast/guide/pages.py names")

    def write(self, page: Page) -> None:
        if page.path == README:
            text = self._of_readme(page)
        else:
            text = self._linked(page, page.path, (self.root / page.path).read_text(encoding="utf-8"))
            if page.title:
                text = re.sub(r"\A# .*\n+", "", text)
            if not text.startswith("#"):  # a table that a command writes has no title of its own
                text = f"# {page.title or PurePosixPath(page.path).stem.capitalize()}\n\n{text}"
            for title in page.sections:
                text = text.replace(FROM_README.format(title), self._section(page, title))
        _put(self.folder / f"{page.name}.md", markdown.with_known_fences(text))

    def _of_readme(self, page: Page) -> str:
        if len(page.sections) == 1:
            (title,) = page.sections
            return f"# {title}\n{self._section(page, title)}"
        parts = [
            f"## {title}\n{self._section(page, title)}" if title else self._section(page, title)
            for title in page.sections
        ]
        return "\n".join([f"# {page.title}", *parts])

    def _section(self, page: Page, title: str) -> str:
        return self._linked(page, README, self.sections[title])

    def _linked(self, page: Page, path: str, text: str) -> str:
        here = posixpath.dirname(path)

        def target(address: str, shown: str) -> str | None:
            file, _, anchor = address.partition("#")
            at = posixpath.normpath(posixpath.join(here, file)) if file else path
            name = self._page_of(at, anchor)
            if at == README and anchor and self.places[self.titles[anchor]].path in self.instead:
                anchor = ""  # the page as a whole says what the section says
            return name and _relative(f"{name}.md", page.name) + (f"#{anchor}" if anchor else "")

        def image(address: str) -> str:
            file = posixpath.normpath(posixpath.join(here, address))
            copy = self.folder / "images" / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / file, copy)
            return _relative(f"images/{file}", page.name)

        return markdown.relinked(text, target, image)

    def _page_of(self, path: str, anchor: str) -> str | None:
        """The name of the page for a file and an anchor in it, or None where there is none."""
        if path == README and anchor:
            return self.places[self.titles[anchor]].name
        if path in self.pages:
            return self.pages[path]
        if not (self.root / path).is_file():
            if not (self.root / path).exists():
                raise FileNotFoundError(f"{path}: a guide links to it")
            return None
        if os.path.splitext(path)[1] not in SHOWN:
            return None
        self.shown.add(path)
        return _shown_name(path)

    def show(self, path: str) -> None:
        language = SHOWN[os.path.splitext(path)[1]]
        code = (self.root / path).read_text(encoding="utf-8")
        head = "---\norphan: true\nnosearch: true\n---\n"
        title = path.replace("__", r"\_\_")
        _put(self.folder / f"{_shown_name(path)}.md", f"{head}# {title}\n\n`````{language}\n{code.rstrip()}\n`````\n")


def _shown_name(path: str) -> str:
    return f"source/{path}"


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def _toctree(caption: str, names: list[str]) -> str:
    head = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "```{toctree}", *head, "", *names, "```", ""])


def _append(path: Path, text: str) -> None:
    _put(path, path.read_text(encoding="utf-8") + text)


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
