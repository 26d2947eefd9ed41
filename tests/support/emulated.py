"""The native module's functions on another architecture: its kernels, cross-compiled and run by QEMU.

`Emulated` may stand in for `cmdp_fast._C` (`cmdp_fast.cpu.native`). A call sends the memory that its addresses name to
tests/csrc/emulated, and writes what comes back to the same places.

    python tests/support/emulated.py max,sve-max-vq=2 tests/ops -k "cpu or variant"

runs other tests on it, with QEMU's name of the processor; `sve-max-vq` is the length of SVE's vectors, in 128 bits.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cmdp_fast.cpu
from cmdp_fast.layout import SAVED
from cmdp_fast.states import FIELDS

ROOT = Path(__file__).parents[2]
SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Target(NamedTuple):
    """An architecture, and the tools that compile for it, read its machine code and run it."""

    processor: str
    compiler: str
    objdump: str
    emulator: str


AARCH64 = Target("aarch64", "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64")
X86_64 = Target("x86_64", "g++", "objdump", "qemu-x86_64")
TARGETS = {target.processor: target for target in (AARCH64, X86_64)}


def problem(target: Target = AARCH64) -> str | None:
    """Why nothing can be emulated here, or None."""
    tools = (target.compiler, target.emulator, "cmake", "ninja")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)" if missing else None


def build(target: Target = AARCH64) -> Path:
    """The program that serves the calls, the one compiled earlier if nothing it is made from has changed since."""
    sources = ROOT / "tests" / "csrc" / "emulated"
    version = subprocess.run([target.compiler, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version)
    for path in sorted(p for folder in (sources, ROOT / "csrc") for p in folder.rglob("*") if p.is_file()):
        digest.update(path.read_bytes())
    folder = ROOT / ".pytest_cache" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"{target.processor}-{digest.hexdigest()[:16]}"
    with open(folder / "lock", "w") as lock:  # workers of pytest-xdist compile once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            for old in folder.glob(f"{target.processor}-*"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                configure = ["cmake", "-S", sources, "-B", scratch, "-G", "Ninja", "-DCMAKE_SYSTEM_NAME=Linux"]
                configure += [f"-DCMAKE_CXX_COMPILER={target.compiler}", f"-DCMAKE_SYSTEM_PROCESSOR={target.processor}"]
                subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
                subprocess.run(["cmake", "--build", scratch], check=True)
                (Path(scratch) / "calls").rename(program)
    return program


class Matrix(NamedTuple):
    address: int
    dtype: str
    sizes: Sequence[int]
    strides: Sequence[int]
    width: int

    @property
    def rows(self) -> int:
        rows = 1
        for size in self.sizes:
            rows *= size
        return rows

    @property
    def region(self) -> tuple[int, int]:
        reach = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True)) + self.width
        return self.address, reach * SIZES[self.dtype] if self.rows else 0


def words(value: Any) -> Iterator[str]:
    """An argument as the program reads it. An optional one, or one of two types, begins with which it is."""
    if isinstance(value, Matrix):
        yield from words((value.address, value.dtype, len(value.sizes), *value.sizes, *value.strides, value.width))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from words(part)
    else:
        yield str(int(value)) if isinstance(value, bool) else str(value)


def joined(regions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Regions of memory as few that do not overlap: an output may be an input as well."""
    parts: list[tuple[int, int]] = []
    for address, size in sorted(r for r in regions if r[0] and r[1]):
        if parts and address < sum(parts[-1]):
            first = parts[-1][0]
            parts[-1] = first, max(sum(parts[-1]), address + size) - first
        else:
            parts.append((address, size))
    return parts


