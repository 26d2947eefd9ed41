"""Whatever the tiles, linear_token_stats gives the same; how large they are, what memory they take, what is kept."""

import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import check, evaluate, make_inputs

import cmdp_fast as cf
from cmdp_fast import containers
from cmdp_fast.cpu import native
from cmdp_fast.ops import free_memory, gemm, kept_logits, tile_size
from cmdp_fast.ops.backends import INTERPRETED

pytestmark = pytest.mark.tiles

GIB = 2**30
needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")


@pytest.mark.parametrize("vocab", [1, 16, 37, 768, 1700])
def test_values_and_gradients_whatever_the_tiles(vocab, tiles, backend):
    if backend == "triton" and vocab > 40 * tile_size.COLUMNS:
        pytest.skip("a hundred tiles take the interpreter a minute")
    check(make_inputs(rows=(3, 5), vocab=vocab, biased=True), backend)


@settings(max_examples=60)
@given(st.data())
def test_any_shape_any_tiles(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    rows, vocab = draw(0, 9), draw(1, 40)
    inputs = make_inputs(
        rows=(rows,), vocab=vocab, hidden=(draw(1, 9), draw(1, 9)), student=torch.float64, teacher=torch.float64
    )
    mask = torch.tensor([data.draw(st.booleans()) for _ in range(rows)], dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_size, "ROWS", draw(1, 5))
        patch.setattr(tile_size, "COLUMNS", draw(1, 11))
        patch.setenv("CMDP_FAST_TILE_BYTES", str(draw(1, 1000)))
        check(inputs, None, mask=mask, vocab_size=draw(int(inputs["tokens"].max()) + 1 if rows else 1, vocab))


@pytest.mark.parametrize("options", [{}, {"student_softcap": 3.0, "teacher_scale": 0.5, "temperature": 0.7}])
@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16])
def test_keeping_the_logits_changes_nothing(dtype, options, tiny_tiles, backend):
    """Nor does a second backward pass: what is kept is not written over. (A GPU's half precision is another matter:
    there the teacher's logits are rounded where they are kept, test_linear_halves.py.)"""
    if torch.get_default_device().type != "cpu":
        dtype = torch.float32
    inputs = make_inputs(rows=(6,), vocab=50, student=dtype, teacher=dtype, biased=True)
    mask = torch.tensor([True, True, False, True, True, True])
    leaves = {name: inputs[name].requires_grad_() for name in ("student_hidden", "student_weight", "student_bias")}
    outcomes = []
    for saved in ("recompute", "teacher", "tiles", "auto"):
        stats = cf.linear_token_stats(**inputs, mask=mask, saved=saved, backend=backend, **options)
        loss = (stats.logprob + stats.entropy + stats.reverse_kl + stats.forward_kl).sum()
        first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        again = torch.autograd.grad(loss, list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        outcomes.append((*stats, *first))
    for plain, *others in zip(*outcomes, strict=True):
        assert all(torch.equal(plain, other) for other in others)


def kept_shapes(call):
    """The shapes of what `call` keeps for a backward pass."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        result = call()
    return result, shapes


@pytest.mark.parametrize("saved, logits", [("recompute", 0), ("teacher", 1), ("tiles", 2), ("auto", 2)])
def test_what_is_kept_and_when_nothing_is(saved, logits, backend, monkeypatch):
    """Nothing where no gradient is wanted, and then no memory is asked for either."""
    asked = []
    monkeypatch.setattr(kept_logits, "free_memory", lambda device: asked.append(device) or 2**30)
    inputs = make_inputs(rows=(6,), vocab=64)
    call = lambda: cf.linear_token_stats(**inputs, saved=saved, backend=backend)  # noqa: E731
    stats, shapes = kept_shapes(call)
    assert not stats.logprob.requires_grad and not shapes
    inputs["student_hidden"].requires_grad_()
    with torch.no_grad():
        stats, shapes = kept_shapes(call)
    assert not stats.logprob.requires_grad and not shapes and not asked
    stats, shapes = kept_shapes(call)
    assert stats.logprob.requires_grad and shapes.count((6, 64)) == logits
    assert len(asked) == (1 if saved == "auto" else 0)


@pytest.mark.parametrize("saved", ["recompute", "teacher", "tiles"])
@pytest.mark.parametrize("present", [("logprob",), ("logprob", "entropy"), ("reverse_kl",), ("entropy", "forward_kl")])
def test_no_product_that_no_gradient_needs(present, saved, tiny_tiles, backend, monkeypatch):
    """Counted: a backward pass for log-probability and entropy alone has none of the teacher's."""
    inputs = make_inputs(rows=(6,), vocab=50, hidden=(12, 20))
    leaves = [inputs[name].requires_grad_() for name in ("student_hidden", "student_weight")]
    stats = cf.linear_token_stats(**inputs, saved=saved, backend=backend)
    products, multiply = {12: 0, 20: 0}, gemm.multiply

    def counted(a, b, out):
        products[a.shape[1]] += 1
        multiply(a, b, out)

    monkeypatch.setattr(gemm, "multiply", counted)
    torch.autograd.grad(sum(getattr(stats, name).sum() for name in present), leaves)
    tiles = 2 * 4  # of at most 4 x 16
    diverges = "reverse_kl" in present or "forward_kl" in present
    assert products[12] == (0 if saved == "tiles" else tiles)
    assert products[20] == (tiles if diverges and saved == "recompute" else 0)


@pytest.mark.parametrize(
    "rows, free, saved",
    [
        (1000, None, "recompute"),
        (1000, 0, "recompute"),
        (1000, 2 * 1000 * 5000 * 4 - 2, "recompute"),
        (1000, 2 * 1000 * 5000 * 4, "teacher"),
        (1000, 4 * 1000 * 5000 * 4 - 2, "teacher"),
        (1000, 4 * 1000 * 5000 * 4, "tiles"),
        (0, 0, "tiles"),
    ],
)
def test_a_choice_by_free_memory(rows, free, saved, monkeypatch):
    monkeypatch.setattr(kept_logits, "free_memory", lambda device: free)
    device = torch.device("cpu")
    assert kept_logits.choose(device, rows, 5000, kept_logits.Dtypes(torch.float32, torch.float32)) == saved
    if saved == "teacher":  # two bytes a column: half the memory does
        monkeypatch.setattr(kept_logits, "free_memory", lambda device: 2 * rows * 5000 * 2)
        assert kept_logits.choose(device, rows, 5000, kept_logits.Dtypes(torch.float32, torch.bfloat16)) == saved


def test_the_choice_is_said_when_it_changes(monkeypatch, caplog):
    inputs = make_inputs(rows=(10,), vocab=50)
    inputs["student_hidden"].requires_grad_()
    monkeypatch.setattr(kept_logits, "_said", {})
    with caplog.at_level(logging.INFO, logger="cmdp_fast"):
        for free in (GIB, GIB, 5000, 5000, 100, None, GIB):
            monkeypatch.setattr(kept_logits, "free_memory", lambda device, free=free: free)
            cf.linear_token_stats(**inputs, saved="auto")
    said = [record.getMessage() for record in caplog.records]
    start = 'linear_token_stats(saved="auto") keeps '
    assert said == [
        f"{start}both models' logits for the backward pass on cpu: 0.537 GB, half of what is free, is for logits",
        f"{start}the teacher's logits for the backward pass on cpu: 2.5e-06 GB, half of what is free, is for logits",
        f"{start}no logits for the backward pass on cpu: 5e-08 GB, half of what is free, is for logits",
        f"{start}both models' logits for the backward pass on cpu: 0.537 GB, half of what is free, is for logits",
    ]


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_graph_chooses_while_it_is_made(dynamic, monkeypatch):
    """Sizes that are symbols included: they are compared and need not be known."""
    asked = []
    monkeypatch.setattr(kept_logits, "free_memory", lambda device: asked.append(device) or GIB)

    def loss(**inputs):
        return cf.linear_token_stats(**inputs, saved="auto").reverse_kl.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for rows, vocab in ((6, 50), (7, 60), (8, 70), (9, 80)):
        inputs = make_inputs(rows=(rows,), vocab=vocab)
        inputs["student_hidden"].requires_grad_()
        asked.clear()
        value, shapes = kept_shapes(lambda inputs=inputs: compiled(**inputs))
        graphs = len(asked)
        assert torch.allclose(value, loss(**inputs)) and shapes.count((rows, vocab)) == 2
    assert graphs == 0  # the last sizes needed none of their own


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Writes files of /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(containers, "PROC", tmp_path / "proc")
    monkeypatch.setattr(containers, "CGROUPS", tmp_path / "cgroup")

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal:       9000 kB\nMemAvailable:   5120 kB\nHugePages_Total:       0\n")
    write("proc/self/cgroup", "0::/pod/job\n")
    return write


@pytest.mark.parametrize("limit, expected", [("max", 5 * 2**20), ("3000000", 2 * 10**6), ("10", 0), (None, 5 * 2**20)])
@pytest.mark.parametrize("group", ["", "/pod", "/pod/job"])
def test_the_free_memory_of_the_host(limit, expected, group, host, tmp_path):
    if limit is not None:
        host(f"cgroup{group}/memory.max", limit + "\n")
        host(f"cgroup{group}/memory.current", "1000000\n")
    assert free_memory.free_memory(torch.device("cpu")) == expected
    (tmp_path / "proc" / "meminfo").unlink()
    assert free_memory.free_memory(torch.device("cpu")) is None


ODD_GROUPS = {  # names of groups are any bytes
    "not UTF-8": b"0::/user\xff\n",
    "other ends of lines": "4:memory:/a\x0bb\u2028c\x85d\n0::/\n".encode(),
    "no colons": b"garbage\n\n0:\n4:memory\n",
    "NUL": b"0::/a\x00b\n",
    "above the root": b"0::/../../x\n4:memory:/../y\n",
    "nothing": b"",
}


@pytest.mark.parametrize("groups", ODD_GROUPS)
@pytest.mark.parametrize("number", ["9" * 5000, "-1", "\u0663", "1 2", "", "max"])
def test_what_a_container_says_may_be_anything(groups, number, host, tmp_path):
    (tmp_path / "proc" / "self" / "cgroup").write_bytes(ODD_GROUPS[groups])
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        host(f"cgroup/{name}", number)
    for name in ("memory.current", "memory/memory.usage_in_bytes"):
        host(f"cgroup/{name}", "1000")
    (tmp_path / "cgroup" / "memory.stat").write_bytes(b"inactive_file \xff\n")
    host("cgroup/cpu.max", f"{number} 0")
    host("cgroup/cpu/cpu.cfs_quota_us", number)
    host("cgroup/cpu/cpu.cfs_period_us", "0")
    expected = {5 * 2**20} | ({0} if number == "1 2" else set())  # the first word counts, where the group is found
    assert free_memory.free_memory(torch.device("cpu")) in expected
    assert not list(containers.processor_limits())


@pytest.mark.parametrize("name", ["a\x0bb", "a\u2028b", "a\x85b", "a:b"])
def test_a_group_of_any_name_is_found(name, host):
    host("proc/self/cgroup", f"0::/{name}\n")
    host(f"cgroup/{name}/memory.max", "3000000\n")
    host(f"cgroup/{name}/memory.current", "1000000\n")
    assert free_memory.free_memory(torch.device("cpu")) == 2_000_000


@pytest.mark.parametrize("version", [1, 2])
def test_files_that_a_container_has_read_are_free_memory(version, host):
    """The kernel gives them up; a pod that has read a model would seem full."""
    folder, total = ("cgroup", "") if version == 2 else ("cgroup/memory", "total_")
    if version == 1:
        host("proc/self/cgroup", "5:cpu:/pod\n4:memory:/pod\n")
    host(f"{folder}/{'memory.max' if version == 2 else 'memory.limit_in_bytes'}", "3000000\n")
    host(f"{folder}/{'memory.current' if version == 2 else 'memory.usage_in_bytes'}", "2900000\n")
    told = {
        f"anon 1\nfile 2400000\n{total}inactive_file 1500000\n{total}active_file 500000\n": 2_100_000,
        "anon 1\n": 100_000,
        f"{total}inactive_file\n": 100_000,
    }
    for lines, expected in told.items():
        host(f"{folder}/memory.stat", lines)
        assert free_memory.free_memory(torch.device("cpu")) == expected


def test_the_free_memory_of_a_gpu(monkeypatch):
    """What the driver has, and what PyTorch holds unused; no question while a graph is captured."""
    gpu, refused = torch.device("cuda", 1), RuntimeError("does not yet support getDeviceStats")
    held = {"reserved_bytes": {"all": {"current": 70}}, "allocated_bytes": {"all": {"current": 30}}}
    given = {"mem_get_info": (100, 1000), "memory_stats_as_nested_dict": held}
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, {gpu: value}.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert free_memory.free_memory(gpu) == 140

    def fails(device):
        raise refused

    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", fails)
    assert free_memory.free_memory(gpu) == 100
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    assert free_memory.free_memory(gpu) is None
    assert free_memory.free_memory(torch.device("meta")) is None


def allocated(call) -> int:
    """The most memory in bytes that `call` holds at once beyond what stood before, as PyTorch's allocator counts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    total = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    del kept
    return most


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_rows_times_vocabulary(dtype, monkeypatch):
    vocab, hidden, tile = 6000, 8, 2**18
    monkeypatch.setattr(tile_size, "ROWS", 32)
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", str(tile))
    for rows in (32, 512):
        inputs = make_inputs(rows=(rows,), vocab=vocab, hidden=(hidden, hidden), student=dtype, teacher=dtype)
        head = vocab * hidden * dtype.itemsize
        pieces = 3 * 1024 * hidden * 4  # of both heads and of the head's gradient, in float32
        per_row = rows * (6 * 8 + 3 * 13 * 8 + 8 * 8 * hidden + 400)
        for call, extra in (
            (lambda inputs=inputs: cf.linear_token_stats(**inputs), 0),
            (lambda inputs=inputs: evaluate(cf.linear_token_stats, inputs), 3 * head),  # clones and the gradient
        ):
            most = allocated(call)
            assert most <= tile + pieces + per_row + extra, (rows, most)
            assert most < rows * vocab * 4 or rows < 512


@pytest.mark.parametrize("bad", ["0", "-1", "many"])
def test_a_tile_size_that_is_none(bad, monkeypatch):
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", bad)
    with pytest.raises(ValueError, match="CMDP_FAST_TILE_BYTES must be a positive number of bytes"):
        cf.linear_token_stats(**make_inputs(rows=(2,), vocab=5))


def test_the_tile_follows_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("CMDP_FAST_TILE_BYTES", raising=False)
    for level, size, sharing in ((1, "32K", "0"), (3, "16384K", "0-2,7")):
        index = tmp_path / f"index{level}"
        index.mkdir()
        for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", sharing)):
            (index / name).write_text(text + "\n")
    cpu = torch.device("cpu")
    for folder, share in ((tmp_path, 4 * 2**20), (tmp_path / "absent", tile_size.UNKNOWN_CACHE)):
        tile_size._cache_of_a_core.cache_clear()
        monkeypatch.setattr(tile_size, "CACHES", folder)
        size = tile_size.tile_bytes(cpu)
        assert size == share * torch.get_num_threads() // tile_size.SHARE
        for rows, vocab in ((1, 151936), (256, 151936), (1024, 49152), (5000, 100), (0, 10)):
            height, width = tile_size.tile_shape(rows, vocab, 8, cpu)
            assert 1 <= height <= tile_size.ROWS and 1 <= width <= vocab
            assert width <= tile_size.COLUMNS or height * width * 8 <= size
    tile_size._cache_of_a_core.cache_clear()


@pytest.mark.parametrize("free", [None, 0, GIB, 3 * GIB, 8 * GIB, 70 * GIB])
def test_the_tile_of_a_gpu_follows_from_its_memory(free, monkeypatch):
    monkeypatch.delenv("CMDP_FAST_TILE_BYTES", raising=False)
    monkeypatch.setattr(tile_size, "free_memory", lambda device: free)
    gpu, pair = torch.device("cuda", 0), 8
    size = tile_size.tile_bytes(gpu)
    assert size.bit_count() == 1 and size == (GIB if free is None or free >= 8 * GIB else max(1, min(size, free // 8)))
    for rows, vocab, beside in itertools.product((0, 1, 64, 1024, 8192, 8200, 20000), (10, 50257, 151936), (0, 6144)):
        height, width = tile_size.tile_shape(rows, vocab, pair, gpu, beside)
        assert 1 <= height <= max(1, min(rows, 8192)) and 1 <= width <= min(vocab, tile_size.WIDEST)
        assert height in (1, rows) or height % 128 == 0
        assert width == vocab or width % 256 == 0
        assert width <= 256 or (height * width * pair <= size and width * beside <= size)


def test_a_tile_fills_a_gpu(monkeypatch):
    """At the sizes that the docstring derives: ten tiles of the vocabulary, and no small one at the end."""
    monkeypatch.delenv("CMDP_FAST_TILE_BYTES", raising=False)
    monkeypatch.setattr(tile_size, "free_memory", lambda device: 60 * GIB)
    gpu = torch.device("cuda", 0)
    assert tile_size.tile_shape(8192, 151936, 8, gpu) == (8192, 15360)
    assert tile_size.tile_shape(64, 151936, 8, gpu) == (64, 30464)
    assert tile_size.tile_shape(12000, 151936, 8, gpu) == (6016, 21760)
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", str(2**28))
    assert tile_size.tile_shape(8192, 151936, 8, gpu) == (8192, 4096)
