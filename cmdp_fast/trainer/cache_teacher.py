"""`cmdp-fast cache-teacher`: completions of a teacher, or of a column, with what the teacher says of their tokens, on
disk.

Sampled are a training's problems, without those that it holds out, `num_generations` each. Of a column all rows are
taken. It goes on where an earlier one stood: the completions of a chunk of `prompts_per_step` prompts are drawn with a
seed of their own.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch

from cmdp_fast.errors import InputError, readable
from cmdp_fast.files import check_encodable, check_writable, writing
from cmdp_fast.teachers.cached.writer import CacheWriter, Pair, contents_of
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.teacher import Teacher

from . import drawn
from .causal_lm import CausalLM
from .command_line.parsing import check_no_other
from .first_tokens import check_first_tokens
from .interrupts import Interrupts
from .launch import launched, make_accelerator
from .material import check_asked_tokens, check_lengths
from .models.failing import in_process
from .models.pair import Found, find_pair, load_teacher
from .parse import parse_as
from .records.lock import alone_in
from .records.origin import model_digest
from .records.report import Report
from .rollout import Sampling, drop_long_prompts, encode_prompts, generate, make_sampling
from .settings import units
from .settings.config import TrainConfig
from .settings.ranges import NOT_NEGATIVE, POSITIVE
from .sources import loading
from .stops import token_named
from .tasks.data import Problem, evaluation_sets, load_problems

if TYPE_CHECKING:
    from accelerate import Accelerator

MIB = 2**20


@dataclass(frozen=True)
class CacheConfig(TrainConfig):
    """What it has beside the settings of a training, whose recipe gives the models and the task."""

    TRAINS: ClassVar[bool] = False
    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *("output", "teacher", "student", "recipe", "task", "dataset", "completion_column", "logprobs", "dtype"),
        *("shard_mb", "prompts_per_step", "num_generations", "max_new_tokens", "temperature", "seed"),
    )
    UNREAD: ClassVar[tuple[str, ...]] = ("reward", "budget", "step", "optimizer", "rollout")  # sections
    REFUSED: ClassVar[tuple[str, ...]] = (  # of other sections: settings of a training alone
        *("name", "output_dir", "checkpoint_every", "save_student_every", "keep", "trackers", "random_weights"),
        *("teacher_mix", "sampler_correction", "sampler_clip", "mask_truncated_completions", "missing_eos_penalty"),
        *("eval_prompts", "eval_generations", "eval_every", "eval_before"),
    )

    output: Annotated[str, units.FOLDER] = ""
    """Folder for what the teacher says; one that an earlier command has begun is gone on with."""
    completion_column: Annotated[str, units.COLUMN] = ""
    """Column of the dataset with completions, instead of sampling them: a text, a list of token ids, or a list of
    several of either. A text gets the end of sequence behind it. What is longer than `max_new_tokens` is cut."""
    logprobs: Annotated[int, NOT_NEGATIVE, units.LOGPROBS] = 0
    """Store so many of the teacher's largest log-probabilities of each token, which bound a divergence. 0: its hidden
    states, which give it."""
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Store numbers in this dtype. Empty: hidden states as the teacher computes them, log-probabilities in float32."""
    shard_mb: Annotated[int, POSITIVE, units.MIB] = 256
    """Size from which a file is complete; as much is held in memory."""

    def validate(self) -> None:
        """Raises InputError on the first value that cannot work; no model or dataset is touched."""
        TrainConfig.validate(replace(self, algorithm="kd"))  # how a student would learn is no concern of ours
        if not self.output:
            raise InputError("--output is missing: give a folder")
        for option in ("resume", "dry_run", "rollout"):
            if getattr(self, option):
                said = "goes on by itself, with the same --output" if option == "resume" else "has none"
                raise InputError(f"--{option.replace('_', '-')}: `cmdp-fast cache-teacher` {said}")
        if self.completion_column and not self.dataset:
            raise InputError("--completion-column is one of a --dataset")
        if self.asks_teacher and not self.completion_column:
            raise InputError(
                f"--teacher {self.teacher} is asked and cannot be sampled from: --completion-column names completions"
            )
        if launched() > 1:
            raise InputError("`cmdp-fast cache-teacher` is one process, start it without a launcher")


def parse_cache(args: Sequence[str], prog: str = "cmdp-fast cache-teacher") -> CacheConfig:
    """The configuration that the command line asks for, validated; see `parse_as`."""
    description = (
        "Store what a teacher says of completions, for `cmdp-fast train --teacher cached:FOLDER` with --method sft, kd "
        "or gkd. A recipe gives models and task; what it says of a training has no effect."
    )
    config = parse_as(CacheConfig, args, prog, description)
    check_no_other(CacheConfig, args, prog, {"output-dir": "--output", "name": "--output"})
    return config


