"""What a person sees in a terminal: a bar that fits, one line a text, nothing that moves in a pipe."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios

import pytest
import torch
from rich.console import Console

from cmdp_fast.terminal import ConsoleLost, fitted, show
from cmdp_fast.trainer.comparison.table import Estimate, TableRow, columns_of, fitting, text_of
from cmdp_fast.trainer.interrupts import PENDING
from cmdp_fast.trainer.records import progress as progress_module
from cmdp_fast.trainer.records.progress import FREE, Progress, Waiting, duration
from cmdp_fast.trainer.records.report import Report, quiet_libraries
from cmdp_fast.trainer.settings.config import TrainConfig

FIGURES = ("reward 0.68", "budget use 334%", "KL 6.68", "3730 tokens/s")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def at(done: int, total: int = 400, before: int = 0, description: str = "training runs/quickstart") -> Progress:
    progress = Progress(description, total, before)
    progress.figures = FIGURES
    progress.reach(done)
    return progress


def shown(progress: Progress, width: int) -> str:
    pieces = progress.pieces(width)
    return " ".join(text if name != "bar" else "=" * len(text) for name, text in pieces.items())


def test_what_a_line_has_at_any_width(clock):
    """The count at all of them; at 80 columns the bar, the time left and the first figure as well."""
    progress = at(13)
    for width in range(1, 200):
        pieces = progress.pieces(width - FREE)
        line = sum(map(len, pieces.values())) + len(pieces) - 1 + sum(name.isdigit() for name in pieces)
        assert pieces["count"] == " 13/400" and (line <= width - FREE or list(pieces) == ["count"])
        if width >= 80:
            assert {"what", "bar", "time", "0"} <= pieces.keys() and len(pieces["bar"]) >= 8
        if width >= 60:
            assert {"what", "bar", "time"} <= pieces.keys()
    assert list(progress.pieces(200)) == ["what", "bar", "count", "time", "0", "1", "2", "3"]
    assert shown(progress, 20) == " 13/400 0:00:00 left"


def test_the_description_is_cut_at_words(clock):
    long = at(13, description="first run: training the arithmetic-student of somebody with a very long name")
    assert long.pieces(76)["what"] == "first run: training the"  # a figure is worth more than the rest


def test_a_run_that_goes_on_counts_steps_and_estimates_by_its_own_speed(clock):
    progress = at(40, total=94, before=40)
    assert progress.seconds_left() is None
    clock[0] += 5
    assert shown(progress, 34).split() == ["training", "40/94", "0:00:05", "so", "far"]
    clock[0] += 5
    progress.reach(42)
    assert progress.seconds_left() == 5 * 52  # and not what 42 steps in ten seconds would say
    clock[0] += 3
    assert progress.seconds_left() == 5 * 52 - 3
    progress.end()
    assert shown(progress, 76).split()[3:6] == ["42/94", "in", "0:00:13"]


def test_a_note_is_whole_before_bar_and_figures(clock):
    """From 40 columns on; below them its first word."""
    progress = at(13)
    progress.note = PENDING
    for width in range(40, 120):
        pieces = progress.pieces(width - FREE)
        assert pieces["what"] == PENDING and pieces["count"] == " 13/400"
        assert ("bar" in pieces and "time" in pieces) == (width >= 59) and ("0" in pieces) == (width >= 72)
    assert list(progress.pieces(20).values()) == ["stopping", " 13/400"]


def test_long_steps_have_a_time_left(clock):
    """rich's own estimate forgets what is older than half a minute."""
    progress = at(0)
    for done in range(1, 4):
        clock[0] += 300
        progress.reach(done)
    assert progress.seconds_left() == 397 * 300 and duration(397 * 300) == "33:05:00"


def test_texts_are_broken_at_words_and_commands_are_not():
    text = "interrupted after step 13 of 94; runs/quickstart keeps step-000013. To go on: cmdp-fast train --resume r"
    assert fitted(text, 200) == text
    assert fitted(text, 60).split("\n") == [
        "interrupted after step 13 of 94; runs/quickstart keeps",
        "  step-000013. To go on:",
        "  cmdp-fast train --resume r",
    ]
    command = f"To go on: cmdp-fast train --resume {'x' * 80} --steps 3"
    assert fitted(command, 40) == command.replace(": ", ":\n  ")
    assert fitted("a-" * 60, 40) == "a-" * 60  # a path is not broken either


def test_a_stream_that_lacks_a_letter():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show("runs/café …", stream)
    assert stream.buffer.getvalue() == b"runs/caf? ?\n"


