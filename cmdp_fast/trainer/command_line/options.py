"""What a class of settings offers on the command line: options by section, out of its fields and their docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args, get_origin, get_type_hints

from ..settings.units import Unit


class Settings(Protocol):
    """A dataclass of settings, with a docstring behind each field."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Option(NamedTuple):
    """An option: of which section, what it is given and what it says."""

    name: str  # of the field
    section: str
    given: str  # "" for one that takes nothing
    expected: str  # in an error
    says: str
    default: str
    choices: tuple[str, ...]
    positional: bool

    @property
    def flag(self) -> str:
        """What is typed, but for a value."""
        return "" if self.positional else f"--{self.name.replace('_', '-')}"


class Section(NamedTuple):
    """The options of a part of the settings."""

    name: str
    says: str
    options: tuple[Option, ...]


def sections_of(kind: type[Settings], default: Any, command: str) -> list[Section]:
    """The sections of a class, one for each class that it is put together from, in the order of the fields; what it
    adds to its bases comes first, under the command's name.

    ``default``: an instance whose values are the defaults, or None for those of the fields.
    """
    hints, names = get_type_hints(kind, include_extras=True), [f.name for f in dataclasses.fields(kind)]
    by_class: dict[type, list[Option]] = {}
    for field in dataclasses.fields(kind):
        home = next(c for c in kind.__mro__ if field.name in inspect.get_annotations(c))
        value = field.default if default is None else getattr(default, field.name)
        section = command if home is kind else home.__name__.removesuffix("Settings").lower()
        option = _option(field.name, section, hints[field.name], value, _docstrings(home)[field.name], names)
        by_class.setdefault(home, []).append(option)
    own = [kind] if kind in by_class else []
    ordered = own + [c for c in by_class if c is not kind]
    return [Section(by_class[c][0].section, _first_paragraph(c), tuple(by_class[c])) for c in ordered]


def read_sections(kind: type[Settings], default: Any, command: str) -> list[Section]:
    """The sections without the options that a class has for recipes alone: those of the sections `UNREAD`, and those
    that it has `REFUSED`."""
    refused = getattr(kind, "REFUSED", ())
    sections = [s for s in sections_of(kind, default, command) if s.name not in getattr(kind, "UNREAD", ())]
    return [s._replace(options=tuple(o for o in s.options if o.name not in refused)) for s in sections]


def first_sentence(text: str) -> str:
    """A text up to the end of its first sentence, without the full stop."""
    return re.split(r"(?<=[\w`)\]])\.(?=\s|$)", text, maxsplit=1)[0]


def meaning(option: Option) -> str:
    """What a default that is nothing stands for, where the text has a sentence of its own for it (`0: all of them.`);
    else empty."""
    word = option.default.split()[0]
    found = re.search(rf"(?:^|[.;] ){word}: (.+)", option.says, re.IGNORECASE) if word in _NOTHING else None
    return first_sentence(found[1]).removesuffix(".") if found else ""


SWITCH = "nothing: it is on where it is named, and off with --no- before its name"
_NOTHING = ("empty", "0", "no")


def _option(name: str, section: str, hint: Any, value: Any, says: str, names: list[str]) -> Option:
    extras = getattr(hint, "__metadata__", ())
    unit = next((extra for extra in extras if isinstance(extra, Unit)), None)
    plain = get_args(hint)[0] if extras else hint
    inner = get_args(plain)[0] if get_origin(plain) is tuple else plain
    choices = tuple(map(str, get_args(inner))) if get_origin(inner) is Literal else ()
    several, positional = get_origin(plain) is tuple, any("Positional" in repr(extra) for extra in extras)
    word = unit.given if unit else _GIVEN.get(get_origin(inner) or inner, "TEXT")
    given = " | ".join(filter(None, choices)) or word
    given = f"[{given} ...]" if Ellipsis in get_args(plain) else given
    return Option(
        name,
        section,
        "" if inner is bool else given,
        _expected(inner, choices, unit, several),
        re.sub(r"`(\w+)`", lambda m: f"--{m[1].replace('_', '-')}" if m[1] in names else m[0], says),
        _shown(value, unit),
        choices,
        positional,
    )


_GIVEN = {int: "N", float: "X", dict: "JSON"}


def _expected(inner: Any, choices: tuple[str, ...], unit: Unit | None, several: bool) -> str:
    if choices:
        return f"{'some' if several else 'one'} of {', '.join(filter(None, choices))}"
    kind = {int: "whole number", float: "number"}.get(inner)
    of = f" ({unit.many})" if unit and unit.many else ""
    if kind:
        return f"{f'{kind}s' if several else f'a {kind}'}{of}"
    if inner is bool:
        return SWITCH
    return "a JSON object" if get_origin(inner) is dict else f"{'texts' if several else 'a text'}{of}"


def _shown(value: Any, unit: Unit | None) -> str:
    """A default with its unit."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is dataclasses.MISSING or value in ("", (), {}):
        return "empty"
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple):
        of = f" {unit.many}" if unit and unit.many else ""
        return " ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value) + of
    return unit.of(value) if unit and isinstance(value, (int, float)) else str(value)


def _first_paragraph(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """The text behind each field of a class, as one line."""
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(found, ast.ClassDef)
    texts = {}
    for field, after in zip(found.body, found.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            value = after.value if isinstance(after, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) else ""
            texts[field.target.id] = " ".join(str(text).split())
    return texts
