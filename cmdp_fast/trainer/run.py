"""A run from beginning to end: load, look at the student before, train, look at it after, save.

The folder of a run can be resumed from the first step on, after any stop: Ctrl-C and SIGTERM let the step at hand
end and write a checkpoint; an error leaves the last one, as does a kill. `distributed.py` describes several processes,
`records/checkpoint.py` a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from cmdp_fast.files import remove_scratch

from .distributed import (
    any_process,
    check_alike,
    main_first,
    noticing_loss,
    on_device,
    prepare_student,
    together,
)
from .engines import NONE, Engines, check_engines, make_engines
from .experience import Collector
from .first_tokens import check_first_tokens
from .interrupts import Interrupts
from .launch import check_training, described, make_accelerator
from .material import Material, load
from .methods.method import method_named
from .models.adapter import check_spread
from .models.believable import make_savable
from .models.offload import check_offload
from .models.quantization import check_quantization
from .models.value_head import ValueHead
from .optimization import check_optimizer, make_optimizer, make_scheduler
from .padding import check_reading
from .records.checkpoint import remove_checkpoints, remove_parts
from .records.clock import Clock
from .records.lock import alone_in
from .records.metrics_log import check_trackers
from .records.origin import check_origin
from .records.report import Report
from .records.resume import is_finished
from .records.run_folder import check_run_folder
from .records.session import Session
from .records.trust import code_of
from .rollout import make_sampling
from .settings.config import TrainConfig
from .settings.constraint import evaluation_constraint, price_within
from .settings.unread import warnings_of
from .step import Learner
from .stops import keep_end_tokens
from .training import Training

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(config: TrainConfig, words: Sequence[str] = ()) -> Path:
    """Trains as the configuration says and returns the run's folder; ``words`` are those of the command line, which
    `summary.json` quotes.

    Raises InputError for anything that cannot be used, before the folder is made, if another process is at work in the
    folder of a run to be resumed, and if it is impossible to go on, with everything saved so far.
    An interrupt (Ctrl-C, SIGTERM) once the training has begun ends it after the step at hand with a checkpoint, and
    KeyboardInterrupt is raised.
    """
    session = Session(words)
    check_trackers(config)
    check_optimizer(config)
    check_offload(config)
    check_quantization(config)
    accelerator = make_accelerator(config)
    check_training(accelerator)
    report = Report(accelerator.is_main_process)
    again = "start it again on all machines with the same launcher, with --resume where its folder is there"
    with (
        Interrupts(accelerator.num_processes > 1, report.note, accelerator.is_main_process) as interrupts,
        ExitStack() as held,
        noticing_loss(accelerator, lambda: again),
    ):
        report.say(described(accelerator, config))
        check_alike(_settings(config), accelerator)
        finished = False
        with together(accelerator):
            code = code_of(config)
            if config.resume and accelerator.is_main_process:
                held.enter_context(alone_in(Path(config.resume), report.say))
                remove_scratch(Path(config.resume))  # whose maker is gone: it is made under the lock
                remove_parts(Path(config.resume))
            if accelerator.is_main_process:
                check_run_folder(config)
            check_engines(config, accelerator.is_main_process)
            if config.resume and accelerator.is_main_process:
                finished = is_finished(config, report.say)
        if any_process(finished, accelerator):
            if accelerator.is_main_process and not config.checkpoint_every:
                remove_checkpoints(Path(config.resume))  # where it was killed before it could
            report.say(f"{config.resume} is finished: {config.steps} of {config.steps} steps; more with --steps")
            return Path(config.resume)
        for warning in warnings_of(config):
            report.say(f"warning: {warning}")
        material = main_first(lambda: load(config, report), accelerator)
        check_alike({**material.origin, **code}, accelerator)
        with together(accelerator):
            if config.resume and accelerator.is_main_process:
                check_origin(config, material.origin, report.say)
        engines = make_engines(config, accelerator, material, report, held)
        learner = make_learner(config, accelerator, material, engines)
        if left_out := make_savable("student", config.student, material.student.generation_config):
            report.say(
                f"--student {config.student}: transformers refuses to write {', '.join(left_out)} of its "
                "generation_config.json, and the saved student has none"
            )
        constraint = evaluation_constraint(config)
        report.say(
            f"{len(material.problems)} problems to train on, {len(material.held_out)} to evaluate on; "
            f"{config.method or config.kind}, budget {config.budget:g} nats of {constraint.cost}"
            + (" per token" if constraint.per_token else "")
            + (f", within it {price:.3g} a nat" if (price := price_within(config)) else "")
        )
        training = Training(config, learner, material, report, code, session)
        training.begin(held, interrupts)
        training.finish(interrupts)
    return training.folder


def _settings(config: TrainConfig) -> dict[str, str]:
    """The settings by option, but for the places of files: those are compared by what they hold."""
    places = (
        *("output_dir", "resume", "student", "teacher", "dataset", "eval_dataset", "recipe", "method"),
        *("rollout_python", "rollout_folder"),  # which only the main process reads
    )
    names = [field.name for field in fields(config) if field.name not in places]
    return {f"--{name.replace('_', '-')}": str(getattr(config, name)) for name in names}


def make_learner(config: TrainConfig, accelerator: Accelerator, material: Material, engines: Engines = NONE) -> Learner:
    """The models on their device with an optimizer, ready for a step. Seeds each process's random numbers."""
    from accelerate.utils import set_seed

    if accelerator.distributed_type == "FSDP":
        check_spread(material.student)
    set_seed(config.seed, device_specific=accelerator.num_processes > 1)
    trained = [parameter for parameter in material.student.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "lr": config.learning_rate}]
    value_head = None
    if config.has_value_head:
        value_head = ValueHead(material.student.config.get_text_config().hidden_size).to(accelerator.device)
        groups.append({"params": list(value_head.parameters()), "lr": config.value_learning_rate})
    optimizer = make_optimizer(config, groups)
    scheduler = make_scheduler(config, optimizer)
    student, prepared = prepare_student(material.student, optimizer, accelerator)
    value_head = value_head and accelerator.prepare(value_head)
    collector = make_collector(config, accelerator, student, material, engines)
    method = method_named(config.algorithm)(collector, Clock(accelerator.device), value_head)
    with together(accelerator):
        method.check(material.prompts)
    return Learner(method, optimizer=prepared, scheduler=scheduler)


