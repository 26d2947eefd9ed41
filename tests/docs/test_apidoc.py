"""The API reference: it builds without a warning, has every public name, and its docstrings say what they promise."""

import importlib
import inspect
import re
import typing
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typing_extensions import Unpack

pdoc = pytest.importorskip("pdoc")

import cmdp_fast as cf  # noqa: E402
from cmdp_fast import apidoc  # noqa: E402

ROOT = Path(__file__).parents[2]
LIBRARY = ("cmdp_fast", "cmdp_fast.heads", "cmdp_fast.objective", "cmdp_fast.pid", "cmdp_fast.reference")
SHAPE = re.compile(r"\[(\.\.\.|(B|N|T|V|H|rows)\b)[^\]]*\]|\b([Ss]haped like|scalar)\b|[Aa]rguments and returns as")


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pages, built where a warning is an error."""
    folder = tmp_path_factory.mktemp("api")
    left_out = apidoc.build(folder)
    assert all(name.startswith(apidoc.OPTIONAL) for name in left_out)
    return folder


@pytest.fixture(scope="module")
def pages(folder):
    return {path: Page(path) for path in folder.rglob("*.html")}


def documented():
    """Public functions, classes and methods of the library by the name of their page and themselves."""
    for name in LIBRARY:
        module = pdoc.doc.Module.from_name(name)
        yield module
        for member in module.members.values():
            if member.name.startswith("_") or (name != "cmdp_fast" and member.taken_from[0] != name):
                continue
            yield member
            if isinstance(member, pdoc.doc.Class):
                yield from (
                    m
                    for m in member.members.values()
                    if m.taken_from[0].startswith("cmdp_fast") and not m.name.startswith("_")
                )


DOCUMENTED = {doc.fullname: doc for doc in documented()}


def test_every_public_name_is_there(folder, pages):
    assert set(cf.__all__) <= pages[folder / "cmdp_fast.html"].ids
    assert {"ppo_loss", "direct_coefficient"} <= pages[folder / "cmdp_fast" / "objective.html"].ids
    assert {"grpo", "rloo", "gae"} <= pages[folder / "cmdp_fast" / "advantage.html"].ids
    assert (folder / "cmdp_fast" / "trainer" / "methods" / "ppo.html").exists() and (folder / "search.js").exists()
    assert "MathJax" in (folder / "cmdp_fast.html").read_text(encoding="utf-8")


def test_no_link_is_broken(pages):
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            file = (path.parent / target).resolve() if target else path
            assert file in pages, f"{path.name}: {link}"
            assert not anchor or anchor in pages[file].ids, f"{path.name}: {link}"


def is_tensor(annotation: object) -> bool:
    return annotation is torch.Tensor or torch.Tensor in typing.get_args(annotation)


@pytest.mark.parametrize("name", [name for name, doc in DOCUMENTED.items() if not isinstance(doc, pdoc.doc.Variable)])
def test_docstring(name):
    """It is there, names the shapes of tensors, and its lists are lists."""
    doc = DOCUMENTED[name]
    text = doc.docstring
    assert text, "no docstring"
    assert not re.search(r"^={3,} ={3,}", text, re.MULTILINE), "a table that Markdown does not know"
    for line in pdoc.docstrings.convert(text, "google", None).splitlines():
        assert not re.match(r" - (?!\*\*)", line), f"a line that wraps needs a deeper indentation: {line}"
    if isinstance(doc, pdoc.doc.Function):
        hints = typing.get_type_hints(inspect.unwrap(doc.obj))
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


def resolves(reference: str, doc: object) -> bool:
    """Whether a name in backticks is one of this object, of its module, of the package, or of torch."""
    module = importlib.import_module(doc.modulename)
    origin = importlib.import_module(doc.taken_from[0])
    starts = [getattr(module, doc.qualname.partition(".")[0], module), origin, module, cf]
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
