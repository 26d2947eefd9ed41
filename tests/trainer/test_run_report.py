"""What `cmdp-fast report` puts on its page, and that nothing in a run's folder can do more than be shown there."""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_runs import FIGURES, SETTINGS, STEPS, of_prompts, sample, write_run

from cmdp_fast.cli import main
from cmdp_fast.digest import write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.run_report import plot, reading
from cmdp_fast.trainer.run_report.chosen import Chosen, Voice, choose
from cmdp_fast.trainer.run_report.groups import groups_of
from cmdp_fast.trainer.run_report.markdown import escaped, markdown_of
from cmdp_fast.trainer.run_report.measures import COLUMNS, rows_of, text_of
from cmdp_fast.trainer.run_report.page import page_of
from cmdp_fast.trainer.run_report.plot import plot_png, way_of
from cmdp_fast.trainer.run_report.reading import Place
from cmdp_fast.trainer.run_report.runs import Run, Step, read_runs
from cmdp_fast.trainer.run_report.samples import Policy, sample_of
from cmdp_fast.trainer.run_report.tokens import MOST_CHARACTERS, MOST_TOKENS, edges_of
from cmdp_fast.trainer.run_report.visible import short, visible

WRITTEN = ("reward_against_kl.png", "samples.html", "samples.md")
ALLOWED = {  # by element, the attributes that the page gives it
    **{name: set() for name in ("head", "title", "style", "body", "main", "h1", "h2", "figure", "picture", "table")},
    **{name: set() for name in ("thead", "tbody", "tr", "td", "bdi", "li", "br")},
    **{name: {"class"} for name in ("p", "div", "ul", "section", "article", "h3", "figcaption")},
    **{"html": {"lang"}, "meta": {"charset", "http-equiv", "content", "name"}, "th": {"scope"}},
    **{"source": {"media", "srcset"}, "img": {"src", "alt"}, "span": {"class", "title"}, "mark": {"class", "title"}},
}
EMPTY_ELEMENTS = {"meta", "source", "img", "br"}


@pytest.fixture(scope="module")
def undrawn() -> None:
    """Here figures are drawn."""


