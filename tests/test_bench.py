"""The benchmark's own correctness: what it checks, in which order it measures, what it makes of the times. No times."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from cmdp_fast import cli
from cmdp_fast.bench import command, compare, measure, memory, page, plots, results, show, suite, sweep
from cmdp_fast.bench.case import MEASURED, SHAPES, Case, Work
from cmdp_fast.bench.ops import OPS
from cmdp_fast.bench.peers import PEERS, eager, kl_div
from cmdp_fast.bench.results import CaseResult, Measured, Memory, Run, Sweep
from cmdp_fast.bench.variant import Absent, Variant
from cmdp_fast.trainer.errors import InputError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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
        variant = suite.variants_of(case, peers)[1][-1]
        found[variant.name] = memory.measure_memory(case, variant)
    assert all(m.trusted for m in found.values())
    assert found["token_stats"].extra < 2**20 and found["token_stats"].outputs == 6 * 256 * 4
    assert 3 * matrix <= found["eager"].extra < 6 * matrix


def test_a_process_that_fails_says_why():
    case = tiny("token_stats", "forward").resized(rows=0)
    with pytest.raises(Absent, match="the process that measures memory failed"):
        memory.measure_memory(case, Variant("no such variant", lambda inputs: inputs))


# --------------------------------------------------------------------------------------------------------------
# What is made of the results


def result(**changes) -> CaseResult:
    ours = Measured("ours", "", "", [1.0, 2.0, 4.0], {"logprob": 1e-7}, Memory(2**20, 0, 64 * 2**20))
    peer = Measured("peer", "eager", "entropy", [3.0, 4.0, 40.0], {"reverse_kl": 2e-6}, None, "no such file")
    base = CaseResult(
        op="token_stats",
        mode="both",
        shape=SHAPES["tiny"],
        dtype="float32",
        device="cpu",
        work=Work(read=2_000_000, written=1_000_000),
        bounds={"both floors": ["read", "copy"]},
        floors={"read": [0.25, 0.25, 0.5], "copy": [0.25, 0.5, 0.5]},
        variants=[ours, peer],
        absent={"compile": "no compiler"},
    )
    return replace(base, **changes)


def run_of(*found: CaseResult, **settings) -> Run:
    machine = {"cpu": "a", "cores": 2, "caches": {"L1": 2**15}, "system": "s", "cmdp_fast": "0", "kernels": "k"}
    machine |= {"threads": 1, "python": "3", "versions": {"torch": "2"}}
    return Run("cmdp-fast bench", machine, {"repeat": 3, "threads": 1}, cases=list(found), **settings)


def test_ratios_and_shares_are_medians_within_rounds():
    case = result()
    ours, peer = case.variants
    assert case.ratio(peer) == 3.0  # of 3, 2 and 10; the ratio of the medians would be 2
    assert case.share(ours) == pytest.approx(0.375)  # of .5, .375 and .25
    assert ours.median == 2.0 and ours.spread == (1.0, 4.0)
    assert case.rate(ours.median) == (1.5, "GB/s")
    assert result(work=Work(flops=3 * 10**9)).rate(1.0) == (3.0, "TFLOP/s")


def test_table_tells_everything():
    rows = show.case_table(result())
    text = show.plain(rows)
    assert [row[0] for row in rows[1:]] == ["both floors", "ours", "peer"]
    for word in ("38%", "3.00 x", "1.5 GB/s", "1.0e-07", "entropy", "both floors"):
        assert word in text
    notes = show.case_notes(result())
    assert notes == ["absent: compile (no compiler)", "no memory: no such file"]
    untrusted = result()
    untrusted.ours.memory.known //= 2
    assert any("do not trust it" in note for note in show.case_notes(untrusted))


def test_json_round_trip(tmp_path):
    scaling = Sweep("token_stats", "both", "rows", SHAPES["tiny"], "float32", "cpu", [1, 2], {"ours": [[1.0], [2.0]]})
    scaling.memory = {"ours": [Memory(1, 2, 3), Memory(4, 5, 6)]}
    run = run_of(result(), sweeps=[scaling], left_out={"a": "b"})
    run.write(tmp_path / "run.json")
    assert results.read(tmp_path / "run.json") == run


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0}', '{"format": 1}', '{"format": 1, "cases": [1]}'])
def test_what_is_no_run_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json: expected the JSON of cmdp-fast bench"):
        results.read(tmp_path / "x.json")


def test_slope_and_growth():
    points = [2, 4, 8]
    ms = {"square": [[n * n * 1.0] * 2 for n in points], "linear": [[3.0 * n] * 2 for n in points]}
    scaling = Sweep("op", "mode", "rows", SHAPES["tiny"], "float32", "cpu", points, ms)
    assert scaling.slope("square") == pytest.approx(2) and scaling.growth("square") == pytest.approx(4)
    assert scaling.slope("linear") == pytest.approx(1) and scaling.growth("linear") == pytest.approx(1)
    assert replace(scaling, axis="threads").growth("linear") == pytest.approx(4)


def test_compare():
    old, new = result(), result()
    new.ours.ms = [0.5, 1.0, 2.0]
    new.variants[1:] = [Measured("new peer", "kl_div", "", [1.0, 1.0, 1.0])]
    rows = {row[1]: row[2:] for row in compare.changes(run_of(old), run_of(new))[1:]}
    assert rows["ours"] == ["2", "1", "-50%", "38% -> 75%", "1.00 -> 1.00", "1.0 -> 1.0"]
    assert rows["new peer"][0] == "not before" and rows["peer"][1] == "gone"
    other = compare.changes(run_of(old), run_of(result(dtype="bfloat16")))
    assert [row[3] for row in other if "float32" in row[0]] == ["not in this run"] * 2


def test_readme_section_is_replaced_whole_and_found_stale():
    run = run_of(result())
    text = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    fresh = page.replaced(text, run)
    assert fresh.startswith("before\n") and fresh.endswith("\nafter\n") and "old" not in fresh
    assert page.stale(text, run) and not page.stale(fresh, run)
    assert "`token_stats` both, 32 x 1536 float32" in fresh and "peer 3" in fresh and "- peer: entropy" in fresh
    slower = run_of(result(variants=[Measured("ours", "", "", [9.0, 9.0, 9.0])]))
    assert page.stale(fresh, slower)
    for broken in ("nothing", page.BEGIN, f"{page.END} {page.BEGIN}", text + text):
        with pytest.raises(InputError, match="once each"):
            page.replaced(broken, run)


def test_page_command(tmp_path):
    run_of(result()).write(tmp_path / "run.json")
    (tmp_path / "rates.png").write_bytes(b"")
    (tmp_path / "readme.md").write_text(f"{page.BEGIN}\n{page.END}\n")
    assert page.main([f"{tmp_path}/run.json", "--page", f"{tmp_path}/p.md", "--readme", f"{tmp_path}/readme.md"]) == 0
    made = (tmp_path / "p.md").read_text()
    assert "![rates.png](rates.png)" in made and "absent: compile (no compiler)" in made and "cmdp-fast bench" in made
    assert not page.stale((tmp_path / "readme.md").read_text(), results.read(tmp_path / "run.json"))
    assert page.main([f"{tmp_path}/absent.json", "--page", f"{tmp_path}/q.md"]) == 2
    assert not (tmp_path / "q.md").exists()


def test_the_pages_that_are_committed_say_what_their_json_says():
    """How to make them anew stands in the docstring of cmdp_fast/bench/page.py."""
    if not (RESULTS / "cpu.json").exists():
        pytest.skip("no run is committed")
    others = sorted(path for path in RESULTS.glob("cpu-*.json"))
    runs = [results.read(path) for path in (RESULTS / "cpu.json", *others)]
    drawn = sorted(path.name for path in RESULTS.glob("*.png"))
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page.page(runs, drawn)
    assert not page.stale((ROOT / "README.md").read_text(encoding="utf-8"), runs[0])


def test_plots(tmp_path):
    scaling = Sweep("token_stats", "both", "rows", SHAPES["tiny"], "float32", "cpu", [1, 2], {"ours": [[1.0], [2.0]]})
    scaling.memory = {"ours": [Memory(0, 0, 1), Memory(2**22, 0, 1)]}
    flops = result(work=Work(flops=10**9), dtype="bfloat16")
    drawn = plots.draw(run_of(result(), flops, result(work=Work(), bounds={}), sweeps=[scaling]), tmp_path / "new")
    names = ["rates.png", "ratios.png", "sweep-token_stats-both-rows-float32.png"]
    assert [path.name for path in drawn] == [*names, "memory-token_stats-both-rows-float32.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert not [path for path in (tmp_path / "new").iterdir() if path not in drawn]


# --------------------------------------------------------------------------------------------------------------
# The command


def test_command(tmp_path, capsys):
    old = tmp_path / "old.json"
    arguments = ["bench", "token_stats", "budget_trace", "--shapes", "tiny", "--repeat", "2", "--no-memory"]
    arguments += ["--dtype", "float32", "--peers", "eager,trl_logprob"]
    assert cli.main([*arguments, "--json", str(old), "--plots", str(tmp_path / "plots")]) == 0
    text = capsys.readouterr().out
    assert "token_stats inplace, tiny (32 x 1536) float32 on cpu" in text and "read + copy floor" in text
    assert "absent: trl_logprob (a Triton kernel: needs a GPU)" in text and "no log-probabilities" in text
    assert "\x1b" not in text  # plain in a pipe
    run = results.read(old)
    assert [case.op for case in run.cases] == ["token_stats"] * 4 + ["budget_trace"]
    assert all(len(v.ms) == 2 and v.memory is None for case in run.cases for v in case.variants)
    assert (tmp_path / "plots" / "rates.png").exists()
    assert cli.main([*arguments, "--compare", str(old)]) == 0
    assert f"changes since {old}" in capsys.readouterr().out


def test_command_sweeps(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    arguments = ["bench", "budget_trace", "--shapes", "tiny", "--dtype", "float32", "--repeat", "2", "--no-memory"]
    assert cli.main([*arguments, "--peers", "eager", "--sweep", "rows", "--json", str(path)]) == 0
    assert "slope" in capsys.readouterr().out
    (scaling,) = results.read(path).sweeps
    assert scaling.points == [8, 16, 32, 64, 128] and set(scaling.ms) == {"budget_trace", "eager"}
    assert all(len(rounds) == 2 for rounds in scaling.ms["eager"])


def test_a_sweep_over_threads_leaves_their_number_alone(threads, capsys):
    threads(2)
    arguments = ["bench", "budget_trace", "--shapes", "tiny", "--dtype", "float32", "--repeat", "1", "--no-memory"]
    assert cli.main([*arguments, "--peers", "none", "--sweep", "threads"]) == 0
    assert torch.get_num_threads() == 2
    assert capsys.readouterr().out.splitlines()[-2].split()[:3] == ["implementation", "1", "2"]


def test_an_interrupt_leaves_threads_and_what_there_is(threads, monkeypatch, tmp_path, capsys):
    threads(2)

    def interrupted(*_):
        torch.set_num_threads(1)
        raise KeyboardInterrupt

    arguments = ["bench", "budget_trace", "--shapes", "tiny", "--dtype", "float32", "--no-memory", "--peers", "none"]
    monkeypatch.setattr(sweep, "measure", interrupted)
    assert cli.main([*arguments, "--sweep", "threads"]) == 130
    assert torch.get_num_threads() == 2 and "interrupted" in capsys.readouterr().err

    kept = iter([result()])
    monkeypatch.setattr(command, "run_case", lambda *_: next(kept, None) or interrupted())
    path = tmp_path / "run.json"
    assert cli.main([*arguments[:1], "token_stats", *arguments[2:], "--repeat", "1", "--json", str(path)]) == 130
    assert results.read(path).cases == [result()]


def test_no_variant_changes_its_inputs():
    for case in cases():
        inputs = OPS[case.op].make(case, 0)
        before = {name: t.clone() for name, t in inputs.items()}
        for variant in suite.variants_of(case, QUICK)[1]:
            variant.run(variant.state(inputs))
            assert all(torch.equal(inputs[name], before[name]) for name in inputs), (case.label, variant.name)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "operation 'nothing' is unknown; expected token_stats, divergence,"),
        (["--shapes", "tiny,gpt9"], "--shapes 'gpt9' is unknown; expected qwen2.5, "),
        (["--shapes", ""], "--shapes is empty; expected some of qwen2.5, "),
        (["--dtype", "int8"], "--dtype 'int8' is unknown; expected float32, bfloat16, float16"),
        (["--peers", "eager,none"], "--peers 'none' is unknown; expected eager, "),
        (["--device", "tpu"], "--device 'tpu' is unknown; expected cpu, cuda"),
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--sweep", "depth"], "--sweep 'depth' is unknown; expected rows, vocab, hidden, threads"),
        (["token_stats", "--sweep", "hidden"], "--sweep hidden: none of token_stats is swept along it"),
        (["--compare", "absent.json"], "absent.json: expected the JSON of cmdp-fast bench"),
        (["--json", "no/such/folder.json"], "there is no folder no/such"),
    ],
)
def test_bad_names_are_one_line_before_any_work(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("cmdp-fast: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err


def test_nothing_left_is_an_error(capsys):
    assert cli.main(["bench", "budget_trace", "--shapes", "tiny", "--dtype", "bfloat16", "--no-memory"]) == 2
    captured = capsys.readouterr()
    assert "costs are float32 whatever the logits are" in captured.out and "nothing is left" in captured.err


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_without_the_extra(missing, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert cli.main(["bench"]) == 2
    assert (
        f"bench needs {missing}, which comes with the extra: pip install 'cmdp_fast[bench]'" in capsys.readouterr().err
    )


WITHOUT_TRAIN = """
import sys
for name in ("transformers", "accelerate", "datasets", "tyro", "trl", "liger_kernel"):
    sys.modules[name] = None
from cmdp_fast import cli
sys.exit(cli.main(["bench", "token_stats", "linear_token_stats", "--shapes", "tiny", "--repeat", "1", "--no-memory",
                   "--dtype", "float32", "--peers", "eager,trl_divergence,liger_chunked_jsd"]))
"""


def test_without_the_trainers_packages():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRAIN], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "absent: trl_divergence (cannot be imported" in done.stdout
    assert "absent: liger_chunked_jsd (cannot be imported" in done.stdout


def test_pytest_benchmarks(tmp_path):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "out.json"
    arguments = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--ops", "token_stats"]
    arguments += ["--shapes", "tiny", "--dtype", "float32", "--peers", "eager,trl_logprob", "--repeat", "1"]
    done = subprocess.run([*arguments, "--benchmark-json", str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    found = json.loads(out.read_text())["benchmarks"]
    assert {b["extra_info"]["variant"] for b in found} == {"token_stats", "eager"}
    assert {b["group"] for b in found} == {tiny("token_stats", mode).label for mode in OPS["token_stats"].modes}
    assert "4 skipped" in done.stdout
