"""Judges that are not ours, asked about completions in processes that may do nothing but think.

A completion is hostile input: whoever judges it may parse it, and many a judge of reasoning-gym's calls `eval` or
sympy's `parse_expr`, which runs it as Python. So it is shown to them in a process of its own, forked for this one
completion from one that has loaded the judge and never sees a completion (process.py).

What the process cannot do, on Linux with Landlock (5.13 or newer) and libseccomp (isolation.py):

- read or list files, but for the Python installation and the system's libraries; write, make, remove or run any;
- reach the network or another process: no sockets, signals, shared memory, tracing, no threads or children;
- see the environment of the training, its memory or its open files; keep anything for the next completion;
- take more time than it is given, or more memory than `MEMORY` (pool.py) beyond what the judge itself takes.

This is tried at each start, not taken for granted. What it does not contain: a completion that runs code decides its
own score (a judge that evaluates it asks for that); the Python installation can be read; time is spent up to its
limit; a fault of the kernel's. Elsewhere, macOS included, the process has limits of time and of memory as far as the
system has them, and nothing else: judges that evaluate code are refused there, unless the user insists.

What comes back is JSON. The pools of processes that libraries offer (concurrent.futures, Pebble, loky) unpickle it,
which would let the process run code where it was started from.
"""
