"""The moment at which the native module ends the process (csrc/deadline.h), where Python cannot."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import threading
import time

import pytest
from faults import be_stopped, in_child

from cmdp_fast.cpu import native

pytestmark = pytest.mark.skipif(native is None or not hasattr(native, "Deadline"), reason="needs the native module")
PATTERN = r"(a+)+$", "a" * 60 + "!"  # keeps Python's lock for longer than anybody waits


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_it_ends_the_process_with_a_line(tmp_path):
    def child() -> int:
        native.Deadline(30.0, b"not yet\n", 3)
        deadline = native.Deadline(0.1, "it took too long: é\n".encode(), 5)
        time.sleep(60)
        return deadline is None

    assert in_child(child, tmp_path / "said") == 5
    assert (tmp_path / "said").read_text() == "it took too long: é\n"


def test_while_another_thread_keeps_pythons_lock(tmp_path):
    def child() -> int:
        deadline = native.Deadline(0.3, b"said\n", 2)
        thread = threading.Thread(target=re.match, args=PATTERN)
        thread.start()
        thread.join()
        return deadline is None

    assert in_child(child, tmp_path / "said") == 2
    assert (tmp_path / "said").read_text() == "said\n"


def test_where_nobody_reads_what_it_says():
    """A pipe that is full."""

    def child() -> int:
        _, full = os.pipe()
        os.set_blocking(full, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(full, b"x" * 4096)
        os.set_blocking(full, True)
        os.dup2(full, 2)
        deadline = native.Deadline(0.1, b"said\n", 7)
        time.sleep(60)
        return deadline is None

    assert in_child(child) == 7


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted as on Linux")
@pytest.mark.parametrize("how", ["called off", "called off twice", "dropped"])
def test_one_that_is_called_off_leaves_nothing(how):
    before = threads()
    for _ in range(200):
        deadline = native.Deadline(0.05, b"", 1)
        for _ in range({"called off": 1, "called off twice": 2, "dropped": 0}[how]):
            deadline.call_off()
        del deadline
    assert threads() == before
    time.sleep(0.1)


def test_a_fork_has_none(tmp_path):
    """Of its parent's, whose thread it has not: it may call it off, drop it, and have one of its own."""
    deadlines = [native.Deadline(0.3, b"", 1) for _ in range(2)]

    def child() -> int:
        time.sleep(0.5)
        deadlines.pop().call_off()
        deadlines.pop()
        own = native.Deadline(0.1, b"", 4)
        time.sleep(60)
        return own is None

    process = os.fork()
    if not process:
        os._exit(in_child(child))
    for deadline in deadlines:
        deadline.call_off()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 4


def test_time_in_which_the_process_is_stopped_does_not_count():
    """But for two seconds."""

    def child() -> int:
        deadline = native.Deadline(2.5, b"", 1)
        be_stopped(3.0)
        deadline.call_off()
        return 0

    assert in_child(child) == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="a thread is refused as by glibc")
def test_where_there_is_no_room_for_a_thread():
    """It says so, and who has made it takes signals still."""

    def child() -> int:
        library, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(256)
        assert not library.pthread_attr_init(attributes)
        assert not library.pthread_attr_setstacksize(attributes, ctypes.c_size_t(1 << 46))
        assert not library.pthread_setattr_default_np(attributes)
        with pytest.raises(RuntimeError, match="unavailable"):
            native.Deadline(0.1, b"", 1)
        return len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    assert in_child(child) == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are looked at as on Linux")
def test_its_thread_takes_no_signal():
    """Python's are woken by them."""
    before = {*os.listdir("/proc/self/task")}
    deadline = native.Deadline(30.0, b"", 1)
    (thread,) = {*os.listdir("/proc/self/task")} - before
    time.sleep(0.2)  # a thread that begins takes none for a moment, whatever it is to take
    with open(f"/proc/self/task/{thread}/status", encoding="ascii") as status:
        blocked = int(next(line.split()[1] for line in status if line.startswith("SigBlk:")), 16)
    assert all(
        blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGURG, signal.SIGVTALRM)
    )
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # and who has made it takes them still
    deadline.call_off()


def test_the_end_of_the_process_does_not_call_it_off(tmp_path):
    """Of a program that hangs as it ends."""

    def child() -> int:
        native.end_in(0.2, 6)
        thread = threading.Thread(target=re.match, args=PATTERN)
        thread.start()
        thread.join()
        return 0

    assert in_child(child) == 6
