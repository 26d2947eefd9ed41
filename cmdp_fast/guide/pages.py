"""The table of the site: which file of the repository, or which sections of the README, make which page."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

README = "README.md"
INTRODUCTION = ""  # what stands above the first section of the README


class Page(NamedTuple):
    """A page of the site."""

    name: str  # its address, without .html
    path: str = README  # the file of the repository that it is made of
    sections: tuple[
        str, ...
    ] = ()  # titles of the README's sections that stand on it; a page of another file: their place
    title: str = ""  # of a page that is made of several sections, and of one whose own says too little


GUIDES = "cmdp_fast/guide"


def _guide(name: str, *sections: str) -> Page:
    return Page(name, f"{GUIDES}/{name}.md", sections)


INDEX = _guide("index", "Ten lines of use", "Cite")

# The sidebar: a caption and the pages below it.
GROUPS: dict[str, tuple[Page, ...]] = {
    "Begin": (
        Page(
            "overview",
            sections=(INTRODUCTION, "What it computes", "In your trainer", "The trainer of this package"),
            title="What is in it",
        ),
        _guide("install", "Install"),
        _guide("tutorial"),
        _guide("budget"),
        _guide("method", "The method"),
    ),
    "Use": (
        Page("operations", "cmdp_fast/ops/README.md"),
        Page("trainer", "cmdp_fast/trainer/README.md"),
        Page("teachers", "cmdp_fast/teachers/README.md"),
        Page("integrations", "cmdp_fast/integrations/README.md"),
        _guide("from_trl"),
        _guide("memory"),
        Page("machines", "cmdp_fast/trainer/MACHINES.md"),
        Page("vllm", "cmdp_fast/trainer/engine/README.md"),
        _guide("hub_kernel"),
    ),
    "When something is wrong": (
        _guide("troubleshooting"),
        _guide("versions"),
        _guide("security"),
        _guide("attacks"),
        Page("environment", sections=("Environment variables",)),
        Page("limits", sections=("Limits",)),
    ),
    "Measured": (
        Page("speed", sections=("Speed",)),
        Page("results/index", "benchmarks/results/README.md"),
    ),
    "Reference": (
        Page("changelog", ".github/CHANGELOG.md"),
        Page("contributing", ".github/CONTRIBUTING.md", ("How it is built",)),
    ),
}
RESULTS = "benchmarks/results"  # every other page below it is a page of the site too, below `results/`
# Pages that a command writes have the command's title, which stands above others as well.
RESULT_TITLES = {
    "cpu": "CPU, x86-64",
    "smollm2/colours": "smollm2: colours",
    "smollm2/questions": "smollm2: questions",
    "training/tempting/table": "tempting: all methods",
}
OTHERS = "Use"  # the group of guides of this folder that no group names


def pages_of(root: Path) -> dict[str, tuple[Page, ...]]:
    """The sidebar of a clone. Raises FileNotFoundError for a page without its file."""
    for page in (page for pages in GROUPS.values() for page in pages):
        if not (root / page.path).exists():
            raise FileNotFoundError(f"{root / page.path}: the page {page.name!r} of the site is made of it")
    groups = {caption: list(pages) for caption, pages in GROUPS.items()}
    named = {page.name for pages in GROUPS.values() for page in pages} | {INDEX.name}
    found = sorted(path.stem for path in (root / GUIDES).glob("*.md"))
    groups[OTHERS] += [_guide(name) for name in found if name not in named]
    return {caption: tuple(pages) for caption, pages in groups.items()}


def results_of(root: Path) -> list[Page]:
    """The pages of measurements below the overview of them, by folder."""
    found = sorted(path.relative_to(root / RESULTS) for path in (root / RESULTS).rglob("*.md"))
    named = {_result_name(path): path for path in found if path != Path(README)}
    return [
        Page(f"results/{name}", f"{RESULTS}/{path.as_posix()}", title=RESULT_TITLES.get(name, ""))
        for name, path in named.items()
    ]


def _result_name(path: Path) -> str:
    return (path.parent if path.name == README else path.with_suffix("")).as_posix()