class Page(HTMLParser):
    """A page that has been parsed: its structure, its text, and its completions' tokens. Whatever it should not hold is
    an assertion."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.structure: list[Any] = []
        self.text = ""
        self.cells: list[list[tuple[str, str, str, str]]] = []  # (element, class, title, text) of each token
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert tag in ALLOWED and given.keys() <= ALLOWED[tag] and len(given) == len(attrs), (tag, attrs)
        for name in ("src", "srcset"):
            assert given.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
        assert re.fullmatch(r"[a-z0-9 ]*", given.get("class", ""))
        self.structure.append((tag, {name: v for name, v in given.items() if name not in ("title", "src", "srcset")}))
        if tag == "div" and given.get("class") == "text":
            self.cells.append([])
        if self._in_text and "title" in given:
            self.cells[-1].append((tag, given.get("class", ""), given["title"], ""))
        if tag not in EMPTY_ELEMENTS:
            self._open.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag
        self.structure.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "style":
            return
        self.text += data
        if self._in_text and "title" in self._open[-1][1]:
            tag, kind, title, text = self.cells[-1][-1]
            self.cells[-1][-1] = (tag, kind, title, text + data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")

    @property
    def _in_text(self) -> bool:
        return any(given.get("class") == "text" for _, given in self._open)


def report(*runs: Path, output: Path, **options: Any) -> str:
    """The page that the command writes."""
    words = [f"--{name}={value}" for name, value in options.items()]
    assert main(["report", *map(str, runs), f"--output-dir={output}", *words]) == 0
    return (output / "samples.html").read_text(encoding="utf-8")


def quiet(_: str) -> None:
    pass


def groups(*folders: Path) -> list[Any]:
    return groups_of(read_runs([str(folder) for folder in folders], quiet))


# ------------------------------------------------------------------------------------------------------ the page


def test_the_files_and_what_the_page_may_do(tmp_path, capsys):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", method="lagrangian", kind="lagrangian", coefficient=0.1)
    text = report(one, two, output=tmp_path / "deep" / "out")
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == sorted(WRITTEN)
    assert (tmp_path / "deep" / "out" / WRITTEN[0]).read_bytes().startswith(b"\x89PNG")
    page = Page(text)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in [
        given.get("content") for kind, given in (s for s in page.structure if isinstance(s, tuple)) if kind == "meta"
    ]
    bare = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|url\(|@import|<script|javascript:|\bon\w+=", bare)
    assert "task sums · budget 2 nats a completion (reverse_kl) · 2 methods · seed 0" in page.text
    assert [name for name in ("before", "cmdp", "lagrangian") if name in page.text] == ["before", "cmdp", "lagrangian"]
    assert "reward 1 · 0.50 of 2 nats · 3 tokens✓ within budget" in page.text
    assert "2 runs, 2 methods, 1 prompt" in capsys.readouterr().out


def test_tokens_are_shaded_and_the_crossing_is_marked(tmp_path):
    tokens, costs = ["A", "\n", "<b>", "d", "e", ""], [0.0, 0.02, 0.5, 2.5, None, 0.25]
    after = sample(completion="A\n<b>de", tokens=tokens, costs=costs, crossing=3, feasible=False, cumulative=3.27)
    page = Page(report(write_run(tmp_path / "r", [sample("student_before"), after]), output=tmp_path / "out"))
    assert edges_of(read_runs([str(tmp_path / "r")], quiet)) == (0.02, 0.06, 0.2, 0.6, 2.0)
    before, cell = page.cells
    assert not before
    assert [(element, kind, text) for element, kind, _, text in cell] == [
        *[("span", "k0", "A"), ("span", "k1", "↵\n"), ("span", "k3", "<b>"), ("mark", "k5", "d")],
        *[("span", "", "e"), ("span", "k3 end", "∎")],
    ]
    titles = [title for _, _, title, _ in cell]
    assert titles[2] == "0.5 nats, 0.52 nats so far (token 3 of 6)"
    assert titles[4] == "unknown, unknown so far (token 5 of 6)"
    assert "✕ OVER BUDGET from token 4" in page.text and "0.02 to 0.06" in page.text


def test_one_that_is_cut_off_or_not_judged_says_so(tmp_path):
    after = sample(finished=False, reward=None, length=1)
    page = Page(report(write_run(tmp_path / "r", [after]), output=tmp_path / "out"))
    assert "not judged · 0.50 of 2 nats · 1 token✓ within budget · ✂ cut off" in page.text
    assert "| cmdp | A2 | not judged | 0.50 of 2 | 1 | within budget, cut off |" in markdown_in(tmp_path / "out")


def test_a_token_in_the_middle_may_have_no_text_and_an_end_none(tmp_path):
    after = sample(completion="ab", tokens=["a", "", "b"], costs=[0.1, 0.1, 0.1])
    page = Page(report(write_run(tmp_path / "r", [after]), output=tmp_path / "out"))
    assert [text for *_, text in page.cells[0]] == ["a", "∅", "b"]


def test_without_costs_and_without_a_teacher_it_is_plain(tmp_path):
    plain = {name: value for name, value in sample(completion="a\nb").items() if "cumulative" not in name}
    del plain["feasible"]
    page = Page(report(write_run(tmp_path / "r", [plain], before=None), output=tmp_path / "out"))
    assert page.cells == [[]] and "a\nb" in page.text
    assert "reward 1 · 3 tokens" in page.text and "budget✓" not in page.text and "tooltip" not in page.text


def test_tokens_that_do_not_spell_the_completion_are_not_shown(tmp_path):
    after = sample(completion="right", tokens=["wrong"], costs=[9.0], crossing=0)
    page = Page(report(write_run(tmp_path / "r", [after]), output=tmp_path / "out"))
    assert page.cells == [[]] and "right (its tokens do not spell it" in page.text and "wrong" not in page.text


def test_a_budget_per_token_is_that_of_the_length(tmp_path):
    page = Page(report(write_run(tmp_path / "r", budget=0.5, budget_per_token=True), output=tmp_path / "out"))
    assert "0.50 of 1.5 nats" in page.text and "budget 0.5 nats a token" in page.text


def test_the_scale_is_of_the_smallest_budget_and_one_for_all(tmp_path):
    folders = [write_run(tmp_path / f"{budget}", budget=budget) for budget in (8.0, 0.5, 2.0)]
    assert edges_of(read_runs([str(folder) for folder in folders], quiet)) == (0.005, 0.015, 0.05, 0.15, 0.5)


def test_a_chat_is_shown_by_its_messages(tmp_path):
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    ]
    page = Page(report(write_run(tmp_path / "r", [sample(prompt=chat)]), output=tmp_path / "out"))
    assert "system\nBe short.\nuser\nHello\nassistant\n" in page.text and '{"tool_calls": [{"name": "f"}]}' in page.text
    assert "**Prompt 1** system&#58; Be short.<br>user&#58; Hello<br>assistant&#58; " in markdown_in(tmp_path / "out")


def test_a_long_completion_is_shown_in_part(tmp_path):
    many = sample(completion="ab" * 10**5, tokens=["ab"] * 10**5, costs=[0.001] * 10**5, crossing=2000)
    long = sample("student_before", completion="y" * 5_000_000)
    single = sample(prompt="2", completion="z" * 5000, tokens=["z" * 4999, "z"], costs=[1.0, 1.0])
    one = [long, many, sample("student_before", "2"), single]
    text = report(write_run(tmp_path / "r", one), output=tmp_path / "out")
    page = Page(text)
    assert len(text) < 10**6 and len(page.cells[1]) == MOST_TOKENS
    assert "… 99,000 more tokens; the budget is spent at token 2001" in page.text
    assert f"… {5_000_000 - MOST_CHARACTERS:,} more characters" in page.text
    assert f"… {5_000_000 - MOST_CHARACTERS:,} more characters" in markdown_in(tmp_path / "out")
    assert len(page.cells[3]) == 1 and "… 1 more token" in page.text
    assert "z" * MOST_CHARACTERS in page.text and "z" * (MOST_CHARACTERS + 1) not in page.text


def markdown_in(folder: Path) -> str:
    return (folder / "samples.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ measures


def test_seeds_of_a_method_are_one_row_with_its_interval(tmp_path):
    """1, 2 and 6: mean 3, standard deviation √7, t of two degrees 4.302653 (any table of Student's t)."""
    folders = [
        write_run(
            tmp_path / f"s{seed}",
            [sample("student_before", reward=0.5), sample(reward=value), sample(reward=value)],
            after={**FIGURES, "constraint_satisfaction": value / 10, "distinct_2": 0.5},
            seed=seed,
            keep=seed + 1,
        )
        for seed, value in ((2, 6.0), (0, 1.0), (1, 2.0))
    ]
    (group,) = groups(*folders)
    assert group.label == "cmdp" and [run.seed for run in group.runs] == [0, 1, 2]
    before, method = rows_of([group])
    half = 4.302653 * math.sqrt(7 / 3)
    assert method.figures["reward"] == (3.0, pytest.approx(half, rel=1e-6))
    assert method.figures["ended"] == (0.75, 0.0) and method.seeds == "3"
    page = Page(report(*folders, output=tmp_path / "out"))
    assert "3.000 ± 6.572" in page.text and "30.0 ± 65.7" in page.text and "50.0 ± 0.0" in page.text
    assert "| cmdp | 3 | 3.000 ± 6.572 | 0.975 ± 0.000 | 30.0 ± 65.7 | 1.25 ± 0.00 |" in markdown_in(tmp_path / "out")
    assert before.label == "student before" and before.figures["reward"].mean == 0.5
    assert math.isnan(before.figures["reward"].half), "one evaluation, whatever the number of seeds"
    assert "student before |  | 0.500 | – | 90.0 |" in markdown_in(tmp_path / "out")


def test_the_reward_in_training_is_that_of_the_last_tenth(tmp_path):
    (group,) = groups(write_run(tmp_path / "r"))
    assert rows_of([group])[-1].figures["reward_in_training"].mean == pytest.approx((0.95 + 1.0) / 2)
    few = [{**STEPS[0], "reward": 3.0}, {**STEPS[1], "reward": 0.25}]
    (group,) = groups(write_run(tmp_path / "few", metrics=few))
    assert rows_of([group])[-1].figures["reward_in_training"].mean == 0.25


def test_the_teacher_has_a_row_where_it_differs(tmp_path):
    other = {**FIGURES, "mean_length": 20.0}
    folders = [write_run(tmp_path / f"{i}", teacher=t, seed=i) for i, t in enumerate((FIGURES, other))]
    assert [[row.label for row in rows_of(groups(f))] for f in folders[1:]] == [["student before", "teacher", "cmdp"]]
    same = [sample(who, reward=0.5) for who in ("teacher", "student_before", "student_after")]
    assert [row.label for row in rows_of(groups(write_run(tmp_path / "same", same, teacher=FIGURES)))] == [
        *("student before", "cmdp")
    ]


def test_the_student_before_has_a_row_for_each_budget(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", before={**FIGURES, "constraint_satisfaction": 1.0}, budget=4.0)
    labels = [row.label for row in rows_of(groups(one, two))]
    assert labels[:2] == ["student before (cmdp, budget 2)", "student before (cmdp, budget 4)"]


def test_a_large_number_has_an_exponent():
    reward = COLUMNS[0]
    assert text_of(rows_of_reward(12345.0), reward) == "12345.000"
    assert text_of(rows_of_reward(-3e38), reward) == "-3e+38"


def rows_of_reward(value: float) -> Any:
    run = Run(Path("r"), dict(SETTINGS), {"code": {}, "origin": {}}, (Step(value, 1.0),), {}, {})
    figures = rows_of(groups_of([run]))[0].figures["reward_in_training"]
    assert figures.mean == value
    return figures


def test_what_methods_are_called(tmp_path):
    soft = {"method": "lagrangian", "kind": "lagrangian"}
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", **soft, coefficient=0.1),
        write_run(tmp_path / "c", **soft, coefficient=0.02),
        write_run(tmp_path / "d", method="", kind="hinge"),
        write_run(tmp_path / "e", method="own/mine.toml", steps=40),
        write_run(tmp_path / "f", method="own/mine.toml", steps=40, began={"code": {"f": "1"}, "origin": {}}),
    ]
    a, b, c, d, e, f = (group.label for group in groups(*folders))
    assert (a, b, c) == (
        "cmdp, steps 20",
        "lagrangian, coefficient 0.1, steps 20",
        "lagrangian, coefficient 0.02, steps 20",
    )
    assert d == "hinge, steps 20" and e != f
    assert re.fullmatch("mine, steps 40, files [0-9a-f]{8}", e) and re.fullmatch("mine, steps 40, files [0-9a-f]{8}", f)


def test_a_lone_setting_of_a_method_is_named_where_it_is_not_its_own(tmp_path):
    """`lagrangian` has 0.1 in its file: another coefficient is named beside any other method."""
    soft = {"method": "lagrangian", "kind": "lagrangian"}
    cmdp = write_run(tmp_path / "cmdp")
    assert groups(cmdp, write_run(tmp_path / "own", **soft, coefficient=0.1))[1].label == "lagrangian"
    changed = groups(cmdp, write_run(tmp_path / "changed", **soft, coefficient=0.3))
    assert [group.label for group in changed] == ["cmdp", "lagrangian, coefficient 0.3"]


def test_a_comparison_is_all_of_its_runs_and_a_run_is_there_once(tmp_path, capsys):
    comparison = tmp_path / "comparisons" / "c"
    for seed in (0, 1):
        write_run(comparison / "runs" / f"cmdp-seed{seed}", seed=seed)
    (comparison / "runs" / "begun").mkdir()
    (comparison / "runs" / ".hidden").mkdir()
    (comparison / "runs" / "note.txt").write_text("")
    report(comparison, comparison / ".." / "c" / "runs" / "cmdp-seed1", output=tmp_path / "out")
    out = capsys.readouterr().out
    assert "begun: no config.json, left out" in out and ".hidden" not in out and "2 runs, 1 method, 1 prompt" in out


def test_a_run_that_was_stopped_has_its_line_alone(tmp_path, capsys):
    stopped = write_run(tmp_path / "a", None, [*STEPS[:5], '{"step": 6, "rew'], summary=False, seed=1)
    (run,) = read_runs([str(stopped)], quiet)
    assert len(run.steps) == 5 and not run.ended
    page = Page(report(stopped, output=tmp_path / "one"))
    assert "the last line is not whole and is dropped" in capsys.readouterr().out
    assert "1 of 1 run not finished" in page.text and "No run has samples yet" in page.text
    page = Page(report(stopped, write_run(tmp_path / "b"), output=tmp_path / "two"))
    assert "1 of 2 runs not finished" in page.text
    assert "| cmdp | 1 of 2 | 1.000 | 0.975 |" in markdown_in(tmp_path / "two")
    begun = write_run(tmp_path / "begun", None, (), summary=False)
    (begun / "metrics.jsonl").unlink()
    Page(report(begun, output=tmp_path / "three"))


# ------------------------------------------------------------------------------------------------------ prompts


def test_the_seed_decides_which_prompts_are_shown(tmp_path):
    prompts = [f"p{i:02}" for i in range(30)]
    one = write_run(tmp_path / "one", of_prompts("student_before", prompts) + of_prompts("student_after", prompts))
    others = [*reversed(prompts[:25]), "only here"]
    two = write_run(tmp_path / "two", of_prompts("student_after", others), method="hinge")
    for seed in (0, 3):
        shown = [row[0].prompt[0][1] for row in choose(groups(one, two), 4, seed).rows]
        assert shown == [prompts[i] for i in sorted(random.Random(seed).sample(range(25), 4))]
    chosen = choose(groups(one, two), 4, 3)
    assert [s.completion for s in chosen.rows[0]] == [
        f"student_{who} {chosen.rows[0][0].prompt[0][1]}" for who in ("before", "after", "after")
    ]
    page = Page(report(one, two, output=tmp_path / "out", prompts=4, seed=3))
    assert "4 of the 25 held-out prompts that all columns have, drawn at random with seed 3" in page.text
    assert len(choose(groups(one, two), 99, 0).rows) == 25


def test_prompts_whose_costs_were_kept_go_before_others(tmp_path):
    samples = of_prompts("student_after", [f"p{i}" for i in range(20)])
    for one in samples[4:7]:
        one |= {"tokens": [one["completion"]], "costs": [0.5]}
    chosen = choose(groups(write_run(tmp_path / "r", samples)), 3, 0)
    assert [row[0].prompt[0][1] for row in chosen.rows] == ["p4", "p5", "p6"] and chosen.with_costs


def test_a_prompt_has_its_first_completion_by_the_smallest_seed(tmp_path):
    runs = [
        write_run(tmp_path / f"{seed}", [sample(completion=f"first {seed}"), sample(completion="later")], seed=seed)
        for seed in (5, 2)
    ]
    (row,) = choose(groups(*runs), 5, 0).rows
    assert [each.completion for each in row] == ["first 2"]


def test_runs_without_a_prompt_in_common_are_refused(tmp_path, capsys):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", [sample(prompt="other")], task="other")
    assert main(["report", str(one), str(two), f"--output-dir={tmp_path / 'out'}"]) == 2
    assert "no prompt has completions of all of these" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ the plot


def test_a_long_run_is_drawn_by_some_of_its_points(monkeypatch):
    """And both of its ends are among them."""
    monkeypatch.setattr(plot, "POINTS", 5)
    steps = tuple(Step(float(n), float(n)) for n in range(1000))
    kl, reward = way_of(Run(Path("r"), {}, {}, steps, {}, {}))
    assert len(kl) == 5 and kl == reward == sorted(kl)
    window = plot.window_of(1000)
    assert kl[0] == (window - 1) / 2 and kl[-1] == 999 - (window - 1) / 2


@pytest.mark.parametrize(("budget", "furthest"), [(1e-12, 1e100), (2.0, 7.0), (20.0, 60.0)])
def test_ticks_of_any_budget(budget, furthest):
    ticks = plot._ticks(budget, furthest)
    assert ticks[:3] == [0.0, budget / 2, budget] and len(ticks) <= 10 and ticks == sorted(ticks)


def test_a_line_is_of_running_means():
    steps = tuple(Step(reward=float(i), cumulative_kl=None if i == 3 else 2.0 * i) for i in range(41))
    run = Run(Path("r"), dict(SETTINGS), {"code": {}, "origin": {}}, steps, {}, {})
    kl, reward = way_of(run)
    assert len(kl) == 39 and (kl[0], reward[0]) == (1.0, 0.5) and (kl[-1], reward[-1]) == (79.0, 39.5)


@pytest.mark.parametrize("label", ["$x^{2$", "_hidden", "\u202etxet \x1b[2J", "漢字 \ud800", "", "%s {0} \\frac"])
def test_a_label_is_drawn_as_it_is(label, monkeypatch):
    steps = (Step(1.0, 1e99), Step(None, None), Step(-1e99, 0.0))
    run = Run(Path("r"), {**SETTINGS, "method": label}, {"code": {}, "origin": {}}, steps, {}, {})
    made = groups_of([run])
    drawn = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    plot_png(made)
    shown, budget = (text.get_text() for text in drawn[0].legends[0].get_texts())
    assert shown == short(made[0].label, plot.LONGEST_LABEL) and budget == "budget 2"
    monkeypatch.undo()
    assert plot_png(made).startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------ hostile folders


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
    for _ in range(1000):
        deep = [deep]
    run = Run(Path("r"), {**SETTINGS, "deep": deep}, {"code": {}, "origin": {}}, (), {}, {})
    with pytest.raises(InputError, match=r"config\.json: expected settings"):
        groups_of([run])


def test_hostile_settings_give_a_sound_page(tmp_path):
    evil = "</title><script>alert(1)</script><img src=http://x onerror=alert(1)>\x1b[2J\u202e\"'&amp;"
    names = {"recipe": evil, "task": evil, "method": evil.replace("/", ":"), "kind": evil, evil: {evil: evil}}
    runs = [write_run(tmp_path / f"{i}", **names, budget=float(i + 1)) for i in range(2)]
    page = Page(report(*runs, output=tmp_path / "out"))
    assert "<script>alert(1)" in page.text and "⟨U+202E⟩" in page.text and "␛[2J" in page.text
    assert "\x1b" not in markdown_in(tmp_path / "out") and "<script" not in markdown_in(tmp_path / "out")


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


@settings(max_examples=200, deadline=None)
@given(ANY, ANY, ANY, ANY.filter(bool))
def test_any_text_is_shown_and_changes_nothing(label, prompt, completion, token):
    page, (group,) = parsed(label, prompt, completion, token)
    assert page.structure == USUAL
    assert visible(prompt) in page.text and visible(completion) in page.text
    assert page.cells[1][1][3] == visible(token).replace("\n", "↵\n")
    assert group.label in page.text and short(Path(label).stem or label, 80) == group.label


@settings(max_examples=200, deadline=None)
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
