"""The figures of a step: phases, memory, padding, operations, and groups without a difference."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_pair import learner_of, settings, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from cmdp_fast.errors import InputError
from cmdp_fast.metrics import frac_reward_zero_std
from cmdp_fast.trainer.models.adapter import FrozenBase, add_adapter
from cmdp_fast.trainer.records import throughput
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.records.throughput import (
    PHASES,
    Throughput,
    forward_flops,
    has_experts,
    matrix_weights,
    read_tokens,
    training_flops,
)

H100 = "NVIDIA H100 80GB HBM3"


# --------------------------------------------------------------------------------------------------------------
# Every step


def test_a_step_has_its_figures(pair):
    learner, rows, prompts = learner_of(settings(pair))
    before = dict(learner.clock.seconds)
    learner.step(rows, prompts)
    metrics = learner.step(rows, prompts)
    total = {name: learner.clock.seconds[name] - before.get(name, 0.0) for name in PHASES}
    phases = {name: metrics[f"timing_s/{name}"] for name in PHASES}
    assert all(0 < phases[name] < total[name] for name in PHASES), "of the step, not of the run"
    assert phases["kernels"] < phases["scoring"] + phases["update"] < metrics["step_time"]
    assert phases["rollout"] + phases["scoring"] + phases["update"] <= metrics["step_time"]
    assert metrics["perf/process_max_rss_gb"] > 0
    assert 0 <= metrics["perf/padding_share"] < 1 and 0 <= metrics["frac_reward_zero_std"] <= 1
    assert not any(name.startswith(("perf/mfu", "perf/hfu")) or "allocated" in name for name in metrics), "on a CPU"


def test_truncated_completions_that_are_masked_are_not_learned_from(pair, monkeypatch):
    """`perf/mfu/update` counted them: with the longest ones masked it was no lower bound."""
    learner, rows, prompts = learner_of(settings(pair, mask_truncated_completions=True, prompts_per_step=2))
    completions = [[4, 5, 6, 7], [4, learner.collector.sampling.eos[0]]] * 4
    learner.collector.rollout = lambda **_: {"completion_ids": completions}
    told = {}
    end = learner.throughput.end
    monkeypatch.setattr(learner.throughput, "end", lambda **given: told.update(given) or end(**given))
    counted = learner.step(rows, prompts)["num_tokens"]
    tokens = sum(len(ids) for ids in prompts)
    assert counted == 4 * tokens + 4 * (4 + 2), "prompts too, as TRL's: it was completions alone"
    # Of four tokens three are read, of two that end before the last column both
    assert told["real"] == 4 * tokens + 4 * (3 + 2) and told["learned"] == 2 * tokens + 4 * 2


@pytest.mark.parametrize("name", ["timing_s/update", "perf/padding_share", "frac_reward_zero_std"])
def test_a_reward_function_logs_over_none_of_them(name, pair):
    reward = lambda completions, log_metric, **_: log_metric(name, 1.0) or [0.0] * len(completions)  # noqa: E731
    learner, rows, prompts = learner_of(settings(pair), mine=reward)
    with pytest.raises(InputError, match=rf"log_metric\('{name}', ...\): a step has a metric of that name"):
        learner.step(rows, prompts)


@pytest.mark.parametrize("method", ["gkd", "sft"])
def test_a_method_without_groups_has_no_share_of_them(method, pair):
    learner, rows, prompts = learner_of(settings(pair, algorithm=method, jsd_beta=1.0))
    assert "frac_reward_zero_std" not in learner.step(rows, prompts)


def test_share_of_groups_without_a_difference():
    nan = math.nan
    reward = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, -1.0, nan, -1.0, nan, nan, nan])
    assert frac_reward_zero_std(reward, 3) == 0.75
    assert frac_reward_zero_std(torch.tensor([0.1, 0.2]), 2) == 0.0


def test_padding_is_what_the_models_are_given():
    prompt = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    completion = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    assert read_tokens(prompt, completion) == 11.0
    assert read_tokens(prompt, completion & torch.tensor([[False], [True]])) == 5.0  # the other is not learned from
    assert throughput.padding_share(14.0, 11.0) == pytest.approx(3 / 14)


class Several:
    """Three processes, of which this is the first; the others took twice and three times as much."""

    num_processes, device = 3, torch.device("cpu")

    def gather(self, here):
        return torch.cat([here, 2 * here, 3 * here])


def test_figures_are_of_all_processes(pair, monkeypatch):
    monkeypatch.setattr(throughput, "_memory", lambda device: {"perf/memory": 5.0})
    clock = Clock()
    clock.seconds["update"] = 7.0
    meter = Throughput(settings(pair), Several(), clock, None, None)
    meter.begin()
    clock.seconds["update"] += 2.0
    figures = meter.end(sampled=100.0, real=40.0, learned=40.0, given=(200.0, 160.0))
    assert figures["timing_s/update"] == 6.0 and figures["timing_s/rollout"] == 0.0 and figures["perf/memory"] == 15.0
    assert figures["tokens_per_second"] == pytest.approx(600 / figures["step_time"])
    assert figures["perf/padding_share"] == pytest.approx(0.2)


# --------------------------------------------------------------------------------------------------------------
# Operations


def counted(model, ids, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        output = model(ids).logits
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2"])
def test_operations_are_those_that_are_counted(family, tmp_path):
    """All matrix products of a model, less attention's own."""
    folder = tiny_model(tmp_path, seed=0, layers=2, family="gpt2" if family == "gpt2" else "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if family == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    ids = torch.randint(3, 10, (3, 7))
    c, tokens = model.config, ids.numel()
    attention = 2 * 2 * tokens * ids.shape[1] * c.hidden_size * c.num_hidden_layers  # scores, and their values
    weights = matrix_weights(model)
    assert counted(model, ids, backward=False) - attention == forward_flops(weights, tokens)
    trained = matrix_weights(model, trained=True)
    assert trained == weights
    assert counted(model, ids, backward=True) - 3 * attention == training_flops(weights, trained, tokens)
    assert training_flops(weights, trained, tokens) == 6 * weights * tokens


def test_weights_under_an_adapter(tmp_path, pair):
    pytest.importorskip("peft")
    folder = tiny_model(tmp_path, seed=0)
    plain, model = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    add_adapter(model, settings(pair, lora_rank=4, lora_modules_to_save=("lm_head",)))
    adapter = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert matrix_weights(FrozenBase(model)) == matrix_weights(plain)
    assert matrix_weights(model) == matrix_weights(plain) + adapter
    assert matrix_weights(model, trained=True) == adapter + plain.lm_head.weight.numel()


def test_share_of_the_peak(pair, monkeypatch):
    """By hand: 12 tokens, 9 of them learned from in 2 epochs; the student has 2832 weights in matrices, as the
    teacher has and one layer."""
    learner, _, _ = learner_of(settings(pair))
    monkeypatch.setattr(throughput, "peak", lambda config, device: 1e6)
    monkeypatch.setattr(throughput, "_memory", lambda device: {})

    def figures(**changes):
        student, teacher = learner.student, learner.teacher
        meter = Throughput(settings(pair, **changes), learner.accelerator, Clock(), student, teacher)
        meter.begin()
        meter.clock.seconds["update"] = 0.5
        return meter.end(sampled=10.0, real=12.0, learned=9.0, given=(50.0, 30.0))

    student, teacher = matrix_weights(learner.student), matrix_weights(learner.teacher)
    update = 2 * 6 * student * 9
    one = figures()
    assert one["perf/mfu/update"] == pytest.approx(update / 0.5e6)
    whole = update + 2 * 12 * (student + student + teacher)
    assert one["perf/mfu/step"] * one["step_time"] == pytest.approx(whole / 1e6)
    assert "perf/hfu/update" not in one
    again = figures(gradient_checkpointing=True)
    assert again["perf/hfu/update"] / again["perf/mfu/update"] == pytest.approx(8 / 6)
    elsewhere = figures(rollout="module:function")
    assert elsewhere["perf/mfu/step"] * elsewhere["step_time"] == pytest.approx((whole - 2 * 12 * student) / 1e6)
    taught = figures(algorithm="kd")
    assert taught["perf/mfu/step"] * taught["step_time"] == pytest.approx((whole + 2 * 12 * (teacher - student)) / 1e6)
    monkeypatch.setattr(throughput, "has_experts", lambda model: model is learner.teacher)
    assert not any("mfu" in name for name in figures())


def test_peak_is_known_of_a_name_and_a_precision(pair, monkeypatch):
    half, device = settings(pair, mixed_precision="bf16"), torch.device("cuda")
    for name, expected in (("another", None), (f"{H100} MIG 1g.10gb", None), (H100, 989.4e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert throughput.peak(half, device) == expected
    assert throughput.peak(settings(pair), device) is None, "float32 has another peak"
    assert throughput.peak(half, torch.device("cpu")) is None


def test_experts_are_not_counted(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, seed=0))
    assert not has_experts(model)
    model.config.num_local_experts = 8
    assert has_experts(model)


# --------------------------------------------------------------------------------------------------------------
# The clock on a GPU


class Device:
    """A stream that is 100 ms further at each event, and how often it was waited for."""

    def __init__(self, monkeypatch) -> None:
        self.time, self.waits, device = 0.0, 0, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                assert stream == "stream"
                device.time += 100.0
                self.at = device.time

            def elapsed_time(self, until):
                assert device.waits
                return until.at - self.at

        def wait(device):
            self.waits += 1

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
        monkeypatch.setattr(torch.cuda, "synchronize", wait)


def test_nobody_waits_for_the_device_in_a_phase(monkeypatch):
    device = Device(monkeypatch)
    clock = Clock(torch.device("cuda"))
    for _ in range(3):
        with clock.phase("update"):
            since = clock.now()
            clock.add("kernels", since)
    assert device.waits == 0
    assert clock.seconds == pytest.approx({"kernels": 0.3, "update": 0.9})
    assert device.waits == 1
    assert clock.seconds == pytest.approx({"kernels": 0.3, "update": 0.9}), "each once"


def test_clock_of_a_step_waits_at_its_ends_alone(pair, monkeypatch):
    learner, rows, prompts = learner_of(settings(pair, micro_batch_size=2))
    device = Device(monkeypatch)
    clock, waits = Clock(torch.device("cuda")), []
    for of in (learner, learner.method, learner.throughput):
        of.clock = clock
    for size in (1, 6):
        object.__setattr__(learner.config, "micro_batch_size", size)
        device.waits = 0
        assert learner.step(rows, prompts)["timing_s/kernels"] > 0
        waits.append(device.waits)
    assert waits[0] == waits[1] <= 12, "for any number of micro-batches"
