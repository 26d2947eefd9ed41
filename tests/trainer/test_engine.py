"""Rollouts on vLLM, the trainer's side: a server of the tests' own answers as vLLM does, or as it should not."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_pair import arguments, learner_of, settings
from two_processes import gloo_averages, in_two_processes, sharding_accelerator
from vllm_stand_in import StandIn

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.engine import client, keeper
from cmdp_fast.trainer.engines import make_engines
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.material import Material
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.rollout import encode_prompts
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


def test_servers_share_the_prompts_and_all_have_the_weights(pair, held, tmp_path):
    servers = [held.enter_context(StandIn(pair["student"]).served()) for _ in range(2)]
    config = engine_settings(pair, servers[0], tmp_path, rollout_url=tuple(each.url for each in servers))
    stepper(config, held)[1]()
    assert [len(each.loaded) for each in servers] == [1, 1]
    asked = [[body["prompt"] for body in completion_requests(each) if body["n"] == 4] for each in servers]
    assert [len(prompts) for prompts in asked] == [2, 1]


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
    server = held.enter_context(StandIn(pair["student"]).served())
    config = engine_settings(pair, server, tmp_path, prompts_per_step=2, lora_rank=rank)
    in_two_processes(_steps_of_processes, pair, config, sharded, tmp_path / "seeds")
    assert len(server.loaded) == 3
    asked = [body["prompt"] for body in completion_requests(server) if body["n"] == 4]
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
            values = [float(rows[i - 1, ids[i]]) for i in range(len(body["prompt"]), len(ids))]
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
    config = settings(pair, rollout="vllm", rollout_python=python, rollout_timeout=30.0)
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


def _running(words: str) -> bool:
    return words in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True).stdout


def test_a_killed_run_leaves_no_server(tmp_path):
    """Nor what the server has started: both die with a parent that could say nothing."""
    mark = f"{1000 + os.getpid()}.25"
    child = f"import subprocess, sys, time; subprocess.Popen(['sleep', '{mark}']); time.sleep(1000)"
    parent = (
        "import os, subprocess, sys, time\n"
        f"keeper = [sys.executable, '-I', {keeper.__file__!r}, str(os.getpid())]\n"
        f"subprocess.Popen([*keeper, sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "time.sleep(1000)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", parent])
    _until(lambda: _running(f"sleep {mark}"))
    run.send_signal(signal.SIGKILL)
    run.wait()
    _until(lambda: not _running(f"sleep {mark}"))


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
