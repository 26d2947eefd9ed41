"""The API reference: HTML pages made from the docstrings by pdoc (extra `docs`).

    python -m cmdp_fast.apidoc build/api

The page of the package documents `import cmdp_fast as cf`. The other pages are those of `MODULES`. A module of
`cmdp_fast.integrations` is left out where the package that it needs is not installed, and a line says so. pdoc's
warnings are errors. MathJax, which the pages load from the network, sets the formulas in the browser.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pkgutil
import re
import sys
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from cmdp_fast import installation

if typing.TYPE_CHECKING:
    import pdoc

MODULES = (
    "cmdp_fast",
    "cmdp_fast.heads",
    "cmdp_fast.objective",
    "cmdp_fast.advantage",
    "cmdp_fast.credit",
    "cmdp_fast.metrics",
    "cmdp_fast.reward_functions",
    "cmdp_fast.batches",
    "cmdp_fast.pid",
    "cmdp_fast.reference",
    "cmdp_fast.topk_bounds",
    "cmdp_fast.integrations",
    "cmdp_fast.trainer",
    "cmdp_fast.judging",
)
OPTIONAL = "cmdp_fast.integrations."


def build(folder: Path) -> dict[str, str]:
    """Writes the pages into a folder; returns the modules that are left out, and why."""
    import pdoc
    import pdoc.render

    left_out: dict[str, str] = {}
    # Imported before pdoc imports them: other packages may warn as they are imported, and ours is not to blame.
    names = [name for root in MODULES for name in _importable(root, left_out)]
    pdoc.render.configure(docformat="google", math=True, show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in left_out:
            warnings.filterwarnings("ignore", f"Couldn't import {re.escape(name)}:")
        modules = {name: pdoc.doc.Module.from_name(name) for name in names}
        for name, module in modules.items():
            _resolve_constructors(module)
            text = _without_dead_links(pdoc.render.html_module(module, modules))
            _write(folder / f"{name.replace('.', '/')}.html", text)
        _write(folder / "index.html", pdoc.render.html_index(modules))
        _write(folder / "search.js", pdoc.render.search_index(modules))
    return left_out


def _resolve_constructors(module: pdoc.doc.Module) -> None:
    """Gives the constructors of NamedTuples and dataclasses their types, which pdoc looks for in one module only.

    Annotations are names. Those of an inherited field belong to the module of the base class.
    """
    for found in module.classes:
        named_tuple = hasattr(found.obj, "_fields")
        if named_tuple or dataclasses.is_dataclass(found.obj):
            made = getattr(found.obj, "__new__" if named_tuple else "__init__")
            hints = typing.get_type_hints(found.obj, include_extras=True)
            made.__annotations__ = {name: hints.get(name, old) for name, old in made.__annotations__.items()}


def _importable(root: str, left_out: dict[str, str]) -> Iterator[str]:
    """Imports a module and all modules below it that no `__all__` hides, and yields their names."""
    try:
        module = importlib.import_module(root)
        public = getattr(module, "__all__", None)
        for name in public or ():
            # Some names are imported at their first use. pdoc finds only those that the module has already.
            setattr(module, name, getattr(module, name))
    except ImportError as error:
        if not root.startswith(OPTIONAL):
            raise
        left_out[root] = str(error)
        return
    yield root
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if info.name != "__main__" and (public is None or info.name in public):
            yield from _importable(f"{root}.{info.name}", left_out)


def _without_dead_links(html: str) -> str:
    """A page without dead links: pdoc links to inherited members, which it does not show."""
    ids = set(re.findall(r'id="([^"]+)"', html))
    return re.sub(r'<a href="#([\w.]+)">(.*?)</a>', lambda link: link[0] if link[1] in ids else link[2], html)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cmdp_fast.apidoc", description="The API reference as HTML.")
    parser.add_argument("folder", type=Path, help="where to write the pages")
    folder = parser.parse_args(arguments).folder
    if importlib.util.find_spec("pdoc") is None:
        print(f"cmdp_fast.apidoc: error: needs pdoc: {installation.extra('train,docs')}", file=sys.stderr)
        return 2
    for name, reason in build(folder).items():
        print(f"left out: {name}: {reason}")
    print(folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
