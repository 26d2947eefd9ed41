"""That nothing in a run's folder can do more than be shown on the page of `cmdp-fast report`."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import Page, groups, markdown_in, report
from written_runs import FIGURES, SETTINGS, STEPS, sample, write_run

from cmdp_fast.cli import main
from cmdp_fast.digest import write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.run_report import groups as grouping
from cmdp_fast.trainer.run_report import reading, runs
from cmdp_fast.trainer.run_report.chosen import Chosen, Voice, choose
from cmdp_fast.trainer.run_report.groups import groups_of
from cmdp_fast.trainer.run_report.markdown import escaped, markdown_of
from cmdp_fast.trainer.run_report.measures import rows_of
from cmdp_fast.trainer.run_report.page import page_of
from cmdp_fast.trainer.run_report.reading import Place
from cmdp_fast.trainer.run_report.runs import Run, Step
from cmdp_fast.trainer.run_report.samples import Policy, sample_of
from cmdp_fast.trainer.run_report.visible import short, visible


@pytest.fixture(scope="module")
def undrawn() -> None:
    """Here figures are drawn."""


def _replace(name: str, text: str | bytes) -> Any:
    def change(run: Path) -> None:
        (run / "summary.json").unlink()
        (run / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))

    return change


def _samples(**changes: Any) -> Any:
    return _replace("samples.jsonl", json.dumps(sample()) + "\n" + json.dumps({**sample(), **changes}) + "\n")


def _lacking(name: str) -> Any:
    return _replace("samples.jsonl", json.dumps({key: value for key, value in sample().items() if key != name}))


def _instead(name: str, make: Any) -> Any:
    def change(run: Path) -> None:
        if name != "summary.json":
            (run / "summary.json").unlink()
        (run / name).unlink()
        make(run / name)

    return change


def _settings(**changes: Any) -> Any:
    def change(run: Path) -> None:
        write_sealed(run / "config.json", {**SETTINGS, **changes, "code": {}, "origin": {}, "processes": 1})

    return change


def _summary(**changes: Any) -> Any:
    return lambda run: write_sealed(run / "summary.json", {"student_after": FIGURES, "files": {}, **changes})


DAMAGES = {
    "config: not JSON": (lambda run: (run / "config.json").write_text("{"), "config.json cannot be read"),
    "config: by hand": (
        lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace("sums", "other")),
        "config.json does not fit its own sha256",
    ),
    "config: a budget of text": (_settings(budget="2"), "config.json: budget is '2', expected a number"),
    "config: no budget": (_settings(budget=None), "budget is None, expected a number of nats from"),
    "config: a seed of true": (_settings(seed=True), "config.json: seed is True, expected a whole number"),
    "config: a method of lists": (_settings(method=[]), "config.json: method is [], expected text"),
    "config: large": (lambda run: (run / "config.json").write_text(" " * (1 << 25)), "a file of at most 16 MiB"),
    "config: a link": (
        _instead("config.json", lambda path: path.symlink_to("/dev/zero")),
        "is a link, expected a file",
    ),
    "summary: a folder": (_instead("summary.json", Path.mkdir), "expected a file"),
    "summary: a pipe": (_instead("summary.json", os.mkfifo), "expected a file"),
    "summary: figures of text": (_summary(student_after="good"), "student_after is 'good', expected an object"),
    "summary: a figure of text": (_summary(student_after={"a\x1b": "1"}), "student_after.a? is '1', expected a number"),
    "summary: files of lists": (_summary(files=[]), "files is [], expected an object"),
    "summary: other samples": (
        lambda run: (run / "samples.jsonl").write_text(json.dumps(sample(reward=9.0)) + "\n"),
        "samples.jsonl is not as it was written",
    ),
    "metrics: no JSON": (_replace("metrics.jsonl", '{"step": 1}\nnone\n'), "metrics.jsonl, line 2: expected a JSON"),
    "metrics: a list": (_replace("metrics.jsonl", "[1]\n"), "metrics.jsonl, line 1: expected a JSON object, not [1]"),
    "metrics: text": (_replace("metrics.jsonl", '{"reward": "1"}\n'), "reward is '1', expected a number"),
    "metrics: true": (_replace("metrics.jsonl", '{"reward": true}\n'), "reward is True, expected a number"),
    "metrics: a pipe": (_instead("metrics.jsonl", os.mkfifo), "metrics.jsonl: expected a file"),
    "samples: a folder": (_instead("samples.jsonl", Path.mkdir), "samples.jsonl: expected a file"),
    "samples: a pipe": (_instead("samples.jsonl", os.mkfifo), "samples.jsonl: expected a file"),
    "samples: a link": (_instead("samples.jsonl", lambda p: p.symlink_to("/etc/passwd")), "is a link, expected a file"),
    "samples: no UTF-8": (_replace("samples.jsonl", b'{"who": "\xff"}\n'), "line 1: expected a JSON object"),
    "samples: deep": (_replace("samples.jsonl", "[" * 10**6), "line 1: expected a JSON object: maximum recursion"),
    "samples: a long number": (_replace("samples.jsonl", '{"reward": 1' + "0" * 5000 + "}"), "samples.jsonl, line 1"),
    "samples: a large number": (_samples(reward=10**120), "line 2: reward is 1000"),
    "samples: by nobody": (_samples(who="mallory"), "line 2: who is 'mallory', expected one of teacher, "),
    "samples: by a list": (_samples(who=[]), "line 2: who is [], expected text"),
    "samples: a number for a prompt": (_samples(prompt=1), "line 2: prompt is 1, expected text or a list of messages"),
    "samples: messages of text": (_samples(prompt=["x"]), "line 2: prompt is ['x'], expected text or a list"),
    "samples: a role of lists": (_samples(prompt=[{"role": []}]), "line 2: role is [], expected text"),
    "samples: no completion": (_lacking("completion"), "line 1: completion is missing"),
    "samples: no length": (_lacking("length"), "line 1: length is missing"),
    "samples: length": (_samples(length=-1), "line 2: length is -1, expected a number of tokens"),
    "samples: finished": (_samples(finished=1), "line 2: finished is 1, expected true or false"),
    "samples: feasible": (_samples(feasible="yes"), "line 2: feasible is 'yes', expected true or false"),
    "samples: tokens alone": (_samples(tokens=["A2"]), "line 2: tokens and costs are 1 and none, expected as many"),
    "samples: a cost less": (_samples(tokens=["A", "2"], costs=[1.0]), "line 2: tokens and costs are 2 and 1"),
    "samples: tokens of numbers": (_samples(tokens=[1], costs=[1.0]), "line 2: a token is 1, expected text"),
    "samples: costs of text": (_samples(tokens=["A2"], costs=["1"]), "line 2: a cost is '1', expected a number"),
    "samples: crossing": (_samples(tokens=["A2"], costs=[1.0], crossing=1), "line 2: crossing is 1, expected one of"),
    "samples: crossing without tokens": (_samples(crossing=0), "line 2: crossing is 0, expected one of the 0 tokens"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_no_training_writes_is_named(name, tmp_path, capsys):
    damage, expected = DAMAGES[name]
    run = write_run(tmp_path / "run")
    damage(run)
    assert main(["report", str(run), f"--output-dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cmdp-fast: error: ") and error.count("\n") == 1 and len(error) < 1000
    assert expected in error and not (tmp_path / "out").exists()


def test_a_line_without_an_end_is_not_read_whole(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "r", [sample(completion="x" * 2000)])
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    assert main(["report", str(run), f"--output-dir={tmp_path / 'out'}"]) == 2
    assert "samples.jsonl, line 1: expected at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give one or more RUN"),
        (["nowhere"], "nowhere: expected a run's folder"),
        (["run", "--prompts=0"], "--prompts must be from 1 to 200, not 0"),
        (["run", "--prompts=201"], "--prompts must be from 1 to 200"),
        (["run", "--seed=-1"], "--seed must be in [0, "),
        (["run", "--output-dir=file/out"], "--output-dir file/out: file is a file, expected a folder"),
        (["run", "again"], "run and again are one training with one seed"),
        (["linked"], "is a link, expected a run's folder"),
        (["empty"], "empty: expected a run's folder"),
    ],
)
def test_what_cannot_be_reported_is_one_line(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = write_run(Path("run"))
    write_run(Path("again"))
    Path("file").write_text("")
    Path("empty/runs").mkdir(parents=True)
    Path("linked/runs").mkdir(parents=True)
    Path("linked/runs/x").symlink_to(run.absolute())
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and not Path("report").exists()


def test_a_file_of_endless_lines_is_not_read_whole(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "r")
    monkeypatch.setattr(reading, "MOST_LINES", len(STEPS))
    groups(run)
    monkeypatch.setattr(reading, "MOST_LINES", len(STEPS) - 1)
    assert main(["report", str(run), f"--output-dir={tmp_path / 'out'}"]) == 2
    assert "metrics.jsonl: expected at most 19 lines" in capsys.readouterr().err


def test_what_looks_like_a_comparison_may_lead_nowhere(tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "runs").symlink_to(write_run(tmp_path / "elsewhere" / "run").parent)
    assert main(["report", str(tmp_path / "c"), f"--output-dir={tmp_path / 'out'}"]) == 2
    assert "expected a run's folder" in capsys.readouterr().err


def test_numbers_that_are_none_leave_a_gap(tmp_path):
    nan = '{"step": 1, "reward": NaN, "cmdp/cumulative_kl": -Infinity}\n'
    one = sample(reward=None, cumulative=None, tokens=["A2"], costs=[None])
    run = write_run(tmp_path / "r", [one], [nan, STEPS[1]], after={**FIGURES, "mean_length": None}, before=None)
    page = Page(report(run, output=tmp_path / "out"))
    assert "not judged · 3 tokens" in page.text and "nan" not in page.text.lower()


def test_settings_that_are_brackets_in_brackets_are_an_error():
    """At some depth reading them works, and writing them does not."""
    deep: Any = 1
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    run = Run(Path("r"), {**SETTINGS, "deep": deep}, {"code": {}, "origin": {}}, (), {}, {})
    with pytest.raises(InputError, match=r"config\.json: expected settings"):
        groups_of([run])


def test_hostile_settings_give_a_sound_page(tmp_path):
    evil = "</title><script>alert(1)</script><img src=http://x onerror=alert(1)>\x1b[2J\u202e\"'&amp;"
    names = {"recipe": evil, "task": evil, "method": evil.replace("/", ":"), "kind": evil, evil: {evil: evil}}
    folders = [write_run(tmp_path / f"{i}", **names, budget=float(i + 1)) for i in range(2)]
    page = Page(report(*folders, output=tmp_path / "out"))
    assert "<script>alert(1)" in page.text and "⟨U+202E⟩" in page.text and "␛[2J" in page.text
    assert "\x1b" not in markdown_in(tmp_path / "out") and "<script" not in markdown_in(tmp_path / "out")


def test_a_setting_of_another_name_names_nothing(tmp_path):
    """Two runs that differ in it are two methods all the same."""
    evil = "evil\u202eKEY\n" + "A" * 1000
    one, two = groups(*(write_run(tmp_path / f"{i}", **{evil: i}) for i in range(2)))
    assert re.fullmatch("cmdp, settings [0-9a-f]{8}", one.label) and one.label != two.label
    assert groups(write_run(tmp_path / "same", **{evil: 0}), tmp_path / "1")[0].label == one.label


def test_many_settings_of_many_runs_are_compared_once(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(grouping, "_value", lambda value: compared.append(1) or str(value))
    own = {f"own {i}": i for i in range(500)}
    groups(*(write_run(tmp_path / f"{i}", **own, coefficient=float(i)) for i in range(20)))
    assert len(compared) < 20 * 2 * len(grouping._DEFAULTS)


def test_a_setting_that_a_file_does_not_have_is_the_default(tmp_path):
    plain, fast = groups(write_run(tmp_path / "plain"), write_run(tmp_path / "fast", fast=True))
    assert (plain.label, fast.label) == ("cmdp, fast false", "cmdp, fast true")


def test_names_of_folders_move_no_cursor(tmp_path, capsys):
    evil = tmp_path / "c" / "runs" / "x\x1b]0;t\x07 y\u202ez\nFAKE"
    evil.mkdir(parents=True)
    run = write_run(tmp_path / "c" / "runs" / "run")
    report(tmp_path / "c", output=tmp_path / "out")
    assert main(["report", str(run), str(write_run(evil / "again")), f"--output-dir={tmp_path / 'two'}"]) == 2
    written = capsys.readouterr()
    assert "no config.json, left out" in written.out and "are one training with one seed" in written.err
    for text in written:
        assert not re.search("[\x1b\x07\u202e]|^FAKE", text, re.MULTILINE)


def test_a_file_that_is_endless_is_not_hashed(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "r")
    monkeypatch.setattr(reading, "LONGEST_LINES", 1 << 20)
    monkeypatch.setattr(runs, "LONGEST_LINES", 1 << 20)
    os.truncate(run / "metrics.jsonl", 1 << 40)  # it takes no room
    assert main(["report", str(run), f"--output-dir={tmp_path / 'out'}"]) == 2
    assert "metrics.jsonl: expected a file of at most 1 MiB" in capsys.readouterr().err


def test_a_link_where_the_page_is_written_is_not_followed(tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    for name in ("samples.md", ".samples.md", ".samples.html", ".reward_against_kl.png"):
        (out / name).symlink_to(victim)
    report(write_run(tmp_path / "r"), output=out)
    assert victim.read_text() == "mine" and not (out / "samples.md").is_symlink()


def test_a_pipe_where_the_page_is_written_is_not_written_to(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / ".samples.md")
    reader = os.open(out / ".samples.md", os.O_RDWR)  # or code that writes to it would wait, and not fail
    try:
        report(write_run(tmp_path / "r"), output=out)
    finally:
        os.close(reader)
    assert (out / "samples.md").is_file()


@pytest.mark.parametrize("name", ["x" * 5000, "x\0y"])
def test_a_folder_that_cannot_be_is_one_line(name, tmp_path, capsys):
    assert main(["report", str(write_run(tmp_path / "r")), f"--output-dir={tmp_path / name}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_is_imported_that_models_need(tmp_path):
    run = write_run(tmp_path / "r")
    code = (
        "import sys; from cmdp_fast.cli import main; "
        f"assert main(['report', {str(run)!r}, '--output-dir', {str(tmp_path / 'out')!r}]) == 0; "
        "heavy = ('transformers', 'datasets', 'accelerate', 'matplotlib.pyplot'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# ------------------------------------------------------------------------------------------------------ any text

ANY = st.text(st.characters(), max_size=40)  # surrogates too


def in_memory(label: str, prompt: str, completion: str, token: str) -> tuple[list[Any], list[Any], Chosen]:
    """Groups, rows and samples with these texts: a completion without costs, and one of three tokens."""
    values = [
        sample("student_before", prompt, completion),
        sample(prompt=prompt, completion=f"<{token}", tokens=["<", token, ""], costs=[0.5, 1.75, 0.0], crossing=1),
    ]
    before, after = (sample_of(each, Place(Path("samples.jsonl"), 1)) for each in values)
    policies = {"student_before": Policy(1.0, 1), "student_after": Policy(1.0, 1)}
    settings = {**SETTINGS, "method": label, "kind": label, "recipe": label, "task": label}
    run = Run(Path("r"), settings, {"code": {}, "origin": {}}, (Step(1.0, 1.0),), {"student_after": FIGURES}, policies)
    made = groups_of([run])
    voices = (Voice("before", run, "student_before", None), Voice(made[0].label, run, "student_after", 0))
    return made, rows_of(made), Chosen(voices, ((before, after),), 1, False, 0)


def parsed(*texts: str) -> tuple[Page, list[Any]]:
    made, rows, chosen = in_memory(*texts)
    text = page_of(made, rows, chosen, b"", b"")
    text.encode()  # no half of a character is left
    return Page(text), made


USUAL = parsed("label", "prompt", "completion", "token")[0].structure


@settings(max_examples=200)
@given(ANY, ANY, ANY, ANY.filter(bool))
def test_any_text_is_shown_and_changes_nothing(label, prompt, completion, token):
    page, (group,) = parsed(label, prompt, completion, token)
    assert page.structure == USUAL
    assert visible(prompt) in page.text and visible(completion) in page.text
    assert page.cells[1][1][3] == visible(token).replace("\n", "↵\n")
    assert group.label in page.text and short(Path(label).stem or label, 80) == group.label


@settings(max_examples=200)
@given(ANY, ANY, ANY, ANY.filter(bool))
def test_any_text_leaves_the_columns_of_the_markdown(label, prompt, completion, token):
    made, rows, chosen = in_memory(label, prompt, completion, token)
    text = markdown_of(made, rows, chosen, "plot.png")
    usual = markdown_of(*in_memory("l", "p", "c", "t"), "plot.png")
    text.encode()
    lines, others = text.splitlines(), usual.splitlines()
    assert len(lines) == len(others)
    assert [line.count("|") for line in lines] == [line.count("|") for line in others]
    for line in lines:
        bare = re.sub(r"&#\d+;|<br>|&emsp;", "", line)
        if bare.startswith("**Prompt"):
            bare = bare.replace("**", "", 2)
        if not bare.startswith(("| ---", "![", "#")):
            assert not re.search(r"[<>`*_~\[\]\\$#@&]", bare), line


@pytest.mark.parametrize("code", [0x34F, 0x115F, 0x180E, 0x200B, 0x202E, 0x2800, 0x3164, 0xFE00, 0xFFA0, 0xE0100])
def test_what_has_no_ink_is_shown_by_its_number(code):
    assert visible(f"a{chr(code)}b") == f"a⟨U+{code:04X}⟩b"


def test_what_writing_needs_stays():
    text = "\U0001f469\u200d\U0001f52c \u2764\ufe0f n\u0303 \u00a0"
    assert visible(text) == text


@given(ANY)
def test_what_is_escaped_reads_as_it_was(text):
    seen = visible(text)
    assert html.unescape(escaped(seen).replace("<br>", "\n").replace("&emsp;", "\t")) == seen


@pytest.mark.parametrize("text", ["https://example.org", "www.example.org", "WWW.example.org", "a@b.org", ":smile:"])
def test_no_link_is_made_of_a_text(text):
    assert not re.search(r"://|www\.|@|:", escaped(text), re.IGNORECASE)


def test_a_second_reading_checks_what_it_reads(tmp_path):
    """A file that changes between the two is an error, not a page."""
    run = write_run(tmp_path / "r", summary=False)
    made = groups(run)
    (run / "samples.jsonl").write_text("x" * 1000)  # no line is where one was
    with pytest.raises(InputError, match=r"samples\.jsonl, line"):
        choose(made, 1, 0)
