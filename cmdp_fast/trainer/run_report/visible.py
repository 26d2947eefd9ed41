"""Text that somebody else has written, so that a reader sees all of it and it does nothing.

A completion may turn the direction of writing, hide characters or move a terminal's cursor. What would do so is shown:
a control code as its picture (`␛`), another invisible character as its number (`⟨U+202E⟩`). Line ends and tabs stay.
"""

from __future__ import annotations

import unicodedata

CUT = "…"
JOINERS = "\u200c\u200d\ufe0e\ufe0f"  # writing needs them: Persian, families of emoji, emoji in colour
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Of Unicode's Default_Ignorable_Code_Point, which Python does not have, those of other categories: joiners, fillers,
# variation selectors, and what is not assigned but never to be seen. And a Braille cell without dots.
_BLANK = [(0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065), (0x2800, 0x2800)]
_BLANK += [(0x3164, 0x3164), (0xFE00, 0xFE0D), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF)]


def visible(text: str) -> str:
    """The text with what cannot be seen as something that can."""
    return text if text.isascii() and text.isprintable() else "".join(map(_seen, text))


def short(text: str, most: int) -> str:
    """A name on one line, of ``most`` characters at most, visible."""
    line = " ".join(text[: most + 1].split())
    return visible(line if len(line) <= most else f"{line[: most - 1]}{CUT}")


def _seen(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or character in JOINERS:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    nothing = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF  # Unicode's noncharacters, which HTML refuses
    blank = any(first <= code <= last for first, last in _BLANK)
    if nothing or blank or unicodedata.category(character) in _HIDDEN:
        return f"⟨U+{code:04X}⟩"
    return character
