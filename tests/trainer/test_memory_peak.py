"""The estimate of the memory against what a step allocates, as torch's profiler sees it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from tiny_pair import learner_of, settings
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cmdp_fast.trainer.launch import make_accelerator
from cmdp_fast.trainer.models.memory_estimate import estimate_memory
from cmdp_fast.trainer.models.optimizer_bytes import optimizer_bytes
from cmdp_fast.trainer.optimization import make_optimizer
from cmdp_fast.trainer.rollout import generate

PROMPT, LENGTH, VOCAB = 4, 28, 1500
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def larger(pair, tmp_path_factory) -> dict[str, str]:
    """A pair of models whose vocabulary and layers are as much of them as in a real one."""
    folders = {}
    tokenizer = AutoTokenizer.from_pretrained(pair["student"])
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "llama",
            vocab_size=VOCAB,
            **SIZES,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
        folder = tmp_path_factory.mktemp(role)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[role] = str(folder)
    return {**pair, **folders}


def peak_of(function) -> int:
    """The most bytes that the CPU's allocator has given out meanwhile, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def of_full_length(prompts, sampling, policy):
    return {"completion_ids": [[3] * (LENGTH - 1) + [4 + i % 5] for i in range(len(prompts))]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"logits": "full"},
    ],
    ids=str,
)
def test_update(changes, larger):
    """The third of a minibatch's three parts, where gradients of the first two are held."""
    config = settings(larger, **changes, max_new_tokens=LENGTH, minibatch_size=6, micro_batch_size=2, epochs=1)
    learner, rows, prompts = learner_of(config)
    estimate = estimate_memory(config, learner.student, learner.teacher, PROMPT, device=torch.device("cpu"))
    learner.collector.rollout = of_full_length
    learner.step(rows, prompts)  # the optimizer has its state
    group = [row for row in rows for _ in range(4)], [ids for ids in prompts for _ in range(4)]
    experience = learner.method.collect(*group, learner.constraint())
    targets = learner.method.targets(experience, learner.constraint())
    torch.nn.Module.zero_grad(learner.student)
    peak = peak_of(lambda: learner.update(experience, targets, learner.constraint()))
    held = estimate.weights + estimate.teacher_weights + (estimate.optimizer or 0) + estimate.teacher_outputs
    expected = estimate.update - held
    widths = [SIZES["hidden_size"]] * 2
    tiles = 2 * LENGTH * VOCAB * 2 * 4 + VOCAB * sum(widths) * 4  # at most: they need not all be there at the peak
    numbers = 2 * LENGTH * 8 * 64  # a few dozen of each token: states, statistics, the loss
    assert expected - tiles <= peak <= expected + numbers


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_rollout(precision, larger):
    config = settings(larger, mixed_precision=precision, max_new_tokens=LENGTH)
    learner, _, prompts = learner_of(config)
    estimate = estimate_memory(config, learner.student, learner.teacher, PROMPT, device=torch.device("cpu"))
    sampling = dataclasses.replace(learner.collector.sampling, eos=(VOCAB - 1,), suppress=(VOCAB - 1,))
    group = [ids for ids in prompts for _ in range(4)]

    def sample() -> None:
        with learner.accelerator.autocast():
            assert generate(learner.student, group, sampling).tokens.shape == (12, LENGTH)

    expected = estimate.rollout - (estimate.weights + estimate.teacher_weights + (estimate.optimizer or 0))
    logits = 2 * 12 * VOCAB * 4  # how many of them a sampler holds at once is not counted to the last
    assert abs(peak_of(sample) - expected) <= logits
    if precision == "bf16":  # without either of these the estimate would be off by more
        assert min(estimate.copies, estimate.cache / 2) > logits


def test_gradients_lie_in_the_buckets_of_ddp(pair):
    """Once, and not in tensors of their own beside them."""
    learner, _, _ = learner_of(settings(pair))
    handler = make_accelerator(learner.config).ddp_handler
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student = DistributedDataParallel(learner.student, **handler.to_kwargs())
        for _ in range(2):  # DDP makes its buckets anew after the first
            student.zero_grad()
            student(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
        gradients = [p.grad for p in student.parameters()]
        storages = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in gradients}
        assert len(storages) < len(gradients) and sum(storages.values()) == sum(g.nbytes for g in gradients)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("name", "decay"), [("adamw_torch", 0.0), ("adafactor", 0.0), ("sgd", 0.1), ("adagrad", 0.0), ("rmsprop", 0.1)]
)
def test_numbers_that_an_optimizer_makes_in_a_step(name, decay, at_once, pair):
    config = settings(pair, optim=name, weight_decay=decay)
    parameters = [torch.nn.Parameter(torch.ones(*shape)) for shape in ((100, 100), (300, 100), (100, 100))]
    optimizer = make_optimizer(config, [{"params": parameters, "lr": 1e-3}])
    for group in optimizer.param_groups:
        if at_once and "foreach" in group:
            group["foreach"] = True
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        made = peak_of(optimizer.step)  # the second time the optimizer has its state
    assert made == pytest.approx(optimizer_bytes(config, parameters, at_once=at_once).step, rel=0.01)
    assert made > parameters[1].nbytes * 0.99
