"""Every equation between numbers in a text, such as ``48 / 2 = 24``, and whether it is right.

A completion is hostile input, so the work is a constant per character: a line is read from left to right, once, token
by token, and a number that no float can hold is not calculated with.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, pairwise
from typing import NamedTuple

# A number, perhaps with thousands separated and a currency in front; a sign or a bracket. Digits are those of ASCII.
_TOKEN = re.compile(r"\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|[-+*/()=]")
# An expression that is a part of something longer tells nothing: what stands before one, and what after it.
_WITHIN = re.compile(
    r"(?<=[\w.^%+*/√∛±-])(?!\$)|(?<=[-+*/^%√∛±] )|(?<=\))(?=[-(\d])|(?<=\d:)|(?<=\d )(?=\d+/\d)"
    r"|(?<=[\d%f] of )|(?<=mod )|(?<=choose )"
)
_GOES_ON = re.compile(
    r"\w|\.\d|,\d{3}|:\d| \d+/\d|\(| ?[%*/^]| ?[-+] ?\w|(?: ?\))+ ?[-+*/^%] ?[($]*\w"
    r"| ?\\(?:[dt]?frac|sqrt|pi|binom)| ?\(? ?\\?[bp]?mod\b| (?:[rR] ?\d|remainder)"
)
_MARKUP = re.compile(r"^\s*[-*+•·∙]\s+|(?<!\d)\*\*|\*\*(?!\d)")  # bullets and bold type
# Operators as LaTeX and Unicode have them, and what LaTeX puts between signs.
_TIMES = re.compile(r"(?<=[\d)]) ?x ?(?=[-$(\d])| ?(?:[×·⋅∙]|\\(?:times|cdot)(?![a-zA-Z])) ?")
_DIVIDED = re.compile(r" ?(?:÷|\\div(?![a-zA-Z])) ?")
_MINUS = re.compile(r"−|(?<=[\d)])–(?=[$(\d])|(?<=[\d)] )–(?= [$(\d])")
_SPACING = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,;!](?=[ \d\\+*/()=-])|\\(?=[$%])")
BITS = 1024  # of a numerator or denominator
DIGITS = 308  # of a number in the text

_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}


def all_hold(text: str) -> bool | None:
    """Whether every equation between numbers is right; None if there is none.

    An equation has + - * / (or x × · ÷, and LaTeX's) on one side at least. A decimal fraction that stands alone on a
    side may be rounded to its last digit. Equations with letters, powers or percentages in them are not looked at,
    nor are those with numbers beyond `BITS`.
    """
    found = None
    for line in text.splitlines():
        if "=" not in line:
            continue
        line = " ".join(line.split())
        line = _SPACING.sub("", _MARKUP.sub("", line))
        holds = _line_holds(_MINUS.sub("-", line))
        if holds is False and "–" in line and _line_holds(line.replace("−", "-")):
            holds = None  # the dash may stand between words, as in "Step 1 – 3 + 4 = 7"
        if holds is False:
            return False
        found = found or holds
    return found


def _line_holds(line: str) -> bool | None:
    """The same of a line, whose products and quotients may be written in any way."""
    found = None
    line = " ".join(_DIVIDED.sub("/", _TIMES.sub("*", line)).split())
    for sides in _equations(line):
        holds = _holds(sides)
        if holds is False:
            return False
        found = found or holds
    return found


class Side(NamedTuple):
    """An expression in a line."""

    start: int
    end: int
    opened: bool  # brackets stand before it that are closed elsewhere
    value: Fraction | None  # None: it is too large, undefined, or its brackets do not fit
    undefined: bool  # it divides by 0
    calculated: bool
    decimals: int | None  # digits behind the point of a number that stands alone, if it has a point


def _holds(sides: list[Side]) -> bool | None:
    """Whether all sides are equal; None if nothing is calculated on any of them, or one cannot be read."""
    if not any(side.calculated for side in sides) or any(side.value is None and not side.undefined for side in sides):
        return None
    values = [side.value for side in sides if side.value is not None]
    if len(values) < len(sides):
        return False
    exact = [value for value, side in zip(values, sides, strict=True) if side.decimals is None]
    true = (exact or values)[0]
    return all(
        abs(value - true) <= (Fraction(1, 2 * 10**side.decimals) if side.decimals is not None else 0)
        for value, side in zip(values, sides, strict=True)
    )


def _equations(line: str) -> Iterator[list[Side]]:
    """The sides of each chain of expressions with ``=`` between them."""
    sides: list[Side] = []
    for part in _parts(line):
        first, last = part.opening(), part.closing()
        if sides and first and (first is last or not _GOES_ON.match(line, first.end)):
            sides.append(first)
        if last is None or last is not first:
            if len(sides) > 1:
                yield sides
            sides = []
        if last and not sides and (last is first or last.opened or not _WITHIN.match(line, last.start)):
            sides = [last]
    if len(sides) > 1:
        yield sides


class _Part(NamedTuple):
    """What stands between two ``=`` of a line, or before the first, or after the last."""

    line: str
    start: int
    end: int
    sides: list[Side]  # none of them a part of another
    is_last: bool

    def opening(self) -> Side | None:
        """The expression that stands right after a ``=``."""
        if not self.sides or self.start == 0:
            return None
        first = self.sides[0]
        return None if self.line[self.start : first.start].strip() else first

    def closing(self) -> Side | None:
        """The expression that stands right before a ``=``, perhaps with brackets that were opened elsewhere."""
        if not self.sides or self.is_last:
            return None
        last = self.sides[-1]
        return None if self.line[last.end : self.end].strip(" )") else last


def _parts(line: str) -> Iterator[_Part]:
    start, sides, reader = 0, list[Side](), _Expression()

    def ended() -> None:
        if side := reader.side():
            sides.append(side)

    for token, following in pairwise(chain(_TOKEN.finditer(line), [None])):
        assert token is not None  # which the last alone is
        if token[0] == "=":
            ended()
            yield _Part(line, start, token.start(), sides, is_last=False)
            start, sides, reader = token.end(), [], _Expression()
            continue
        is_sign = following is not None and following.start() == token.end() and following[0][0] in "($0123456789"
        if not reader.takes(token, line, is_sign):
            ended()
            reader = _Expression()
            reader.takes(token, line, is_sign)
    ended()
    yield _Part(line, start, len(line), sides, is_last=True)


@dataclass
class _Expression:
    """An expression that is read token by token, with the values and operators that wait for their turn."""

    values: list[Fraction | None] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)  # operators, "(", and "-(" for one whose value is negated
    start: int = -1
    end: int = -1  # of what can be an expression
    seen: int = -1  # the end of the last token
    complete: int = 0  # how many of those waiting belong to what can be an expression
    brackets: int = 0
    expects_value: bool = True
    negated: bool = False
    undefined: bool = False
    calculated: bool = False
    decimals: int | None = None

    def takes(self, token: re.Match[str], line: str, is_sign: bool) -> bool:
        """Whether the token goes on with the expression, and takes it if so. ``is_sign``: a minus may be a sign here,
        as a number or a bracket follows at once."""
        text, start = token[0], token.start()
        if self.seen >= 0 and line[self.seen : start] not in ("", " "):
            return False
        taken = self._value(text, is_sign) if self.expects_value else self._operator(text)
        if taken:
            self.start = start if self.start < 0 else self.start
            self.seen = token.end()
            self.end = self.end if self.expects_value else self.seen
        return taken

    def _value(self, text: str, is_sign: bool) -> bool:
        if text == "(":
            self.waiting.append("-(" if self.negated else "(")
            self.brackets += 1
        elif text == "-" and is_sign and not self.negated:
            self.negated = True
            return True
        elif text in "+-*/)":
            return False
        else:
            self._push(text)
        self.negated = False
        return True

    def _push(self, text: str) -> None:
        digits = text.replace("$", "").replace(",", "")
        whole, point, decimals = digits.partition(".")
        value = None
        if len(digits) <= DIGITS and (whole == "0" or not whole.startswith("0")):  # 007 is no number
            value = Fraction(int(whole + decimals), 10 ** len(decimals))
            value = -value if self.negated else value
        self.decimals = len(decimals) if point and not self.values and not self.calculated else None
        self.values.append(value)
        self.expects_value = False
        self.complete = len(self.waiting)

    def _operator(self, text: str) -> bool:
        if text == ")":
            if not self.brackets:
                return False
            self._calculate(0)
            self.brackets -= 1
            if self.waiting.pop() == "-(" and self.values[-1] is not None:
                self.values[-1] = -self.values[-1]
            self.complete = len(self.waiting)
            return True
        if text not in _BINDS:
            return False
        self._calculate(_BINDS[text])
        self.complete = len(self.waiting)
        self.waiting.append(text)
        self.expects_value = True
        return True

    def _calculate(self, least: int) -> None:
        """Applies the operators that wait behind the last bracket and bind at least so closely."""
        while self.waiting and _BINDS.get(self.waiting[-1], -1) >= least:
            operation, right, left = self.waiting.pop(), self.values.pop(), self.values.pop()
            self.calculated, self.decimals, value = True, None, None
            if left is not None and right is not None:
                if operation == "/" and right == 0:
                    self.undefined = True
                else:
                    value = _OPERATIONS[operation](left, right)
                    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
                    value = value if bits <= BITS else None
            self.values.append(value)

    def side(self) -> Side | None:
        """The expression up to its last whole value, without brackets that stand around the whole equation; None if
        there is none."""
        if self.end < 0:
            return None
        del self.waiting[self.complete :]
        self._calculate(0)
        value = self.values[0]
        undefined = self.undefined
        if any(bracket != "(" for bracket in self.waiting):  # one that is open in the middle, or has a sign
            value, undefined = None, False
        return Side(self.start, self.end, bool(self.waiting), value, undefined, self.calculated, self.decimals)