def cache_teacher(config: CacheConfig) -> Path:
    """Fills the folder and returns it; says how many bytes a token takes.

    Raises InputError for anything that cannot be used, and if the folder was begun with other completions or by another
    teacher. What was written before an error stays, and is gone on with. Ctrl-C and SIGTERM end it after the prompts at
    hand, with all that is stored by then; a second one at once, with the shards that are complete. KeyboardInterrupt is
    raised.
    """
    report = Report()
    with Interrupts(note=report.note) as interrupts:
        return _cache_teacher(config, report, interrupts)


def _cache_teacher(config: CacheConfig, report: Report, interrupts: Interrupts) -> Path:
    folder = Path(config.output)
    check_encodable(config.output, f"--output {readable(config.output)}")
    check_writable(folder, f"--output {readable(config.output)}")
    accelerator = make_accelerator(config)
    with loading():
        with report.waiting(f"reading the problems of {config.task or config.dataset}"):
            train = load_problems(config).train
        found = find_pair(config, train, report)
        with report.waiting(f"loading {config.teacher}"):
            work = _work(config, found, train, accelerator.device, report)
    contents = contents_of(work.teacher, config.logprobs, config.dtype, work.source)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, report.say):
        writer = CacheWriter(folder, contents, work.teacher, config.shard_mb * MIB)
        if writer.index.whole:
            report.say(f"{folder} is finished: {_described(writer)}")
            return folder
        if writer.prompts:
            report.say(f"{folder} goes on after {writer.prompts} of {len(work.prompts)} prompts")
        try:
            interrupts.deferred, interrupts.waits = True, "storing the prompts at hand"
            _store(config, work, writer, accelerator, report, interrupts)
        except KeyboardInterrupt:
            report.say(f"{folder} has {writer.prompts} of {len(work.prompts)} prompts; the same command goes on there")
            raise
    work.teacher.close()
    report.say(f"{folder}: {_described(writer)}")
    return folder


def _store(
    config: CacheConfig,
    work: _Work,
    writer: CacheWriter,
    accelerator: Accelerator,
    report: Report,
    interrupts: Interrupts,
) -> None:
    """Everything that the folder lacks, or up to an interrupt: then what waits for others that make a shard is a
    smaller one, and KeyboardInterrupt is raised."""
    done, size, count = writer.prompts, config.prompts_per_step, len(work.prompts)
    completions = sum(shard.completions for shard in writer.index.shards)
    starts = range(done, count, size)
    with accelerator.autocast():  # as a training samples; what is asked is computed in another thread, without
        for start in report.track(starts, f"storing {config.output}", before=done, each=size, total=count):
            if interrupts.received:
                writer.write_waiting()
                raise KeyboardInterrupt
            prompts = work.prompts[start : start + size]
            pairs = list(work.pairs(start, prompts))
            writer.store(pairs, len(prompts), config.micro_batch_size)
            completions += len(pairs)
            report.status(f"{completions} completions")
    writer.finish()


def _described(writer: CacheWriter) -> str:
    shards = writer.index.shards
    return (
        f"{sum(s.completions for s in shards)} completions of {writer.prompts} prompts, "
        f"{sum(s.outputs for s in shards)} tokens, {writer.bytes_per_token:.0f} bytes per token"
    )


# --------------------------------------------------------------------------------------------------------------
# What is stored


class _Work(NamedTuple):
    """The teacher, the prompts, and where their completions come from."""

    teacher: Teacher
    prompts: list[list[int]]  # each once
    completions: _Sampled | _Given
    source: dict[str, str]

    def pairs(self, start: int, prompts: list[list[int]]) -> Iterator[Pair]:
        """Prompts with their completions, of which the first is number ``start``."""
        for prompt, completions in zip(prompts, self.completions.of(start, prompts), strict=True):
            for completion in completions:
                yield prompt, completion


class _Sampled(NamedTuple):
    """Completions that the teacher is sampled for."""

    model: CausalLM
    sampling: Sampling
    each: int  # of a prompt
    seed: int

    def of(self, start: int, prompts: list[list[int]]) -> list[list[list[int]]]:
        """Those of a chunk, whose random numbers depend on the seed and its place alone."""
        torch.manual_seed(random.Random(f"{self.seed} {start}").getrandbits(63))
        with torch.no_grad():
            rollout = generate(self.model, [ids for ids in prompts for _ in range(self.each)], self.sampling)
        ids = rollout.completion_ids()
        return [ids[i : i + self.each] for i in range(0, len(ids), self.each)]


