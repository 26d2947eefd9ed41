"""Fields of a model's files that no library refuses as it reads them: one line before any work, where a training, or
the saving of its student, would fail; and files that are none, or too large to be read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import in_child
from tiny_pair import arguments, arguments_for, learner_of, settings
from transformers import AutoTokenizer
from two_processes import in_two_processes, run_sharded

from cmdp_fast import time_limits
from cmdp_fast.cli import main
from cmdp_fast.cpu import native
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import rollout
from cmdp_fast.trainer.cache_teacher import CacheConfig
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.first_tokens import check_first_tokens
from cmdp_fast.trainer.models.pair import load_alone, load_pair
from cmdp_fast.trainer.models.saving import save_student
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.records.token_texts import token_texts

CONFIG, GENERATION = "config.json", "generation_config.json"


@pytest.fixture
def changed(pair, tmp_path) -> Callable[..., dict[str, str]]:
    """The pair with other fields in a file of one of them."""

    def change(role: str, file: str = CONFIG, **fields: Any) -> dict[str, str]:
        folder = Path(shutil.copytree(pair[role], tmp_path / "m"))
        about = json.loads((folder / file).read_text())
        layers = about.get("num_hidden_layers", 1)
        given = {name: value * layers if name == "layer_types" else value for name, value in fields.items()}
        (folder / file).write_text(json.dumps({**about, **given}))
        return {**pair, role: str(folder)}

    return change


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line of a command that ends with one."""
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Of a text, of a configuration's own functions, of how many: before the weights are read.
BELIEVED: dict[str, tuple[dict[str, Any], str]] = {
    "a text that is a dict": ({"text_config": {"vocab_size": 5}}, "its config.json has as its text_config"),
    "a text that is a number": ({"text_config": 5}, "its config.json has as its text_config 5"),
    "save_pretrained": ({"save_pretrained": 5}, "'save_pretrained', the name of a function"),
    "validate": ({"validate": 5}, "'validate', the name of a function"),
    "to_json_file": ({"to_json_file": None}, "'to_json_file', the name of a function"),
    "from_dict": ({"from_dict": {}}, "'from_dict', the name of a function"),
    "a private one": ({"_get_generation_parameters": 5}, "'_get_generation_parameters', the name of a function"),
    "labels": ({"num_labels": 2**21}, "num_labels 2097152, expected at most 1048576"),
    "labels as a fraction": ({"num_labels": 2e6}, "num_labels 2000000.0, expected at most 1048576"),
    "layers in a list": ({"model_type": "qwen3", "num_hidden_layers": 10**6}, "expected at most 1024"),
    "labels within": ({"other": [{"num_labels": 2**21}]}, "num_labels 2097152, expected at most 1048576"),
}
# What is made, and fails as it is used.
FAILING: dict[str, dict[str, Any]] = {
    "tuples": {"return_dict": False},
    "an encoder": {"is_encoder_decoder": True},
    "windows": {"layer_types": ["sliding_attention"]},
    "chunks": {"layer_types": ["chunked_attention"]},
    "no attention": {"layer_types": ["linear_attention"]},
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("case", BELIEVED)
def test_a_field_that_is_not_believed_is_one_line(case, role, changed):
    fields, said = BELIEVED[case]
    named = changed(role, **fields)
    with pytest.raises(InputError) as raised:
        load_pair(settings(named), [], Report())
    line = str(raised.value)
    assert line.startswith(f"--{role} {named[role]}: ") and said in line and line.isprintable()


def test_nor_in_a_model_that_is_served(changed):
    named = changed("teacher", text_config=5)
    with pytest.raises(InputError, match=r"its config.json has as its text_config 5"):
        load_alone("model", settings(named), torch.float32, list, Report())


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("case", FAILING)
def test_a_model_that_fails_at_a_token_is_one_line(case, role, changed, tmp_path, capsys):
    named = changed(role, **FAILING[case])
    line = refused(arguments(named, tmp_path / "runs", steps=1), capsys)
    assert f"--{role} {named[role]} cannot be used: LlamaForCausalLM fails at a first token" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["dry", "evaluate", "cache", "cpu"])
