"""The benchmark's own correctness: what it checks, in which order it measures, what it weighs. No times."""

import ctypes

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from cmdp_fast.bench import implementations, measure, memory, suite
from cmdp_fast.bench.case import CHECKED_ROWS, LAYOUTS, MEASURED, SHAPES, Case, Work
from cmdp_fast.bench.ops import OPS
from cmdp_fast.bench.peers import PEERS, eager, kl_div
from cmdp_fast.bench.variant import Absent, Variant

QUICK = ("eager", "kl_div", "verl_pipeline", "generate")  # nothing to compile or to install


def quiet(_):
    pass


def tiny(op, mode, dtype="float32"):
    return Case(op, mode, SHAPES["tiny"], dtype, "cpu")


def cases():
    found = []
    for op in OPS.values():
        for mode in op.modes:
            for dtype in ("float32", "bfloat16"):
                if op.why_not(tiny(op.name, mode, dtype)) is None:
                    found.append(tiny(op.name, mode, dtype))
    return found


# --------------------------------------------------------------------------------------------------------------
# Checks


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}-{case.mode}-{case.dtype}")
def test_every_implementation_agrees_with_float64(case):
    variants, errors, absent = suite.checked_variants(case, [p for p in PEERS if p != "compile"], quiet)
    assert [v.name for v in variants if not v.peer] == [v.name for v in OPS[case.op].ours(case)]
    assert all(errors[v.name] for v in variants if case.op != "trainer_step")  # something was looked at
    for peer, reason in absent.items():
        assert peer not in QUICK and ("needs a GPU" in reason or "cannot be imported" in reason), (peer, reason)


def test_a_wrong_peer_is_absent_and_a_wrong_kernel_is_an_error(monkeypatch):
    op, case = OPS["token_stats"], tiny("token_stats", "forward")

    def off(inputs):
        return {"reverse_kl": eager.reverse_kl(inputs)["reverse_kl"] * 1.0001}

    with pytest.raises(Absent, match=r"its reverse_kl is off by 1\.0e-04 of the largest value"):
        suite.check(op, case, Variant("off", off, peer="eager"), op.make(case, 0))
    monkeypatch.setattr(eager, "variants", lambda _: [Variant("off", off, peer="eager")])
    variants, _, absent = suite.checked_variants(case, ("eager",), quiet)
    assert [v.name for v in variants] == ["token_stats"] and "off by" in absent["eager"]
    monkeypatch.setattr(op, "ours", lambda _: [Variant("ours", off)])
    with pytest.raises(Absent, match="off by"):
        suite.checked_variants(case, (), quiet)


def test_a_peer_may_add_up_a_row_in_sequence():
    """`torch.log_softmax` does on a CPU, and our reference does not."""
    op, case = OPS["token_stats"], Case("token_stats", "forward", SHAPES["gemma"], "bfloat16", "cpu").resized(rows=8)
    (peer,) = eager.variants(case)
    assert suite.check(op, case, peer, op.make(case, 0))


def test_nan_is_never_close_enough():
    op, case = OPS["token_stats"], tiny("token_stats", "forward")
    nan = Variant("nan", lambda inputs: {"entropy": torch.full((32,), torch.nan)})
    with pytest.raises(Absent, match="its entropy is off by nan"):
        suite.check(op, case, nan, op.make(case, 0))


def test_a_peer_that_fails_is_absent_with_the_reason(monkeypatch):
    def fails(_):
        raise ZeroDivisionError("no such luck\nsecond line")

    def missing(_):
        raise ImportError("No module named 'nothing'")

    monkeypatch.setattr(eager, "variants", lambda _: [Variant("eager", fails, peer="eager")])
    monkeypatch.setattr(kl_div, "variants", missing)
    _, _, absent = suite.checked_variants(tiny("token_stats", "both"), ("eager", "kl_div"), quiet)
    assert absent == {"eager": "fails: no such luck", "kl_div": "cannot be imported: No module named 'nothing'"}


