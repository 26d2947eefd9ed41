"""A process that is forked after threads had work: the same results, and no wait for the parent's threads."""

from __future__ import annotations

import os
import select
import signal
import sys
import warnings

import pytest
import torch
from helpers import make_logits

import cmdp_fast as cf
from cmdp_fast import cpu

pytestmark = [
    pytest.mark.skipif(cpu.native is None, reason="the native module is not built"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]
SECONDS = 60  # until a child that hangs is killed


def results(x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor) -> list[bytes]:
    """Those of rows enough for several threads each: of a forward and a backward pass, and of a scan."""
    x = x.detach().requires_grad_()  # PyTorch would copy it in threads
    stats = cf.token_stats(x, y, tokens, backend="cpu")
    (stats.reverse_kl + stats.entropy).backward(torch.ones(len(tokens)))
    trace = cf.budget_trace(stats.reverse_kl.detach().repeat(512).view(32, -1), 3.0, backend="cpu")
    assert x.grad is not None
    return [t.numpy().tobytes() for t in (stats.reverse_kl.detach(), x.grad, trace.cumulative)]


def in_a_child(function) -> bytes:
    """What a forked process answers. It is killed if it hangs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writer, function())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    try:
        ended = select.select([reader], [], [], SECONDS)[0]
        if not ended:
            os.kill(pid, signal.SIGKILL)
        answer = os.read(reader, 4096) if ended else b"it hangs"
        os.waitpid(pid, 0)
        return answer
    finally:
        os.close(reader)


@pytest.mark.skipif(sys.platform == "darwin", reason="PyTorch's own use of Accelerate does not survive a fork")
def test_a_forked_process_computes_the_same_and_says_what_it_cannot_help(threads):
    threads(4)
    x, y = make_logits(32, 9001), make_logits(32, 9001, seed=1)
    tokens = torch.arange(32)
    expected = results(x, y, tokens)

    def child() -> bytes:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            same = [results(x, y, tokens) == expected for _ in range(3)]
        told = [str(w.message) for w in caught]
        return repr((same, told == [cpu.FORKED])).encode()

    assert in_a_child(child) == b"([True, True, True], True)"


def test_on_one_thread_a_forked_process_says_nothing(threads):
    threads(4)
    x, tokens = make_logits(32, 9001), torch.arange(32)
    cf.token_stats(x, x, tokens, backend="cpu")

    def child() -> bytes:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cf.token_stats(x, x, tokens, backend="cpu")
        return b"quiet"

    assert in_a_child(child) == b"quiet"
