"""The native module trusts nobody: wrong addresses, sizes and tags raise before anything is read."""

import contextlib
import ctypes
import mmap
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import make_logits

import cmdp_fast as cf
from cmdp_fast.cpu import matrix, native
from cmdp_fast.layout import SAVED, address
from cmdp_fast.states import FIELDS

pytestmark = pytest.mark.skipif(native is None, reason="the native module is not built")


def call(x=None, *, tokens=None, vocab=8, temperature=1.0, statistics=None, saved=None, threads=1, teacher=None):
    x = matrix(make_logits(2, 8)) if x is None else x
    keep = (
        [torch.empty(2) for _ in range(6)],
        torch.empty(2, native.SAVED, dtype=torch.float64),
        torch.zeros(2, dtype=torch.int64),
    )
    native.token_stats(
        x,
        x if teacher is None else teacher,
        keep[2].data_ptr() if tokens is None else tokens,
        0,
        vocab,
        temperature,
        [t.data_ptr() for t in keep[0]] if statistics is None else statistics,
        False,
        keep[1].data_ptr() if saved is None else saved,
        threads,
    )


def test_both_sides_agree_on_what_is_saved():
    assert (SAVED, len(FIELDS)) == (native.SAVED, native.STATE)


def test_a_right_call_passes():
    x = make_logits(2, 8)
    call(matrix(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tokens": 0}, "tokens is a null pointer"),
        ({"tokens": 3}, "tokens is not aligned"),
        ({"saved": 0}, "saved is a null pointer"),
        ({"vocab": 9}, "vocab is outside the width"),
        ({"vocab": 0}, "vocab is outside the width"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"statistics": [8, 0, 0, 0, 0, 0]}, "a statistic is a null pointer"),
    ],
)
def test_wrong_calls_raise(arguments, message):
    x = make_logits(2, 8)
    with pytest.raises(ValueError, match=message):
        call(matrix(x), **arguments)


def test_nothing_is_read_before_all_is_checked():
    with pytest.raises(ValueError, match="saved is a null pointer"):
        call(tokens=64, saved=0)  # an address that is no one's
    with pytest.raises(ValueError, match="threads must be at least 1"):
        call(tokens=64, threads=-1)


def test_more_threads_than_a_system_has_are_not_started():
    count = 20000
    cost, limits = torch.rand(count), torch.ones(count, dtype=torch.float64)
    cumulative, remaining, excess = (torch.empty(count) for _ in range(3))
    violated, first = torch.empty(count, dtype=torch.bool), torch.empty(count, dtype=torch.int64)
    trace = [t.data_ptr() for t in (cumulative, remaining, violated, first, excess)]
    rule = (1.0, False, False)
    native.budget_trace(
        cost.data_ptr(), False, 0, 0, count, count, limits.data_ptr(), rule, trace, None, 0, 0, 2**31 - 1
    )
    assert torch.equal(cumulative, cost)


LOST = "has lost memory: its storage has shrunk or was released"


@pytest.mark.parametrize("left", [0, 2])
def test_memory_that_is_gone_is_not_read(left):
    """A storage may shrink under a tensor, or be released: a mask would then count as none."""
    for t in (make_logits(4, 9), make_logits(4, 9)[:, ::2], make_logits(4, 9)[3:]):
        t.untyped_storage().resize_(left)
        for given in (address, matrix):
            with pytest.raises(ValueError, match=LOST):
                given(t)
    empty = make_logits(4, 9)[4:]
    empty.untyped_storage().resize_(left)
    assert address(empty) in (0, empty.data_ptr())


def test_memory_that_was_lost_before_the_backward_pass_is_not_read():
    logits, mask = make_logits(4, 9).requires_grad_(), torch.ones(4, dtype=torch.bool)
    stats = cf.token_stats(logits, make_logits(4, 9, seed=1), torch.arange(4), mask=mask, backend="cpu")
    mask.untyped_storage().resize_(2)
    with pytest.raises(ValueError, match=LOST):
        stats.reverse_kl.sum().backward()


