"""Functions of the user's own, named on the command line. Such a file is code: it is run, with all that this means."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

from cmdp_fast.errors import InputError, first_line
from cmdp_fast.nearest import did_you_mean
from cmdp_fast.own_code import described


def import_function(option: str, spec: str, built_in: Sequence[str] = ()) -> Callable[..., Any]:
    """The function that ``module:function`` or ``path/file.py:function`` names.

    Raises InputError, which names the option and the built-in functions, if there is none, and for whatever its file
    raises.
    """
    module_name, colon, function_name = spec.rpartition(":")
    if not colon:
        neither = f"neither one of {', '.join(built_in)} nor" if built_in else "not"
        raise InputError(f"{option} {spec}: {neither} module:function{did_you_mean(spec, built_in)}")
    try:
        if module_name.endswith(".py"):
            loader = _FromSource(Path(module_name).stem, module_name)
            source = importlib.util.spec_from_file_location(loader.name, module_name, loader=loader)
            assert source is not None  # it has a loader
            module = importlib.util.module_from_spec(source)
            loader.exec_module(module)
        else:
            _look_here()
            with _from_source(module_name):
                module = importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise InputError(f"{option} {spec}: {first_line(error)}") from error
    except (Exception, SystemExit) as error:  # of the file's own lines
        raise InputError(f"{option} {spec}: its import raised {described(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{option} {spec}: {module_name} has no function {function_name!r}")
    return function


def source_files(spec: str) -> list[Path]:
    """The files that an import of ``module:function`` or ``path/file.py:function`` runs by its name: those of the
    packages above the module, and its own, the last; those that Python itself brings are left out.

    Nothing is run. Raises ImportError or ValueError if there is no such module.
    """
    module_name = spec.rpartition(":")[0]
    if module_name.endswith(".py"):
        return [Path(module_name)]
    _look_here()
    first, *rest = module_name.split(".")
    found = importlib.util.find_spec(first)  # which imports what is above a module: here there is nothing
    files = [found]
    for depth, _ in enumerate(rest):
        places = found.submodule_search_locations if found else None
        found = PathFinder.find_spec(".".join([first, *rest[: depth + 1]]), places) if places else None
        files.append(found)
    if found is None:
        raise ImportError(f"No module named {module_name!r}")
    return [Path(spec.origin) for spec in files if spec and spec.has_location and spec.origin]


@contextmanager
def _from_source(module_name: str) -> Iterator[None]:
    """Imports of a module and of the packages that it is in run their files; those of all others are as ever."""
    parts = module_name.split(".")
    finder = _Finder(".".join(parts[: depth + 1]) for depth in range(len(parts)))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """The modules that the other finders find under some names, to be run from their source."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if found is not None and type(found.loader) is SourceFileLoader:
            found.loader = _FromSource(fullname, found.loader.path)
        return found


class _FromSource(SourceFileLoader):
    """Runs the file itself, never the compiled copy of it in a `__pycache__`."""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


def _look_here() -> None:
    if os.getcwd() not in sys.path:  # a console script does not look there
        sys.path.append(os.getcwd())
