"""What breaks a run from outside: kills, signals and errors at the moments at which its folder changes."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from tiny_pair import arguments, untimed

WRITTEN = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")
SHORT = {  # a run that comes through every phase, and leaves everything that a run leaves
    **{"steps": 2, "prompts_per_step": 2, "num_generations": 2, "minibatch_size": 4, "max_new_tokens": 4},
    **{"eval_generations": 1, "lr_schedule": "constant", "checkpoint_every": 1, "save_student_every": 1, "keep": 1},
}


def command(pair: dict[str, str], output: Path, **changes: Any) -> list[str]:
    """The command line of a short run, `output/r`, without a tracker: TensorBoard's files have the time in their names
    and in their lines."""
    return [*arguments(pair, output, **{**SHORT, **changes}), "--trackers"]


def in_child(function: Callable[[], Any], told: Path | None = None) -> int:
    """The exit code of a forked process that runs a function, which may return one; a signal's number below zero. What
    it prints is in ``told``."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        code: Any = 99
        try:
            log = os.open(told or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            both = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
            with both, redirect_stdout(both), redirect_stderr(both):
                code = function()
        except BaseException:  # nothing of the test's may go on in the child
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code or 0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def be_stopped(seconds: float) -> None:
    """This process, as by Ctrl-Z."""
    if not (waker := os.fork()):
        time.sleep(seconds)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(waker, 0)


def watch(parent: Path, act: Callable[[str], None]) -> None:
    """From now on ``act`` is called before each change of a folder and of what is in it, whichever library makes it in
    Python; with what it is. What ``act`` raises is the error of the change. Of native code no opening is heard, but the
    renames and fsyncs around it are. For a process that ends with it: such a hook stays for good."""
    inside, busy, fsync = os.path.realpath(parent), False, os.fsync

    def hear(what: str, path: Any, folder: Any = -1) -> None:
        nonlocal busy
        if isinstance(path, int):
            place = os.path.realpath(f"/proc/self/fd/{path}")
        else:
            base = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else "."
            before, name = os.path.split(os.path.join(base, os.fsdecode(path)))
            place = os.path.join(os.path.realpath(before), name)  # itself it may be a link
        if f"{place}/".startswith(f"{inside}/") and not busy:  # else it is a change of its own
            busy = True
            try:
                act(f"{what} {place.removeprefix(inside)}")
            finally:
                busy = False

    def heard(event: str, given: tuple[Any, ...]) -> None:
        if busy:
            return
        if event == "open":
            path, mode, flags = given
            if path is not None and (flags & WRITTEN or set(mode or "") & {*"wax+"}):
                hear(event, path)
        elif event in CHANGES:
            hear(event, given[0], given[-1])

    def synced(descriptor: int) -> None:
        hear("fsync", descriptor)
        fsync(descriptor)

    os.fsync = synced
    sys.addaudithook(heard)


def states_of(run: Callable[[], int], folder: Path, states: Path) -> list[Path]:
    """What a kill may leave of a folder: a copy of it, in the order of time, for each change that ``run`` makes there.
    The process itself counts for nothing: what it has not written by then is lost. `in_place` reads what else it
    leaves there."""
    states.mkdir()
    seen: list[Any] = []

    def copy(what: str) -> None:
        state = tree(folder)
        if not seen or state != seen[-1]:
            shutil.copytree(folder, states / f"{len(seen):04d}", symlinks=True)
            seen.append(state)
        with open(states / "changes", "a") as changes:
            changes.write(f"{len(seen) - 1} {what}\n")

    def child() -> int:
        watch(folder, copy)
        code = run()
        copy("at last")
        return code

    assert in_child(child, states / "told") == 0, (states / "told").read_text()
    return sorted(path for path in states.iterdir() if path.is_dir())


def in_place(states: Path) -> list[str]:
    """The files that have changed under their last names, and not by a rename: a kill would have left a part of them.
    Of native code, too, of which no opening is heard."""
    folders = sorted(path for path in states.iterdir() if path.is_dir())
    renamed: dict[int, set[str]] = {}
    for line in (states / "changes").read_text().splitlines():
        number, event, path = line.split(" ", 2)
        if event == "os.rename":
            before, _, name = path.strip("/").rpartition("/")
            renamed.setdefault(int(number), set()).add("/".join(filter(None, (before, name.removeprefix(".")))))
    found = []
    for number, (one, other) in enumerate(zip(map(tree, folders), map(tree, folders[1:]), strict=False)):
        changed = [name for name, content in other.items() if content is not None and one.get(name) != content]
        visible = [name for name in changed if not any(part.startswith(".") for part in Path(name).parts)]
        found += [name for name in visible if name not in renamed.get(number, ())]
    return found


def some(items: list[Any], count: int) -> list[Any]:
    """So many, spread over all; the first and the last among them."""
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(min(count, len(items)))]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder by its name; hidden ones, too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def result(folder: Path) -> dict[str, Any]:
    """Everything in a run's folder, without times and the names of places: what is the same of two runs that are."""
    return {name: _timeless(name, value) for name, value in tree(folder).items()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What is not the same in two results, by name."""
    pairs = {name: (one.get(name, "not there"), other.get(name, "not there")) for name in {**one, **other}}
    return {
        name: differences(*values) if all(isinstance(value, dict) for value in values) else values
        for name, values in pairs.items()
        if values[0] != values[1]
    }


def _timeless(name: str, value: bytes | None) -> Any:
    last = name.rpartition("/")[2]
    if last == "optimizer.bin":  # whose betas are a tuple, or a list once they have been read
        return _numbers(torch.load(io.BytesIO(value or b""), weights_only=True))
    if value is None or last not in ("metrics.jsonl", "summary.json", "run.json", "config.json"):
        return value
    if last == "metrics.jsonl":
        return [untimed(json.loads(line)) for line in value.splitlines()]
    read = json.loads(value)
    for timed in ("sha256", "seconds", "sessions", "kernel_share_of_step", "output_dir"):
        read.pop(timed, None)
    for config in (read.get("config"), read):
        if isinstance(config, dict):
            config.pop("output_dir", None)
    if last == "summary.json":
        read["files"].pop("metrics.jsonl", None)
    if "metrics" in read:
        read["files"].pop("optimizer.bin")
        read["metrics"] = [untimed(line) for line in read["metrics"]]
    return read


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(each) for each in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def small_disk(folder: Path, size: str) -> None:
    """Mounts a disk of so many bytes (`1m`), in memory, on a folder; for this process and its children alone, so that
    it is gone with them. Raises OSError where that is not allowed."""
    user, group = os.geteuid(), os.getegid()
    _unshare(0 if user == 0 else NEW_USER)
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    _mount("none", "/", "", PRIVATE | RECURSIVE, "")
    _mount("tmpfs", str(folder), "tmpfs", 0, f"size={size}")


def resize(folder: Path, size: str) -> None:
    """Makes a small disk larger."""
    _mount("tmpfs", str(folder), "tmpfs", REMOUNT, f"size={size}")


def make_read_only(folder: Path) -> None:
    """Has a folder of a small disk be one that nothing can be written to from now on; what is open stays so."""
    _mount(str(folder), str(folder), "", BIND, "")
    _mount(str(folder), str(folder), "", BIND | REMOUNT | READ_ONLY, "")


def make_writable(folder: Path) -> None:
    """The end of that."""
    _called(ctypes.CDLL(None, use_errno=True).umount2(str(folder).encode(), DETACH))


NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE, DETACH = 1, 32, 1 << 12, 1 << 14, 1 << 18, 2


def _unshare(more: int) -> None:
    _called(ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS | more))


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    words = [word.encode() for word in (source, target, kind, data)]
    _called(ctypes.CDLL(None, use_errno=True).mount(*words[:3], ctypes.c_ulong(flags), words[3]))


def _called(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
