"""What `cmdp-fast report` puts on its page: the samples, and how they are drawn."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from report_pages import Page, groups, markdown_in, quiet, report
from written_runs import FIGURES, of_prompts, sample, write_run

from cmdp_fast.cli import main
from cmdp_fast.trainer.run_report import chosen as chosen_samples
from cmdp_fast.trainer.run_report import samples
from cmdp_fast.trainer.run_report.chosen import choose
from cmdp_fast.trainer.run_report.reading import Place
from cmdp_fast.trainer.run_report.runs import read_runs
from cmdp_fast.trainer.run_report.samples import MOST_CHARACTERS, MOST_TOKENS
from cmdp_fast.trainer.run_report.tokens import edges_of

WRITTEN = ("reward_against_kl.png", "samples.html", "samples.md")


@pytest.fixture(scope="module")
def undrawn() -> None:
    """Here figures are drawn."""


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


def test_one_that_is_cut_off_has_no_end(tmp_path):
    """The last token that it may have can be one without text."""
    after = sample(completion="a", tokens=["a", ""], costs=[0.1, 0.1], finished=False)
    page = Page(report(write_run(tmp_path / "r", [after]), output=tmp_path / "out"))
    assert [text for *_, text in page.cells[0]] == ["a", "∅"]


def test_one_that_is_over_for_a_while_says_so(tmp_path):
    after = sample(completion="ab", tokens=["a", "b"], costs=[3.0, -2.0], crossing=0, cumulative=1.0)
    page = Page(report(write_run(tmp_path / "r", [after]), output=tmp_path / "out"))
    assert "✓ within budget at its end, over it for a while from token 1" in page.text


def test_no_more_of_a_sample_is_kept_than_is_shown():
    values = sample(completion="ab" * 10**5, tokens=["ab"] * 10**5, costs=[0.0] * 10**5, prompt="p" * 10**5)
    one = samples.sample_of(values, Place(Path("s"), 1))
    assert len(one.completion.text) == len(one.prompt[0].text.text) == MOST_CHARACTERS
    assert len(one.tokens) == MOST_TOKENS and one.more_tokens == 10**5 - MOST_TOKENS
    values = sample(completion="abc" * 5000, tokens=["abc" * 2500, "abc" * 2500], costs=[0.0, 0.0])
    one = samples.sample_of(values, Place(Path("s"), 1))
    assert [len(token.text) for token in one.tokens] == [MOST_CHARACTERS] and one.more_tokens == 1


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


def test_of_a_long_chat_the_beginning_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MOST_MESSAGES", 2)
    monkeypatch.setattr(samples, "MOST_CHARACTERS", 12)
    chat = [{"role": "user", "content": f"message {i}"} for i in range(1003)]
    text = Page(report(write_run(tmp_path / "r", [sample(prompt=chat)]), output=tmp_path / "out")).text
    assert "user\nmessage 0\nuser\nmes … 6 more characters\n … 1,001 more messages" in text
    assert "user&#58; mes … 6 more characters<br>… 1,001 more messages" in markdown_in(tmp_path / "out")


def test_a_budget_that_bounds_leave_open_is_not_called_kept(tmp_path):
    """A teacher of most likely tokens gives the costs' lower bounds."""
    proven, open_, over = (sample(prompt=str(i), certified=i == 0, feasible=i < 2) for i in range(3))
    run = write_run(tmp_path / "r", [proven, open_, over], after={**FIGURES, "certified": 0.25})
    text = Page(report(run, output=tmp_path / "out")).text
    assert text.count("at least 0.50 of 2 nats") == 3 and text.count("✓ within budget") == 1
    assert text.count("? within budget or not: its teacher gives bounds") == 1 and text.count("✕ OVER BUDGET") == 1
    assert "are named “at least”" in text and "proven within budget, %" in text and "25.0" in text
    lines = markdown_in(tmp_path / "out")
    assert "| at least 0.50 of 2 | 3 | within budget or not&#58; its teacher gives bounds |" in lines


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


# ------------------------------------------------------------------------------------------------------ prompts


def test_the_seed_decides_which_prompts_are_shown(tmp_path):
    prompts = [f"p{i:02}" for i in range(30)]
    one = write_run(tmp_path / "one", of_prompts("student_before", prompts) + of_prompts("student_after", prompts))
    others = [*reversed(prompts[:25]), "only here"]
    two = write_run(tmp_path / "two", of_prompts("student_after", others), method="hinge")
    for seed in (0, 3):
        shown = [row[0].prompt[0].text.text for row in choose(groups(one, two), 4, seed).rows]
        assert shown == [prompts[i] for i in sorted(random.Random(seed).sample(range(25), 4))]
    chosen = choose(groups(one, two), 4, 3)
    assert [s.completion.text for s in chosen.rows[0]] == [
        f"student_{who} {chosen.rows[0][0].prompt[0].text.text}" for who in ("before", "after", "after")
    ]
    page = Page(report(one, two, output=tmp_path / "out", prompts=4, seed=3))
    assert "4 of the 25 held-out prompts that all columns have, drawn at random with seed 3" in page.text
    assert len(choose(groups(one, two), 99, 0).rows) == 25


def test_prompts_whose_costs_were_kept_go_before_others(tmp_path):
    samples = of_prompts("student_after", [f"p{i}" for i in range(20)])
    for one in samples[4:7]:
        one |= {"tokens": [one["completion"]], "costs": [0.5]}
    chosen = choose(groups(write_run(tmp_path / "r", samples)), 3, 0)
    assert [row[0].prompt[0].text.text for row in chosen.rows] == ["p4", "p5", "p6"] and chosen.with_costs


def test_a_prompt_has_its_first_completion_by_the_smallest_seed(tmp_path):
    runs = [
        write_run(tmp_path / f"{seed}", [sample(completion=f"first {seed}"), sample(completion="later")], seed=seed)
        for seed in (5, 2)
    ]
    (row,) = choose(groups(*runs), 5, 0).rows
    assert [each.completion.text for each in row] == ["first 2"]


def test_a_page_has_a_bound(tmp_path, monkeypatch, capsys):
    prompts = [str(i) for i in range(9)]
    run = write_run(tmp_path / "r", of_prompts("student_before", prompts) + of_prompts("student_after", prompts))
    monkeypatch.setattr(chosen_samples, "MOST_SHOWN", 16)
    report(run, output=tmp_path / "all", prompts=8)
    assert main(["report", str(run), f"--output-dir={tmp_path / 'out'}", "--prompts=9"]) == 2
    error = capsys.readouterr().err
    assert "9 prompts with 2 completions each are more than the 16 of a page: fewer --prompts, or fewer runs" in error
    assert not (tmp_path / "out").exists()


def test_runs_without_a_prompt_in_common_are_refused(tmp_path, capsys):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", [sample(prompt="other")], task="other")
    assert main(["report", str(one), str(two), f"--output-dir={tmp_path / 'out'}"]) == 2
    assert "no prompt has completions of all of these" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_label_shows_no_secret(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, stop_strings=[f"TOKEN={name}-of-mine"]) for name in ("one", "two")]
    labels = [group.label for group in groups(*runs)]
    assert all("TOKEN=***" in label and "of-mine" not in label for label in labels) and len(set(labels)) == 2
