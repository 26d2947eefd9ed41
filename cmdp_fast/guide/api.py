"""The sources of the API reference: a page for each public module, made of its docstrings by autodoc."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

MODULES = (  # each with the modules below it, but for those that an `__all__` hides
    "cmdp_fast",
    "cmdp_fast.heads",
    "cmdp_fast.objective",
    "cmdp_fast.advantage",
    "cmdp_fast.sampler_correction",
    "cmdp_fast.credit",
    "cmdp_fast.metrics",
    "cmdp_fast.reward_functions",
    "cmdp_fast.batches",
    "cmdp_fast.pid",
    "cmdp_fast.reference",
    "cmdp_fast.topk_bounds",
    "cmdp_fast.integrations",
    "cmdp_fast.teachers",
    "cmdp_fast.trainer.settings",
    "cmdp_fast.trainer.methods",
    "cmdp_fast.trainer.tasks.rewards",
    "cmdp_fast.trainer.tasks.judge",
    "cmdp_fast.trainer.tasks.step_verifiers",
    "cmdp_fast.trainer.user_rollout",
    "cmdp_fast.judging",
)
# How the settings are checked and shown, of which the pages of the settings say what comes of it.
UNLISTED = ("cmdp_fast.trainer.settings.ranges", "cmdp_fast.trainer.settings.units")
OPTIONAL = "cmdp_fast.integrations."  # below it each module needs a package of its own


def write(folder: Path) -> dict[str, str]:
    """Writes a source for each module into a folder; returns the modules that are left out, and why."""
    left_out: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for root in MODULES:
        for name in importable(root, left_out):
            title = f"{name}\n{'=' * len(name)}"
            (folder / f"{name}.rst").write_text(f"{title}\n\n.. automodule:: {name}\n", encoding="utf-8")
    pages = sorted(path.stem for path in folder.glob("*.rst"))
    first = [name for name in MODULES if name in pages]
    lines = [
        "API",
        "===",
        "",
        "Made of the docstrings. Names of the package are those of ``import cmdp_fast as cf``.",
        "",
    ]
    for caption, names in (("Public modules", first), ("Modules below them", [p for p in pages if p not in first])):
        lines += [
            caption,
            "-" * len(caption),
            "",
            ".. toctree::",
            "   :maxdepth: 1",
            "",
            *(f"   {n}" for n in names),
            "",
        ]
    lines += [left_out_line(name, reason) for name, reason in left_out.items()]
    (folder / "index.rst").write_text("\n".join(lines), encoding="utf-8")
    return left_out


def left_out_line(name: str, reason: str) -> str:
    """What the site says of a module that is left out. The error's own text has paths of the machine that builds."""
    said = re.match(r"\S+ is not installed|\S+ \S+ is installed, which was not tested", reason)
    package = name.removeprefix(OPTIONAL).partition(".")[0]
    return f"Left out: ``{name}`` ({said[0] if said else 'a package is missing'}: ``pip install '.[{package}]'``).\n"


def importable(root: str, left_out: dict[str, str]) -> Iterator[str]:
    """Imports a module and all modules below it that no `__all__` hides, and yields their names."""
    try:
        module = importlib.import_module(root)
        public = getattr(module, "__all__", None)
        for name in public or ():
            # Some names are imported at their first use. autodoc finds only those that the module has already.
            setattr(module, name, getattr(module, name))
    except ImportError as error:
        if not root.startswith(OPTIONAL):
            raise
        left_out[root] = str(error)
        return
    yield root
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        name = f"{root}.{info.name}"
        if info.name != "__main__" and name not in UNLISTED and (public is None or info.name in public):
            yield from importable(name, left_out)


@contextlib.contextmanager
def plain_types() -> Iterator[None]:
    """While it lasts, the fields of the modules' classes have their types alone: a float, not `Annotated[float, NATS]`.

    Sphinx shows all that stands in such a pair of brackets, and no setting of it leaves that out.
    """
    changed = {kind: kind.__annotations__ for kind in _annotated()}
    for kind, given in changed.items():
        types = typing.get_type_hints(kind)
        kind.__annotations__ = {name: types[name] for name in given}
    try:
        yield
    finally:
        for kind, given in changed.items():
            kind.__annotations__ = given


def _annotated() -> list[type]:
    modules = [module for name, module in sys.modules.items() if name.startswith(MODULES)]
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    return [kind for kind in kinds if "Annotated[" in str(vars(kind).get("__annotations__"))]
