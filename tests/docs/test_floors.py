"""The order of the modules and the top level of the repository: the lists of .github/CONTRIBUTING.md hold.

Read are the imports of every module, those inside functions and under TYPE_CHECKING too, and `import_module` of a
literal. An import of a module runs the packages above it as well; Python does that, the importing module does not name
them, and they do not count. A process of its own (`cmdp_fast.children`) imports nothing into this one.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / ".github" / "CONTRIBUTING.md"
PACKAGE = ROOT / "cmdp_fast"

Floors = dict[str, int]  # an entry of the list, "trainer/" or "cli.py" -> its floor, 0 at the top
Imports = dict[str, set[str]]  # a module's path in the package -> those of the modules that it imports


def block(name: str, text: str) -> list[list[str]]:
    """The words of a fenced block by line, without comments."""
    found = re.search(rf"^```{name}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no block ```{name}"
    lines = [line.partition("#")[0].split() for line in found[1].splitlines()]
    return [line for line in lines if line]


def read_floors(text: str) -> Floors:
    return {entry: floor for floor, line in enumerate(block("floors", text)) for entry in line}


def entry_of(module: str, floors: Floors) -> str | None:
    """The entry that a module belongs to: the longest that is its path or a folder above it."""
    fitting = [e for e in floors if module == e or (e.endswith("/") and module.startswith(e))]
    return max(fitting, key=len, default=None)


def read_imports(package: Path) -> Imports:
    """What each module imports of its own package. A stub stands for the compiled module that it describes."""
    paths = {_name(path, package): path for pattern in ("*.py", "*.pyi") for path in sorted(package.rglob(pattern))}
    places = {name: path.relative_to(package).as_posix() for name, path in paths.items()}
    return {places[name]: {places[target] for target in _targets(name, paths)} for name in paths}


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _targets(name: str, paths: dict[str, Path]) -> Iterator[str]:
    """The names of the modules of `paths` that one of them imports."""
    parents = name.split(".") if paths[name].stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(paths[name].read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=aliases):
                found = [alias.name for alias in aliases]
            case ast.ImportFrom(module=module, names=aliases, level=level):
                above = parents[: len(parents) - level + 1] if level else []
                base = ".".join([*above, *filter(None, [module])])
                # a name is that of a submodule, or of something in the module
                found = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in paths else base for alias in aliases]
            case ast.Call(func=func, args=[ast.Constant(value=str(module)), *_]):
                found = [module] if ast.unparse(func).rpartition(".")[2] == "import_module" else []
            case _:
                found = []
        yield from (module for module in found if module in paths)


def off_the_list(imports: Imports, floors: Floors) -> list[str]:
    """Modules that stand on no floor, and entries without a module."""
    entries = {module: entry_of(module, floors) for module in imports}
    homeless = [f"{module} stands on no floor" for module, entry in entries.items() if entry is None]
    return homeless + [f"no module is at {entry}" for entry in floors if entry not in entries.values()]


def upward(imports: Imports, floors: Floors) -> list[str]:
    """Imports that do not lead to a lower floor; the modules of one folder of the list may import each other."""
    found = []
    for module, target in ((module, target) for module, targets in imports.items() for target in sorted(targets)):
        here, there = entry_of(module, floors), entry_of(target, floors)
        if here is not None and there is not None and here != there and floors[there] <= floors[here]:
            place = "above" if floors[there] < floors[here] else "beside"
            found.append(f"{module} imports {target}, which stands {place} it")
    return found


def cycles(imports: Imports) -> list[str]:
    """The ways on which a module imports itself. Each is cut where it was found, and the next one is sought."""
    left, found = {module: set(targets) for module, targets in imports.items()}, list[str]()
    while True:
        try:
            graphlib.TopologicalSorter(left).prepare()
            return found
        except graphlib.CycleError as error:
            way = error.args[1][::-1]  # graphlib begins at an imported module
            found.append(" imports ".join(way))
            left[way[0]].remove(way[1])


def strangers(tracked: list[str], allowed: set[str]) -> list[str]:
    """Top-level entries of the repository, folders with a slash, that are not on the list."""
    found = {head + slash for head, slash, _ in (path.partition("/") for path in tracked)}
    return sorted(found - allowed)


# --------------------------------------------------------------------------------------------------------- the package


@pytest.fixture(scope="module")
def floors() -> Floors:
    return read_floors(GUIDE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def imports() -> Imports:
    return read_imports(PACKAGE)


def test_every_module_stands_on_a_floor(imports: Imports, floors: Floors) -> None:
    assert not off_the_list(imports, floors)


def test_imports_lead_downwards(imports: Imports, floors: Floors) -> None:
    assert not upward(imports, floors)


def test_the_trainers_imports_lead_downwards(imports: Imports) -> None:
    """Between the floors that the trainer's README lists."""
    floors = read_floors((PACKAGE / "trainer" / "README.md").read_text(encoding="utf-8"))
    inside = {
        module.removeprefix("trainer/"): {t.removeprefix("trainer/") for t in targets if t.startswith("trainer/")}
        for module, targets in imports.items()
        if module.startswith("trainer/")
    }
    assert not off_the_list(inside, floors)
    assert not upward(inside, floors)