def make_collector(
    config: TrainConfig,
    accelerator: Accelerator,
    student: nn.Module,
    material: Material,
    engines: Engines = NONE,
) -> Collector:
    """The collector of the material's student, which accelerate has on its device by now."""
    model, teacher, tokenizer = accelerator.unwrap_model(student), material.teacher, material.tokenizer
    sampling = make_sampling(config, model, teacher, tokenizer)
    keep_end_tokens(model, sampling.eos)
    teacher = None if teacher is None else on_device(teacher, accelerator)
    models = {"student": model, **({} if material.loaded_teacher is None else {"teacher": teacher})}
    # By what else samples none is asked to go on: it may be a model that transformers cannot sample
    others = {"student": engines[0] is not None or material.rollout is not None, "teacher": engines[1] is not None}
    sampled = {role for role in models if not others[role]}
    with together(accelerator), accelerator.autocast():
        check_first_tokens(config, models, sampling, sampled, synced=accelerator.distributed_type == "FSDP")
    collector = Collector(
        config,
        accelerator=accelerator,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        sampling=sampling,
        vocab_size=sampling.vocab_size,
        rewards=material.rewards,
        step_verifier=material.verifier,
        rollout=material.rollout,
        engine=engines[0],
        teacher_engine=engines[1],
        problem_count=len(material.problems),
    )
    half = accelerator.mixed_precision == "bf16"
    with together(accelerator), accelerator.autocast():  # all read the same tokens, and find the same
        check_reading(models, collector.outputs, sampling, padding_free=config.padding_free, half=half)
    return collector
