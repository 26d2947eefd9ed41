"""The modules that a kernel of the Hub needs, found by their imports, as files with relative imports.

A loaded kernel has a name that its loader chooses, so no file of it may say `cmdp_fast`. What is followed is every
import statement, those inside functions and under TYPE_CHECKING too. Lines keep their numbers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
NAME = PACKAGE.name
FACE = f"{NAME}.hub_kernel.face"  # whose copy is the kernel's own `__init__.py`

# Compiled modules, and the one that is nothing without its own: an import of them fails, which their importers expect.
LEFT_OUT = {f"{NAME}.{name}" for name in ("_C", "_cuda", "cuda")}

# What stands in a kernel in the place of a file of ours.
INSTEAD = {
    f"{NAME}.native_module": '''\
"""In the place of the file that finds cmdp_fast's compiled module: a kernel of the Hub holds Python alone."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
OTHER_SOURCES = "never: there is nothing that could be built from other sources"


def load() -> tuple[None, str, None]:
    return None, "this kernel of the Hub holds none", None
''',
    f"{NAME}.ops.namespace": '''\
"""The namespace of torch that this kernel's operators are registered in: its own, so that no other has it."""

from .._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
''',
}


def kernel_files() -> dict[str, str]:
    """Every file of the kernel by its path in it, but ``_ops.py``, which says the namespace and is each build's own."""
    files, waiting = dict[str, str](), [FACE]
    while waiting:
        module = waiting.pop()
        path = _place(module)
        if path in files:
            continue
        text = _source(module)
        files[path] = with_relative_imports(text, _inside(module))
        for target in imported(text):
            waiting += [package for package in _packages(target) if package != NAME] + [target]
    return dict(sorted(files.items()))


def imported(text: str) -> Iterator[str]:
    """The modules of ours that a file imports; those that a kernel has not are left out."""
    for node in ast.walk(ast.parse(text)):
        for module, name in _imports_of(node):
            if module in LEFT_OUT or f"{module}.{name}" in LEFT_OUT:
                continue
            submodule = name and _path(f"{module}.{name}").is_file()
            if module == NAME and not submodule:
                raise ValueError(f"line {node.lineno}: `from {NAME} import {name}` needs the whole package")  # type: ignore[attr-defined]
            yield f"{module}.{name}" if submodule else module


def _imports_of(node: ast.AST) -> list[tuple[str, str]]:
    """What an import statement imports of ours: the module, and the name in it or ""."""
    if isinstance(node, ast.Import):
        return [(alias.name, "") for alias in node.names if _is_ours(alias.name)]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and _is_ours(node.module):
        return [(node.module, alias.name) for alias in node.names]
    return []


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == NAME


def with_relative_imports(text: str, inside: str) -> str:
    """A file's text with relative imports in the place of absolute ones of ours. ``inside``: the package that it is in,
    without our name, such as "ops"; "" at the top.

    Raises ValueError for `import` without `as` of ours, which binds a name that a relative import cannot.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not _imports_of(node):
            continue
        assert isinstance(node, (ast.Import, ast.ImportFrom))
        line = lines[node.lineno - 1].encode()  # columns are counted in bytes
        before, statement = line[: node.col_offset].decode(), line[node.col_offset :].decode()
        if isinstance(node, ast.Import):
            if len(node.names) != 1 or node.names[0].asname is None:
                raise ValueError(f"line {node.lineno}: write `from {NAME} import ...`, not `{ast.unparse(node)}`")
            above, _, last = node.names[0].name.rpartition(".")
            old, new = rf"import\s+{re.escape(node.names[0].name)}\b", f"from {relative(above, inside)} import {last}"
        else:
            old, new = rf"from\s+{re.escape(node.module or '')}\b", f"from {relative(node.module or '', inside)}"
        changed, count = re.subn(rf"\A{old}", new, statement)
        if count != 1:
            raise ValueError(f"line {node.lineno}: an import in a form that is not known: {statement.strip()}")
        lines[node.lineno - 1] = before + changed
    return "".join(lines)


def relative(module: str, inside: str) -> str:
    """How a file of the package ``inside`` names a module of ours: ``..layout`` for cmdp_fast.layout in "ops"."""
    target, here = module.split(".")[1:], [part for part in inside.split(".") if part]
    common = 0
    while common < min(len(target), len(here)) and target[common] == here[common]:
        common += 1
    return "." * (len(here) - common + 1) + ".".join(target[common:])


def _source(module: str) -> str:
    return INSTEAD.get(module) or _path(module).read_text(encoding="utf-8")


def _path(module: str) -> Path:
    """The file of a module of ours, which need not be there."""
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _place(module: str) -> str:
    """Where its copy lies in the kernel."""
    return "__init__.py" if module == FACE else _path(module).relative_to(PACKAGE).as_posix()


def _packages(module: str) -> list[str]:
    """The packages above a module: their files run before its own does."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _inside(module: str) -> str:
    """The package that a module's copy is in, without our name."""
    return ".".join(_place(module).removesuffix(".py").split("/")[:-1])
