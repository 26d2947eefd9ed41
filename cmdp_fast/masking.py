"""Texts that others may read: what looks like a secret becomes `***`, and the home folder `~`.

A secret is known by its form, so that one of another form stays: this keeps what a person pastes without looking from
the worst, and is no proof that nothing is in a text. Hosts, addresses, paths elsewhere and names of users in them stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmdp_fast.errors import without_controls

_AGAIN = r"(?![a-z])(?![-_]?(?:file|ids?)(?![a-z]))"  # not `tokens`, `tokenizer`, `keyword`, `token_file`, `token_ids`
_KINDS = rf"(?:key|keys|(?<![-_]per[-_])token|secrets?|passwords?|passwd|passphrase|credentials?){_AGAIN}"
_NAMED = rf"[\w.-]*{_KINDS}[\w.-]{{0,40}}"  # bounds keep the time in proportion to the text
_NAME = rf"(?<![\w.-]){_NAMED}"
_IN_QUOTES = rf"""\\{{0,4}}["']{_NAME}\\{{0,4}}["']"""
_QUOTED = r"""(?P<quote>\\{0,4}["'])(?:\\[\s\S]|[^\\])*?(?P=quote)"""

_END = r"""(?=["']?:?(?:\s|$))"""  # a message goes on behind a colon, and may quote what it found

_OPTION = re.compile(rf"--?(?=\w){_NAMED}", re.IGNORECASE)
_RULES = (  # in this order
    (re.compile(r"(?<=://)[^/?#\s]*@"), "***@"),  # the user and the password of an address
    (
        re.compile(rf"(://[^\s?#\"']{{0,2000}}\?)[^\s#\"]+?(?:(?=[#\"])|{_END})"),
        r"\1***",
    ),  # its query, which may be its signature
    (re.compile(r"\b(?:sk-[\w-]{8,}|(?:hf|gh[oprsu])_[A-Za-z0-9]{10,}|github_pat_\w{10,}|AKIA[A-Z0-9]{16})"), "***"),
    (re.compile(r"\b(Bearer|Basic) +[\w.~+/=-]{8,}"), r"\1 ***"),
    # {"api_key": "..."}, NAME=..., and --name ... of a command in a text
    (re.compile(rf"(?P<name>{_IN_QUOTES}\s*:\s*)(?:{_QUOTED}|[^\s,}}\]]+)", re.IGNORECASE), r"\g<name>***"),
    (re.compile(rf"(?P<name>{_NAME}\s?=(?!=)\s?)(?:{_QUOTED}|\S+?{_END})", re.IGNORECASE), r"\g<name>***"),
    (
        re.compile(rf"(?P<name>(?<![\w.-])--?(?=\w){_NAMED}\s+)(?:{_QUOTED}|(?!-)\S+?{_END})", re.IGNORECASE),
        r"\g<name>***",
    ),
)


def home() -> Path | None:
    """The home folder; None where there is none, as for a user that a container has only the number of."""
    try:
        folder = Path.home()
    except RuntimeError:
        return None
    return folder if folder.is_absolute() else None


def without_secrets(text: str) -> str:
    """A text with `***` for values of names like key, token, secret, password or credential (`NAME=value`, JSON,
    `--name value`), for keys of the forms `sk-…`, `hf_…`, GitHub's and Amazon's, and for what follows `Bearer`; and
    for user, password and query of addresses."""
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return text


def told(text: str) -> str:
    """A text that others may have written parts of, for a console, which a log may keep: without secrets and without
    what a terminal obeys."""
    return without_secrets(without_controls(text))


def public(text: str) -> str:
    """The same, with `~` for the home folder, under the name that it has and under the one that it resolves to."""
    text = without_secrets(text)
    folder = home()
    names = {str(folder), str(folder.resolve())} if folder else set()
    for name in sorted(names - {"/"}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-]|\.\w)", "~", text)
    return text


def public_words(words: Sequence[str]) -> list[str]:
    """The words of a command: `public`, and the one behind an option like `--api-key` is `***`."""
    shown: list[str] = masked(list(words))
    return shown


def names_a_secret(option: str) -> bool:
    """Whether the value of such an option of a command is a secret."""
    return _OPTION.fullmatch(option) is not None


def masked(value: Any, mask: Callable[[str], str] = public) -> Any:
    """A value of JSON whose texts are masked. What is under a name like `api_key`, or in a list behind a word like
    `--api-key`, is `***`, whatever it is, but for what is empty, or true."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {name: "***" if _is_secret(f"--{name}", item) else masked(item, mask) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        behind = zip(("", *value), value, strict=False)
        return ["***" if _is_word_of(before, item) else masked(item, mask) for before, item in behind]
    return value


def _is_word_of(before: Any, word: Any) -> bool:
    """Whether a word is the secret of the option before it, and not another option."""
    return isinstance(before, str) and not str(word).startswith("--") and _is_secret(before, word)


def _is_secret(option: str, value: Any) -> bool:
    return bool(value) and not isinstance(value, bool) and names_a_secret(option)  # a setting like `budget_per_token`
