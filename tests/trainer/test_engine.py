"""Rollouts on vLLM, the trainer's side: a server of the tests' own answers as vLLM does, or as it should not."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests
import torch
from accelerate import Accelerator
from tiny_pair import arguments, learner_of, settings, tiny_model
from two_processes import gloo_averages, in_two_processes, sharding_accelerator
from vllm_stand_in import StandIn

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.engine import answers, client, engine, keeper
from cmdp_fast.trainer.engines import make_engines
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.material import Material
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.rollout import Sampling, encode_prompts
from cmdp_fast.trainer.run import make_learner
from cmdp_fast.trainer.tasks import data, rewards


@pytest.fixture
def held():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def server(pair, held):
    return held.enter_context(StandIn(pair["teacher"]).served())  # it begins with weights that are not the student's


def engine_settings(pair, server, tmp_path, **changes):
    folder = {"rollout_folder": str(tmp_path), "rollout_url": (server.url,)}
    return settings(pair, **{"rollout": "vllm", "rollout_timeout": 20.0, **folder, **changes})


def stepper(config, held, **rewards):
    learner, rows, prompts = learner_of(config, held, **rewards)
    return learner, lambda: learner.step(rows, prompts)


def completion_requests(server):
    return [body for path, body in server.asked if path == "/v1/completions" and "prompt_logprobs" not in body]


# ------------------------------------------------------------------------------------- what is asked, and taken


def test_a_step_learns_from_the_weights_of_the_step(pair, server, held, tmp_path):
    """Two steps: each is sampled with its own weights, from the whole softmax at the temperature, every group in one
    request, and what the server says of its tokens is what the trainer says."""
    config = engine_settings(pair, server, tmp_path, temperature=0.7)
    learner, step = stepper(config, held)
    for count in (1, 2):
        metrics = step()
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
        assert len(server.loaded) == count
    bodies = completion_requests(server)[-3:]
    assert [body["n"] for body in bodies] == [4, 4, 4] and len({body["seed"] for body in bodies}) == 3
    assert {body["temperature"] for body in bodies} == {0.7}
    assert {(body["max_tokens"], body["top_k"], body["top_p"], body["ignore_eos"]) for body in bodies} == {
        (6, 0, 1.0, True)
    }
    assert all(body["stop_token_ids"] == list(learner.collector.sampling.eos) for body in bodies)
    held.close()
    assert list(tmp_path.iterdir()) == []  # nothing of it stays


def test_a_run_is_repeated_by_its_seed(pair, server, held, tmp_path):
    config = engine_settings(pair, server, tmp_path)
    runs = [[stepper(config, held)[1]()["cmdp/cumulative_kl"]] for _ in range(2)]
    assert runs[0] == runs[1]


def test_columns_that_the_teacher_lacks_are_not_sampled(pair, server, held, tmp_path):
    learner, _, prompts = learner_of(engine_settings(pair, server, tmp_path), held)
    sampling = dataclasses.replace(learner.collector.sampling, suppress=(5, 6), vocab_size=17)
    drawn = learner.collector.engine.sample(learner.student, prompts * 30, sampling, 0)
    assert not set(drawn.tokens[drawn.mask].tolist()) & {5, 6}


def test_columns_that_the_student_lacks_are_not_spoken_of(pair, held, tmp_path):
    """Models of a family pad their vocabulary differently, and vLLM refuses a bias of a column that it has not."""
    wide = pair | {"teacher": tiny_model(tmp_path / "wide", seed=2, layers=2, spare=3)}
    servers = [held.enter_context(StandIn(wide[role]).served()) for role in ("student", "teacher")]
    urls = {"rollout_url": (servers[0].url,), "rollout_teacher_url": (servers[1].url,)}
    learner, step = stepper(engine_settings(wide, servers[0], tmp_path, **urls), held)
    step()
    assert {body["logit_bias"] and len(body["logit_bias"]) for body in completion_requests(servers[0])} == {None}
    learner.collector.teacher_engine.sample(learner.teacher, [[4], [5]], learner.collector.sampling, 0)
    assert {len(body["logit_bias"]) for body in completion_requests(servers[1])} == {3}


def test_servers_share_the_prompts_and_all_have_the_weights(pair, held, tmp_path):
    servers = [held.enter_context(StandIn(pair["student"]).served()) for _ in range(2)]
    config = engine_settings(pair, servers[0], tmp_path, rollout_url=tuple(each.url for each in servers))
    stepper(config, held)[1]()
    assert [len(each.loaded) for each in servers] == [1, 1]
    asked = [[body["prompt"] for body in completion_requests(each) if body["n"] == 4] for each in servers]
    assert [len(prompts) for prompts in asked] == [2, 1]


def test_servers_load_at_the_same_time(pair, held, tmp_path):
    """One after another would take as often as long as there are servers, in each step."""
    servers = [held.enter_context(StandIn(pair["student"]).served()) for _ in range(2)]
    both = threading.Barrier(2, timeout=30.0)

    def meet(path, body, answer):
        if path == "/collective_rpc":
            both.wait()
        return answer

    for each in servers:
        each.fault = meet
    config = engine_settings(pair, servers[0], tmp_path, rollout_url=tuple(each.url for each in servers))
    stepper(config, held)[1]()
    assert both.n_waiting == 0 and not both.broken


def test_an_adapter_is_sent_alone(pair, held, tmp_path):
    server = held.enter_context(StandIn(pair["student"]).served())
    config = engine_settings(pair, server, tmp_path, lora_rank=2)
    _, step = stepper(config, held)
    for _ in range(2):
        assert step()["sampling/sampling_logp_difference/max"] < 1e-4
    assert {body["model"] for body in completion_requests(server)} == {"student"}
    assert len({*server.loaded}) == 2
    [folder] = tmp_path.iterdir()
    assert [path.name for path in folder.glob("adapter-*")] == [Path(server.loaded[-1]).name]  # the last one is kept


def test_teacher_and_evaluation_come_through_the_same_door(pair, held, tmp_path, capsys):
    student, teacher = (held.enter_context(StandIn(pair[role]).served()) for role in ("student", "teacher"))
    urls = {"rollout_url": student.url, "rollout_teacher_url": teacher.url, "rollout_folder": tmp_path}
    assert main(arguments(pair, tmp_path / "runs", rollout="vllm", method="sft", **urls)) == 0
    groups = [[body["n"] for body in completion_requests(each)] for each in (student, teacher)]
    assert groups[1].count(4) == 6 and 4 not in groups[0]  # two steps of three prompts, all the teacher's
    assert groups[0].count(3) == 3 and groups[1].count(3) == 1  # evaluations, of a problem
    trained = tmp_path / "runs" / "r" / "student"
    words = [f"--student={trained}", f"--teacher={pair['teacher']}", f"--dataset={pair['dataset']}", "--task="]
    words += ["--prompt-template=", "--answer-pattern=", "--max-new-tokens=6", "--rollout=vllm"]
    before = len(completion_requests(student))
    assert main(["evaluate", *words, *(f"--{n.replace('_', '-')}={v}" for n, v in urls.items())]) == 0
    assert len(completion_requests(student)) > before
    assert "teacher" in capsys.readouterr().out


def test_sampling_ahead_is_a_step_behind(pair, server, held, tmp_path):
    """Step k + 1 is asked for before the weights of step k + 1 are there, and the last step asks for none."""
    words = {"rollout_url": server.url, "rollout_folder": tmp_path, "eval_every": 2, "steps": 3}
    assert main(arguments(pair, tmp_path / "runs", rollout="vllm", rollout_ahead=1, **words)) == 0
    lines = (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    apart = [float(line.split('sampling_logp_difference/max": ')[1].split(",")[0]) for line in lines]
    assert apart[0] < 1e-4 and min(apart[1:]) > 1e-3
    kinds = ["load" if path == "/collective_rpc" else body.get("n") for path, body in server.asked]
    order = [kind for kind in kinds if kind in ("load", 4)]
    assert order == ["load", 4, 4, 4, 4, 4, 4, "load", 4, 4, 4, "load", "load"][: len(order)]
    assert order.count(4) == 9


def _steps_of_processes(pair, config, sharded, shown):
    """Two steps and an evaluation in each of the processes, whose samplings have to be the student's."""
    accelerator = sharding_accelerator() if sharded else Accelerator(cpu=True)
    problems = data.load_problems(config)
    student, teacher, tokenizer = load_pair(config, problems.train, Report())
    prompts = encode_prompts(problems.train, tokenizer)
    functions = rewards.load_rewards(config, problems.train[0])
    material = Material(student=student, teacher=teacher, tokenizer=tokenizer, rewards=functions)
    material.prompts, material.longest = prompts, max(map(len, prompts)) + config.max_new_tokens
    with ExitStack() as held:
        engines = make_engines(config, accelerator, material, Report(), held)
        learner = make_learner(config, accelerator, material, engines)
        rows = slice(accelerator.process_index, 2 + accelerator.process_index)
        for _ in range(2):
            metrics = learner.step(problems.train[rows], prompts[rows])
            assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
        evaluate(learner.collector, learner.student, problems.held_out, Clock())
        seeds = torch.randint(2**47, (3,)).tolist()
    Path(f"{shown}-{accelerator.process_index}").write_text(str(seeds))


