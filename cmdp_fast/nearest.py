"""The known names that are nearest to one that is not known, for errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ALIKE = 0.7  # difflib's measure; below it two names mostly mean different things


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names that were probably meant: those with these initials (`lr`: `learning-rate`), the one spelt alike,
    or the first that begins so."""
    names = {each.lower().replace("_", "-"): each for each in known}
    given = name.lower().replace("_", "-")
    initials = [each for each in names if "-" in each and "".join(word[:1] for word in each.split("-")) == given]
    begun = [each for each in names if len(given) > 1 and each.startswith(given)]
    return [names[each] for each in initials or difflib.get_close_matches(given, names, n=1, cutoff=ALIKE) or begun[:1]]


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error: `, did you mean --learning-rate?` (with ``prefix`` "--"), or nothing."""
    found = " or ".join(f"{prefix}{each}" for each in nearest(name, known))
    return f", did you mean {found}?" if found else ""
