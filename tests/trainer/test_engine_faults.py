"""Rollouts on vLLM, the trainer's side: what a server may not answer, and settings that cannot work."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest
import requests
import torch
from engine_runs import engine_settings, stepper
from tiny_pair import arguments
from vllm_stand_in import StandIn

from cmdp_fast import http_client
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.engine import answers, client
from cmdp_fast.trainer.rollout import Sampling


def only(path, change):
    """A fault of the answers to one path, and not of the fixed tokens' log-probabilities."""

    def fault(asked, body, answer):
        return change(body, answer) if asked == path and "prompt_logprobs" not in body else answer

    return fault


def first_choice(**values):
    def change(body, answer):
        choice = answer["choices"][0]
        return {
            "choices": [
                {**choice, **{n: v(choice) if callable(v) else v for n, v in values.items()}},
                *answer["choices"][1:],
            ]
        }

    return only("/v1/completions", change)


FAULTS = {
    "fewer completions": (
        only("/v1/completions", lambda body, answer: {"choices": answer["choices"][1:]}),
        "returned the completions .* for a prompt, expected",
    ),
    "one twice": (
        only("/v1/completions", lambda _, answer: {"choices": [{**each, "index": 7} for each in answer["choices"]]}),
        "returned the completions .7.* for a prompt",
    ),
    "another prompt": (first_choice(prompt_token_ids=[1]), "went on with another prompt"),
    "wrong lengths": (
        first_choice(logprobs=lambda c: {"token_logprobs": c["logprobs"]["token_logprobs"][1:]}),
        "logprobs of other lengths than its completions",
    ),
    "a token that is none": (first_choice(token_ids=[99], logprobs={"token_logprobs": [-1.0]}), "returned token 99"),
    "too many tokens": (first_choice(token_ids=[4] * 70, logprobs={"token_logprobs": [-1.0] * 70}), "of 70 tokens"),
    "no tokens": (first_choice(token_ids=[]), "of 0 tokens"),
    "ids that are text": (first_choice(token_ids=["4"]), "no list of integers"),
    "NaN": (
        first_choice(logprobs=lambda c: {"token_logprobs": [float("nan")] * len(c["token_ids"])}),
        "returned nan among its logprobs",
    ),
    "positive": (
        first_choice(logprobs=lambda c: {"token_logprobs": [1.0] * len(c["token_ids"])}),
        "returned the log-probability 1.0",
    ),
    "no log-probabilities": (first_choice(logprobs=None), "answered without logprobs"),
    "aborted": (first_choice(finish_reason="abort"), "ended a completion with 'abort'"),
    "an end of its own": (
        first_choice(token_ids=[4], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"),
        "ended a completion with 'stop' at token 4",
    ),
    "no room": (
        first_choice(token_ids=[4], logprobs={"token_logprobs": [-1.0]}, finish_reason="length"),
        "after 1 of .* --max-model-len",
    ),
    "other ids than its text": (
        only("/v1/completions", lambda _, answer: {"choices": [{**c, "text": "zz"} for c in answer["choices"]]}),
        "has another tokenizer",
    ),
    "log-probabilities of another temperature": (
        only(
            "/v1/completions",
            lambda _, answer: {
                "choices": [
                    {**c, "logprobs": {"token_logprobs": [x - 0.5 for x in c["logprobs"]["token_logprobs"]]}}
                    for c in answer["choices"]
                ]
            },
        ),
        "not those it samples with: they differ by 0.5 nats .* processed_logprobs",
    ),
    "no JSON": (only("/v1/completions", lambda *_: b"<html>"), "something that is not JSON"),
    "nesting": (only("/v1/completions", lambda *_: b"[" * 100_000), "something that is not JSON"),
    "an error": (
        only("/v1/completions", lambda *_: (400, {"error": {"message": "no\x1b[2J such"}})),
        r"answered 400: no\?",
    ),
    "a dead engine": (only("/v1/completions", lambda *_: (500, {"error": {"message": "dead"}})), "answered 500: dead"),
    "no dev mode": (
        lambda path, body, answer: (404, {"detail": "Not Found"}) if path == "/collective_rpc" else answer,
        "answered 404.*collective_rpc",
    ),
    "no prompt's log-probabilities": (
        lambda _, body, answer: {"choices": [{}]} if "prompt_logprobs" in body else answer,
        "without the prompt's logprobs",
    ),
    "no model": (lambda path, _, answer: {"data": []} if path == "/v1/models" else answer, "names no model"),
    "little room": (
        lambda path, _, answer: {"data": [{"id": "m", "max_model_len": 7}]} if path == "/v1/models" else answer,
        "takes 7 tokens, expected 10",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_answer_is_named(pair, server, held, tmp_path, name):
    server.fault, expected = FAULTS[name]
    _, step = stepper(engine_settings(pair, server, tmp_path), held)
    with pytest.raises(InputError, match=expected) as raised:
        step()
    assert server.url in str(raised.value) and str(raised.value).isprintable()


def test_a_stop_string_may_end_within_a_token(pair):
    """A server's text ends with the string, where the tokens go on: that is no other tokenizer."""

    class Tokenizer:
        def decode(self, ids, **_):
            return "".join({1: "9", 2: ";;"}[token] for token in ids)

    sampling = Sampling(8, 1.0, eos=(0,), pad=0, vocab_size=3, stop_strings=("9;",), tokenizer=Tokenizer())
    answers.check_texts([answers.Drawn([1, 2], [-1.0, -1.0], "9;")], sampling, "the server")
    with pytest.raises(InputError, match="another tokenizer"):
        answers.check_texts([answers.Drawn([1, 2], [-1.0, -1.0], "9")], sampling, "the server")


def test_every_server_reports_what_it_samples_with(pair, server, held, tmp_path):
    """Also the last of more servers than there are fixed prompts."""
    servers = [held.enter_context(StandIn(pair["student"]).served()) for _ in range(5)]
    servers[-1].fault, _ = FAULTS["log-probabilities of another temperature"]
    urls = tuple(each.url for each in servers)
    _, step = stepper(engine_settings(pair, server, tmp_path, rollout_url=urls), held)
    with pytest.raises(InputError, match=f"{urls[-1]} reports log-probabilities that are not those .* by 0.5 nats"):
        step()


def test_log_probabilities_before_top_p_are_seen(pair, server, held, tmp_path):
    """vLLM's default reports them as they are without temperature, top-k and top-p."""
    changes = {"temperature": 0.7, "top_k": 9, "top_p": 0.8}
    _, step = stepper(engine_settings(pair, server, tmp_path, **changes), held)
    step()
    honest = server.answer

    def raw(path, body):
        given = honest(path, body)
        for choice in given["choices"] if path == "/v1/completions" and "prompt_logprobs" not in body else ():
            ids = [*body["prompt"], *choice["token_ids"]]
            rows = server.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            values = [rows[i - 1, ids[i]].item() for i in range(len(body["prompt"]), len(ids))]
            choice["logprobs"]["token_logprobs"] = values
        return given

    server.answer = raw
    _, step = stepper(engine_settings(pair, server, tmp_path, **changes), held)
    with pytest.raises(InputError, match=r"reports log-probabilities that are not those .* processed_logprobs"):
        step()


def test_weights_that_did_not_arrive_are_named_by_their_step(pair, server, held, tmp_path):
    _, step = stepper(engine_settings(pair, server, tmp_path), held)
    step()
    step()
    honest = server.answer

    def deaf(path, body):
        return {"results": [None]} if path == "/collective_rpc" else honest(path, body)

    server.answer = deaf
    with pytest.raises(InputError, match="other weights than it was given after step 2: those of step 1"):
        step()


def test_a_part_of_the_weights_that_did_not_arrive_is_seen(pair, server, held, tmp_path):
    """A head of before: 0.001 nats are within what another precision does, not within what this server did."""
    _, step = stepper(engine_settings(pair, server, tmp_path, learning_rate=1e-3), held)
    step()
    head = server.model.lm_head.weight.detach().clone()
    honest = server.answer

    def half(path, body):
        answer = honest(path, body)
        if path == "/collective_rpc":
            server.model.lm_head.weight.data = head
        return answer

    server.answer = half
    with pytest.raises(InputError, match="other weights than it was given after step 1"):
        step()


@pytest.mark.parametrize(
    "health, said",
    [
        (200, r"has not answered in 0.5 s \(--rollout-timeout\)"),
        (503, r"is not there, or its engine has died \(GET /health\): no answer in 0.5 s \(POST /v1/completions\)"),
    ],
)
def test_a_server_that_hangs_is_waited_for_so_long(pair, server, held, tmp_path, health, said):
    """And its health tells whether an answer may be expected of it at all."""
    _, step = stepper(engine_settings(pair, server, tmp_path, rollout_timeout=0.5), held)
    hung = threading.Event()

    def hangs(path, body, answer):
        if path == "/v1/completions" and "prompt_logprobs" not in body:
            hung.set()
            time.sleep(2)
        return (health, {}) if path == "/health" and hung.is_set() else answer

    server.fault = hangs
    with pytest.raises(InputError, match=said):
        step()


def test_a_run_that_fails_waits_for_no_other_answer(pair, server, held, tmp_path):
    """Nor does its process: the others may take as long as --rollout-timeout."""
    begun, over = threading.Event(), threading.Event()
    held.callback(over.set)

    def second_fails(body, answer):
        if body["n"] != 4:
            return answer
        if not begun.is_set():
            begun.set()
            over.wait()
        return 500, {"error": {"message": "dead"}}

    server.fault = only("/v1/completions", second_fails)
    words = {"rollout_url": server.url, "rollout_folder": tmp_path}
    command = [sys.executable, "-m", "cmdp_fast.cli", *arguments(pair, tmp_path / "runs", rollout="vllm", **words)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "answered 500: dead" in run.stderr and not over.is_set()


def test_a_connection_that_is_lost_is_named_by_its_reason(server, monkeypatch):
    monkeypatch.setattr(http_client, "WAITS", ())
    server.fault = lambda *_: 1 / 0  # its thread ends without an answer
    with pytest.raises(InputError, match=r"cannot be reached: Remote end closed connection without response \(GET"):
        client.Client(server.url, 20.0).get("version")


def test_a_host_that_takes_no_connection_is_not_said_to_be_slow(monkeypatch):
    """Packets to it are lost: that is known after the time for a connection, and not after that for an answer."""
    monkeypatch.setattr(http_client, "WAITS", (0.0,))
    lost = client.Client("http://10.255.255.1", 900.0)
    tried = []

    def connect(*_, **__):
        tried.append(1)
        raise requests.ConnectTimeout

    monkeypatch.setattr(lost._session, "request", connect)
    with pytest.raises(InputError, match="cannot be reached: no connection in 10 s"):
        lost.get("version")
    assert len(tried) == 2


@pytest.mark.parametrize("drips", [False, True])
def test_an_answer_that_stops_in_its_middle_is_waited_for_so_long(drips):
    """requests has another error for that than for an answer that does not begin, and none for one that goes on with a
    byte now and then."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        slow = client.Client(f"http://127.0.0.1:{listening.getsockname()[1]}", 0.3)
        sent = []
        server = threading.Thread(target=_begin_an_answer, args=(listening, 100 if drips else 0, sent), daemon=True)
        server.start()
        with pytest.raises(InputError, match=r"has not answered in 0.3 s \(--rollout-timeout\)"):
            slow.get("version")
        server.join()
    assert len(sent) < 50


def test_half_of_an_answer_is_none(monkeypatch):
    monkeypatch.setattr(http_client, "WAITS", ())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        gone = client.Client(f"http://127.0.0.1:{listening.getsockname()[1]}", 5.0)

        def answer():
            connection, _ = listening.accept()
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n[]")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(InputError, match="cannot be reached: "):
            gone.get("version")


def _begin_an_answer(listening, drips, sent):
    connection, _ = listening.accept()
    with connection, contextlib.suppress(OSError):  # nobody reads any more
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{")
        for _ in range(drips):
            time.sleep(0.05)
            connection.sendall(b" ")
            sent.append(1)
        connection.recv(1)


def test_an_answer_that_never_ends_is_cut(pair, server, held, tmp_path, monkeypatch):
    monkeypatch.setattr(http_client, "LONGEST", 1000)
    _, step = stepper(engine_settings(pair, server, tmp_path), held)
    server.fault = only("/v1/completions", lambda *_: b" " * 2000)
    with pytest.raises(InputError, match="more than 1000 bytes"):
        step()


def test_what_may_pass_is_asked_again(pair, server, held, tmp_path, monkeypatch):
    monkeypatch.setattr(http_client, "WAITS", (0.01, 0.01))
    busy = iter([(503, {"error": {"message": "busy"}})] * 2)
    server.fault = only("/v1/completions", lambda _, answer: next(busy, answer))
    stepper(engine_settings(pair, server, tmp_path), held)[1]()


def test_a_server_that_is_not_there_is_said_before_models_are_read(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(http_client, "WAITS", ())
    words = {"rollout_url": "http://127.0.0.1:9", "rollout_folder": tmp_path, "student": "no/such/model"}
    assert main(arguments(pair, tmp_path, rollout="vllm", **words)) == 2
    assert (
        "the vLLM server at http://127.0.0.1:9 cannot be reached: Connection refused"
        in capsys.readouterr().err.replace("[Errno 111] ", "")
    )


def test_a_run_whose_server_fails_keeps_its_checkpoint(pair, server, tmp_path, capsys):
    """And goes on from there with another server."""
    words = {"rollout_url": server.url, "rollout_folder": tmp_path, "checkpoint_every": 1, "steps": 3, "eval_every": 0}
    answered = [0]

    def third(body, answer):
        answered[0] += body["n"] == 4
        return answer if answered[0] <= 6 else (500, {"error": {"message": "dead"}})

    server.fault = only("/v1/completions", third)
    assert main(arguments(pair, tmp_path / "runs", rollout="vllm", **words)) == 2
    said = capsys.readouterr()
    assert "answered 500: dead" in said.err and "--resume" in said.out
    server.fault = None
    run = tmp_path / "runs" / "r"
    assert main(["train", f"--resume={run}"]) == 2
    assert "that its folder names" in capsys.readouterr().err
    assert main(["train", f"--resume={run}", f"--rollout-url={server.url}", f"--rollout-folder={tmp_path}"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rollout": "vlm"}, "expected vllm, module:function"),
        ({"rollout": "vllm", "method": "minillm"}, "--teacher-mix 0"),
        ({"rollout": "vllm", "rollout_url": "ftp://x"}, "expected an address"),
        ({"rollout": "vllm", "rollout_url": "http://x:none"}, "expected an address"),
        ({"rollout": "vllm", "rollout_url": "http://x"}, "needs --rollout-folder"),
        ({"rollout": "vllm", "rollout_teacher_url": "http://x"}, "for a run with --rollout-url"),
        (
            {
                **{"rollout": "vllm", "rollout_url": "http://x", "rollout_folder": "/tmp", "rollout_ahead": 1},
                "method": "sft",
            },
            "would have no effect: it is for --rollout vllm where it samples what is learned from",
        ),
        ({"rollout": "vllm", "rollout_args": "'--a"}, "No closing quotation"),
        ({"rollout": "vllm", "rollout_ahead": 2}, "must be 0 or 1"),
        ({"rollout_ahead": 1}, "would have no effect: it is for --rollout vllm"),
        ({"rollout_python": "python"}, "would have no effect"),
        ({"rollout": "vllm", "rollout_python": "/no/python"}, "there is no such program"),
        ({"rollout": "vllm", "rollout_python": sys.executable}, "has no vLLM"),
        ({"rollout": "vllm", "rollout_folder": "/no/folder"}, "there is no such folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(pair, tmp_path, capsys, values, expected):
    assert main(arguments(pair, tmp_path, **values)) == 2
    assert expected in capsys.readouterr().err
