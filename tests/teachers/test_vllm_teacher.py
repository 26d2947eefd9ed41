"""Teachers on vLLM, with vLLM: what the stand-in of the other tests takes for granted."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_no_worse
from on_vllm import PYTHON, needs_vllm
from tiny_pair import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import cmdp_fast as cf
from cmdp_fast.heads import head_of, last_hidden_state
from cmdp_fast.http_client import HttpClient
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.on_vllm.asked import VLLM
from cmdp_fast.teachers.open import open_teacher
from cmdp_fast.teachers.teacher import Asking
from cmdp_fast.trainer.engine.client import Client
from cmdp_fast.trainer.engine.server import Server
from cmdp_fast.trainer.settings.config import TrainConfig

pytestmark = needs_vllm

LENGTHS, WANTED = (20, 40, 61, 1, 62), (10, 0, 61, 1, 33)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """vLLM's attention on a CPU takes heads of 16, 32, ... numbers. The norms are the model's own, as trained ones."""
    folder = tiny_model(tmp_path_factory.mktemp("model"), seed=2, layers=2, spare=3, head_dim=32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def urls(folder, tmp_path_factory):
    """Of a server that pools and one that generates, started at the same time; as README.md has them."""
    pools = ["--runner", "pooling", "--convert", "embed", "--pooler-config.task", "token_embed"]
    generates = ["--max-logprobs", "20", "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    config = TrainConfig(rollout="vllm", rollout_python=PYTHON)
    common = ["--model", folder, "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    logs = [tmp_path_factory.mktemp(name) / "vllm.log" for name in ("pools", "generates")]
    servers = [
        Server(config, [*common, *own], log, on_cpu=True) for own, log in zip((pools, generates), logs, strict=True)
    ]
    try:
        for server in servers:
            server.wait(Client(server.url, 300.0), 300.0)
        yield [server.url for server in servers]
    finally:
        for server in servers:
            server.close()


@pytest.fixture(scope="module")
def local(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return TeacherInProcess(model, AutoTokenizer.from_pretrained(folder), folder)


def rows_of(local) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(local.about.vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def exact_hidden(local, rows) -> torch.Tensor:
    """In float64, each row alone."""
    model = copy.deepcopy(local.model).double()
    with torch.no_grad():
        wanted = zip(rows, WANTED, strict=True)
        return torch.cat([last_hidden_state(model, torch.tensor([row]))[0, len(row) - n :] for row, n in wanted])


def test_a_divergence_is_that_of_the_model_in_this_process(urls, local):
    """In float32, by float64: hidden states and costs of vLLM are no worse than those of transformers, within twice its
    error and rounding. Whose server it is has been held against the log-probabilities of the other."""
    teacher, rows = open_teacher(f"vllm:{urls[0]}?check={urls[1]}"), rows_of(local)
    assert teacher.about.dtype == "float32" and teacher.about.head == local.about.head
    assert teacher.about.tokenizer == local.about.tokenizer and teacher.about.positions == 64
    said, eager, exact = teacher.answer(rows, WANTED), local.answer(rows, WANTED), exact_hidden(local, rows)
    assert_no_worse(said.hidden, eager.hidden, exact, "hidden states")
    generator = torch.Generator().manual_seed(2)
    student, head = (torch.randn(n, exact.shape[1], generator=generator) for n in (len(exact), 20))
    tokens = torch.randint(20, (len(exact),), generator=generator)
    stats = [
        cf.linear_token_stats(student.to(h.dtype), head.to(h.dtype), h, head_of(local.model).weight.to(h.dtype), tokens)
        for h in (said.hidden, eager.hidden, exact)
    ]
    apart = (stats[0].reverse_kl - stats[1].reverse_kl).abs().max()
    print(f"reverse KL {stats[2].reverse_kl.mean():.3g} nats, apart by up to {apart:.2g}")
    for name in ("teacher_logprob", "teacher_entropy", "reverse_kl", "forward_kl"):
        assert_no_worse(*(getattr(each, name) for each in stats), name, size=float(exact.abs().max()))


def test_a_narrow_wire_costs_its_rounding(urls, local):
    rows = rows_of(local)
    wide, narrow = (
        open_teacher(f"vllm:{urls[0]}", Asking(dtype=wire)).answer(rows, WANTED) for wire in ("", "bfloat16")
    )
    assert narrow.bytes * 2 == wide.bytes
    assert ((narrow.hidden - wide.hidden).abs() <= 2.0**-8 * wide.hidden.abs() + 1e-5).all()


def test_the_likeliest_tokens_are_those_of_the_model_in_this_process(urls, local):
    """By value: two of nearly the same probability may change places. Whatever a request's temperature, and whether or
    not a server reports what it samples with."""
    rows = rows_of(local)
    with torch.no_grad():
        logits = head_of(local.model).logits(local.answer(rows, WANTED).hidden)
        exact = (exact_hidden(local, rows) @ head_of(local.model).weight.double().T).log_softmax(-1)
    eager = logits.log_softmax(-1)
    for k in (1, 5, 20):
        said = open_teacher(f"vllm:{urls[1]}?k={k}").answer(rows, WANTED).topk
        assert_no_worse(said.logprobs, eager.gather(1, said.ids), exact.gather(1, said.ids), "of these tokens")
        assert_no_worse(said.logprobs, eager.topk(k).values, exact.topk(k).values, "the likeliest")
    client = HttpClient(urls[1], 60.0, "the server", "--teacher-timeout")
    vllm = VLLM(client)
    plain, _ = vllm.prompt_logprobs(rows[:1], 3, local.about.vocab_size)
    ask = client.ask
    client.ask = lambda method, path, body, longest: ask(method, path, body | {"temperature": 0.3, "top_k": 2}, longest)
    assert vllm.prompt_logprobs(rows[:1], 3, local.about.vocab_size)[0] == plain


def test_rows_may_be_as_long_as_a_teacher_says(urls):
    for options in ("", "?k=1"):
        teacher = open_teacher(f"vllm:{urls[bool(options)]}{options}")
        row = [3] * teacher.about.positions
        said = teacher.answer([row], [1])
        assert (said.topk.ids if options else said.hidden).shape[0] == 1
