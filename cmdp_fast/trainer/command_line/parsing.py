"""Settings out of the words of a command line, by tyro; help and errors are ours."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TypeVar

import tyro

from cmdp_fast.errors import InputError, readable
from cmdp_fast.nearest import did_you_mean, nearest
from cmdp_fast.terminal import columns, show

from ..settings.config import TrainConfig
from .options import SWITCH, Option, Section, Settings, read_sections, sections_of
from .screens import ALL, Screen
from .trl_names import option_here

Kind = TypeVar("Kind", bound=Settings)


class FirstLook(argparse.ArgumentParser):
    """Reads a few options before all others are known. Its errors are InputErrors."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises InputError: argparse would print, and exit."""
        if of_switch := re.match(r"argument (--[\w-]+)/\S+: ignored explicit argument '(.*)'$", message, re.DOTALL):
            raise InputError(f"{of_switch[1]} {readable(of_switch[2])}: expected {SWITCH}")
        raise InputError(message.removeprefix("argument "))


def settings_of(
    kind: type[Kind], args: Sequence[str], prog: str, description: str, default: Kind | None = None
) -> Kind:
    """The settings that the words ask for, over those of ``default`` or of the fields.

    Prints help and exits with code 0 where that is asked for. Raises InputError for an option that does not exist and
    for a value that is none of its option's.
    """
    topic = _help_topic(args)
    if topic is not None:
        show("\n".join(Screen(prog, description, kind, default, columns(sys.stdout)).lines(topic)), sys.stdout)
        raise SystemExit(0)
    given: dict[str, Any] = {"prog": prog, "args": list(args), "return_unknown_args": True}
    if default is not None:
        given["default"] = default
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            settings, unknown = tyro.cli(kind, **given)
    except SystemExit as ending:
        if not ending.code:  # it was asked for a shell's completions
            show(said.getvalue().rstrip("\n"), sys.stdout)
            raise
        options = [o for section in sections_of(kind, default, prog) for o in section.options]
        raise InputError(_refused(said.getvalue(), options, args)) from None
    if unknown:
        raise InputError(_unknown(unknown, kind, prog))
    return settings


def check_no_other(kind: type[Settings], args: Sequence[str], prog: str, meant: Mapping[str, str]) -> None:
    """Raises InputError, which names all of them, for options on the command line that the class has for recipes alone;
    ``meant``: what to give in their place."""
    read = _names(read_sections(kind, None, prog))
    every = {*_names(sections_of(kind, None, prog))} - {*read}
    words = (word.partition("=")[0].replace("_", "-").removeprefix("--") for word in args if word.startswith("--"))
    given = list(dict.fromkeys(each for word in words for each in (word, word.removeprefix("no-")) if each in every))
    if not given:
        return
    flags = [f"--{name}" for name in given]
    listed = " and ".join(filter(None, [", ".join(flags[:-1]), flags[-1]]))
    text = f"{listed} {'is' if len(given) == 1 else 'are'} for cmdp-fast train"
    hints = list(dict.fromkeys(meant[name] for name in given if name in meant))
    raise InputError(
        f"{text}{f': did you mean {hints[0]}?' if len(hints) == 1 else f', and nothing that {prog} reads'}"
    )


def _names(sections: Sequence[Section]) -> list[str]:
    """What is typed behind two hyphens."""
    return [o.flag.removeprefix("--") for section in sections for o in section.options if o.flag]


def _help_topic(args: Sequence[str]) -> str | None:
    """What help is asked of: "" for the first screen; None where it is not asked for."""
    for at, word in enumerate(args):
        if word in ("-h", "--help"):
            following = args[at + 1] if at + 1 < len(args) else ""
            return following if re.fullmatch(r"(?:--)?\w[\w-]*", following) else ""
        if word.startswith("--help="):
            return word.partition("=")[2]
        if word.replace("_", "-") == "--help-all":
            return ALL
    return None


def _unknown(words: Sequence[str], kind: type[Settings], prog: str) -> str:
    """Why the first of the words is no option, and what was probably meant, of what the command reads."""
    word, *rest = words
    name, _, value = re.sub(r"^-+", "", word).partition("=")
    if word.startswith("--") and name.replace("_", "-") in _names(read_sections(kind, None, prog)):
        return f"{readable(word)}: it stands behind a --, which ends the options: leave the -- out"
    what = "there is no such option" if word.startswith("-") else "expected an option, which begins with --"
    value = value or (rest[0] if rest and not rest[0].startswith("--") else "...")
    hint = _hint(name.lower().replace("_", "-"), readable(value), kind) or f" ({prog} --help-all lists all)"
    return f"{readable(word)}: {what}{hint}"


def _hint(name: str, value: str, kind: type[Settings]) -> str:
    read, trainings = _names(read_sections(kind, None, "")), _names(sections_of(TrainConfig, None, ""))
    here = option_here(name, [f"--{each}" for each in read])
    if here.text:
        return f", what TRL calls so is here {here.text}" if here.trl else f", did you mean {here.text}?"
    of_command = [*read, "help", "help-all"]
    meant = [flag.removeprefix("--") for flag in here.flags] or nearest(name, [*of_command, *trainings])
    if not here.flags and (suggested := [each for each in meant if each in of_command]):
        return f", did you mean {' or '.join(f'--{each}' for each in suggested)}?"
    method = getattr(kind, "METHODS_SET", "")  # in a comparison
    if meant and method and meant[0].replace("-", "_") not in getattr(kind, "CHOSEN", ()):
        return f", did you mean {method.format(meant[0].replace('-', '_'), value)}?"
    if not meant or method:
        return did_you_mean(name, of_command, "--")
    return f" (--{meant[0]} is for cmdp-fast train)"


def _refused(said: str, options: Sequence[Option], args: Sequence[str]) -> str:
    """Why tyro has refused a value, in one line: the option, what was given and what is expected."""
    text = re.split(r"─{8,}", re.sub(r"╭[^\n]*╮", "", said))[0]
    text = " ".join(re.sub(r"[│╭╮╰╯]", " ", text).split())
    by_flag = {o.flag: o for o in options if o.flag}
    flag = next((word for word in re.findall(r"--[\w-]+", text) if word in by_flag), "")
    if not flag:
        return readable(text) or "the command line cannot be read"
    option, given = by_flag[flag], _given(flag, args)
    hint = did_you_mean(given, [c for c in option.choices if c]) if given else ""
    return f"{flag} {readable(given)}".rstrip() + f": expected {option.expected}{hint}"


def _given(flag: str, args: Sequence[str]) -> str:
    """The words behind the last mention of an option."""
    found = ""
    for at, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            end = next((i for i in range(at + 1, len(args)) if args[i].startswith("--")), len(args))
            found = value if equals else " ".join(args[at + 1 : end])
    return found
