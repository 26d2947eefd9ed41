"""The launch plan: that its model says what the analysis of the design said, and that it lists what the code launches.

Every time here is a prediction that is compared with another. The ranges are those of the analysis, by hand, from the
ceilings that were seen on an H100: they were written down before the model was.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import cmdp_fast as cf
from cmdp_fast.ops import backends, gemm

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
launch_plan = importlib.import_module("launch_plan")
launch_model = importlib.import_module("launch_model")
peer_plans = importlib.import_module("peer_plans")

MARGIN = 0.1
QWEN = launch_plan.QWEN
H100, H200 = launch_model.GPUS
ONE_TILE = launch_model.Shape(rows=8192, student_hidden=1536, teacher_hidden=3584, vocab=16384)


def milliseconds(steps, gpu="H100"):
    return launch_model.total(steps).seconds(gpu) * 1e3


def within(value, low, high):
    return low * (1 - MARGIN) <= value <= high * (1 + MARGIN)


# --------------------------------------------------------------------------------------------------------------
# What the analysis said


ANALYSIS = {  # milliseconds, forward and backward: the least and the most
    "floor": ((16.1, 16.1), (25.8, 25.8)),
    "sized for the L2 cache": ((30, 34), (53, 53)),
    "TRL": ((22, 23), (36, 40)),
    "8192 x 16384": ((20, 21), (31, 34)),
    "4096 x 32768": ((20, 21), (31, 34)),
    "teacher kept": ((21, 21), (20, 20)),
}


@pytest.fixture(scope="module")
def plans():
    return {
        "floor": launch_plan.floor(QWEN),
        "sized for the L2 cache": launch_plan.cache_sized_plan(QWEN),
        "TRL": peer_plans.trl_divergence(QWEN),
        "8192 x 16384": launch_plan.linear_plan(QWEN, (8192, 16384)),
        "4096 x 32768": launch_plan.linear_plan(QWEN, (4096, 32768)),
        "teacher kept": launch_plan.linear_plan(QWEN, (8192, 16384), "teacher"),
    }


@pytest.mark.parametrize("name", ANALYSIS)
def test_linear_token_stats_takes_what_the_analysis_said(name, plans):
    forward, backward = ANALYSIS[name]
    assert within(milliseconds(plans[name].forward), *forward)
    assert within(milliseconds(plans[name].backward), *backward)


@pytest.mark.parametrize("rows, microseconds", [(64, 22), (256, 61), (1024, 216), (8192, 1670)])
def test_statistics_of_logits_take_what_the_analysis_said(rows, microseconds):
    forward = launch_model.total(launch_plan.logits_forward(rows, 151936))
    assert within(forward.device["H100"] * 1e6, microseconds, microseconds)


def test_the_gradient_of_logits_takes_what_the_analysis_said():
    assert within(milliseconds(launch_plan.logits_backward(8192, 151936)), 2.6, 2.6)


def test_operations_and_bytes():
    """By hand: 2 x 8192 x 151936 x (1536 + 3584) operations; 608 KB and 912 KB per row of logits."""
    floor = launch_plan.floor(QWEN)
    forward, backward = launch_model.total(floor.forward), launch_model.total(floor.backward)
    assert forward.flops == 2 * 8192 * 151936 * (1536 + 3584) and round(forward.flops / 1e12, 2) == 12.75
    assert round(backward.flops / 1e12, 1) == 20.4
    teacher = launch_plan.linear_plan(QWEN, (8192, 16384), "teacher")
    assert round((backward.flops - launch_model.total(teacher.backward).flops) / 1e12, 1) == 8.9
    assert launch_model.total(launch_plan.logits_forward(1, 151936)).bytes == 4 * 151936
    assert launch_model.total(launch_plan.logits_backward(1, 151936)).bytes == 6 * 151936


# --------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("gpu", launch_model.GPUS, ids=lambda gpu: gpu.name)
def test_the_product_whose_rate_was_seen_has_it(gpu):
    seen = launch_model.Product(8192, 8192, 8192, out_size=2)
    assert seen.flops / seen.seconds(gpu) == pytest.approx(gpu.product_teraflops * 1e12)


def test_a_wave_is_whole():
    """132 multiprocessors: 12 x 11 output tiles of 128 x 256 take one wave, one row of tiles more takes two."""
    full = launch_model.Product(12 * 128, 11 * 256, 8192, out_size=2)
    fuller = full._replace(rows=13 * 128)
    tile = 2 * 128 * 256 * 8192 / launch_model.full_rate(H100)
    assert full._seconds(H100, 128, 256, 1) == pytest.approx(tile + launch_model.WAVE)
    assert fuller._seconds(H100, 128, 256, 1) == pytest.approx(2 * (tile + launch_model.WAVE))
    assert full.seconds(H100) <= fuller.seconds(H100)


def test_more_work_takes_no_less():
    product = launch_model.Product(1000, 3000, 2000, out_size=4)
    moved = launch_model.Pass(10**9, 10**9)
    for gpu in launch_model.GPUS:
        for field in ("rows", "columns", "inner"):
            larger = product._replace(**{field: 2 * getattr(product, field)})
            assert larger.seconds(gpu) > product.seconds(gpu) and larger.bytes > product.bytes
        assert product._replace(adds=True).bytes > product.bytes
        assert moved._replace(written=2 * 10**9).seconds(gpu) > moved.seconds(gpu)
        slow = moved._replace(instructions=1e12)
        assert slow.seconds(gpu) > moved.seconds(gpu)
    assert moved.seconds(H200) < moved.seconds(H100)


def test_a_thin_product_takes_as_long_as_its_bytes():
    thin = launch_model.Product(128, 151936, 1536, out_size=4)
    assert thin.seconds(H100) == pytest.approx(thin.bytes / 3.0e12)
    deep = launch_model.Product(128, 1536, 151936, out_size=2)  # few output tiles: the inner dimension is split
    assert deep.seconds(H100) < deep._seconds(H100, 128, 256, 1) / 4


def test_host_and_device_work_beside_each_other():
    small = launch_model.total([launch_model.Pass(0, 0, host=40e-6)] * 1000)
    assert small.seconds("H100") == pytest.approx(40e-3) and small.device["H100"] < 40e-3


def test_what_stays_is_not_made_again():
    recompute, teacher, tiles = (launch_plan.linear_plan(QWEN, (8192, 16384), saved) for saved in launch_plan.KEPT)
    times = [milliseconds(plan.backward) for plan in (recompute, teacher, tiles)]
    assert times == sorted(times, reverse=True)
    assert len(recompute.backward) - len(tiles.backward) == 2 * len(launch_plan.pieces(151936, 16384))
    assert "10.0 GB" in tiles.beside and "2.5 GB" in teacher.beside and not recompute.beside


# --------------------------------------------------------------------------------------------------------------
# The code launches what the plan lists


def recorded(monkeypatch):
    """The list that every product and every kernel of the loop is written to, as it is called."""
    seen, kernels = [], backends.get("torch")

    def watch(owner, name, described):
        function = getattr(owner, name)

        def watched(*args, **settings):
            seen.append(described(*args, **settings))
            return function(*args, **settings)

        monkeypatch.setattr(owner, name, watched)

    watch(gemm, "multiply", lambda a, b, out: ("product", *a.shape, b.shape[1], False))
    watch(
        gemm,
        "accumulate",
        lambda total, a, b, *_, fresh=False: ("product", *a.shape, b.shape[1], not fresh),
    )
    for name in ("update_states", "token_stats_backward"):
        watch(kernels, name, lambda pair, *_: ("kernel", *pair.student.shape))
    return seen


def listed(steps):
    """The same of a plan: which kernel it is does not stand there, but how many logits it reads."""
    found = []
    for step in steps:
        if isinstance(step, launch_model.Product):
            found.append(("product", step.rows, step.inner, step.columns, step.adds))
        elif step.host == launch_model.HOST_TRITON:
            found.append(("kernel", step.read))
    return found


@pytest.mark.parametrize("saved", launch_plan.KEPT)
@pytest.mark.parametrize("divergences", [True, False])
def test_the_loop_launches_what_the_plan_lists(saved, divergences, monkeypatch):
    rows, student_hidden, teacher_hidden, vocab = shape = launch_model.Shape(1100, 16, 24, 2000)
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", str(600 * 800 * 8))
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    hidden, weight = normal(rows, student_hidden).requires_grad_(), normal(vocab, student_hidden).requires_grad_()
    inputs = hidden, weight, normal(rows, teacher_hidden), normal(vocab, teacher_hidden)
    tokens = torch.randint(vocab, (rows,), generator=generator)
    seen = recorded(monkeypatch)
    stats = cf.linear_token_stats(*inputs, tokens, saved=saved, backend="torch")
    made = len(seen)
    loss = stats.logprob + stats.entropy + (stats.reverse_kl + stats.forward_kl if divergences else 0)
    loss.sum().backward()
    logits = [size for what, *size in seen if what == "kernel"]
    tile = logits[0]
    assert 1 < len({tuple(size) for size in logits}) <= 4 and len(logits) >= 2 * 4  # several tiles both ways
    plan = launch_plan.linear_plan(shape, tile, saved, divergences=divergences)
    # A kernel reads both models' logits: 8 bytes per column, 6 where the teacher's are kept in half precision, and 4
    # where the student's are all that a gradient needs.
    size = 6 if saved == "teacher" else 8
    for steps, calls, read in (
        (plan.forward, seen[:made], size),
        (plan.backward, seen[made:], size if divergences else 4),
    ):
        expected = [(what, read * n[0] * n[1]) if what == "kernel" else (what, *n) for what, *n in calls]
        assert listed(steps) == expected


def test_the_tile_is_the_one_of_the_code():
    height, width = launch_plan.tile_on_a_gpu(QWEN)
    assert 1 <= height <= 8192 and 1 <= width <= 151936 and height * width * 8 <= 2**30
    names = [plan.name for plan in launch_plan.our_plans(QWEN, update_launches=1)]
    assert sum(f"tiles of {height} x {width}" in name for name in names) >= len(launch_plan.KEPT)


def test_a_second_launch_of_a_tile_is_listed():
    one, two = (launch_plan.linear_plan(ONE_TILE, (8192, 16384), update_launches=n).forward for n in (1, 2))
    assert len(two) == len(one) + 1 == 4
    assert milliseconds(two) > milliseconds(one)


def test_trl_launches_what_its_plan_lists(monkeypatch):
    module = pytest.importorskip("trl.kernels.chunked_divergence", reason="trl 1.16 is not installed")
    shape = launch_model.Shape(20, 6, 8, 50)
    monkeypatch.setattr(module, "TOKEN_CHUNK_SIZE", 12)
    monkeypatch.setattr(module, "VOCAB_CHUNK_SIZE", 16)
    seen = []
    monkeypatch.setattr(module, "_addmm_fp32", lambda sums, a, b: seen.append(("product", *a.shape, b.shape[1], True)))
    project = module._project

    def watched(tile, hidden, weight, bias, start, end, dtype):
        seen.append(("product", *hidden.shape, end - start, False))
        project(tile, hidden, weight, bias, start, end, dtype)

    monkeypatch.setattr(module, "_project", watched)
    for name in ("_stats_tile", "_backward_tile"):
        function = getattr(module, name)

        def watched_kernel(*args, function=function, **settings):
            seen.append(("kernel", 8 * args[0].numel()))
            return function(*args, **settings)

        monkeypatch.setattr(module, name, watched_kernel)
    hidden, weight = torch.randn(20, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    inputs = hidden, weight, None, torch.randn(20, 8), torch.randn(50, 8), None
    divergence, _ = module.ChunkedDivergenceFunction.apply(*inputs, 1.0)
    made = len(seen)
    divergence.sum().backward()
    plan = peer_plans.trl_divergence(shape, chunk=(12, 16))
    assert listed(plan.forward) == seen[:made] and listed(plan.backward) == seen[made:]


def test_eager_is_recorded_from_its_code():
    plan = peer_plans.eager(QWEN)
    products = [step for step in plan.forward + plan.backward if isinstance(step, launch_model.Product)]
    assert len(products) == 4 and sum(p.flops for p in products) == 2 * 8192 * 151936 * (3 * 1536 + 3584)
    # Both models' logits are widened, normalised, subtracted and summed: no fewer than ten matrices of float32.
    assert launch_model.total(plan.forward).bytes > 10 * 4 * 8192 * 151936
    assert milliseconds(plan.forward) > milliseconds(launch_plan.floor(QWEN).forward)


def test_the_record_is_labelled(capsys):
    launch_plan.show(launch_plan.record(update_launches=1))
    printed = capsys.readouterr().out
    assert printed.count("PREDICTED, NOT MEASURED") == 2
    for name in ("ours, saved=teacher", "TRL 1.16", "Liger 0.8.5", "cut-cross-entropy", "eager", "floor"):
        assert name in printed
