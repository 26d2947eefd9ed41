"""What it costs to ask a teacher: bytes per token and seconds per 1,000 tokens, by the way that its outputs take.

    python benchmarks/teacher_cost.py [--out benchmarks/results/teachers]

A random model of `--hidden` numbers and `--layers` layers answers the same question in turn, round after round: in this
process, from a server at a Unix socket and at a port of this machine (`cmdp-fast teacher`, one process), and from disk
(`CachedTeacher`). All but the disk compute the teacher, so what is above the first row is the way. The page that it
writes ends with `teacher_limits.py`: the same for models that do not fit this machine, calculated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import teacher_limits
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cmdp_fast.bench import machine
from cmdp_fast.teachers.cached.reader import CachedTeacher
from cmdp_fast.teachers.cached.writer import CacheWriter, contents_of
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.open import open_teacher
from cmdp_fast.teachers.teacher import Asking, Teacher
from cmdp_fast.trainer.models import builtin

TOPK = 64
ROUNDS = 7
WIRES = ("float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--length", type=int, default=128, help="tokens of each completion")
    parser.add_argument("--out", type=Path, default=None, help="folder for the page and the JSON")
    given = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        own = make_teacher(given, Path(folder) / "model")
        pairs = [
            (torch.randint(given.vocab, (given.prompt,)).tolist(), torch.randint(given.vocab, (given.length,)).tolist())
            for _ in range(given.completions)
        ]
        ways = make_ways(own, pairs, Path(folder), held)
        rows, wanted = [[*prompt, *tokens[:-1]] for prompt, tokens in pairs], [given.length] * given.completions
        found = measure(ways, rows, wanted)
    result = {"machine": machine.describe("cpu"), "settings": {**vars(given), "out": None}, "ways": found}
    print("\n".join(page(result)))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "cost.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (given.out / "README.md").write_text("\n".join(page(result)) + "\n", encoding="utf-8")


def make_teacher(given: argparse.Namespace, folder: Path) -> TeacherInProcess:
    """A random model in a folder, with a tokenizer that fits it."""
    tokenizer = builtin._tokenizer(["0123456789+=;A"])
    config = AutoConfig.for_model(
        "llama",
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=3 * given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 64,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TeacherInProcess(model, tokenizer, str(folder))


def make_ways(
    own: TeacherInProcess, pairs: Sequence[tuple[list[int], list[int]]], folder: Path, held: ExitStack
) -> dict[str, Teacher]:
    """Teachers that say the same, by the way that they are asked."""
    ways: dict[str, Teacher] = {"in this process": own}
    socket = folder / "socket"
    for place, name, options in (
        (f"unix:{socket}", "Unix socket", ["--socket", str(socket)]),
        ("", "TCP", ["--port", "0"]),
    ):
        url = held.enter_context(serving(own.about.model, options))
        for wire in WIRES:
            ways[f"served, {name}, {wire}"] = open_teacher(f"served:{place or url}", Asking(dtype=wire))
    for name, k, dtype in (("float32", 0, ""), ("bfloat16", 0, "bfloat16"), (f"top {TOPK}", TOPK, "")):
        where = folder / f"cached-{name.replace(' ', '-')}"
        writer = CacheWriter(where, contents_of(own, k, dtype), own, 1 << 28)
        writer.store(pairs, len(pairs), 8)
        writer.finish()
        ways[f"cached, {name}"] = CachedTeacher.open(str(where), Asking())
    return ways


@contextmanager
def serving(model: str, options: Sequence[str]) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "cmdp_fast.cli", "teacher", "--model", model, "--dtype", "float32", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "--teacher served:" in line:
                yield line.rpartition("served:")[2].strip()
                break
    finally:
        process.terminate()
        process.wait()


def measure(ways: dict[str, Teacher], rows: list[list[int]], wanted: list[int]) -> dict[str, dict[str, float]]:
    """Of each way the bytes per token, and the median and the quartiles of the seconds per 1,000 tokens."""
    tokens, seconds, sizes = sum(wanted), {name: list[float]() for name in ways}, dict[str, float]()
    for turn in range(ROUNDS + 1):  # the first warms up
        for name, teacher in ways.items():
            since = time.perf_counter()
            said = teacher.answer(rows, wanted)
            took = time.perf_counter() - since
            sizes[name] = said.bytes / tokens
            if turn:
                seconds[name].append(1e3 * took / tokens)
    return {
        name: {
            "bytes_per_token": sizes[name],
            "seconds_per_1000_tokens": statistics.median(some),
            "quartiles": statistics.quantiles(some, n=4)[::2],
        }
        for name, some in seconds.items()
    }


def page(result: dict[str, Any]) -> list[str]:
    """The figures as Markdown, the calculated ones behind those that were measured."""
    given = result["settings"]
    text = [
        "# What a teacher costs, by the way that it is asked",
        "",
        f"`python benchmarks/teacher_cost.py --out benchmarks/results/teachers`: {ROUNDS} rounds, medians (quartiles). "
        f"A random llama of {given['layers']} layers of {given['hidden']} numbers, {given['vocab']} columns, float32; "
        f"{given['completions']} completions of {given['length']} tokens behind prompts of {given['prompt']}, one "
        "question. The server is a process on the same cores.",
        "",
        *machine.text(result["machine"]),
        "",
        "| way | bytes a token | seconds per 1,000 tokens |",
        "| --- | --: | --: |",
    ]
    for name, way in result["ways"].items():
        low, high = way["quartiles"]
        text.append(
            f"| {name} | {way['bytes_per_token']:,.0f} | {way['seconds_per_1000_tokens']:.3f} ({low:.3f}-{high:.3f}) |"
        )
    return [*text, "", "## For larger models", "", *teacher_limits.lines()]


if __name__ == "__main__":
    main()