class Terminal:
    """A terminal of so many columns in the place of the standard output; `lines` is what a person sees at last."""

    def __init__(self, monkeypatch, columns: int, encoding: str = "utf-8") -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.output = os.fdopen(slave, "w", encoding=encoding)
        monkeypatch.setattr(sys, "stdout", self.output)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.delenv("CI", raising=False)

    def lines(self) -> list[str]:
        self.output.flush()
        os.set_blocking(self.master, False)
        text = ""
        while True:
            try:
                text += os.read(self.master, 1 << 16).decode()
            except BlockingIOError:
                break
        drawn = [line.split("\x1b[2K")[-1] for line in text.replace("\r\n", "\n").split("\n")]
        return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line).rstrip() for line in drawn if line]


def test_an_interrupt_leaves_one_bar_and_what_was_said(monkeypatch):
    terminal = Terminal(monkeypatch, 80)
    report = Report()
    assert not report.quiet
    with pytest.raises(KeyboardInterrupt):
        for item in report.track(range(30), "training runs/quickstart", before=10):
            if item == 3:
                report.note(PENDING)
                raise KeyboardInterrupt
            report.status(*FIGURES)
    report.say("interrupted after step 13 of 40; runs/quickstart keeps it")
    bars = [line for line in terminal.lines() if "/40" in line]
    assert len(bars) == 1 and " 13/40 in 0:00:00  reward 0.68" in bars[0] and len(bars[0]) <= 80 - FREE
    assert bars[0].startswith("training runs/quickstart ")


def test_a_line_leaves_room_for_what_the_terminal_writes_itself(clock):
    """`^C`, behind which it must not be wrapped: at a width that it fills, and at all others."""
    for line in (at(13), Waiting("something " * 20, most=600)):
        for width in range(30, 120):
            console = Console(file=io.StringIO(), width=width, color_system=None)
            console.print(line, end="")
            assert 0 < len(console.file.getvalue()) <= width - len("^C")


def test_what_is_waited_for_leaves_nothing(monkeypatch):
    terminal = Terminal(monkeypatch, 60)
    report = Report()
    for _ in report.track(range(1), "evaluating"):  # a bar that has ended takes nothing away from it
        pass
    with report.waiting("vLLM starts for the student", most=600):
        pass
    report.say("vLLM serves")
    *_, waited, said = [line for line in terminal.lines() if line]
    assert waited == "0:00:00 of at most 0:10:00  vLLM starts for the student" and said == "vLLM serves"
    assert str(Waiting("vLLM starts", 600)) == "0:00:00 of at most 0:10:00  vLLM starts"


@pytest.mark.parametrize("within", ["a bar", "a wait"])
def test_a_terminal_that_is_gone(within, monkeypatch):
    """Nothing of what draws or says raises from then on, and nothing is left that would at the end of Python."""
    terminal = Terminal(monkeypatch, 80)
    report, seen = Report(), []
    assert not report.quiet
    if within == "a bar":
        for item in report.track(range(3), "training"):
            if item == 1:
                os.close(terminal.master)
            report.say(f"a line of {item}")
    else:
        with report.waiting("something"):
            os.close(terminal.master)
            report.say("a line")
    for item in report.track(range(4), "evaluating"):
        report.say("a line")
        seen.append(item)
    assert seen == [0, 1, 2, 3] and not report.shown
    terminal.output.flush()


def test_no_console_at_all(monkeypatch):
    """As with `>&-`; and one that somebody closes meanwhile."""
    monkeypatch.setattr(sys, "stdout", None)
    report = Report()
    report.say("a line")
    assert report.quiet and not report.shown
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    report = Report()
    sys.stdout.close()
    report.say("a line")
    assert not report.shown


class Full(io.StringIO):
    """A file on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("before", ["", "a line"])
def test_a_result_that_nobody_has_seen_is_told_of(before, monkeypatch):
    """Lines are not: of a training all is in its folder."""
    monkeypatch.setattr(sys, "stdout", Full())
    report = Report()
    report.say("a line")
    report.check("nothing is lost")
    report = Report()
    if before:  # it is known by then, and nothing more is written
        report.say(before)
    report.result("a figure")
    with pytest.raises(ConsoleLost, match=r"^the output cannot be written: No space left on device; it is in a file$"):
        report.check("it is in a file")


def test_a_result_of_another_process_or_without_a_console_is_expected_nowhere(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    other = Report(shown=False)
    monkeypatch.setattr(sys, "stdout", None)
    for report in (other, Report()):
        report.result("a figure")
        report.check("it is in a file")


def test_what_a_report_says_shows_no_secrets(capsys):
    """Such as why a run was stopped."""
    Report().say("stopped by an error: https://me:pass@host/x?sig=abc: no answer\x1b[31m")
    assert (
        capsys.readouterr().out
        == "stopped by an error: https://***@host/x?***: no answer\N{REPLACEMENT CHARACTER}[31m\n"
    )


def test_a_console_that_lacks_a_character(monkeypatch):
    """A question mark stands for it, and all that follows is shown too."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output := io.BytesIO(), encoding="ascii"))
    report = Report()
    for line in ("runs/café", "and on"):
        report.say(line)
    assert report.shown and output.getvalue() == b"runs/caf?\nand on\n"
    terminal = Terminal(monkeypatch, 80, "ascii")
    report = Report()
    assert not report.quiet
    for _ in report.track(range(3), "training runs/café"):
        report.status("reward 0.50")
    report.say("and on")
    assert report.shown
    *_, bar, last = [line for line in terminal.lines() if line]
    assert bar.startswith("training runs/caf? ") and " 3/3 in 0:00:00  reward 0.50" in bar and last == "and on"


