"""Judges that are not ours, asked about completions in processes that may do nothing but think.

A completion is hostile input: its judge may parse it, and many a judge of reasoning-gym's calls `eval` or
sympy's `parse_expr`, which runs it as Python. So it is shown to them in a process of its own, forked for this one
completion from one that has loaded the judge and unpickles none (process.py).

The process cannot, on Linux with Landlock (5.13 or newer) and libseccomp (isolation.py):

- read or list files, but for the Python installation, the judge's packages and the system's libraries; write, make,
  remove or run any;
- reach the network or another process: no sockets, signals, shared memory, tracing, no threads or children;
- see the environment of the training, its memory or its open files; keep anything for the next completion;
- take more time than it is given, or more memory than `MEMORY` (pool.py) beyond that of the judge itself.

This is tried at each start, not taken for granted. It does not contain everything: a completion that runs code decides
its own score (a judge that evaluates it asks for that), and can read the other completions and reference answers of its
batch, whose bytes its process inherits; the Python installation can be read, and of other files whether they exist,
their sizes and dates; time is spent up to its limit, and up to `WORKERS` times `MEMORY`; a fault of the kernel's.
Elsewhere, macOS included, the process has limits of time and of memory as far as the system has them, which code can
evade, and nothing else: judges that evaluate code are refused there, unless the user insists.

The answers are JSON. The pools of processes that libraries offer (concurrent.futures, Pebble, loky) unpickle it,
which would let the process run code where it was started from.
"""
