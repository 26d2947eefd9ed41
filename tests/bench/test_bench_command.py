"""`cmdp-fast bench` and `pytest benchmarks` as they are called."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench_results import result

from cmdp_fast import cli, installation
from cmdp_fast.bench import command, measure, results, sweep
from cmdp_fast.bench.case import SHAPES, Case
from cmdp_fast.bench.ops import OPS

ROOT = Path(__file__).parents[2]


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


class Unread(io.StringIO):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_what_is_measured_though_nobody_reads_it(tmp_path, capsys, monkeypatch):
    """All of it where there is a file; else nothing is measured any more."""
    seen: list[str] = []
    monkeypatch.setattr(command, "run_case", lambda case, *_: seen.append(case.op) or result(op=case.op))
    arguments = ["bench", "token_stats", "budget_trace", "--shapes", "tiny", "--dtype", "float32"]
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "stdout", Unread())
    assert cli.main([*arguments, "--json", str(path)]) == 141
    assert [case.op for case in results.read(path).cases] == seen and {"token_stats", "budget_trace"} == set(seen)
    said = f"cmdp-fast: error: nobody reads the output any more; what was measured is in {path}\n"
    assert capsys.readouterr().err == said
    seen.clear()
    assert cli.main(arguments) == 141 and not seen
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(arguments) == 2 and not seen
    assert "the standard output is closed, and --json names no file" in capsys.readouterr().err
    assert cli.main([*arguments, "--json", str(path)]) == 0 and seen


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
    assert results.read(path).cases == [result()] and results.read(path).incomplete


def test_a_signal_keeps_the_rounds_so_far(monkeypatch, tmp_path, capsys):
    """The round at hand ends, and no other is begun; a second signal ends it at once, with the cases before."""
    elapsed, calls = measure.elapsed, 0

    def signalled(*given):
        nonlocal calls
        calls += 1
        for _ in range({9: 1, again: 2}.get(calls, 0)):  # in the first round, after the warm-up
            signal.raise_signal(signal.SIGTERM)
        return elapsed(*given)

    again = 0
    monkeypatch.setattr(measure, "elapsed", signalled)
    path = tmp_path / "run.json"
    arguments = ["bench", "budget_trace", "--shapes", "tiny", "--dtype", "float32", "--peers", "eager"]
    assert cli.main([*arguments, "--json", str(path)]) == 130
    told = capsys.readouterr()
    assert f"interrupted: 1 cases measured, {path} has them, marked as incomplete" in told.out
    run = results.read(path)
    assert run.incomplete and [len(variant.ms) for variant in run.cases[0].variants] == [1, 1]
    assert {variant.memory_note for variant in run.cases[0].variants} == {"interrupted"}
    calls, again, before = 0, 1, path.read_bytes()
    assert cli.main([*arguments, "--json", str(path)]) == 130
    assert "interrupted: 0 cases measured, nothing was written" in capsys.readouterr().out
    assert path.read_bytes() == before


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
        (["--threads", "99999999999"], "--threads must be at most "),
        (["--repeat", "99999999999999999999999"], "--repeat must be at most 1000000, got 999"),
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
    assert "costs are float32 for logits of every dtype" in captured.out and "nothing is left" in captured.err


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_without_the_extra(missing, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert cli.main(["bench"]) == 2
    assert (
        f"bench needs {missing}, which comes with the extra: {installation.extra('bench')}" in capsys.readouterr().err
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
    # Several processes would not measure: those of pytest-xdist, if this is one or has options for them, are not told.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_XDIST", "PYTEST_ADDOPTS"))}
    done = subprocess.run(
        [*arguments, "--benchmark-json", str(out)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(out.read_text())["benchmarks"]
    assert {b["extra_info"]["variant"] for b in found} == {"token_stats", "eager"}
    groups = {Case("token_stats", mode, SHAPES["tiny"], "float32", "cpu").label for mode in OPS["token_stats"].modes}
    assert {b["group"] for b in found} == groups
    assert "4 skipped" in done.stdout
