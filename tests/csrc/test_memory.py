"""Twenty thousand calls leave nothing behind, wrong ones included: neither memory nor a reference to an argument."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import sys

import pytest
import torch
from helpers import make_logits

import cmdp_fast as cf
from cmdp_fast.cpu import matrix, native

ROUNDS, CALLS = 4, 410  # of each of fourteen kinds, but for the two that take milliseconds: 20,160 in all
WATCHED = "libasan" in os.environ.get("LD_PRELOAD", "")  # it keeps what has been freed


class _Mallinfo2(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_size_t * 10)]


def allocated() -> tuple[int, int]:
    """Bytes that malloc has given out, and blocks of Python's own allocator: exact, where resident memory is not."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo2
    numbers = mallinfo().numbers
    return numbers[7] + numbers[4], sys.getallocatedblocks()  # uordblks and hblkhd


def has_mallinfo() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


def kinds_of_calls(backend: str):
    """One function a kind of call."""
    x, y, tokens = make_logits(2, 17), make_logits(2, 17, seed=1), torch.tensor([3, 4])
    wrong = torch.tensor([3, 17])
    leaf, mask = make_logits(2, 17).requires_grad_(), torch.tensor([True, False])
    cost, ids = torch.rand(2, 5), torch.tensor([[1, 5], [0, 2]])
    reference = torch.log_softmax(y, -1).gather(-1, ids)

    def forward():
        cf.token_stats(x, y, tokens, mask=mask, backend=backend)

    def backward():
        leaf.grad = None
        cf.token_stats(leaf, y, tokens, backend=backend).reverse_kl.sum().backward()

    def mixture():
        leaf.grad = None
        cf.divergence(leaf, y, "jsd", backend=backend).sum().backward()

    def listed():
        leaf.grad = None
        cf.topk_stats(leaf, ids, reference, tokens, backend=backend).reverse_kl.sum().backward()

    def scan():
        cf.budget_trace(cost, 1.0, backend=backend)

    def wrong_token():
        with contextlib.suppress(ValueError):
            cf.token_stats(x, y, wrong, backend=backend)

    def wrong_cost():
        with contextlib.suppress(ValueError):
            cf.budget_trace(cost.flatten(), 1.0, cu_seqlens=wrong, backend=backend)

    return [forward, backward, mixture, listed, scan, wrong_token, wrong_cost]


@pytest.mark.skipif(not has_mallinfo() or WATCHED, reason="nothing tells what malloc has given out")
def test_memory_is_constant():
    """In the quietest of some rounds: caches grow now and then, and more at first, a leak does in every round."""
    calls = [
        call for backend in (["cpu"] if native is not None else []) + ["torch"] for call in kinds_of_calls(backend)
    ]
    gc.collect()
    gc.freeze()  # what earlier tests have left is not looked through
    try:
        for call in calls:
            rounds, times = (ROUNDS, CALLS) if call.__name__ != "listed" else (8, 30)
            readings = []
            for _ in range(rounds):
                for _ in range(times):
                    call()
                readings.append(allocated())
            bytes_more, blocks_more = (
                min(now - then for then, now in itertools.pairwise(column)) for column in zip(*readings, strict=True)
            )
            assert bytes_more < 8 * times and blocks_more < times / 2, (call, bytes_more, blocks_more)
    finally:
        gc.unfreeze()


@pytest.mark.skipif(native is None, reason="the native module is not built")
def test_an_error_keeps_no_reference():
    rows, tokens, saved = matrix(make_logits(2, 8)), [0] * 6, 64
    strides: list[int] = [8]
    given = (rows, tokens, strides)
    before = [sys.getrefcount(value) for value in given]
    for _ in range(1000):
        with pytest.raises(ValueError, match="tokens is not aligned"):
            native.token_stats(rows, rows, 3, 0, 8, 1.0, [8] * 6, False, saved, 1)
        with pytest.raises(ValueError, match="a null pointer"):
            native.token_stats(rows, rows, 64, 0, 8, 1.0, tokens, False, 0, 1)
        with pytest.raises(TypeError):
            native.token_stats(rows, rows, 64, 0, 8, 1.0, tokens, False, 0, "1")
        with pytest.raises(ValueError, match="not aligned"):
            native.Matrix(65, "float32", strides, strides, 8)
    assert [sys.getrefcount(value) for value in given] == before