class Emulated:
    """The functions of cmdp_fast/_C.pyi. `cpu` is QEMU's name of the processor, and `options` are QEMU's too."""

    SAVED, STATE, OPENMP, CUDA_NOTE = SAVED, len(FIELDS), True, ""
    TokenState: Any = getattr(cmdp_fast.cpu.native, "TokenState", None)  # no kernel: that of this processor
    Matrix = Matrix

    def __init__(self, cpu: str = "max", target: Target = AARCH64, options: Sequence[str] = ()) -> None:
        command = [target.emulator, "-cpu", cpu, *options, build(target)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0, f"the emulated program ended with {self._process.returncode}"

    def _call(self, name: str, regions: Iterable[tuple[int, int]], *arguments: Any) -> str:
        memory = joined(regions)
        line = " ".join((str(len(memory)), *words(memory), name, *words(arguments)))
        to, back = self._process.stdin, self._process.stdout
        assert to is not None and back is not None
        to.write(line.encode() + b"\n")
        for address, size in memory:
            to.write(ctypes.string_at(address, size))
        to.flush()
        answer = back.readline().decode()
        assert answer.endswith("\n"), f"the emulated program ended in a call of {name}"
        for address, size in memory:
            ctypes.memmove(address, back.read(size), size)
        if answer.startswith("error: "):
            raise ValueError(answer.removeprefix("error: ").strip())
        return answer.strip()

    def token_stats(self, x, y, tokens, mask, vocab, temperature, statistics, wide, saved, threads):
        n = x.rows
        rows = [(tokens, 8 * n), (mask, n), (saved, 8 * SAVED * n), *((s, (8 if wide else 4) * n) for s in statistics)]
        given = (x, y, tokens, mask, vocab, temperature, statistics, wide, saved, threads)
        self._call("token_stats", [x.region, y.region, *rows], *given)

    def token_stats_backward(
        self, x, y, tokens, mask, vocab, temperature, upstream, saved, out, threads, first_column=0
    ):
        n = x.rows
        rows = [(tokens, 8 * n), (mask, n), (saved, 8 * SAVED * n), *((g, 8 * n) for g in upstream)]
        given = (x, y, tokens, mask, vocab, temperature, upstream, saved, out, threads, first_column)
        self._call("token_stats_backward", [x.region, y.region, out.region, *rows], *given)

    def mixture(self, x, y, mask, vocab, temperature, b, teacher, student, saved, value, mean, threads):
        n = x.rows
        rows = [(mask, n), (saved, 8 * SAVED * n), (value, 8 * n), (mean, 8 * n)]
        given = (x, y, mask, vocab, temperature, b, teacher, student, saved, value, mean, threads)
        self._call("mixture", [x.region, y.region, *rows], *given)

    def mixture_backward(
        self, x, y, mask, vocab, temperature, b, teacher, student, saved, mean, upstream, out, threads
    ):
        n = x.rows
        rows = [(mask, n), (saved, 8 * SAVED * n), (mean, 8 * n), (upstream, 8 * n)]
        given = (x, y, mask, vocab, temperature, b, teacher, student, saved, mean, upstream, out, threads)
        self._call("mixture_backward", [x.region, y.region, out.region, *rows], *given)

    def update_states(self, x, y, tokens, first_column, temperature, states, threads, mask=0):
        n = x.rows
        rows = [(tokens, 8 * n), (mask, n), (states, 8 * len(FIELDS) * n)]
        given = (x, y, tokens, first_column, temperature, states, threads, mask)
        self._call("update_states", [x.region, y.region, *rows], *given)

    def update_tails(self, x, ids, listed, tokens, mask, vocab, temperature, first, states, threads):
        n = x.rows
        sizes = (4 * 8 * n, 8 * n * listed, 8 * n)
        rows = [(ids, 8 * n * listed), (tokens, 8 * n), (mask, n), *zip(states, sizes, strict=True)]
        given = (x, ids, listed, tokens, mask, vocab, temperature, first, states, threads)
        self._call("update_tails", [x.region, *rows], *given)

    def tail_backward(self, x, ids, listed, tokens, mask, vocab, temperature, first, gradient, out, threads):
        n = x.rows
        sizes = (*[8 * n] * 5, 8 * n * listed)
        rows = [(ids, 8 * n * listed), (tokens, 8 * n), (mask, n), *zip(gradient, sizes, strict=True)]
        given = (x, ids, listed, tokens, mask, vocab, temperature, first, gradient, out, threads)
        self._call("tail_backward", [x.region, out.region, *rows], *given)

    def budget_trace(
        self, cost, wide, mask, offsets, count, total, limits, budget, trace, reward, task_reward, result, threads
    ):
        number = 8 if wide else 4
        sizes = (number * total, number * total, total, 8 * count, number * total)
        tokens = [(mask, total), *((a, number * total) for a in (cost, task_reward, result))]
        own = isinstance(limits, int)
        regions = [*tokens, (offsets, 8 * (count + 1)), (limits, 8 * count if own else 0)]
        given = (cost, wide, mask, offsets, count, total, (own, limits), budget, trace)
        paid = False if reward is None else (True, reward)
        self._call(
            "budget_trace", [*regions, *zip(trace, sizes, strict=True)], *given, paid, task_reward, result, threads
        )

    def modified_reward(self, task_reward, cost, wide, mask, offsets, count, total, trace, reward, result):
        number = 8 if wide else 4
        sizes = (number * total, number * total, total, number * total)
        tokens = [(mask, total), *((a, number * total) for a in (cost, task_reward, result))]
        regions = [*tokens, (offsets, 8 * (count + 1)), *zip(trace, sizes, strict=True)]
        given = (task_reward, cost, wide, mask, offsets, count, total, trace, reward, result)
        self._call("modified_reward", regions, *given)

    def advise_huge_pages(self, address: int, size: int) -> bool:
        return False

    def variants(self) -> list[tuple[str, bool]]:
        return [(word[:-1], word[-1] == "+") for word in self._call("variants", ()).split()]

    def variant(self) -> str:
        return self._call("variant", ())

    def set_variant(self, name: str) -> None:
        self._call("set_variant", (), name)

    def cpu_features(self) -> list[str]:
        return re.findall(r"\S+", self._call("cpu_features", ()))


@contextmanager
def in_place_of_native(module: Emulated) -> Iterator[None]:
    """`backend="cpu"` calls the emulated kernels."""
    before = cmdp_fast.cpu.native
    cmdp_fast.cpu.native = module
    try:
        yield
    finally:
        cmdp_fast.cpu.native = before


if __name__ == "__main__":
    import sys

    import pytest

    with in_place_of_native(Emulated(sys.argv[1])):
        sys.exit(pytest.main(sys.argv[2:]))