def test_no_integration_needs_the_trainer_of_the_command_line(imports: Imports) -> None:
    """It stands below them, so that an import would lead downwards; what they share with it stands below both."""
    wrong = [(module, t) for module, targets in imports.items() for t in targets if t.startswith("trainer/")]
    assert not [pair for pair in wrong if pair[0].startswith("integrations/")]


def test_no_cycle(imports: Imports) -> None:
    assert not cycles(imports)


def test_reference_stands_alone(imports: Imports) -> None:
    """The float64 truth that all is tested against shares no code with what is tested."""
    assert not imports["reference.py"]


def test_the_top_level_has_nothing_else() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: there is no list of the repository's files")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    allowed = {name for line in block("top-level", GUIDE.read_text(encoding="utf-8")) for name in line}
    assert not strangers(listed.rstrip("\0").split("\0"), allowed)


# ------------------------------------------------------------------------------------------------------ the test itself

LIST = """
```floors
cli.py           # the command
trainer/ bench/
__init__.py
ops/
_C.pyi reference.py
```
"""
SOUND = {
    "cli.py": "def main():\n    from .trainer.run import run\n",
    "trainer/__init__.py": "",
    "trainer/run.py": "import pack as p\nfrom pack.trainer import step\n",
    "trainer/step.py": "from .. import ops\n",
    "bench/__init__.py": "",
    "__init__.py": "from pack.ops.stats import stats\n",
    "ops/__init__.py": "",
    "ops/stats.py": "import torch\nfrom pack import _C, reference\n",
    "_C.pyi": "",
    "reference.py": "import pathlib\n",
}


def written(folder: Path, **changes: str) -> Imports:
    """The imports of a package of the files of SOUND and some others; `_` in a name is a folder."""
    for name, text in {**SOUND, **{f"{name.replace('_', '/')}.py": text for name, text in changes.items()}}.items():
        (folder / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pack" / name).write_text(text)
    return read_imports(folder / "pack")


def test_a_sound_package_is_passed(tmp_path: Path) -> None:
    imports, floors = written(tmp_path), read_floors(LIST)
    assert imports["ops/stats.py"] == {"_C.pyi", "reference.py"} and imports["cli.py"] == {"trainer/run.py"}
    assert imports["trainer/run.py"] == {"__init__.py", "trainer/step.py"}
    assert imports["trainer/step.py"] == {"ops/__init__.py"}
    assert not off_the_list(imports, floors) and not upward(imports, floors) and not cycles(imports)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ops_stats": "import pack\n"}, "ops/stats.py imports __init__.py, which stands above it"),
        ({"ops_stats": "def f():\n    from ..trainer import run\n"}, "ops/stats.py imports trainer/run.py, "),
        ({"ops_stats": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pack.cli\n"}, "cli.py, which"),
        ({"ops_stats": "import importlib\nimportlib.import_module('pack.bench')\n"}, "imports bench/__init__.py"),
        ({"bench_time": "from pack.trainer.run import run\n"}, "trainer/run.py, which stands beside it"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, changes: dict[str, str], problem: str) -> None:
    (found,) = upward(written(tmp_path, **changes), read_floors(LIST))
    assert problem in found


def test_a_lazy_cycle_is_found(tmp_path: Path) -> None:
    imports = written(tmp_path, trainer_step="def f():\n    from . import run\n")
    (found,) = cycles(imports)
    assert found.split(" imports ")[1:] in (
        ["trainer/run.py", "trainer/step.py"],
        ["trainer/step.py", "trainer/run.py"],
    )


def test_what_is_off_the_list_is_found(tmp_path: Path) -> None:
    floors = read_floors(LIST) | {"kernels/": 3}
    assert off_the_list(written(tmp_path, extra=""), floors) == [
        "extra.py stands on no floor",
        "no module is at kernels/",
    ]


def test_a_stranger_at_the_top_is_found() -> None:
    assert strangers(["README.md", "tests/a.py", "tests/b.py", "notes.txt", "docs/a.md"], {"README.md", "tests/"}) == [
        "docs/",
        "notes.txt",
    ]