class _Given(NamedTuple):
    """Completions out of a column."""

    by_prompt: dict[tuple[int, ...], list[list[int]]]

    def of(self, start: int, prompts: list[list[int]]) -> list[list[list[int]]]:
        """Those of a chunk."""
        return [self.by_prompt[tuple(prompt)] for prompt in prompts]


def _work(config: CacheConfig, found: Found, train: list[Problem], device: torch.device, report: Report) -> _Work:
    rows = train
    if config.completion_column:  # of which several rows may have one prompt
        rows = evaluation_sets(replace(config, eval_dataset=(), eval_split="", reference_pattern=""))[""]
    (rows,) = drop_long_prompts([rows], found.tokenizer, config.max_prompt_length, report)
    prompts = encode_prompts(rows, found.tokenizer)
    distinct = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
    teacher, sampling = _asked(config, found) if found.asked else _loaded(config, found, device)
    check_asked_tokens(teacher, config, distinct)
    check_lengths(config, {config.teacher: teacher.about.positions}, max(map(len, distinct)) + config.max_new_tokens)
    source = {"prompts": _digest(distinct), "prompts_per_step": str(config.prompts_per_step)}
    if config.completion_column:
        given = _given(config, rows, prompts, sampling, found.tokenizer, report)
        return _Work(teacher, distinct, _Given(given), {**source, "column": _digest(list(given.values()))})
    assert isinstance(teacher, TeacherInProcess)  # one that is asked has a column
    plain = ("max_new_tokens", "temperature", "vocab_size", "top_k", "top_p", "batch_size")
    source |= {name: str(getattr(sampling, name)) for name in plain}
    source |= {"num_generations": str(config.num_generations), "seed": str(config.seed)}
    source |= {"stop_strings": _digest(sampling.stop_strings)}
    sampled = _Sampled(teacher.model, sampling, config.num_generations, config.seed)
    return _Work(teacher, distinct, sampled, source)


def _asked(config: CacheConfig, found: Found) -> tuple[Teacher, Sampling]:
    """A teacher that is asked, and what completions are held against."""
    assert found.asked is not None
    teacher, tokenizer = found.asked, found.tokenizer
    named = (token_named("--stop-tokens", name, tokenizer) for name in config.stop_tokens)
    ends = {tokenizer.eos_token_id, *teacher.about.ends, *named}
    return teacher, Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        eos=tuple(sorted(ends)),
        pad=tokenizer.pad_token_id,
        vocab_size=teacher.about.vocab_size,
    )


def _loaded(config: CacheConfig, found: Found, device: torch.device) -> tuple[Teacher, Sampling]:
    """The model, and how it is sampled: as in a training, at its temperature, and no token that the student lacks."""
    model = load_teacher(config, found)
    model.to(device)
    sampling = make_sampling(config, model, None, found.tokenizer)
    check_first_tokens(config, {"teacher": model}, sampling, {"teacher"})
    columns = min(sampling.vocab_size, int(found.configs["student"].get_text_config().vocab_size))
    sampling = replace(
        sampling,
        temperature=config.teacher_temperature or config.temperature,
        suppress=tuple(range(columns, sampling.vocab_size)),
        vocab_size=columns,
    )
    revision = model_digest(found.folders["teacher"])
    teacher = in_process(model, found.tokenizers["teacher"], config.teacher, revision, ends=sampling.eos)
    return teacher, sampling


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _given(
    config: CacheConfig,
    rows: list[Problem],
    prompts: list[list[int]],
    sampling: Sampling,
    tokenizer: Any,
    report: Report,
) -> dict[tuple[int, ...], list[list[int]]]:
    """The completions of the column by their prompts. Raises InputError, which names the row, for what is none."""
    column, cut = config.completion_column, 0
    name = "answer" if column == config.answer_column else column  # as the rows have it
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), 1):
        where = f"--dataset {config.dataset}, row {number}: --completion-column {column}"
        if name not in row:
            raise InputError(f"{where}: there is no such column, only {', '.join(row)}")
        for completion in _several(row[name]):
            if isinstance(completion, str):
                completion = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            elif not isinstance(completion, list):
                raise InputError(f"{where} has a {type(completion).__name__}, expected a text or a list of token ids")
            cut += len(completion) > config.max_new_tokens
            ids = drawn.tokens(completion[: config.max_new_tokens], sampling, where)
            by_prompt.setdefault(tuple(prompt), []).append(ids)
    if cut:
        report.say(f"{cut} completions were cut to --max-new-tokens {config.max_new_tokens}")
    return by_prompt


def _several(value: Any) -> list[Any]:
    """A text or a list of token ids as the only one of several."""
    if isinstance(value, list) and value and all(isinstance(each, (str, list)) for each in value):
        return value
    return [value]
