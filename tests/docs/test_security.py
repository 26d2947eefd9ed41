"""What `cmdp_fast/guide/security.md` says of the package: what could run somebody else's code, or make a name that
others foresee, stands in few files, each with its reason. Read is the source of every module, of `benchmarks` and of
`setup.py`, with what a name was imported as; texts that are handed to another process are not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cmdp_fast"

ALLOWED = {
    # A pickle is read where this package has just written it: by a process that it has started, over its own pipe.
    ("judging/pool.py", "import pickle"): "writes requests to the process of the judges, and reads none",
    (
        "judging/process.py",
        "import pickle",
    ): "reads them from its standard input; a completion in the isolated child alone",
    ("trainer/tasks/varying.py", "import pickle"): "of a process that imports reasoning-gym and makes its problems",
    # Modules that are named in a text
    ("imports.py", "import_module of a variable"): "the user's own functions, named on the command line",
    ("imports.py", "exec_module"): "the same, of a file",
    ("judging/process.py", "exec_module"): "isolation.py and judges.py beside it, by their paths",
    (
        "judging/judges.py",
        "import_module of a variable",
    ): "a function of the package verl itself, in the process of the judges",
    ("teachers/open.py", "import_module of a variable"): "the modules of a table in that file",
    ("trainer/methods/method.py", "import_module of a variable"): "the module of a method, by the table in methods/",
    ("guide/api.py", "import_module of a variable"): "the modules of this package",
    ("bench/peers/__init__.py", "import_module of a variable"): "the modules of its folder",
    ("trainer/comparison/warm.py", "import_module of a variable"): "the modules of a table in that file",
    (
        "setup.py",
        "runs a file",
    ): "native_module.py of the checkout that it builds, which must not be imported with its package",
    ("benchmarks/phases/worker.py", "import_module of a variable"): "the modules of its folder",
    ("benchmarks/phases/prove.py", "a parser of XML"): "the report that a pytest of its own has just written",
    ("doctor/importing.py", "import_module of a variable"): "the packages of the extra, in a process of the doctor's",
}

PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
OPENERS = {"eval", "exec", "compile", "__import__"}  # builtins that take a text for code
CALLS = {
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "asyncio.create_subprocess_shell": "a shell",
    "tempfile.mktemp": "a name that others foresee",
    "os.tempnam": "a name that others foresee",
    "runpy.run_path": "runs a file",
    "runpy.run_module": "runs a module",
    "code.interact": "runs what is typed",
    "ssl._create_unverified_context": "a server that is not asked who it is",
}


def dangers(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a module with something on the list, and what it is."""
    tree = ast.parse(text)
    names = _names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from ((node.lineno, danger) for a in aliases for danger in _of_module(a.name))
            case ast.ImportFrom(module=str(module)):
                yield from ((node.lineno, danger) for danger in _of_module(module))
            case ast.Constant(value=str(value)) if value.startswith(("/tmp", "/var/tmp")):
                yield node.lineno, "a path in /tmp"
            case ast.Call():
                yield from ((node.lineno, danger) for danger in _of_call(node, names))