def test_calls_at_once_with_the_same_tensors(threads):
    threads(2)
    x, y, tokens = make_logits(16, 9001), make_logits(16, 9001, seed=1), torch.arange(16)
    upstream = torch.ones(16, dtype=torch.float64)
    alone = cf.token_stats(x, y, tokens, backend="cpu")
    wrong = []

    def work():
        for _ in range(10):
            leaf = x.detach().requires_grad_()
            stats = cf.token_stats(leaf, y, tokens, backend="cpu")
            stats.forward_kl.backward(upstream.float())
            if not all(torch.equal(a, b.detach()) for a, b in zip(alone, stats, strict=True)):
                wrong.append(stats)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_tokens_that_change_during_a_call_reach_no_other_memory():
    """They are checked first, while another thread may write to them; a column that is none has no logit."""
    x, y = make_logits(64, 2001), make_logits(64, 2001, seed=1)
    tokens, stop = torch.zeros(64, dtype=torch.int64), threading.Event()

    def disturb():
        while not stop.is_set():
            tokens.fill_(2**40)
            tokens.fill_(0)

    worker = threading.Thread(target=disturb)
    worker.start()
    try:
        for _ in range(200):
            with contextlib.suppress(ValueError):
                cf.token_stats(x, y, tokens, backend="cpu")
    finally:
        stop.set()
        worker.join()


def test_tokens_are_checked_here_too():
    x, tokens = make_logits(2, 8), torch.tensor([0, 8])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        call(matrix(x), tokens=tokens.data_ptr())


def test_rows_must_agree():
    x, y = make_logits(2, 8), make_logits(3, 8)
    with pytest.raises(ValueError, match="different numbers of rows"):
        call(matrix(x), teacher=matrix(y))


TAILS = {
    "student": 0, "ids": 64, "listed": 3, "tokens": 64, "mask": 0, "vocab": 8, "temperature": 1.0, "first_column": 0,
    "states": [64] * 3, "threads": 1,
}  # fmt: skip
GRADIENT = {**dict(list(TAILS.items())[:8]), "gradient": [64] * 6, "out": 0, "threads": 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ids": 0}, "ids is a null pointer"),
        ({"ids": 65}, "ids is not aligned"),
        ({"listed": -1}, "the number of ids is impossible"),
        ({"listed": 2**62}, "the number of ids is impossible"),
        ({"listed": 2**59}, "the number of ids is impossible"),
        ({"listed": 2**63 - 1}, "the number of ids is impossible"),  # twice that is -2
        ({"tokens": 0}, "tokens is a null pointer"),
        ({"vocab": 9}, "vocab is outside the width"),
        ({"first_column": -1}, "first_column is negative"),
        ({"first_column": 2**63 - 8}, "the last column overflows 64 bits"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"states": [0, 64, 64]}, "fields is a null pointer"),
        ({"states": [64, 0, 64]}, "listed is a null pointer"),
        ({"states": [64, 64, 0]}, "own is a null pointer"),
        ({"gradient": [64, 64, 0, 64, 64, 64]}, "a number of the gradient is a null pointer"),
        ({"out": (3, 8)}, "the gradient must have the rows, width and dtype"),
    ],
)
def test_wrong_calls_for_a_tail_raise(arguments, message):
    """Nothing is read of the addresses, which are no one's."""
    x = matrix(make_logits(2, 8))
    for function, right in ((native.update_tails, TAILS), (native.tail_backward, GRADIENT)):
        if set(arguments) <= set(right):
            given = {**right, "student": x, "out": x, **arguments}
            if isinstance(given["out"], tuple):
                given["out"] = matrix(make_logits(*given["out"]))
            with pytest.raises(ValueError, match=message):
                function(*(given[name] for name in right))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, "float32", [2], [8], 8), "null pointer"),
        ((64, "int8", [2], [8], 8), "dtype 'int8' is not one of"),
        ((64, "float32", [2], [8, 1], 8), "as many strides"),
        ((64, "float32", [-2], [8], 8), "negative size"),
        ((64, "float32", [2], [-8], 8), "negative size or stride"),
        ((64, "float32", [2], [8], -1), "negative width"),
        ((64, "float32", [2**40, 2**40], [1, 1], 8), "overflows 64 bits"),
        ((64, "float32", [2], [2**62], 8), "overflows 64 bits"),
        ((64, "float32", [2**40], [0], 2**30), "overflows 64 bits"),
        ((65, "float32", [2], [8], 8), "not aligned"),
        ((64, "float32", [1] * 9, [1] * 9, 8), "at most 8"),
    ],
)
def test_wrong_matrices_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        native.Matrix(*arguments)


def test_wrong_offsets_raise():
    cost, offsets, limits = torch.zeros(4), torch.tensor([0, 9]), torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="offsets must begin with 0 and end with the number of tokens"):
        native.budget_trace(
            cost.data_ptr(),
            False,
            0,
            offsets.data_ptr(),
            1,
            4,
            limits.data_ptr(),
            (1.0, False, False),
            [8] * 5,
            None,
            0,
            0,
            1,
        )


