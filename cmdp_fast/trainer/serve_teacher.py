"""`cmdp-fast teacher`: a teacher's hidden states, served to trainers in other processes and on other machines."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from cmdp_fast.errors import InputError, first_line
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.parallel import ParallelTeacher, follow
from cmdp_fast.teachers.prefix_cache import PrefixCachedTeacher
from cmdp_fast.teachers.served.client import read_token
from cmdp_fast.teachers.served.server import TeacherServer

from .command_line.parsing import settings_of
from .interrupts import Interrupts
from .models.pair import load_alone
from .records.origin import model_digest
from .records.report import Report
from .settings.config import check_choices, check_ranges
from .settings.ranges import NOT_NEGATIVE, POSITIVE, Range
from .settings.recipe import read_recipe
from .settings.units import ADDRESS, FILE, MIB, MODEL, NAME, PROCESSES, TOKENS, WHOLE
from .sources import loading
from .stops import end_tokens
from .tasks.data import load_problems
from .teacher_ranks import meet, rank, ranks

PORT = Range(lambda value: 0 <= value < 1 << 16, "must be in [0, 65536), not")
EVERY = 10.0  # seconds between two lines on a terminal


@dataclass(frozen=True)
class ServeSettings:
    """Settings of `cmdp-fast teacher`."""

    model: Annotated[str, MODEL] = ""
    """Hub id or folder of the teacher, or `builtin:arithmetic-teacher`, `builtin:smollm2`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What it computes with. auto: as its files have it. A training with `mixed_precision no` holds its own teacher in
    float32, one with `bf16` in bfloat16."""
    device: Annotated[str, NAME] = ""
    """Where it computes, such as `cuda:1`. Empty: on a GPU where there is one."""
    attn_implementation: Annotated[str, NAME] = ""
    """How it computes attention, by transformers' name. Empty: as transformers chooses."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Weights are read from safetensors files only, with either value."""
    recipe: Annotated[str, NAME] = "quickstart"
    """The recipe whose task a `builtin:arithmetic-teacher` has learned."""
    host: Annotated[str, ADDRESS] = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs a `token_file`."""
    port: Annotated[int, PORT, WHOLE] = 8765
    """Port to listen at. 0: any that is free, which the first line names."""
    socket: Annotated[str, FILE] = ""
    """A Unix socket to listen at in place of host and port; only its owner may open it."""
    token_file: Annotated[str, FILE] = ""
    """File with the word that trainers have to bring (their `teacher_token_file`), 8 characters at least."""
    batch_tokens: Annotated[int, POSITIVE, TOKENS] = 1 << 16
    """Tokens that the model reads at once, each row counted as long as the longest. A question of more is read in
    several batches, one of less just as it was asked."""
    prefix_cache_mb: Annotated[int, NOT_NEGATIVE, MIB] = 0
    """Memory for the keys and values of prompts, which their completions share: a prompt is read once, and the
    results are those of whole rows but for rounding. For models whose every layer attends to all tokens. 0: none."""
    tensor_parallel: Annotated[int, POSITIVE, PROCESSES] = 1
    """Processes that hold the model together, each a part of every layer, by transformers' own plan; on GPUs one each,
    the first of `CUDA_VISIBLE_DEVICES`."""
    merge: bool = False
    """Read questions that wait together, as far as `batch_tokens` goes: more tokens per second, and results whose last
    bits depend on who else asks."""


def parse_teacher(args: Sequence[str], prog: str = "cmdp-fast teacher") -> ServeSettings:
    """The settings that the command line asks for. Raises InputError for options that do not exist and settings that
    cannot work."""
    description = "Serve a teacher's hidden states: `cmdp-fast train --teacher served:http://HOST:PORT` asks for them."
    settings = settings_of(ServeSettings, args, prog, description)
    check_ranges(settings)
    check_choices(settings)
    if not settings.model:
        raise InputError("--model is missing: give a hub id, a folder or a builtin:… model")
    if not (settings.socket or settings.token_file or _is_own(settings.host)):
        raise InputError(
            f"--host {settings.host} lets other machines ask: it needs --token-file, a file with a word that they bring"
        )
    if settings.tensor_parallel > 1 and settings.device:
        raise InputError("--device is for one process: with --tensor-parallel CUDA_VISIBLE_DEVICES says which GPUs")
    return settings


def serve_teacher(settings: ServeSettings, arguments: Sequence[str]) -> None:
    """Serves until a signal ends it; what was asked by then is answered. ``arguments``: of the command line, for the
    processes that hold a part of the model. Raises InputError for a model or an address that cannot be used."""
    report = Report(shown=rank() == 0)
    if rank():
        meet()
        return follow(_teacher(settings, report))
    token = read_token(settings.token_file) if settings.token_file else ""
    with Interrupts() as interrupts:
        if settings.tensor_parallel == 1:
            return _serve(_teacher(settings, report), settings, token, interrupts, report)
        with ranks(arguments, settings.tensor_parallel) as others:
            teacher = ParallelTeacher(_teacher(settings, report), others.lost)
            _serve(teacher, settings, token, interrupts, report)
            teacher.close()


def _serve(
    teacher: TeacherInProcess | ParallelTeacher,
    settings: ServeSettings,
    token: str,
    interrupts: Interrupts,
    report: Report,
) -> None:
    server = TeacherServer(
        teacher,
        teacher.vocabulary(),
        host=settings.host,
        port=settings.port,
        path=settings.socket,
        token=token,
        batch_tokens=settings.batch_tokens,
        merge=settings.merge,
    )
    interrupts.deferred, interrupts.waits = True, "answering what was asked"
    server.start()
    about = teacher.about
    report.say(
        f"teacher at {server.url}: {about.model}, {about.dtype}, {about.vocab_size} columns of logits, hidden "
        f"states of {about.hidden_size}: --teacher served:{server.url}"
    )
    try:
        _wait(server, interrupts, report)
    finally:
        server.close()
    report.say("the teacher has ended: what was asked is answered")


@loading()
def _teacher(settings: ServeSettings, report: Report) -> TeacherInProcess:
    """The model on its device, with the name that it was asked for by and the digest of its files."""
    config = replace(
        read_recipe(settings.recipe),
        teacher=settings.model,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
    )
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    parallel = settings.tensor_parallel > 1
    device = _device(settings.device)
    model, tokenizer, folder = load_alone("model", config, dtype, lambda: load_problems(config).train, report, parallel)
    try:
        model = model if parallel else model.to(device)
        given = (model, tokenizer, settings.model, model_digest(folder), end_tokens(model, tokenizer))
        if settings.prefix_cache_mb:
            return PrefixCachedTeacher(*given, most=settings.prefix_cache_mb << 20)
        teacher = TeacherInProcess(*given)
        teacher.answer([[0, 0]], [1])
    except Exception as error:  # its head is none of which hidden states make logits; of what its files describe
        raise InputError(f"--model {settings.model}: {first_line(error)}") from error
    return teacher


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except Exception as error:  # of a driver, too
        raise InputError(f"--device {name}: {first_line(error)}") from error
    return device


def _wait(server: TeacherServer, interrupts: Interrupts, report: Report) -> None:
    """Until a signal comes. On a terminal a line now and then says how much is read."""
    read, since = 0, time.monotonic()
    while not interrupts.received:
        time.sleep(0.1)
        if (seconds := time.monotonic() - since) < EVERY or report.quiet:
            continue
        tokens = server.batching.tokens
        if tokens > read:
            report.say(f"{(tokens - read) / seconds:,.0f} tokens/s, {server.batching.waiting} questions wait")
        read, since = tokens, time.monotonic()


def _is_own(host: str) -> bool:
    """Whether an address is this machine's own, which no other reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be anybody's
        return False
