"""A Sphinx extension: docstrings, Markdown with Google's sections, as the reStructuredText that autodoc reads.

What differs and is used: formulas between dollars, tables, code that is indented, and characters that are markup in
one of the two alone.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.ext import napoleon

LONGEST_SIGNATURE = 1500  # characters, of a class whose signature is shown
# What is markup in both: code, references, formulas, and emphasis of a word or two.
_LITERAL = re.compile(r"``.+?``|`[^`]+`|\$[^$\n]+\$|(?<![\w*])\*\w[\w ]*\*(?![\w*])|\*\*\w[\w ]*\.?\*\*", re.DOTALL)
_NAME = re.compile(r"^`[A-Za-z_][\w.]*`$")
_SECTIONS: Any = napoleon.Config(napoleon_numpy_docstring=False)
_FIELDS = ("attribute", "data")  # which have no sections: their words before a colon would be taken for a type
_PLACEHOLDER = re.compile(r"^Alias for field number \d+$")  # what Python says of a NamedTuple's field by itself


def converted(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    lines = [line for line in lines if not _PLACEHOLDER.match(line)]
    return [line for block in _blocks(lines) for line in _block(block)]


def _blocks(lines: list[str]) -> list[list[str]]:
    """Paragraphs, each with the empty lines behind it; a paragraph of code with the empty lines inside it."""
    blocks: list[list[str]] = []
    for line in lines:
        begun = blocks and (not line.strip() or blocks[-1][-1].strip())
        goes_on = begun or (blocks and _is_code(blocks[-1]) and line.startswith("    "))
        if goes_on:
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks


def _is_code(block: list[str]) -> bool:
    """Whether a paragraph is indented by itself. The lists of Google's sections follow their titles without a gap."""
    return block[0].startswith("    ")


def _block(block: list[str]) -> list[str]:
    if _is_code(block):
        return [".. code-block:: text", "", *block, ""]
    if block[0].startswith("|"):
        return _table([line for line in block if line.strip()])
    text = "\n".join(block)
    text = re.sub(r"^(\s*)\$\$(.+?)\$\$", r"\1.. math:: \2", text, flags=re.MULTILINE | re.DOTALL)
    if text.lstrip().startswith(".. math::"):
        return [" ".join(line.strip() for line in text.splitlines() if line.strip()), ""]
    return _prose(text).split("\n")


def _prose(text: str) -> str:
    parts, end = [], 0
    for found in _LITERAL.finditer(text):
        parts += [_escaped(text[end : found.start()]), _literal(found[0])]
        end = found.end()
    return "".join([*parts, _escaped(text[end:])])


def _literal(found: str) -> str:
    """Code stays code; what has single backticks is a reference where it is a name, and else code."""
    if found.startswith("$"):
        return f":math:`{found[1:-1]}`"
    if found.startswith(("``", "*")) or _NAME.match(found):
        return found
    return f"`{found}`"


def _escaped(text: str) -> str:
    text = re.sub(r"(?<!\*)\*(?!\*)", r"\\*", text)
    return re.sub(r"\|", r"\\|", re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", text))


def _table(rows: list[str]) -> list[str]:
    cells = [[_prose(cell.strip()) for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))] for row in rows]
    body = [row for row in cells if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in body:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return [*lines, ""]


def _process(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = converted(lines)
    if what not in _FIELDS:
        lines[:] = napoleon.GoogleDocstring(lines, _SECTIONS).lines()


def _signature(
    app: Any, what: str, name: str, obj: object, options: object, arguments: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    """Leaves off what a class of settings is made with: its fields stand below it, one by one."""
    shown = arguments or ""
    if what == "class" and (len(shown) > LONGEST_SIGNATURE or "Annotated[" in shown):
        return "", returned
    return None


def _exact(app: Any, doctree: nodes.document) -> None:
    """Takes a name for what it says: where Sphinx knows no such object, it would look for any that ends like it."""
    for node in doctree.findall(addnodes.pending_xref):
        node.attributes.pop("refspecific", None)


def setup(app: Any) -> dict[str, Any]:
    """Registers what is done to docstrings, signatures and references."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-read", _exact)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
