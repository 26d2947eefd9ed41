"""How many threads the native module starts: in a process of its own, which has no others and imports no PyTorch."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from cmdp_fast.cpu import native

pytestmark = [
    pytest.mark.skipif(native is None or not native.OPENMP, reason="the native module has no threads"),
    pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as on Linux"),
]

BEGINNING = """
import importlib.util, os, sys, threading
from array import array

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
ITEMS = 20_000
costs, numbers, whole = array("d", [1.0] * ITEMS), array("d", [0.0] * ITEMS), array("q", [0] * ITEMS)
cost, place = costs.buffer_info()[0], numbers.buffer_info()[0]
flags = array("b", bytes(ITEMS))
others = array("d", numbers)
other = others.buffer_info()[0]
trace = [place, other, flags.buffer_info()[0], whole.buffer_info()[0], other]


def scan(items, threads):
    native.budget_trace(cost, True, 0, 0, items, ITEMS, 1.0, (1.0, False, False), trace, None, 0, 0, threads)


def in_a_child(function):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, repr(function()).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    return os.read(reader, 4096).decode()


def those_there():
    return len(os.listdir("/proc/self/task"))
"""


def said(program: str) -> str:
    command = [sys.executable, "-c", BEGINNING + program, native.__file__]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_no_more_threads_than_are_asked_for_have_work_or_help():
    """OpenMP's stay, so that they can be counted. It ends a process that the system refuses one."""
    program = """
for items, threads in ((ITEMS, 1), (ITEMS, 2), (4, 8), (1, 8), (ITEMS, 5), (ITEMS, 64), (ITEMS, ITEMS)):
    scan(items, threads)
    print(those_there(), end=" ")
print(min(ITEMS, max(64, os.cpu_count())))
"""
    *there, most = said(program).split()
    assert there == ["1", "2", "4", "4", "5", "64", most]


def test_a_fork_is_late_only_after_several_threads():
    program = """
scan(ITEMS, 1)
print(in_a_child(native.forked_late), native.forked_late())
scan(ITEMS, 2)
print(in_a_child(native.forked_late), native.forked_late())
"""
    assert said(program).split() == ["False", "False", "True", "False"]


def test_a_forked_process_starts_as_many_threads_as_are_asked_for():
    """They end with each call. Their numbers are given out in order, and to other processes seldom."""
    program = """
def number():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    return thread.native_id


def started(threads):
    first = number()
    scan(ITEMS, threads)
    return number() - first - 1


print(in_a_child(lambda: [[started(threads) for _ in range(30)] for threads in (1, 2, 4)]))
"""
    for others, seen in zip((0, 1, 3), ast.literal_eval(said(program)), strict=True):
        assert others in seen and not any(0 <= each < others for each in seen), seen


def test_a_forked_process_that_gets_no_thread_does_the_work_itself():
    program = """
import resource


def scanned():
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, size + 2**20))  # less than a stack
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        scan(4, 4)
    return list(numbers[4999::5000])


print(in_a_child(scanned))
"""
    assert ast.literal_eval(said(program)) == [5000.0] * 4
