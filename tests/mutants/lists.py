"""The mutants of a source: small changes, each of which a test has to notice, or a reason why none can.

Those of csrc/budget.h stand in tests/mutants/csrc/budget.h.toml: ``tests``, the files that have to notice them;
``preload``, modules that are imported once for all, of a source that acts when it is itself imported; and ``mutants``:

``old``       a text that the source has once; « and » mark the part that is replaced, where the rest says which it is
``new``       what takes its place
``reason``    why no test can notice it, where it is expected to survive
``kind``      how C++ chooses between the two when it runs, if they are no expressions: "statement"; or "raw", where
              ``new`` is the text with both of them, and @ in it the condition
``function``  the head of the function that they stand in, up to its {: the choice is one of two functions then, which
              serves changes that overlap
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Span(NamedTuple):
    begin: int
    end: int


class Mutant(NamedTuple):
    number: int  # its place in the list, from 1
    old: str
    new: str
    reason: str = ""
    kind: str = "expression"
    function: str = ""

    def span(self, text: str) -> Span | None:
        """Where in a text the part is that it replaces; None if that is not there, or not once."""
        before, mark, rest = self.old.partition("«")
        if not mark:
            before, rest = "", f"{self.old}»"
        replaced, _, after = rest.partition("»")
        if text.count(before + replaced + after) != 1:
            return None
        begin = text.index(before + replaced + after) + len(before)
        return Span(begin, begin + len(replaced))

    def choice(self, text: str) -> Span | None:
        """What there are two of in C++: the part that it replaces, or the whole function."""
        if not self.function:
            return self.span(text)
        whole = _body(text, self.function)
        return whole if whole and self.span(text[whole.begin : whole.end]) else None

    def applied(self, text: str) -> str:
        begin, end = self.span(text) or Span(0, 0)
        return text[:begin] + self.new + text[end:]


class Mutants(NamedTuple):
    source: str
    tests: list[str]
    mutants: list[Mutant]
    preload: list[str]


def read(root: Path, source: str) -> Mutants:
    """The list of a source. Raises OSError where it has none, TypeError for a key that no list has."""
    given: dict[str, Any] = tomllib.loads((root / "tests" / "mutants" / f"{source}.toml").read_text("utf-8"))
    mutants = [Mutant(number, **entry) for number, entry in enumerate(given.pop("mutants"), 1)]
    return Mutants(**{"source": source, "mutants": mutants, "preload": []} | given)


def _body(text: str, head: str) -> Span | None:
    """From the head of a function to the } that ends it."""
    if text.count(head) != 1:
        return None
    begin, depth = text.index(head), 0
    for brace in re.finditer("[{}]", text[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return Span(begin, begin + brace.end())
    return None
