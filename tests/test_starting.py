"""The first moments of a command: torch takes seconds to be imported, and is not here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cmdp_fast import cli, starting
from cmdp_fast.doctor import installed
from cmdp_fast.errors import InputError

ROOT = Path(__file__).parents[1]
TORCH = """
import os, signal, sys
if os.environ.get("SIGNAL"):
    os.kill(os.getpid(), signal.SIGINT)
sys.exit(f"went on {os.get_inheritable(1)}")
"""


def started(folder: Path, *words: str, closed: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command, of whose imports the first takes long, or is not got to."""
    (folder / "torch.py").write_text(TORCH)
    path = os.pathsep.join([str(folder), str(ROOT)])
    script = 'exec "$0" "$@" >&-' if closed else 'exec "$0" "$@"'
    return subprocess.run(
        ["sh", "-c", script, sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def console_script(folder: Path) -> str:
    """What pip makes of an entry point."""
    path = folder / "cmdp-fast"
    path.write_text("import sys\nfrom cmdp_fast.cli import main\nsys.exit(main())\n")
    return str(path)


def test_ctrl_c_while_torch_is_imported(tmp_path):
    for words in ([console_script(tmp_path), "info"], ["-m", "cmdp_fast", "info"]):
        done = started(tmp_path, *words, SIGNAL="1")
        assert (done.returncode, done.stderr) == (130, "cmdp-fast: interrupted\n")
        assert started(tmp_path, *words, SIGNAL="1", RANK="3").stderr == ""


def test_a_library_handles_no_signals(tmp_path):
    done = started(tmp_path, "-c", "import cmdp_fast", SIGNAL="1")
    assert done.returncode == -signal.SIGINT and done.stderr.endswith("KeyboardInterrupt\n")


def test_no_file_gets_the_number_of_a_stream_that_is_closed(tmp_path):
    assert started(tmp_path, console_script(tmp_path), closed=True).stderr == "went on True\n"


def test_ctrl_c_is_an_exception_again(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr(sys, "argv", ["/venv/bin/cmdp-fast", "info"])
        starting.begin()
        assert signal.getsignal(signal.SIGINT) is starting._end
        assert cli.main(["--version"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
        starting.begin()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "argv, original, command",
    [
        (["/venv/bin/cmdp-fast", "train"], ["python", "/venv/bin/cmdp-fast", "train"], True),
        (["-m", "info"], ["python", "-u", "-m", "cmdp_fast", "info"], True),
        (["-m"], ["python", "-m", "theirs"], False),
        (["train.py", "cmdp-fast"], ["python", "train.py"], False),
        (["-c"], ["python", "-c", "import cmdp_fast"], False),
        ([], ["python"], False),
    ],
)
def test_what_a_command_is(argv, original, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert starting.is_command() == command


# ----------------------------------------------------------------------------------------------- what it then imports


def refused(error: Exception, cause: Exception | None = None) -> str:
    with pytest.raises(InputError) as told, cli._needing("train", "train"):
        raise error from cause
    return str(told.value)


def test_what_cannot_be_imported_is_not_called_absent(monkeypatch):
    absent = ModuleNotFoundError("No module named 'absent_one'", name="absent_one.part")
    for of_extra in (["absent-one"], []):  # [] where nothing is known of it
        monkeypatch.setattr(installed, "names_of_extra", lambda _, names=of_extra: names)
        assert refused(absent).startswith("train needs absent_one, which comes with the extra: pip install ")
    monkeypatch.setattr(installed, "names_of_extra", lambda _: ["transformers"])
    assert refused(absent) == "train needs absent_one, which is not installed"
    broken = (
        "train needs json, which is installed and cannot be imported: ModuleNotFoundError: No module named 'json.x'"
    )
    assert refused(ModuleNotFoundError("No module named 'json.x'", name="json.x")).startswith(broken)
    library = ImportError("libfoo.so.1: cannot open shared object file", name="json", path="/x.so")
    said = refused(ImportError("look above"), cause=library)
    assert said.startswith("train needs json, which is installed and cannot be imported: ImportError: libfoo.so.1: ")
    assert refused(ImportError("a\nb")) == (
        "train needs something that cannot be imported: ImportError: a (cmdp-fast doctor says more)"
    )


def test_a_finder_that_refuses_makes_nothing_absent(monkeypatch):
    class Refusing:
        def find_spec(self, name, path=None, target=None):
            if name == "of_a_hook":
                raise ModuleNotFoundError("No module named 'of_a_hook'", name=name)

    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    error = ModuleNotFoundError("No module named 'of_a_hook'", name="of_a_hook")
    assert refused(error).startswith("train needs of_a_hook, which is installed and cannot be imported: Module")


def test_a_module_of_this_package_that_is_missing_is_no_mistake_of_the_user():
    with pytest.raises(ModuleNotFoundError), cli._needing("train", "train"):
        raise ModuleNotFoundError("No module named 'cmdp_fast.x'", name="cmdp_fast.x")
