"""A command whose output nobody reads to its end (`| head -1`), or that has nowhere to write it, ends without a
traceback and with an exit code of its own."""

import errno
import io
import os
import sys

import pytest

from cmdp_fast import cli, info

TEXTS = [["--help"], ["--version"], ["info"], ["doctor", "--help"], ["bench", "--help"], ["train", "--help"]]


class Full(io.StringIO):
    """A file on a disk that is full: nothing is written before it is flushed."""

    def flush(self) -> None:
        if self.getvalue():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("words", TEXTS)
def test_a_text_that_cannot_be_written(words, monkeypatch, capsys):
    monkeypatch.setattr(info, "report", lambda: "text")
    for stream, why in ((Full(), "No space left on device"), (None, "it is closed")):
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(words) == 74
        assert capsys.readouterr().err == f"cmdp-fast: error: the output cannot be written: {why}\n"


def test_what_others_have_printed_and_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_main", lambda _: print("text") or 0)
    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.main([]) == 74 and "cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main([]) == 0


@pytest.mark.parametrize("words", TEXTS)
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


@pytest.mark.parametrize("stream", [Full(), None])
@pytest.mark.parametrize("words", [["info", "nonsense"], ["nonsense"], []])
def test_an_error_that_cannot_be_written_keeps_its_exit_code(words, stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(words) == 2


def test_an_error_that_nobody_reads_keeps_its_exit_code(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as unread:
        monkeypatch.setattr(sys, "stderr", unread)
        assert cli.main(["info", "nonsense"]) == 2
        print("more", file=unread, flush=True)
