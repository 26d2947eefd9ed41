"""The folder as the Hub's package `kernels` loads it: the package's own results, in one process with the package."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import runpy
import sys
from pathlib import Path

import hub_kernels
import pytest
import torch

import cmdp_fast as cf
from cmdp_fast.hub_kernel.__main__ import main

with_kernels = pytest.mark.skipif(not hub_kernels.INSTALLED, reason="the package kernels is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:cmdp_fast serves CPU tensors with plain PyTorch:RuntimeWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub") / "kernel"


@pytest.fixture(scope="module")
def kernel(folder):
    return hub_kernels.loaded(folder)


@pytest.mark.parametrize("operation", hub_kernels.OPERATIONS, ids=lambda operation: operation.__name__)
def test_the_results_are_the_packages_to_the_last_bit(kernel, operation):
    assert hub_kernels.same(operation(kernel, "torch"), operation(cf, "torch"))
    assert hub_kernels.same(operation(kernel, None), operation(cf, "torch"))  # what it chooses here


@pytest.mark.parametrize("operation", hub_kernels.OPERATIONS, ids=lambda operation: operation.__name__)
def test_they_compile_in_one_graph(kernel, operation):
    def compiled(package):
        class Compiled:
            Head, Constraint = package.Head, package.Constraint

        call = getattr(package, operation.__name__)
        setattr(Compiled, operation.__name__, torch.compile(call, fullgraph=True, backend="aot_eager"))
        return operation(Compiled, "torch")

    assert hub_kernels.same(compiled(kernel), compiled(cf))
    torch.compiler.reset()


def test_it_shares_nothing_with_the_package_that_it_was_made_of(kernel):
    name = kernel.__name__
    assert name.startswith("_cmdp_fast_cpu_") and name != cf.__name__
    assert kernel.token_stats is not cf.token_stats
    assert kernel.token_stats.__module__ == f"{name}.ops.token_stats"
    ours, theirs = torch.ops.cmdp_fast, getattr(torch.ops, name)
    assert theirs.constrained_pass.default is not ours.constrained_pass.default
    assert str(theirs.constrained_pass.default._schema).startswith(f"{name}::")
    operators = sys.modules[f"{name}.ops.operator"]
    assert name == operators.NAMESPACE and operators.REVISION
    assert kernel.available_backends()["cpu"] == "this kernel of the Hub holds none"
    assert "cannot import name 'cuda'" in kernel.available_backends()["cuda"]


def test_the_first_call_on_a_cpu_says_what_is_missing(kernel, monkeypatch):
    monkeypatch.setattr(sys.modules[f"{kernel.__name__}.ops.backends"], "_warned", set())
    sys.modules[f"{kernel.__name__}.ops.backends"]._decided.cache_clear()
    with pytest.warns(RuntimeWarning, match="holds none") as caught:
        hub_kernels.token_stats(kernel, None)
    assert "install" not in str(caught[0].message)  # no index has the package, and its name there is anybody's to take


def test_wherever_it_is_fetched_it_is_said_to_be_trusted(kernel, folder):
    """`kernels` refuses code of publishers whom the Hub has not marked, unless that word is there."""
    for page in (folder / "README.md", Path(cf.__file__).parent / "guide" / "hub_kernel.md"):
        calls = re.findall(r"(?<!local_)\bget_kernel\(([^)]*)\)", page.read_text(encoding="utf-8"))
        assert calls and all("version=0, trust_remote_code=True" in call for call in calls), calls


@with_kernels
def test_the_metadata_are_those_that_the_loader_reads(kernel, folder):
    from kernels import Metadata
    from kernels._rust import Build, Digest, DigestAlgorithm

    for backend in ("cpu", "cuda"):
        build = folder / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(build / "metadata.json")
        assert (str(metadata.name), metadata.version, metadata.python_depends) == ("cmdp-fast", 0, [])
        assert str(metadata.backend.backend_type).lower() == backend
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))  # raises where a file differs
    assert len(Build.open(folder).general.backends) == 2


def test_each_builds_digests_are_those_of_its_files(kernel, folder):
    identities = set()
    for build in (folder / "build").iterdir():
        metadata = json.loads((build / "metadata.json").read_text())
        files = {path.relative_to(build).as_posix(): path.read_bytes() for path in build.rglob("*.py")}
        digests = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in files.items()}
        assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
        assert build.name == f"torch-{metadata['backend']['type']}" and metadata["id"].isidentifier()
        identities.add(metadata["id"])
    assert len(identities) == 2 and kernel.__name__ in identities


def test_the_module_below_its_own_name_has_the_same_names(kernel, folder):
    below = runpy.run_path(str(folder / "build" / "torch-cpu" / "cmdp_fast" / "__init__.py"))
    assert below["__all__"] == kernel.__all__ and below["token_stats"] is kernel.token_stats


@with_kernels
def test_its_own_tests_and_the_cards_example_pass(kernel, folder, monkeypatch):
    monkeypatch.chdir(folder)
    tests = runpy.run_path("tests/test_kernel.py")
    found = [name for name in tests if name.startswith("test_")]
    for name in found:
        tests[name](kernel)
    assert len(found) == 3
    card = (folder / "README.md").read_text()
    out = {}
    exec(card.split("```python\n")[1].split("```")[0], out)
    assert out["student"].grad is not None and "$" not in card
    assert f"version={json.loads((folder / 'build/torch-cpu/metadata.json').read_text())['version']}" in card


def test_the_sources_for_the_builder_are_those_of_the_builds(kernel, folder):
    source, build = folder / "torch-ext" / "cmdp_fast", folder / "build" / "torch-cpu"
    names = {path.relative_to(source) for path in source.rglob("*.py")}
    built = {path.relative_to(build).as_posix() for path in build.rglob("*.py")}
    assert built - {name.as_posix() for name in names} == {"_ops.py", "cmdp_fast/__init__.py"}  # the builder makes both
    assert all((source / name).read_bytes() == (build / name).read_bytes() for name in names)
    assert "Apache License" in (folder / "LICENSE").read_text()


def test_the_command_writes_into_no_folder_with_something_in_it(folder, kernel, tmp_path, capsys):
    assert main([str(folder)]) == 2
    assert f"{folder} is not empty" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file" / "below")]) == 2
    assert "could not be written" in capsys.readouterr().err
    assert main([str(tmp_path / "new")]) == 0
    assert "torch-cuda" in capsys.readouterr().out and os.listdir(tmp_path / "new" / "build")