def test_an_unknown_variant_raises():
    with pytest.raises(ValueError, match="no kernel variant named 'sse9'"):
        native.set_variant("sse9")
    for name, runs in native.variants():
        if not runs:
            with pytest.raises(RuntimeError, match=f"cannot run the kernel variant '{name}'"):
                native.set_variant(name)


FLAGS = {  # as Linux names them, of the levels of x86-64
    "x86_64_v2": {"sse4_2", "popcnt"},
    "x86_64_v3": {"avx2", "fma", "bmi1", "bmi2", "f16c"},
    "x86_64_v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


def test_the_best_variant_that_the_processor_runs_is_chosen():
    known = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    for name, runs in native.variants():
        if name in FLAGS and known:
            below = set().union(*(FLAGS[each] for each in FLAGS if each <= name))
            assert runs == (below <= set(known)), name
    assert native.variant() == [name for name, runs in native.variants() if runs][-1]


def test_the_gil_is_released():
    """A Python thread makes progress while a kernel runs."""
    x, y = make_logits(64, 60000), make_logits(64, 60000, seed=1)
    tokens = torch.zeros(64, dtype=torch.int64)
    ticks, stop = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0)

    worker = threading.Thread(target=tick)
    worker.start()
    while ticks == 0:
        time.sleep(0.001)
    before = ticks
    for _ in range(20):
        cf.token_stats(x, y, tokens)
    during = ticks - before
    stop.set()
    worker.join()
    assert during > 20  # with the GIL held there is at most a switch between two calls


def test_advice_on_memory_changes_nothing_in_it():
    values = torch.arange(5_000_000, dtype=torch.float32)
    native.advise_huge_pages(values.data_ptr(), values.nbytes)
    assert torch.equal(values, torch.arange(5_000_000, dtype=torch.float32))
    for nothing in ((0, 1 << 30), (values.data_ptr(), 0), (values.data_ptr() + 8, 100), (2**64 - 8, 100)):
        assert native.advise_huge_pages(*nothing) is False


def advised(address, size):
    """Of a piece of memory, the part that has asked for huge pages: from where to where, as Linux tells."""
    parts, here = [], None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            here = [int(end, 16) - address for end in name.split("-")]
        elif name == "VmFlags:" and "hg" in rest.split() and here[1] > 0 and here[0] < size:
            parts.append(here)
    return parts


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
@pytest.mark.parametrize("inside, size, pages", [(8, 4, [1, 4]), (0, 4, [0, 4]), (-8, 4, [0, 3])])
def test_advice_is_about_the_whole_pages_of_a_range(inside, size, pages):
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 8 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE, 0, 8 * page)  # apart from all other memory
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    before = advised(address, 8 * page)
    assert native.advise_huge_pages(address + page + inside, size * page)
    assert not before and advised(address, 8 * page) == [[(1 + each) * page for each in pages]]


def test_the_features_of_the_processor_are_those_that_linux_tells():
    known = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if not FLAGS["x86_64_v2"] <= set(known):
        pytest.skip("the names are those of x86-64")
    names = ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl")
    assert native.cpu_features() == [name for name in names if name.replace(".", "_") in known]


def test_the_warning_of_a_fork_names_the_caller(threads, monkeypatch):
    threads(2)
    monkeypatch.setattr("cmdp_fast.cpu._untold", True)
    with pytest.warns(UserWarning, match="this process was forked after") as said:
        cf.divergence(make_logits(2, 9), make_logits(2, 9, seed=1), backend="cpu")
    assert [warning.filename for warning in said if "forked" in str(warning.message)] == [__file__]


@pytest.mark.skipif(native is None or not native.OPENMP, reason="the native module has no threads")
def test_threads_compute_as_the_one_that_calls():
    """Each has its own way with numbers that are nearly 0, and with rounding."""
    student, before = make_logits(512, 600), torch.get_num_threads()
    student[:, ::2] -= 85

    def gradient(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        logits = student.clone().requires_grad_()
        value = cf.token_stats(logits, make_logits(512, 600, seed=1), torch.zeros(512, dtype=torch.long)).entropy
        return torch.autograd.grad(value.sum() * 1e-3, logits)[0].view(torch.int32)

    try:
        whole = gradient(4)  # and all threads are there
        if not torch.set_flush_denormal(True):
            pytest.skip("the processor flushes nothing")
        alone, shared = gradient(1), gradient(4)
        torch.set_flush_denormal(False)
        again = gradient(4)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert not torch.equal(alone, whole) and torch.equal(alone, shared)
    assert torch.equal(whole, again)
