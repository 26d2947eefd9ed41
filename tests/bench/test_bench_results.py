"""What the benchmark makes of its times: medians, ratios, tables, files, pages, plots."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench_results import phase_record, result, run_of

from cmdp_fast.bench import compare, gpu_record, page, plots, results, show
from cmdp_fast.bench.case import SHAPES, Work
from cmdp_fast.bench.results import Measured, PeakGrowth, Sweep
from cmdp_fast.errors import InputError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CPU = RESULTS / "cpu"


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
    scaling.memory = {"ours": [PeakGrowth(1, 2, 3), PeakGrowth(4, 5, 6)]}
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
    fresh = page.replaced(text, [run])
    assert fresh.startswith("before\n") and fresh.endswith("\nafter\n") and "old" not in fresh
    assert page.stale(text, [run]) and not page.stale(fresh, [run])
    assert "| `token_stats` both, 32 x 1536 | 2 ms | 38% (both floors) | 3 | 1.0, -, - |" in fresh
    assert "- eager for `token_stats`: entropy" in fresh
    slower = run_of(result(variants=[Measured("ours", "", "", [9.0, 9.0, 9.0])]))
    assert page.stale(fresh, [slower])
    with pytest.raises(InputError, match="at least one of the cases"):
        page.section([run_of(result(mode="inplace"))])
    for broken in ("nothing", page.BEGIN, f"{page.END} {page.BEGIN}", text + text):
        with pytest.raises(InputError, match="once each"):
            page.replaced(broken, [run])


def test_page_command(tmp_path, capsys):
    run_of(result()).write(tmp_path / "run.json")
    (tmp_path / "readme.md").write_text(f"{page.BEGIN}\n{page.END}\n")
    places = ("--page", f"{tmp_path}/p.md", "--readme", f"{tmp_path}/readme.md", "--plots", f"{tmp_path}/plots")
    assert page.main([f"{tmp_path}/run.json", *places]) == 0
    made = (tmp_path / "p.md").read_text()
    assert "![rates.png](plots/rates.png)" in made and "absent: compile (no compiler)" in made
    assert "## `cmdp-fast bench`" in made
    assert "| `token_stats` both, 32 x 1536 float32 | 2 ms | 38% (both floors) | peer 3 | 1.0 |" in made
    assert "- peer for `token_stats`: entropy" in made
    assert not page.stale((tmp_path / "readme.md").read_text(), [results.read(tmp_path / "run.json")])
    assert page.main([f"{tmp_path}/absent.json", "--page", f"{tmp_path}/q.md"]) == 2
    short = run_of(result())
    short.incomplete = True
    short.write(tmp_path / "short.json")
    assert page.main([f"{tmp_path}/short.json", "--page", f"{tmp_path}/q.md"]) == 2
    assert "short.json: the run was interrupted" in capsys.readouterr().err
    assert not (tmp_path / "q.md").exists()


def test_the_pages_that_are_committed_say_what_their_json_says():
    """How to make them anew stands in the docstring of cmdp_fast/bench/page.py."""
    runs = [results.read(path) for path in sorted(CPU.glob("*.json"))]
    assert runs
    drawn = page.drawn_beside(CPU / "README.md")
    assert drawn == sorted(path.name for path in (CPU / "plots").iterdir())
    assert (CPU / "README.md").read_text(encoding="utf-8") == page.page(runs, drawn)
    cards = gpu_record.measured_on_gpus(RESULTS)
    assert not page.stale((ROOT / "README.md").read_text(encoding="utf-8"), runs, cards)
    shown = page.section(runs).splitlines()
    assert sum(line.startswith("| `") for line in shown) == len(page.IN_README)
    for folder in cards:
        records = [gpu_record.read_record(path) for path in sorted((RESULTS / folder).glob("*.json"))]
        assert (RESULTS / folder / "README.md").read_text(encoding="utf-8") == page.gpu_page(records)


def written(folder: Path, record: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['phase']}.json"
    path.write_text(json.dumps(record))
    return path


def test_readme_says_predicted_until_a_gpu_has_been_measured(tmp_path):
    """By itself: nobody has to remember the sentence when there are results."""
    (tmp_path / "README.md").write_text(f"{page.BEGIN}\n{page.END}\n")
    run_of(result()).write(tmp_path / "run.json")
    command = [f"{tmp_path}/run.json", "--readme", f"{tmp_path}/README.md"]
    found = tmp_path / "benchmarks" / "results"
    written(found / "gpu-toy", phase_record(small=True))  # toy sizes
    written(found / "gpu-cpu", phase_record(card=None))
    written(found / "gpu-h200", phase_record("prove", parts=[]))  # nothing was timed
    (found / "gpu-static").mkdir()
    (found / "gpu-static" / "static_gpu.json").write_text("[]")
    assert page.main(command) == 0
    text = (tmp_path / "README.md").read_text()
    assert page.PREDICTED in text and "predicted" in text and "Measured on" not in text

    written(found / "gpu-h100", phase_record())
    assert page.main(command) == 0
    text = (tmp_path / "README.md").read_text()
    assert "predicted" not in text and "Measured on NVIDIA H100 80GB HBM3 by `python benchmarks/gpu.py`" in text
    assert "[page](benchmarks/results/gpu-h100/README.md)" in text
    # the device's part: 1 ms of which the floors take .25 + .25, and the peer five times as long
    assert "| `token_stats` both, 32 x 1536 | 1 ms | 50% (both floors) | peer 5 | 1.0 |" in text
    (found / "gpu-h100" / "logits.json").write_text('{"phase": "logits", "format": 1}')
    assert page.main(command) == 2  # a broken file is no file that says nothing


def test_page_of_a_card(tmp_path):
    paths = [written(tmp_path, phase_record(phase)) for phase in ("logits", "prove")]
    assert page.main([*map(str, paths), "--page", f"{tmp_path}/README.md"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# NVIDIA H100 80GB HBM3\n") and "driver 580" in text
    assert "| sanitizer | absent | 0 | there is no compute-sanitizer here |" in text
    assert "| worse | failed | 1 | ValueError: no |" in text
    assert "| ours | 2 | 1 - 4 | 1 | 3 GB/s | 50% | 1.00 x | 1.0 | 1.0e-07 |" in text
    assert text == page.gpu_page([gpu_record.read_record(path) for path in paths])
    assert page.main([*map(str, paths), "--readme", f"{tmp_path}/README.md"]) == 2
    assert page.gpu_page([gpu_record.read_record(written(tmp_path, phase_record(card=None)))]).startswith("# Toy sizes")


def test_the_static_page_says_what_its_json_says():
    """How to make it anew stands in the docstring of benchmarks/static_page.py."""
    spec = importlib.util.spec_from_file_location("static_page", ROOT / "benchmarks" / "static_page.py")
    static_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(static_page)
    files = (RESULTS / "gpu-static" / name for name in (static_page.FOUND, static_page.VERSIONS))
    found, versions = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    made = static_page.page(found, versions)
    assert (RESULTS / "gpu-static" / "README.md").read_text(encoding="utf-8") == made
    reports, plan = found["reports"], found["launch_plan"]
    rows = [len(reports), sum(len(r["predicted"]) for r in reports)]
    rows += [len(plan["linear_token_stats"]), len(plan["logits"])]
    kernels = {(r["kernel"], r["dtype"]) for version in versions.values() for r in version}
    assert made.count("\n| ") == sum(rows) + len(kernels) + 2 * 5  # five heads of two lines
    assert "Nothing\non it is measured" in made and f"compiled by Triton {found['triton']}" in made


def test_the_command_is_shown_without_its_files():
    run = replace(run_of(), command="cmdp-fast bench token_stats --json a/b.json --repeat 7 --plots 'a b'")
    assert run.measured_by == "cmdp-fast bench token_stats --repeat 7"


def test_plots(tmp_path):
    scaling = Sweep("token_stats", "both", "rows", SHAPES["tiny"], "float32", "cpu", [1, 2], {"ours": [[1.0], [2.0]]})
    scaling.memory = {"ours": [PeakGrowth(0, 0, 1), PeakGrowth(2**22, 0, 1)]}
    flops = result(work=Work(flops=10**9), dtype="bfloat16")
    others = run_of(flops, result(work=Work(), bounds={}), sweeps=[scaling])
    drawn = plots.draw([run_of(result()), others], tmp_path / "new")
    names = ["rates.png", "ratios.png", "sweep-token_stats-both-rows-float32.png"]
    assert [path.name for path in drawn] == [*names, "memory-token_stats-both-rows-float32.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert not [path for path in (tmp_path / "new").iterdir() if path not in drawn]