def _names(tree: ast.Module) -> dict[str, str]:
    """What stands behind each name that a module imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def _of_module(name: str) -> Iterator[str]:
    first = name.partition(".")[0]
    if first in PICKLES:
        yield f"import {name}"
    if first in ("xml", "lxml"):  # whose entities grow, and name files
        yield "a parser of XML"


def _called(function: ast.expr, names: dict[str, str]) -> str:
    """The whole name of what is called: of `getattr(os, "system")`, and of a name that was imported as another."""
    if (
        isinstance(function, ast.Call)
        and ast.unparse(function.func) == "getattr"
        and len(function.args) > 1
        and isinstance(function.args[1], ast.Constant)
    ):
        return f"{_called(function.args[0], names)}.{function.args[1].value}"
    if isinstance(function, ast.Attribute):
        return f"{_called(function.value, names)}.{function.attr}"
    name = ast.unparse(function)
    return names.get(name, name)


def _of_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = _called(call.func, names).removeprefix("builtins.")
    first, _, last = name.partition(".")[0], "", name.rpartition(".")[2]
    given = {word.arg: word.value for word in call.keywords}
    if name in OPENERS:
        yield name
    if name in CALLS:
        yield CALLS[name]
    if _is(given.get("shell"), True):
        yield "a shell"
    if name in ("torch.load", "torch.serialization.load") and not _is(given.get("weights_only"), True):
        yield "torch.load without weights_only"
    if last == "load" and first in ("np", "numpy") and not _is(given.get("allow_pickle"), False):
        yield "numpy's load"
    if last in ("load", "load_all", "full_load", "unsafe_load") and first == "yaml":
        yield "yaml that makes objects"
    if _is(given.get("trust_remote_code"), True):
        yield "code from the hub"
    if _is(given.get("verify"), False):
        yield "a server that is not asked who it is"
    # Where transformers is not told, it asks at the terminal.
    auto = ast.unparse(call.func).startswith("Auto") or name.startswith("transformers.Auto")
    if last == "from_pretrained" and auto and not {"trust_remote_code", "gguf_file"} & given.keys():
        yield "from_pretrained that asks about code"
    if last == "import_module" and not isinstance(call.args[0], ast.Constant):
        yield "import_module of a variable"
    if last in ("exec_module", "extractall", "unpack_archive"):
        yield last


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_on_the_list_but_what_has_a_reason():
    found = {}
    for folder, paths in {
        PACKAGE: PACKAGE.rglob("*.py"),
        ROOT: [ROOT / "setup.py", *(ROOT / "benchmarks").rglob("*.py")],
    }.items():
        for path in sorted(paths):
            name = path.relative_to(folder).as_posix()
            found |= {(name, danger): line for line, danger in dangers(path.read_text(encoding="utf-8"))}
    assert not {where: line for where, line in found.items() if where not in ALLOWED}
    assert not ALLOWED.keys() - found.keys(), "a reason without its line"


@pytest.mark.parametrize(
    ("text", "danger"),
    [
        ("import os, pickle", "import pickle"),
        ("def f():\n    from cloudpickle import loads", "import cloudpickle"),
        ("torch.load(path)", "torch.load without weights_only"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only"),
        ("eval('1')", "eval"),
        ("exec(code)", "exec"),
        ("subprocess.run(command, shell=True)", "a shell"),
        ("os.system('ls')", "a shell"),
        ("yaml.load(text)", "yaml that makes objects"),
        ("np.load(path)", "numpy's load"),
        ("tempfile.mktemp()", "a name that others foresee"),
        ("open('/tmp/log', 'w')", "a path in /tmp"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "code from the hub"),
        ("AutoTokenizer.from_pretrained(name)", "from_pretrained that asks about code"),
        ("importlib.import_module(name)", "import_module of a variable"),
        ("loader.exec_module(module)", "exec_module"),
        ("import shelve as s", "import shelve"),
        ("from os import system\nsystem('ls')", "a shell"),
        ("import os as o\no.popen('ls')", "a shell"),
        ("getattr(os, 'system')('ls')", "a shell"),
        ("import torch as t\nt.load(path)", "torch.load without weights_only"),
        ("from torch import load as read\nread(path)", "torch.load without weights_only"),
        ("import builtins\nbuiltins.eval(text)", "eval"),
        ("from yaml import load\nload(text)", "yaml that makes objects"),
        ("import numpy as n\nn.load(path, allow_pickle=True)", "numpy's load"),
        ("import xml.etree.ElementTree as tree", "a parser of XML"),
        ("requests.get(url, verify=False)", "a server that is not asked who it is"),
        ("tarfile.open(path).extractall()", "extractall"),
        ("shutil.unpack_archive(path)", "unpack_archive"),
        ("from tempfile import mktemp as name\nname()", "a name that others foresee"),
    ],
)
def test_each_is_found(text, danger):
    assert [what for _, what in dangers(text)] == [danger]


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "re.compile(pattern)",
        "torch.compile(model)",
        "yaml.safe_load(text)",
        "json.load(file)",
        "importlib.import_module('vllm')",
        "subprocess.run(['ls'])",
        "tempfile.mkdtemp()",
        "auto.from_pretrained(name, trust_remote_code=trusted)",
    ],
)
def test_what_does_no_harm_is_passed(text):
    assert not list(dangers(text))


def test_the_pages_figures_are_those_of_the_code():
    from cmdp_fast import http_client
    from cmdp_fast.judging import pool
    from cmdp_fast.teachers.served import protocol
    from cmdp_fast.trainer import rollout
    from cmdp_fast.trainer.run_report import reading

    page = (PACKAGE / "guide" / "security.md").read_text(encoding="utf-8")
    sizes = {reading.LONGEST_LINE: "64 MiB in a line", reading.LONGEST_LINES: "4 GiB in a file of lines"}
    sizes |= {reading.LONGEST_FILE: "16 MiB in any other", http_client.LONGEST: "1 GiB at most"}
    for size, said in sizes.items():
        number, unit = said.split()[:2]
        assert size == int(number) << {"MiB": 20, "GiB": 30}[unit] and said in page
    assert pool.MEMORY == 1 << 30 and "a gibibyte of memory" in page
    assert f"{rollout.PATIENCE:g} seconds for a prompt" in page and f"{rollout.LONGEST:,} characters" in page
    assert protocol.TOKENS // 10**6 == 4 and "4 million tokens" in page
