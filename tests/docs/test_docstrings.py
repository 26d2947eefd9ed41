"""The docstrings of the library: each public name has one, and it says what it promises."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typing_extensions import Unpack

import cmdp_fast as cf

ROOT = Path(__file__).parents[2]
LIBRARY = ("cmdp_fast", "cmdp_fast.heads", "cmdp_fast.objective", "cmdp_fast.pid", "cmdp_fast.reference")
SHAPE = re.compile(r"\[(\.\.\.|(B|N|T|V|H|rows)\b)[^\]]*\]|\b([Ss]haped like|scalar)\b|[Aa]rguments and returns as")


class Documented(NamedTuple):
    """A module, a public function or class of it, or a member of such a class."""

    module: str  # the page that it is on
    name: str  # in that module; empty: the module itself
    obj: Any

    @property
    def docstring(self) -> str:
        return inspect.getdoc(self.obj) or ""


def documented() -> Iterator[Documented]:
    for page in LIBRARY:
        module = importlib.import_module(page)
        yield Documented(page, "", module)
        for name in getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]):
            obj = getattr(module, name)
            if not (inspect.isfunction(obj) or inspect.isclass(obj)):
                continue
            if page != "cmdp_fast" and obj.__module__ != page:
                continue
            yield Documented(page, name, obj)
            yield from (Documented(page, f"{name}.{of.__name__}", of) for of in members(obj))


def members(holder: object) -> Iterator[Any]:
    """The public methods, classmethods and properties that a class has of its own."""
    if not inspect.isclass(holder):
        return
    for name, member in vars(holder).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property) and member.fget is not None:
            yield member.fget
        elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
            yield getattr(member, "__func__", member)


DOCUMENTED = {".".join(filter(None, (doc.module, doc.name))): doc for doc in documented()}


def is_tensor(annotation: object) -> bool:
    return annotation is torch.Tensor or torch.Tensor in typing.get_args(annotation)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring(name):
    """It is there, and names the shapes of tensors and every argument."""
    doc = DOCUMENTED[name]
    text = doc.docstring
    assert text and not text.startswith("Alias for field number"), "no docstring"
    assert not re.search(r"^={3,} ={3,}", text, re.MULTILINE), "a table that Markdown does not know"
    if inspect.isfunction(doc.obj):
        hints = typing.get_type_hints(doc.obj)
        if any(map(is_tensor, hints.values())):
            assert SHAPE.search(text) or name.startswith("cmdp_fast.reference."), "tensors without a shape"
        if "Args:" in text:
            arguments = text.partition("Args:")[2].partition("\n\n")[0]
            for parameter in parameters(hints):
                as_elsewhere = "Everything else:" in arguments
                assert as_elsewhere or re.search(rf"\b{parameter}\b", arguments), f"nothing about {parameter}"


def parameters(hints: dict[str, object]) -> set[str]:
    """The names of a function's arguments; those of `**settings: Unpack[Settings]` are the keys of Settings."""
    names = set()
    for name, hint in hints.items():
        names |= set(typing.get_args(hint)[0].__annotations__) if typing.get_origin(hint) is Unpack else {name}
    return names - {"return"}


def resolves(reference: str, doc: Documented) -> bool:
    """Whether a name in backticks is one of this object, of its module, of the package, or of torch."""
    module = importlib.import_module(doc.module)
    origin = inspect.getmodule(doc.obj) or module
    starts = [getattr(module, doc.name.partition(".")[0] or "__doc__", module), module, origin, cf]
    for start in starts:
        try:
            for part in reference.split("."):
                start = getattr(start, part)
        except AttributeError:
            continue
        return True
    root, _, rest = reference.partition(".")
    if root not in ("cmdp_fast", "cf", "torch") or not rest:
        return False
    try:
        importlib.import_module(reference)
    except ImportError:
        holder, _, last = reference.replace("cf.", "cmdp_fast.", 1).rpartition(".")
        return hasattr(importlib.import_module(holder), last)
    return True


@pytest.mark.parametrize("name", DOCUMENTED)
def test_references_are_of_something(name):
    """A single backtick is a reference (two are literals): to an object, or to a file of the repository."""
    doc = DOCUMENTED[name]
    text = re.sub(r"``.*?``|^    .*$", "", doc.docstring, flags=re.MULTILINE | re.DOTALL)
    for reference in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[A-Za-z_][\w.]*", reference) and not reference.endswith((".py", ".h")):
            assert resolves(reference, doc), reference
    for file in re.findall(r"\b(?:csrc|cmdp_fast|benchmarks|tests)/[\w/.]*\w", doc.docstring):
        assert (ROOT / file).exists(), file