def test_no_variant_changes_its_inputs():
    for case in cases():
        inputs = OPS[case.op].make(case, 0)
        before = {name: t.clone() for name, t in inputs.items()}
        for variant in implementations.variants_of(case, QUICK)[1]:
            variant.run(variant.state(inputs))
            assert all(torch.equal(inputs[name], before[name]) for name in inputs), (case.label, variant.name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_work_is_what_the_inputs_weigh(dtype):
    for name in ("token_stats", "divergence", "constrained_reward"):
        case = tiny(name, "forward", dtype)
        inputs = OPS[name].make(case, 0)
        assert OPS[name].work(case) == Work(read=inputs["student"].nbytes + inputs["teacher"].nbytes)
        assert not torch.equal(inputs["student"], OPS[name].make(case, 1)["student"])  # sets differ
    whole = OPS["token_stats"].work(tiny("token_stats", "both", dtype))
    parts = [OPS["token_stats"].work(tiny("token_stats", mode, dtype)) for mode in ("forward", "backward")]
    assert whole.bytes == sum(part.bytes for part in parts)


def test_every_measured_shape_can_be_padded_and_grouped():
    for name in (*MEASURED, "tiny"):
        shape = SHAPES[name]
        assert shape.sequences * shape.length == shape.rows and shape.sequences % 4 == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_shape_can_say_how_long_a_completion_is(name):
    case = Case("constrained_reward", "forward", SHAPES[name], "float32", "cpu").resized(vocab=8)
    inputs = OPS["constrained_reward"].make(case, 0)
    assert "x".join(map(str, inputs["tokens"].shape)) == name and inputs["student"].shape[-1] == 8
    few = case.reduced().shape  # one short completion, or the beginning of one
    assert few.sequences * few.length == few.rows == CHECKED_ROWS


# --------------------------------------------------------------------------------------------------------------
# Time and memory


def test_variants_take_turns_and_sets_rotate(monkeypatch):
    monkeypatch.setattr(measure, "SHORTEST", 0.0)  # one call a measurement
    calls = []

    def variant(name):
        return Variant(name, lambda inputs: calls.append((name, int(inputs["x"]))))

    sets = [{"x": torch.tensor(i)} for i in range(3)]
    times = measure.measure([variant("a"), variant("b")], sets, 4, "cpu")
    assert {name: len(ms) for name, ms in times.items()} == {"a": 4, "b": 4}
    assert [name for name, _ in calls] == ["a", "a", "b", "b", *("a", "b") * 4]  # warm-up, then in turn
    for name in "ab":
        assert [i for who, i in calls if who == name] == [0, 1, 2, 0, 1, 2]


def test_what_is_prepared_is_not_timed_and_made_for_each_run():
    prepared, ran = [], []
    variant = Variant("v", lambda state: ran.append(state), prepare=lambda inputs: prepared.append(1) or len(prepared))
    measure.measure([variant], [{}], 3, "cpu")
    assert ran == [1, 2, 3, 4, 5]


def test_sets_fill_the_cache_twice(monkeypatch):
    monkeypatch.setattr(measure, "last_level_cache", lambda _: 1000)
    small = measure.make_sets(lambda seed: {"x": torch.zeros(100, dtype=torch.uint8)}, "cpu")
    assert len(small) == 20
    assert len(measure.make_sets(lambda seed: {"x": torch.zeros(3000, dtype=torch.uint8)}, "cpu")) == 1


needs_clear_refs = pytest.mark.skipif(memory.unavailable("cpu") is not None, reason="no /proc/self/clear_refs")


@needs_clear_refs
def test_growth_of_a_known_allocation():
    ctypes.CDLL(None).malloc_trim(0)  # what other tests have given back is no longer there to be taken again
    memory.growth(lambda: torch.ones(1), "cpu")  # and what the measuring takes is
    grown, kept = memory.growth(lambda: torch.ones(96 * 2**18), "cpu")
    assert abs(grown - 96 * 2**20) < 2**20 and kept.numel()
    grown, _ = memory.growth(lambda: torch.ones(64 * 2**18).sum(), "cpu")  # given back again: the peak counts
    assert abs(grown - 64 * 2**20) < 2**20


@needs_clear_refs
def test_memory_of_a_variant_in_a_fresh_process():
    """Eager PyTorch holds log-probabilities and products as large as the logits, of which our kernel has none."""
    case = tiny("token_stats", "forward").resized(rows=256, vocab=16384)
    matrix = 256 * 16384 * 4
    found = {}
    for peers in ((), ("eager",)):
        variant = implementations.variants_of(case, peers)[1][-1]
        found[variant.name] = memory.measure_memory(case, variant)
    assert all(m.trusted for m in found.values())
    assert found["token_stats"].extra < 2**20 and found["token_stats"].outputs == 6 * 256 * 4
    assert 3 * matrix <= found["eager"].extra < 6 * matrix


def test_a_process_that_fails_says_why():
    case = tiny("token_stats", "forward").resized(rows=0)
    with pytest.raises(Absent, match="the process that measures memory failed"):
        memory.measure_memory(case, Variant("no such variant", lambda inputs: inputs))