def test_an_error_that_says_nothing_of_the_console_is_told(monkeypatch):
    class Odd(io.StringIO):
        def write(self, text: str) -> int:
            raise ValueError("a text of another kind")

    monkeypatch.setattr(sys, "stdout", Odd())
    report = Report()
    with pytest.raises(ValueError, match="another kind"):
        report.say("a line")
    with pytest.raises(ValueError, match="another kind"):
        report._console().file.write("a line")
    assert report.shown


@pytest.mark.parametrize("why", ["CI", "a pipe", "a terminal that draws nothing"])
def test_quiet(why, monkeypatch, capsys):
    """A line at a tenth of the way, by the count of the whole, and nothing that moves."""
    if why == "CI":
        terminal = Terminal(monkeypatch, 80)
        monkeypatch.setenv("CI", "true")
    elif why != "a pipe":
        terminal = Terminal(monkeypatch, 80)
        monkeypatch.setenv("TERM", "dumb")
    else:
        monkeypatch.delenv("CI", raising=False)
    report = Report()
    with report.waiting("something"):
        for _ in report.track(range(3), "training", before=40):
            report.status("reward 0.50", "KL 1.00")
    lines = capsys.readouterr().out.splitlines() if why == "a pipe" else terminal.lines()
    assert lines[0] == "training" and len(lines) == 4
    assert [line.strip() for line in lines[1:]] == [f"{n}/43  reward 0.50  KL 1.00  0 s left" for n in (41, 42, 43)]


def test_a_run_that_goes_on_says_a_tenth_by_the_count_of_the_whole_and_the_last(monkeypatch, capsys):
    monkeypatch.setenv("CI", "true")
    report = Report()
    for _ in report.track(range(35), "training", before=65):
        report.status("KL 1.00")
    counts = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert counts == [f"{n}/100" for n in (*range(66, 100, 3), 100)]


def test_a_line_holds_nothing_that_a_terminal_obeys(capsys):
    """Others have written parts of it."""
    Report().say("runs/a\x1b[2J\x9b\b goes on")
    assert capsys.readouterr().out == "runs/a?[2J?? goes on\n".replace("?", "\N{REPLACEMENT CHARACTER}")


def test_evaluations_count_completions(clock):
    report = Report(shown=False)
    seen = []
    for start in report.track(range(0, 100, 32), "evaluating", each=32, total=100):
        seen.append(start)
    assert seen == [0, 32, 64, 96]
    progress = Progress("evaluating", 100)
    progress.reach(4 * 32)
    assert progress.done == 100


def test_the_notes_of_what_a_run_does_meanwhile():
    report = Report()
    report._progress = progress = Progress("training", 10)
    with report.doing("evaluating"):
        assert progress.note == "evaluating"
        report.note("stopping")  # a signal comes
    assert progress.note == "stopping"  # and stays
    with report.doing("writing a checkpoint"):
        assert progress.note == "stopping"


def test_what_other_libraries_say_of_tied_weights_alone(capsys, caplog):
    """That one of two names is saved is as it should be; anything else of the same module is said."""
    from accelerate import PartialState
    from accelerate.utils import other

    PartialState()  # without which its log is silent
    quiet_libraries()
    weight = torch.zeros(2)
    with caplog.at_level("WARNING"):
        assert list(other.clean_state_dict_for_safetensors({"embedding": weight, "head": weight})) == ["embedding"]
        other.logger.warning("something else")
    (record,) = caplog.records
    assert record.getMessage().endswith("something else")


def test_a_comparison_shows_the_columns_that_fit(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # in one that draws nothing rich takes no width
    figures = {name: Estimate(0.985, 0.003) for name in ("accuracy", "constraint_satisfaction", "mean_cumulative_kl")}
    rows = [TableRow("cmdp:budget=8,penalty=2", 3, TrainConfig(), {**figures, "mean_length": Estimate(18.0, 0.1)})]
    every = columns_of(rows)
    for width in range(20, 140):
        shown = fitting(rows, every, width)
        assert shown == every[: len(shown)] and shown
        if len(shown) > 1 and width >= 80:  # no figure is cut
            console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
            with monkeypatch.context() as patch:
                patch.setattr("rich.console.Console", lambda console=console, **_: console)
                text = text_of(rows)
            assert "98.5 ± 0.3" in text and ("more columns: table.md" in text) == (shown != every)
            assert "…" not in text
    assert fitting(rows, every, 80) == every[:3] and fitting(rows, every, 139) == every
