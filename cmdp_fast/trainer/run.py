"""A run from beginning to end: load, look at the student before, train, look at it after, save."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .checkpoint import check_run_folder, make_run_folder, save_student, write_json, write_samples, write_text
from .config import TrainConfig
from .constraint import evaluation_constraint
from .data import load_problems
from .errors import InputError
from .evaluate import evaluate
from .experience import Collector
from .gkd import GKD
from .imports import import_function
from .minillm import MiniLLM
from .models import common_vocabulary, load_pair
from .off_policy import OffPolicy
from .ppo import PPO
from .report import MetricsLog, Report, plot_curves, samples_text
from .rewards import load_rewards
from .rollout import Sampling, encode_prompts, end_tokens
from .steps import StepVerifier, load_step_verifier
from .value import ValueHead

SAMPLES = 20
STEPS: dict[str, type[PPO]] = {"ppo": PPO, "gkd": GKD, "minillm": MiniLLM, "sft": OffPolicy, "kd": OffPolicy}


def train(config: TrainConfig) -> Path:
    """Trains as the configuration says and returns the run's folder.

    Raises InputError for anything that cannot be used, before the folder is made. An interrupt (Ctrl-C) once the
    training has begun ends it there: the folder gets everything but the last evaluation, and the interrupt is raised
    again.
    """
    report = Report()
    check_run_folder(config)
    problems = load_problems(config)
    rewards = load_rewards(config, problems.train[0])
    verifier = load_step_verifier(config, problems.train[0])
    student, teacher, tokenizer = load_pair(config, problems.train, report)
    train_prompts = encode_prompts(problems.train, tokenizer)
    held_out = problems.held_out[: config.eval_prompts]
    check_lengths(config, [student, teacher], train_prompts + encode_prompts(held_out, tokenizer))

    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    ppo = make_ppo(config, accelerator, student, teacher, tokenizer, rewards, verifier)
    collector = ppo.collector
    order = shuffled(len(problems.train), config.prompts_per_step, config.seed)

    clock = ppo.clock
    report.say(
        f"{len(problems.train)} problems to train on, {len(problems.held_out)} held out; "
        f"{config.method or config.kind}, budget {config.budget:g} nats of {evaluation_constraint(config).cost}"
    )
    results: dict[str, Any] = {}
    samples = {}
    for who, policy in (("teacher", ppo.teacher), ("student_before", ppo.student)):
        results[who], samples[who] = evaluate(collector, policy, held_out, clock, report, who)
        report.say(f"{who:<15}{_describe(results[who])}")

    folder = make_run_folder(config)
    log = MetricsLog(folder)
    log.evaluation(0, results["student_before"])
    done, interrupted = 0, False
    try:
        for step in report.track(range(1, config.steps + 1), f"training {folder}"):
            chosen = next(order)
            metrics = ppo.step([problems.train[i] for i in chosen], [train_prompts[i] for i in chosen])
            log.step(step, metrics)
            done = step
            report.status(
                f"reward {metrics['reward']:.2f}  KL {metrics['cmdp/cumulative_kl']:.2f}  "
                f"within budget {metrics['cmdp/constraint_satisfaction']:.0%}"
            )
            if step < config.steps and config.eval_every and step % config.eval_every == 0:
                log.evaluation(step, evaluate(collector, ppo.student, held_out, clock)[0])
            if config.save_every and step % config.save_every == 0:
                save_student(ppo.student, tokenizer, folder)
        who = "student_after"
        results[who], samples[who] = evaluate(collector, ppo.student, held_out, clock, report, who)
        log.evaluation(config.steps, results[who])
        report.say(f"{who:<15}{_describe(results[who])}")
    except KeyboardInterrupt:
        interrupted = True
        report.say(f"interrupted after step {done}: saving the student as it is")
        raise
    finally:
        save_student(ppo.student, tokenizer, folder)
        log.close()
        write_samples(folder / "samples.jsonl", samples)
        write_json(folder / "summary.json", summary(config, ppo, results, done, interrupted))
        plot_curves(folder / "curves.png", log, evaluation_constraint(config), results["teacher"]["accuracy"])
        shown = ((who, some[:: config.eval_generations][:SAMPLES]) for who, some in samples.items())
        write_text(folder / "samples.txt", samples_text(shown))
        report.say(f"{folder}: student/ summary.json metrics.jsonl tensorboard/ curves.png samples.txt samples.jsonl")
    return folder


def make_ppo(
    config: TrainConfig,
    accelerator: Any,
    student: Any,
    teacher: Any,
    tokenizer: Any,
    rewards: dict[str, Any],
    verifier: StepVerifier | None = None,
) -> PPO:
    """The models on their device with an optimizer, ready for a step. Seeds each process's random numbers."""
    from accelerate.utils import set_seed
    from transformers import get_scheduler

    set_seed(config.seed, device_specific=accelerator.num_processes > 1)
    groups = [{"params": list(student.parameters()), "lr": config.learning_rate}]
    value_head = None
    if config.algorithm == "ppo" and config.baseline == "gae":
        value_head = ValueHead(student.config.get_text_config().hidden_size).to(accelerator.device)
        groups.append({"params": list(value_head.parameters()), "lr": config.value_learning_rate})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    scheduler = get_scheduler(config.lr_schedule, optimizer, config.lr_warmup_steps, config.steps)
    if accelerator.num_processes > 1:
        student, optimizer = accelerator.prepare(student, optimizer)
        value_head = value_head and accelerator.prepare(value_head)
    else:  # not `prepare`d: that would copy every output to float32, and the kernels read bfloat16 logits as they are
        student, optimizer = student.to(accelerator.device), accelerator.prepare(optimizer)
    collector = make_collector(config, accelerator, student, teacher, tokenizer, rewards, verifier)
    step = STEPS[config.algorithm]
    return step(collector, optimizer=optimizer, scheduler=scheduler, value_head=value_head)