@pytest.mark.parametrize(("sharded", "rank"), [(False, 0), (True, 0), (True, 2)])
def test_processes_ask_each_for_its_own(pair, held, tmp_path, sharded, rank):
    """The main process brings the weights, of a model that is spread as well; each has random numbers of its own."""
    if sharded and not gloo_averages():
        pytest.skip("gloo of this torch takes a sum for a mean")
    servers = [held.enter_context(StandIn(pair["student"]).served()) for _ in range(4)]
    urls = tuple(server.url for server in servers)
    config = engine_settings(pair, servers[0], tmp_path, rollout_url=urls, prompts_per_step=2, lora_rank=rank)
    in_two_processes(_steps_of_processes, pair, config, sharded, tmp_path / "seeds")
    assert [len(server.loaded) for server in servers] == [3] * 4
    each = [[body["prompt"] for body in completion_requests(server) if body["n"] == 4] for server in servers]
    assert [*map(len, each)] == [2] * 4  # of four prompts in each of two steps
    asked = [prompt for some in each for prompt in some]
    assert len(asked) == 8 and len({*map(tuple, asked)}) == 3
    assert (tmp_path / "seeds-0").read_text() != (tmp_path / "seeds-1").read_text()


# ------------------------------------------------------------------------------------- what is refused


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


