"""A command whose output nobody reads to its end (`| head -1`) ends without a traceback."""

import os
import sys

import pytest

from cmdp_fast import cli, info


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["info"], ["doctor", "--help"]])
def test_a_text_that_nobody_reads(words, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(info, "report", lambda: "text")
    with os.fdopen(writing, "w", encoding="utf-8") as unread:  # whose end writes what is left
        monkeypatch.setattr(sys, "stdout", unread)
        assert cli.main(words) == 141
        print("more", file=unread, flush=True)
    assert not capsys.readouterr().err


def test_another_pipe_that_breaks_is_an_error(monkeypatch):
    def broken():
        raise BrokenPipeError("of a process that ended")

    monkeypatch.setattr(info, "report", broken)
    with pytest.raises(BrokenPipeError, match="of a process that ended"):
        cli.main(["info"])


def test_an_error_that_nobody_reads_keeps_its_exit_code(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as unread:
        monkeypatch.setattr(sys, "stderr", unread)
        assert cli.main(["info", "nonsense"]) == 2
        print("more", file=unread, flush=True)
