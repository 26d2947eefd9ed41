"""What of a guide differs between GitHub and the site: links, images, formulas, and the README's sections.

Code is left alone: no fence and no inline code is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_FENCE = re.compile(r"^(`{3,})(.*?)^\1`*[ ]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?:(?!\1).)+?\1(?!`)", re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_SECTION = re.compile(r"^## (.*)$", re.MULTILINE)


def outside(pattern: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
    """The text with everything changed that the pattern does not match."""
    parts, end = [], 0
    for found in pattern.finditer(text):
        parts += [change(text[end : found.start()]), found[0]]
        end = found.end()
    return "".join([*parts, change(text[end:])])


def relinked(text: str, page: Callable[[str, str], str | None], image: Callable[[str], str]) -> str:
    """The text with its links and images led to where their targets are in the site.

    ``page`` gets a link's address and its text, and returns its new address, or None where the text is to stand without
    a link. ``image`` gets and returns the address of an image. Addresses of the web stay as they are.
    """

    def changed(found: re.Match[str]) -> str:
        mark, shown, address = found.groups()
        if re.match(r"[a-z]+:", address):
            return found[0]
        if mark:
            return f"![{shown}]({image(address)})"
        target = page(address, shown)
        return f"[{shown}]({target})" if target else shown

    return outside(_FENCE, text, lambda prose: _links_outside_code(prose, changed))


def _links_outside_code(prose: str, changed: Callable[[re.Match[str]], str]) -> str:
    # A link's text may be code, and code may look like a link: what begins inside code is none.
    spans = [found.span() for found in _CODE.finditer(prose)]

    def one(found: re.Match[str]) -> str:
        return found[0] if any(first < found.start() < last for first, last in spans) else changed(found)

    return _LINK.sub(one, prose)


def with_known_fences(text: str) -> str:
    """The text with GitHub's blocks of mathematics as MyST's, and languages as Pygments knows them."""
    text = re.sub(r"^```math$", "```{math}", text, flags=re.MULTILINE)
    text = re.sub(r"^```jsonl$", "```json", text, flags=re.MULTILINE)
    return re.sub(r"^```(floors|top-level)$", "```text", text, flags=re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """The sections of the README by their titles, each without its own; above the first: the empty title."""
    starts = [found for found in _SECTION.finditer(text) if not _inside_fence(text, found.start())]
    ends = [found.start() for found in starts[1:]] + [len(text)]
    first = starts[0].start() if starts else len(text)
    above = re.sub(r"\A# .*\n", "", text[:first])
    return {"": above} | {found[1]: text[found.end() : end] for found, end in zip(starts, ends, strict=True)}


def _inside_fence(text: str, place: int) -> bool:
    return any(found.start() < place < found.end() for found in _FENCE.finditer(text))


def slug(title: str) -> str:
    """The anchor that GitHub gives a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