def test_a_server_that_hangs_is_waited_for_so_long(pair, server, held, tmp_path):
    _, step = stepper(engine_settings(pair, server, tmp_path, rollout_timeout=0.5), held)
    server.fault = only("/v1/completions", lambda *_: time.sleep(2))
    with pytest.raises(InputError, match=r"has not answered in 0.5 s \(--rollout-timeout\)"):
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
    monkeypatch.setattr(client, "WAITS", ())
    server.fault = lambda *_: 1 / 0  # its thread ends without an answer
    with pytest.raises(InputError, match=r"cannot be reached: Remote end closed connection without response \(GET"):
        client.Client(server.url, 20.0).get("version")


def test_a_host_that_takes_no_connection_is_not_said_to_be_slow(monkeypatch):
    """Packets to it are lost: that is known after the time for a connection, and not after that for an answer."""
    monkeypatch.setattr(client, "WAITS", (0.0,))
    lost = client.Client("http://10.255.255.1", 900.0)
    tried = []

    def connect(*_, **__):
        tried.append(1)
        raise requests.ConnectTimeout

    monkeypatch.setattr(lost._session, "request", connect)
    with pytest.raises(InputError, match="cannot be reached: no connection in 10 s"):
        lost.get("version")
    assert len(tried) == 2


def test_an_answer_that_stops_in_its_middle_is_waited_for_so_long():
    """requests has another error for that than for an answer that does not begin."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        slow = client.Client(f"http://127.0.0.1:{listening.getsockname()[1]}", 0.3)
        threading.Thread(target=_begin_an_answer, args=(listening,), daemon=True).start()
        with pytest.raises(InputError, match=r"has not answered in 0.3 s \(--rollout-timeout\)"):
            slow.get("version")


def _begin_an_answer(listening):
    connection, _ = listening.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{")
        connection.recv(1)


def test_an_answer_that_never_ends_is_cut(pair, server, held, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "LONGEST", 1000)
    _, step = stepper(engine_settings(pair, server, tmp_path), held)
    server.fault = only("/v1/completions", lambda *_: b" " * 2000)
    with pytest.raises(InputError, match="more than 1000 bytes"):
        step()


def test_what_may_pass_is_asked_again(pair, server, held, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.01, 0.01))
    busy = iter([(503, {"error": {"message": "busy"}})] * 2)
    server.fault = only("/v1/completions", lambda _, answer: next(busy, answer))
    stepper(engine_settings(pair, server, tmp_path), held)[1]()


def test_a_server_that_is_not_there_is_said_before_models_are_read(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(client, "WAITS", ())
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
    assert "would run code that its folder names" in capsys.readouterr().err
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


# ------------------------------------------------------------------------------------- a server of the run's own


def fake_python(folder: Path, script: str) -> str:
    """A Python "with vLLM" that runs a script in its place."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exit 0; fi\n{script}\n')
    program.chmod(0o755)
    return str(program)


def test_a_server_that_does_not_start_says_why(pair, held, tmp_path):
    python = fake_python(
        tmp_path, "echo 'INFO fine'; echo '(Worker) RuntimeError: head_dim=24 is not supported'; exit 3"
    )
    config = settings(pair, rollout="vllm", rollout_python=python, rollout_timeout=3.0)
    _, step = stepper(config, held)
    with pytest.raises(InputError, match=r"has ended \(exit code 3\): RuntimeError: head_dim=24 .* its log: (\S+)"):
        step()