def make_collector(
    config: TrainConfig,
    accelerator: Any,
    student: Any,
    teacher: Any,
    tokenizer: Any,
    rewards: dict[str, Any],
    verifier: StepVerifier | None = None,
) -> Collector:
    """What samples from the student, which is on its device, and scores against the teacher (None: there is none)."""
    model = accelerator.unwrap_model(student)
    vocab_size = common_vocabulary(model) if teacher is None else common_vocabulary(model, teacher)
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        eos=end_tokens(model, tokenizer),
        pad=tokenizer.pad_token_id,
        suppress=tuple(range(vocab_size, model.get_output_embeddings().weight.shape[0])),
        top_k=config.top_k,
        top_p=config.top_p,
        batch_size=config.rollout_batch_size,
    )
    return Collector(
        config,
        accelerator=accelerator,
        student=student,
        teacher=None if teacher is None else teacher.to(accelerator.device),
        tokenizer=tokenizer,
        sampling=sampling,
        vocab_size=vocab_size,
        rewards=rewards,
        step_verifier=verifier,
        rollout=import_function("--rollout", config.rollout) if config.rollout else None,
    )


def shuffled(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices below count without end: one shuffle follows another, and none repeats within a shuffle."""
    rng = random.Random(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.sample(range(count), count)
        yield waiting[:size]
        waiting = waiting[size:]


def summary(config: TrainConfig, ppo: PPO, results: dict[str, Any], steps: int, interrupted: bool) -> dict[str, Any]:
    """What `summary.json` holds. `kernels` are the seconds of scoring and update inside the token statistics."""
    phases = ("rollout", "scoring", "update", "evaluation", "kernels")
    seconds = {phase: round(ppo.clock.seconds.get(phase, 0.0), 3) for phase in phases}
    step = sum(seconds[phase] for phase in ("rollout", "scoring", "update"))
    return {
        "budget": config.budget,
        **{who: results.get(who) for who in ("teacher", "student_before", "student_after")},
        "steps": steps,
        "interrupted": interrupted,
        "seconds": seconds,
        "kernel_share_of_step": round(seconds["kernels"] / step, 4) if step else None,
        "pid": ppo.pid.state_dict() if config.kind == "pid" else None,
        "config": asdict(config),
    }


def _describe(result: dict[str, float]) -> str:
    return (
        f"accuracy {result['accuracy']:.1%}   within budget {result['constraint_satisfaction']:.1%}   "
        f"cumulative KL {result['mean_cumulative_kl']:.2f}   length {result['mean_length']:.1f}"
    )


def check_lengths(config: TrainConfig, models: list[Any], prompts: list[list[int]]) -> None:
    """Raises InputError if a prompt and its completion may not fit into a model's positions."""
    longest = max(len(ids) for ids in prompts)
    for model in models:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and longest + config.max_new_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens and --max-new-tokens {config.max_new_tokens} do not fit "
                f"the {limit} positions of {model.config.name_or_path}"
            )
