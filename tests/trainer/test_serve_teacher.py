"""`cmdp-fast teacher`: the command, from its settings to its end."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import torch
from tiny_pair import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmdp_fast.cli import main
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.open import check_vocabulary, open_teacher
from cmdp_fast.teachers.teacher import Asking
from cmdp_fast.trainer.serve_teacher import ServeSettings, parse_teacher


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models") / "teacher", seed=1, spare=3)


def test_the_command_serves_what_the_model_says_and_ends_at_a_signal(model, tmp_path):
    """With a token, and in another dtype than its files; two questions are under way as the signal comes."""
    (tmp_path / "token").write_text("a-long-word\n")
    options = ["--model", model, "--port=0", "--dtype=bfloat16", f"--token-file={tmp_path / 'token'}", "--host=0.0.0.0"]
    command = [sys.executable, "-m", "cmdp_fast.cli", "teacher", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stdout.readline()
            url = re.search(r"teacher at (http://0\.0\.0\.0:\d+): .*, bfloat16, 20 columns", ready)[1]
            served = open_teacher(f"served:{url}", Asking(token_file=str(tmp_path / "token")))
            tokenizer = AutoTokenizer.from_pretrained(model)
            check_vocabulary(served, tokenizer)
            itself = TeacherInProcess(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), tokenizer)
            rows, wanted = [[5, 6, 7, 8], [9, 10]], [3, 1]
            expected = itself.answer(rows, wanted).as_hidden()
            assert torch.equal(served.answer(rows, wanted).as_hidden(), expected)
            assert served.about.model == model and len(served.about.revision) == 64
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert process.stdout.read() == "the teacher has ended: what was asked is answered\n"
            assert process.stderr.read() == "cmdp-fast: answering what was asked; a second signal stops it now\n"
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("other_is_lost", [False, True])
def test_two_processes_hold_a_model_together(model, other_is_lost):
    """They answer as one does but for rounding, end at a signal, and the first ends where the other is lost."""
    command = [sys.executable, "-m", "cmdp_fast.cli", "teacher", f"--model={model}", "--port=0", "--tensor-parallel=2"]
    rows, wanted = [[5, 6, 7, 8], [], [9, 10]], [3, 0, 1]
    own = AutoModelForCausalLM.from_pretrained(model)
    expected = TeacherInProcess(own, AutoTokenizer.from_pretrained(model)).answer(rows, wanted).as_hidden()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = re.search(r"teacher at (\S+): ", process.stdout.readline())[1]
            served = open_teacher(f"served:{url}")
            assert torch.equal(served.own_head().weight, own.lm_head.weight)
            for _ in range(3):
                torch.testing.assert_close(served.answer(rows, wanted).as_hidden(), expected)
            (other,) = psutil.Process(process.pid).children()
            if other_is_lost:
                other.kill()
            else:
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == (2 if other_is_lost else 0)
            error = process.stderr.read()
            lost = "process 1 of the 2 of the teacher has ended (exit code -9)"
            assert (lost in error) if other_is_lost else error == ""
            assert not psutil.pid_exists(other.pid)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model is missing"),
        (["--model=m", "--host=0.0.0.0"], "--host 0.0.0.0 lets other machines ask: it needs --token-file"),
        (["--model=m", "--host=machine"], "--host machine lets other machines ask"),
        (["--model=m", "--host=::"], "lets other machines ask"),
        (["--model=m", "--port=65536"], r"--port must be in [0, 65536), not 65536"),
        (["--model=m", "--batch-tokens=0"], "--batch-tokens must be a positive number, not 0"),
        (["--model=m", "--token-file=none"], "the token file none cannot be read"),
        (["--model=/none"], "--model /none: there is no such folder"),
        (["--model=builtin:none"], "there is no model builtin:none"),
        (["--model=MODEL", "--device=none"], "--device none: "),
        (["--model=MODEL", "--attn-implementation=none"], "--attn-implementation none: transformers has"),
        (["--model=MODEL", "--port=TAKEN"], "--host 127.0.0.1 --port TAKEN: cannot be listened at"),
        (["--model=m", "--tensor-parallel=2", "--device=cpu"], "--device is for one process"),
        (["--model=MODEL", "--socket=/none/socket"], "--socket /none/socket: cannot be listened at"),
    ],
)
def test_what_cannot_be_served_is_one_line(model, capsys, words, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["teacher", *(word.replace("MODEL", model).replace("TAKEN", port) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cmdp-fast: error: ") and message.replace("TAKEN", port) in error and error.count("\n") == 1


def test_addresses_of_this_machine_need_no_token():
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert parse_teacher(["--model=m", f"--host={host}"]) == ServeSettings(model="m", host=host)
    assert parse_teacher(["--model=m", "--host=0.0.0.0", "--socket=/a"]).socket == "/a"  # no other machine gets there
