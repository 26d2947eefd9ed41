"""The rights that a process gives up before it judges: Landlock for files, seccomp for all other calls, limits for the
rest.

The process has no way back. Everything here is the standard library, `landlock` and `pyseccomp` (Linux only), so that
the process which judges need not import more.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import sys
import sysconfig
from collections.abc import Iterable
from typing import Any

# The needs of a computation in Python: memory, time, its open files, and to read the modules that it imports late.
CALLS = (
    *("read", "readv", "pread64", "write", "writev", "lseek", "close", "poll", "ppoll", "select", "pselect6"),
    *("stat", "fstat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2"),
    *("readlink", "readlinkat", "getcwd", "getdents64"),
    *("brk", "mmap", "munmap", "mremap", "mprotect"),
    *("futex", "futex_time64", "sched_yield", "sched_getaffinity", "rseq", "set_robust_list"),
    *("clock_gettime", "clock_getres", "gettimeofday", "time", "times", "getrusage", "sysinfo", "uname"),
    *("nanosleep", "clock_nanosleep", "restart_syscall", "setitimer", "getitimer", "alarm", "pause"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "sigreturn"),
    *("getpid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getrandom", "exit", "exit_group"),
)
# Of the commands of `fcntl`: F_SETOWN would have the kernel send signals to any process of the user's.
CONTROLS = (fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_DUPFD_CLOEXEC)
# How a file is not opened: but for reading, or to be emptied, which Landlock lets readers do before Linux 6.2.
CHANGES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | 0x400000  # O_TMPFILE's own bit
ADVICE = 25  # MADV_COLLAPSE; those from 100 on break pages for other processes
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo")
SINGLE = ("/dev/null", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo")


def close_files(packages: Iterable[str]) -> None:
    """From now on this process and its children read the Python installation, `packages` and system libraries alone,
    and write nothing that they have not open already. Raises OSError or ImportError where it cannot be done."""
    from landlock import FSAccess, Ruleset

    ctypes.set_errno(0)  # landlock takes the error number of an earlier call for its own
    rules = Ruleset()
    installed = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed += [os.path.join(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix)]  # conda's shared libraries
    for path in {*installed, *packages, *LIBRARIES}:
        if os.path.isdir(path):
            rules.allow(path, rules=FSAccess.READ_FILE | FSAccess.READ_DIR)
        elif os.path.isfile(path):
            rules.allow(path, rules=FSAccess.READ_FILE)
    for path in SINGLE:
        if os.path.exists(path):
            rules.allow(path, rules=FSAccess.READ_FILE)
    rules.apply()


def call_filter() -> Any:
    """A filter whose ``load()`` makes every system call but `CALLS` fail with EPERM from then on. Made before
    `close_files`, as libseccomp is looked for with the help of other programs. Raises ImportError or RuntimeError
    where there is no libseccomp."""
    import pyseccomp

    calls = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in CALLS:
        if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) >= 0:  # not every machine has all of them
            calls.add_rule(pyseccomp.ALLOW, name)
    for control in CONTROLS:
        calls.add_rule(pyseccomp.ALLOW, "fcntl", pyseccomp.Arg(1, pyseccomp.EQ, control))
    for name, flags in (("open", 1), ("openat", 2)):
        if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) >= 0:
            calls.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(flags, pyseccomp.MASKED_EQ, CHANGES, os.O_RDONLY))
    calls.add_rule(pyseccomp.ALLOW, "madvise", pyseccomp.Arg(2, pyseccomp.LE, ADVICE))
    return calls


def limit(seconds: float, space: int | None) -> None:
    """Limits of processor time and, where `space` says so, of the address space in bytes. No core files, and no file
    grows."""
    cpu = int(seconds) + 2  # the wall clock, which the parent of this process watches, comes first
    limits = {resource.RLIMIT_CPU: cpu, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    if space is not None:
        limits[resource.RLIMIT_AS] = space
    for kind, value in limits.items():
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def address_space() -> int | None:
    """Bytes of address space in use, None where the system does not tell (macOS, which has no limit of it either)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def die_with(parent: int) -> None:
    """Linux kills this process when `parent`, which has forked it, ends, and writes no core of it; elsewhere its time
    ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: a limit of 0 does not hold where cores go to a program
        if os.getppid() != parent:
            os._exit(1)


def breaches() -> list[str]:
    """The things that this process can still do and should not, by trying them: [] where the isolation holds."""
    possible = []
    for name, attempt in _ATTEMPTS.items():
        try:
            attempt()
        except PermissionError:
            continue
        except OSError as error:
            name = f"{name} ({error})"
        possible.append(name)
    return possible


def _child() -> None:
    if os.fork() == 0:
        os._exit(0)


def _run() -> None:
    os.execv("/bin/true", ["true"])


_ATTEMPTS = {
    "read a file": lambda: open("/proc/self/status", "rb").close(),  # there for everybody, even where /proc hides much
    "list a folder": lambda: os.listdir("/"),
    "write a file": lambda: os.close(os.open(os.devnull, os.O_WRONLY)),
    "empty a file": lambda: os.close(os.open(os.devnull, os.O_RDONLY | os.O_TRUNC)),
    "open a socket": lambda: socket.socket().close(),
    "start a process": _child,
    "send a signal": lambda: os.kill(os.getpid(), 0),
    "run a program": _run,
}