def test_in_every_command(command, changed, tmp_path, capsys):
    fields = {"return_dict": False} if command == "cpu" else {"layer_types": ["linear_attention"]}
    named = changed("teacher", **fields)
    words = {
        "dry": lambda: [*arguments(named, tmp_path / "runs"), "--dry-run"],
        "evaluate": lambda: arguments_for(EvaluateConfig, "evaluate", named),
        "cache": lambda: [*arguments_for(CacheConfig, "cache-teacher", named), f"--output={tmp_path / 'cache'}"],
        "cpu": lambda: arguments(named, tmp_path / "runs", teacher_device="cpu"),
    }
    assert f"--teacher {named['teacher']} cannot be used" in refused(words[command](), capsys)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_in_each_of_several_processes(changed, tmp_path):
    """Which hold a part of its weights each, and do everything together."""
    named = changed("student", layer_types=["linear_attention"])
    in_two_processes(run_sharded, arguments(named, tmp_path / "runs", steps=1), tmp_path / "shown", 2)
    said = [(tmp_path / f"shown-{rank}").read_text() for rank in range(2)]
    assert said[0].count(f"--student {named['student']} cannot be used: ") == 1 and not said[1]


@pytest.mark.parametrize("ends", [2**70, [1, 2**31]])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_end_that_no_vocabulary_has(role, ends, changed):
    named = changed(role, GENERATION, eos_token_id=ends)
    with pytest.raises(
        InputError, match=rf"--{role} {named[role]}: a model's eos_token_id is \d+, expected the number"
    ):
        load_pair(settings(named), [], Report())


def test_the_first_tokens_leave_nothing_behind(pair):
    """No number is drawn, and nothing of the model is other than it was."""
    config = settings(pair)
    learner, _, _ = learner_of(config)
    collector = learner.collector
    model = collector.student.train()
    before = [torch.get_rng_state(), *(value.clone() for value in (*model.parameters(), *model.buffers()))]
    own = model.generation_config
    check_first_tokens(
        config, {"student": model, "teacher": collector.teacher}, collector.sampling, {"student", "teacher"}
    )
    assert all(map(torch.equal, before, [torch.get_rng_state(), *model.parameters(), *model.buffers()]))
    assert model.training and model.generation_config is own and all(each.grad is None for each in model.parameters())


def test_one_that_others_sample_need_not_go_on(pair, changed):
    """By vLLM, say, which has its own layers."""
    config = settings(changed("student", layer_types=["linear_attention"]))
    student, _, tokenizer = load_pair(config, [], Report())
    sampling = rollout.make_sampling(config, student, None, tokenizer)
    check_first_tokens(config, {"student": student}, sampling, set())
    with pytest.raises(InputError, match="fails at a first token"):
        check_first_tokens(config, {"student": student}, sampling, {"student"})


@pytest.mark.parametrize("error", [RuntimeError("gloo: Connection closed by peer"), torch.OutOfMemoryError("full")])
def test_an_error_of_the_machine_is_no_field_s(error, pair):
    config = settings(pair)
    learner, _, _ = learner_of(config)

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    learner.collector.student.forward = fails
    with pytest.raises(type(error)) as raised:
        check_first_tokens(config, {"student": learner.collector.student}, learner.collector.sampling, set())
    assert raised.value is error


def test_attentions_that_are_asked_for_do_not_cost_the_student(changed, tmp_path, capsys):
    """As some models ask for them; transformers reads that and refuses to write it."""
    named = changed("student", output_attentions=True)
    assert main([*arguments(named, tmp_path / "runs", steps=1), "--no-eval-before"]) == 0
    assert f"--student {named['student']}: transformers refuses to write output_attentions" in capsys.readouterr().out
    written = json.loads((tmp_path / "runs" / "r" / "student" / CONFIG).read_text())
    assert not written.get("output_attentions")