def test_a_server_that_never_starts_is_waited_for_so_long(pair, held, tmp_path):
    python = fake_python(tmp_path, "exec sleep 1000")
    _, step = stepper(settings(pair, rollout="vllm", rollout_python=python, rollout_timeout=1.0), held)
    with pytest.raises(InputError, match=r"has not started in 1 s"):
        step()
    held.close()
    assert not _running("sleep 1000")


def test_a_server_sees_nothing_of_the_runs_processes(pair, held, tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_PORT", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    python = fake_python(tmp_path, f'env > {tmp_path}/env; echo "$@" > {tmp_path}/words; exit 1')
    words = {"rollout_args": "--tensor-parallel-size 2", "rollout_devices": "6,7"}
    _, step = stepper(settings(pair, rollout="vllm", rollout_python=python, **words), held)
    with pytest.raises(InputError, match="has ended"):
        step()
    seen = (tmp_path / "env").read_text()
    assert "CUDA_VISIBLE_DEVICES=6,7" in seen and "VLLM_NO_USAGE_STATS=1" in seen
    assert not [
        line for line in seen.splitlines() if line.startswith(("RANK=", "MASTER_", "ACCELERATE_", "TORCHELASTIC"))
    ]
    assert "--tensor-parallel-size 2" in (tmp_path / "words").read_text()
    assert "--host 127.0.0.1" in (tmp_path / "words").read_text()


def test_a_server_of_the_runs_own_is_given_the_key_that_it_asks_for(pair, held, tmp_path, monkeypatch):
    """vLLM takes VLLM_API_KEY out of its environment, which is the run's."""
    monkeypatch.setenv("VLLM_API_KEY", "k")
    python = fake_python(tmp_path, "exec sleep 1000")
    stand_in = held.enter_context(StandIn(pair["student"]).served())
    monkeypatch.setattr(engine, "Server", lambda *_: Elsewhere(stand_in.url))
    stepper(settings(pair, rollout="vllm", rollout_python=python), held)[1]()
    assert stand_in.keys == {"Bearer k"}


class Elsewhere:
    """In the place of a server of the run's own."""

    def __init__(self, url: str) -> None:
        self.url = url

    def wait(self, *_) -> None:
        pass

    def gone(self) -> str:
        return ""

    def close(self) -> None:
        pass


def _running(words: str) -> bool:
    return words in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True).stdout


def test_a_killed_run_leaves_no_server(tmp_path):
    """Nor what the server has started, nor its weights: all goes with a parent that could say nothing."""
    folder = tmp_path / "weights"
    folder.mkdir()
    mark = f"{1000 + os.getpid()}.25"
    child = f"import subprocess, sys, time; subprocess.Popen(['sleep', '{mark}']); time.sleep(1000)"
    parent = (
        "import os, subprocess, sys, time\n"
        f"keeper = [sys.executable, '-I', {keeper.__file__!r}, str(os.getpid()), {str(folder)!r}]\n"
        f"subprocess.Popen([*keeper, sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "time.sleep(1000)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", parent])
    _until(lambda: _running(f"sleep {mark}"))
    run.send_signal(signal.SIGKILL)
    run.wait()
    _until(lambda: not _running(f"sleep {mark}") and not folder.exists())


@pytest.mark.parametrize(("kind", "kept"), [(InputError, ["vllm.log"]), (KeyboardInterrupt, []), (None, [])])
def test_the_log_stays_after_an_error_alone(pair, tmp_path, monkeypatch, kind, kept):
    stand_in = StandIn(pair["student"])
    held = ExitStack()
    with stand_in.served():
        monkeypatch.setattr(engine, "Server", lambda *_: Elsewhere(stand_in.url))
        python = fake_python(tmp_path, "exit 1")
        (where := tmp_path / "of-engines").mkdir()
        stepper(settings(pair, rollout="vllm", rollout_python=python, rollout_folder=str(where)), held)[1]()
        [folder] = where.iterdir()
        (folder / "vllm.log").touch()
        held.__exit__(kind, kind and kind(), None)
    assert [path.name for folder in where.iterdir() for path in folder.iterdir()] == kept


def _until(holds) -> None:
    for _ in range(300):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never was so")


def test_a_dry_run_looks_for_the_servers_and_counts_no_sampling(pair, server, tmp_path, capsys):
    words = {"rollout": "vllm", "rollout_url": server.url, "rollout_folder": tmp_path}
    assert main([*arguments(pair, tmp_path / "runs", **words), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "what --rollout takes" in shown and "keys and values" not in shown
    assert [path for path, _ in server.asked] == ["/version"]
