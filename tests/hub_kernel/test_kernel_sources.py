"""The kernel's sources: nothing but what its operations need, and no word of a package that is not there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from cmdp_fast.hub_kernel import face
from cmdp_fast.hub_kernel import folder as kernel_folder
from cmdp_fast.hub_kernel.__main__ import main
from cmdp_fast.hub_kernel.sources import LEFT_OUT, kernel_files, relative, with_relative_imports

# What a kernel may import beside itself. typing_extensions is required by torch.
AT_HAND = {"torch", "triton", "typing_extensions"}


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return kernel_files()


def test_no_file_imports_more_than_torch_and_what_it_brings(files):
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            outside = {name.partition(".")[0] for name in names} - AT_HAND - sys.stdlib_module_names
            assert not outside, f"{path}:{node.lineno} imports {outside}"  # type: ignore[attr-defined]


def test_every_relative_import_leads_to_a_file_of_the_kernel(files):
    left_out = {name.partition(".")[2] for name in LEFT_OUT}
    for path, text in files.items():
        here = path.removesuffix(".py").split("/")[:-1]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
                for name in (alias.name for alias in node.names):
                    places = ["/".join([*base, name]) + ".py", "/".join([*base, name, "__init__.py"])]
                    places += ["/".join(base) + ".py"] if base else []
                    own = "/".join([*base, "__init__.py"])
                    there = any(place in files for place in places) or f"\n{name} " in files.get(own, "")
                    assert there or ".".join([*base, name]) in left_out or base == ["_ops"], (path, node.lineno)


def test_only_the_imports_differ_from_the_package(files):
    """And lines keep their numbers: an error in the kernel names the package's line."""
    package = ast.parse(kernel_source("tiles.py"))
    kernel = ast.parse(files["tiles.py"])
    for ours, theirs in zip(ast.walk(package), ast.walk(kernel), strict=True):
        if isinstance(ours, ast.ImportFrom) and ours.module and ours.module.startswith("cmdp_fast"):
            assert isinstance(theirs, ast.ImportFrom) and theirs.level == 1
            ours.module, ours.level = theirs.module, theirs.level
    assert ast.dump(package, include_attributes=False) == ast.dump(kernel, include_attributes=False)
    assert len(files["tiles.py"].splitlines()) == len(kernel_source("tiles.py").splitlines())


def kernel_source(name: str) -> str:
    from cmdp_fast.hub_kernel.sources import PACKAGE

    return (PACKAGE / name).read_text(encoding="utf-8")


def test_the_trainer_and_what_the_operations_do_not_use_stay_out(files):
    assert "ops/linear.py" in files and "kernels/fold.py" in files
    assert not [
        path for path in files if path.startswith(("trainer", "teachers", "integrations", "hub_kernel", "bench"))
    ]
    assert not {"objective.py", "cuda.py", "ops/topk_stats.py"} & files.keys()
    assert all(f'"{name}"' in files["__init__.py"] for name in face.__all__)


@pytest.mark.parametrize(
    ("module", "inside", "name"),
    [
        ("cmdp_fast.layout", "", ".layout"),
        ("cmdp_fast", "ops", ".."),
        ("cmdp_fast.kernels", "kernels", "."),
        ("cmdp_fast.kernels.shared", "kernels", ".shared"),
        ("cmdp_fast.kernels.shared", "ops.deep", "...kernels.shared"),
    ],
)
def test_a_module_has_a_relative_name(module, inside, name):
    assert relative(module, inside) == name


def test_imports_are_found_wherever_they_stand():
    text = (
        "é = 1; from cmdp_fast.ops import (\n    cost,\n)\n"
        "def f():\n    import cmdp_fast.heads as heads\n    s = 'from cmdp_fast.ops import cost'\n"
        "from cmdp_faster import x\n"
    )
    assert with_relative_imports(text, "ops") == (
        "é = 1; from . import (\n    cost,\n)\n"
        "def f():\n    from .. import heads as heads\n    s = 'from cmdp_fast.ops import cost'\n"
        "from cmdp_faster import x\n"
    )
    with pytest.raises(ValueError, match=r"line 2: write `from cmdp_fast import"):
        with_relative_imports("\nimport cmdp_fast.heads\n", "")
    with pytest.raises(ValueError, match="form that is not known"):
        with_relative_imports("from \\\n cmdp_fast.heads import Head\n", "")


def test_builds_of_other_sources_have_other_ids(tmp_path, monkeypatch):
    """Under an id a process knows one module, whatever the version says."""
    given = {"one": {"a.py": "x = 1\n"}, "same": {"a.py": "x = 1\n"}, "other": {"a.py": "x = 2\n"}}
    given |= {"elsewhere": {"b.py": "x = 1\n"}}
    ids = {}
    for name, sources in given.items():
        monkeypatch.setattr(kernel_folder, "kernel_files", lambda sources=sources: sources)
        builds = kernel_folder.write(tmp_path / name)
        ids[name] = tuple(json.loads((build / "metadata.json").read_text())["id"] for build in builds)
    assert ids["one"] == ids["same"] and len({identity for each in ids.values() for identity in each}) == 2 * 3


@pytest.mark.parametrize("name", ["kernel", "x$(touch pwned)", "it's`touch pwned`"])
def test_the_command_that_is_printed_is_one_of_python_alone(name, tmp_path, monkeypatch, capsys):
    """The folder's name has no meaning to a shell that it is pasted into, nor to Python."""
    monkeypatch.setattr("cmdp_fast.hub_kernel.__main__.write", lambda folder: [])
    assert main([str(tmp_path / name)]) == 0
    (tmp_path / "kernels.py").write_text("get_local_kernel = str\n")
    command = capsys.readouterr().out.replace("python", sys.executable, 1)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{tmp_path / name}\n" and not (tmp_path / "pwned").exists(), done.stderr
