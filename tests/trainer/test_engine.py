"""Rollouts on vLLM, the trainer's side: what a server is asked, and what is learned from. A stand-in answers as vLLM
does."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from engine_runs import completion_requests, engine_settings, stepper
from tiny_pair import arguments, learner_of, tiny_model
from two_processes import gloo_averages, in_two_processes, sharding_accelerator
from vllm_stand_in import StandIn

from cmdp_fast.cli import main
from cmdp_fast.trainer.engine.weights import Adapter
from cmdp_fast.trainer.engines import make_engines
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.material import Material
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.rollout import encode_prompts
from cmdp_fast.trainer.run import make_learner
from cmdp_fast.trainer.tasks import data, rewards


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
    assert "sampling/" not in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text()  # no student to be corrected for
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


def test_a_server_of_another_user_may_read_an_adapter(tmp_path):
    """Of which safetensors makes a file for its owner alone."""

    class Adapted:
        def save_pretrained(self, folder):
            (folder / "adapter_model.safetensors").touch(mode=0o600)
            (folder / "adapter_config.json").touch()

    written = Adapter("base", 2).write(Adapted(), None, tmp_path)
    assert len({path.stat().st_mode for path in written.iterdir()}) == 1


def test_a_dry_run_looks_for_the_servers_and_counts_no_sampling(pair, server, tmp_path, capsys):
    words = {"rollout": "vllm", "rollout_url": server.url, "rollout_folder": tmp_path}
    assert main([*arguments(pair, tmp_path / "runs", **words), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "what --rollout takes" in shown and "keys and values" not in shown
    assert [path for path, _ in server.asked] == ["/version"]