def test_attentions_that_are_computed_stay(changed):
    named = changed("student", output_attentions=True)
    student, _, _ = load_pair(settings(named, attn_implementation="eager"), [], Report())
    assert student.config.output_attentions


def test_what_cannot_be_saved_is_one_line(tmp_path):
    class Student(torch.nn.Module):
        def save_pretrained(self, *_: Any, **__: Any) -> None:
            raise ValueError("not\nthis")

    with pytest.raises(InputError, match=r"student could not be written: not$"):
        save_student(Student(), None, tmp_path)
    assert not list(tmp_path.iterdir())


class Panic(BaseException):
    """As that of a library in Rust, which is no Exception."""


class Panicking:
    """A tokenizer whose decoder fails."""

    def decode(self, *_: Any, **__: Any) -> str:
        raise Panic("index out of bounds")

    batch_decode = decode


def test_a_decoder_that_panics_is_one_line(pair):
    learner, rows, prompts = learner_of(settings(pair))
    collector = learner.collector
    collector.tokenizer = Panicking()
    clock = learner.method.clock
    with pytest.raises(InputError, match=r"^the tokenizer cannot write \[\[.*\]: index out of bounds$"):
        collector.complete(collector.student, rows, prompts, clock)
    with pytest.raises(InputError, match=r"the tokenizer cannot write \[5\]"):
        token_texts([5], Panicking())
    with pytest.raises(InputError, match=r"the tokenizer cannot write \[5\]"):
        rollout.cut_tokens([5], ["x"], Panicking())


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to(path.parent / "none"),
}


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "special_tokens_map.json", "additional_chat_templates/x.jinja"]
)
@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_file_is_not_passed_over(case, file, changed):
    named = changed("student")
    path = Path(named["student"], file)
    path.parent.mkdir(exist_ok=True)
    NO_FILES[case](path)
    with pytest.raises(InputError, match=rf"--student {named['student']}: its {path.name} is no file"):
        load_pair(settings(named), [], Report())


@pytest.mark.parametrize(
    ("file", "size"),
    [
        *(("x.model", 100 << 30), ("chat_template.jinja", 100 << 30), ("tokenizer.json", 100 << 30)),
        *((CONFIG, 17 << 20), (GENERATION, 17 << 20), ("additional_chat_templates/x.jinja", 100 << 30)),
    ],
)
def test_what_would_be_read_whole_is_not_large(file, size, changed):
    """It has no content, and takes no room on a disk."""
    named = changed("teacher")
    path = Path(named["teacher"], file)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, size)
    with pytest.raises(InputError, match=rf"--teacher {named['teacher']}: its {path.name} has [\d,]+ bytes, expected"):
        load_pair(settings(named), [], Report())


MESSAGES = [{"prompt": [{"role": "user", "content": "1+1="}]}]


def render(folder: str, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    rollout.encode_prompts(MESSAGES, tokenizer)


@pytest.mark.usefixtures("soon")
def test_a_template_that_computes_in_c_is_ended(pair, monkeypatch):
    monkeypatch.setattr(rollout, "PATIENCE", 0.1)
    with pytest.raises(InputError, match=r"^the chat template has not returned for 0.1 s.*: the prompt \[\{'role'"):
        render(pair["student"], "{{ 9**(9**9) }}")


@pytest.mark.skipif(not hasattr(native, "Deadline"), reason="needs the native module")
def test_one_that_does_not_listen_ends_with_the_process(pair, tmp_path):
    def child() -> int:
        render(pair["student"], "1")  # what is made once, and listens
        rollout.PATIENCE, time_limits.GRACE, time_limits.SPARE = 0.5, 0.1, 0.1
        render(pair["student"], "{{ ([[0]*1000]*100000)|sum(start=[])|length }}")
        return 0

    assert in_child(child, tmp_path / "told") == 2
    assert (tmp_path / "told").read_text() == (
        "cmdp-fast: error: the chat template has not returned for 0.5 s, and is given up (what it has for a prompt): "
        "it does not listen, and the process is ended\n"
    )
