"""Models that somebody else wrote: every file of a folder, cut, absurd, of another kind. One line, or a model that is
what its files say."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pair import arguments, settings
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import rollout
from cmdp_fast.trainer.models.believable import check_tokenizer, is_quantised, make_savable
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.weight_files import INDEX, ONE

Edit = Callable[[Path], object]
SOME = "model.norm.weight"


def text(content: str | bytes) -> Edit:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def json_with(**changes: Any) -> Edit:
    """The file with other fields; a field that is `...` is taken out."""

    def edit(path: Path) -> None:
        about = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in about.items() if value is not ...}))

    return edit


def tensors(change: Callable[[torch.Tensor], torch.Tensor], only: str = "") -> Edit:
    def edit(path: Path) -> None:
        stored = load_file(path)
        save_file({n: change(t) if only in n else t for n, t in stored.items()}, path, metadata={"format": "pt"})

    return edit


def header(change: Callable[[dict[str, Any]], object], data: bytes | None = None) -> Edit:
    """The weights with another header before them."""

    def edit(path: Path) -> None:
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        about = json.loads(content[8 : 8 + size])
        changed = change(about)
        written = changed if isinstance(changed, bytes) else json.dumps(changed or about).encode()
        path.write_bytes(struct.pack("<Q", len(written)) + written + (content[8 + size :] if data is None else data))

    return edit


def field(**changes: Any) -> Edit:
    return header(lambda about: about[SOME].update(changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def replaced(make: Callable[[Path], object]) -> Edit:
    return lambda path: (path.unlink(missing_ok=True), make(path))


KINDS: dict[str, Edit] = {  # in place of any file
    "a pipe": replaced(os.mkfifo),
    "a folder": replaced(os.mkdir),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a loop": replaced(lambda path: path.symlink_to(path)),
}
TEXTS: dict[str, Edit] = {  # in place of any JSON
    "empty": text(""),
    "null": text("null"),
    "list": text("[]"),
    "number": text("5"),
    "text": text('"x"'),
    "deep": text("[" * 100_000),
    "UTF-16": text("{}".encode("utf-16")),
    "zeros": text(b"\0" * 100),
    "half a character": text(b'{"model_type": "\xff"}'),
    "a number of 5000 digits": text('{"vocab_size": ' + "1" * 5000 + "}"),
}
WEIGHTS: dict[str, Edit] = {
    "empty": text(""),
    "two bytes": text("{}"),
    "a header of 2^63 bytes": text(struct.pack("<Q", 2**63) + b"{}"),
    "a header of 2^64 - 1 bytes": text(struct.pack("<Q", 2**64 - 1) + b"{}"),
    "a header longer than the file": text(struct.pack("<Q", 10**6) + b"{}"),
    "a header of 101 MB": lambda path: (path.write_bytes(struct.pack("<Q", 101_000_000)), os.truncate(path, 102 << 20)),
    "no JSON": header(lambda _: b"{"),
    "a list": header(lambda _: b"[]"),
    "deep": header(lambda _: b'{"a":' + b"[" * 100_000),
    "no tensors": header(lambda _: b"{}", b""),
    "overlapping": field(data_offsets=[0, 64]),
    "beyond the end": field(data_offsets=[0, 2**40]),
    "before the beginning": field(data_offsets=[-64, 0]),
    "a dtype that is none": field(dtype="X9"),
    "a shape that overflows": field(shape=[2**62, 2**62]),
    "a negative shape": field(shape=[-1]),
    "a shape of text": field(shape=["a"]),
    "half a name": header(lambda about: json.dumps(about).encode().replace(b"model.norm", b"\xff", 1)),
    "metadata that are numbers": header(lambda about: about.update(__metadata__={"format": 1})),
    "twice the same name": header(lambda about: json.dumps(about).replace(SOME, "lm_head.weight").encode()),
    "trailing bytes": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "cut": cut,
    "a pickle": text(b"\x80\x04."),
    "8-bit integers": tensors(lambda t: t.to(torch.int8)),
    "bools": tensors(torch.Tensor.bool, SOME),
    "complex numbers": tensors(lambda t: t.to(torch.complex64), SOME),
    "8-bit floats": tensors(lambda t: t.to(torch.float8_e4m3fn), "mlp"),
    **KINDS,
}
SIZES = {
    "num_hidden_layers": (0, -1, 10**4, 2**70, 1.5, "3", None, [1]),
    "hidden_size": (0, -1, 2**40, "x"),
    "vocab_size": (0, -1, 10**7, 2**40, 2**70, None),
    "intermediate_size": (0, -1, 2**40),
    "num_attention_heads": (0, -1, 3, 2**40),
    "num_key_value_heads": (0, 2**40),
    "head_dim": (0, -8, 2**40),
}
CONFIG: dict[str, Edit] = {
    **{f"{name} {value}": json_with(**{name: value}) for name, values in SIZES.items() for value in values},
    "no model_type": json_with(model_type=...),
    "model_type 5": json_with(model_type=5),
    "a model_type with a code": json_with(model_type="\x1b[2J"),
    "half a pair as model_type": text('{"model_type": "\\ud800"}'),
    "code of its own": json_with(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
    "code of the hub": json_with(model_type="own", auto_map={"AutoConfig": "a/b--own.C"}),
    "attention of the hub": json_with(_attn_implementation="a/b"),
    "weights elsewhere": json_with(transformers_weights="x.bin"),
    "a dtype that is none": json_with(dtype="nonsense", torch_dtype="nonsense"),
    "an activation that is none": json_with(hidden_act="nonsense"),
    "ends that are texts": json_with(eos_token_id=["a"]),
    "rotations that are none": json_with(rope_parameters={"rope_type": "nonsense"}),
    "quantised as nobody does": json_with(quantization_config=5),
    "another family": json_with(model_type="bert"),
    "a UTF-8 mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    **TEXTS,
    **KINDS,
}
TOKENIZER: dict[str, Edit] = {
    "{}": text("{}"),
    "a model that is a number": json_with(model=5),
    "a number no token has": json_with(model={"type": "BPE", "vocab": {"a": 2**70}, "merges": []}),
    "a number of another": json_with(model={"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}),
    "no words": json_with(model={"type": "WordLevel", "vocab": {}, "unk_token": "x"}),
    "a token that there is not": json_with(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "a pattern that is none": json_with(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
    **TEXTS,
    **KINDS,
}
TOKENIZER_CONFIG: dict[str, Edit] = {
    "a class that is a number": json_with(tokenizer_class=5),
    "code of its own": json_with(tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.T", "own.T"]}),
    "no end": json_with(eos_token=None),
    "an end that is a number": json_with(eos_token=5),
    "a length that is a text": json_with(model_max_length="x"),
    "a side that is none": json_with(padding_side="up"),
    "tokens that are a number": json_with(added_tokens_decoder={"x": 5}),
    **{name: edit for name, edit in TEXTS.items() if name not in ("zeros",)},
}
GENERATION: dict[str, Edit] = {
    "an end that is a text": json_with(eos_token_id="x"),
    "ends in a list of lists": json_with(eos_token_id=[[1]]),
    "an end that is a fraction": json_with(eos_token_id=1.5),
    "no tokens": json_with(max_new_tokens=-1),
    "many of one": json_with(num_return_sequences=5),
    "null": text("null"),
    "list": text("[]"),
    "deep": text("[" * 100_000),
}
INDEXES: dict[str, Edit] = {
    "a number for the files": text('{"weight_map": 5}'),
    "a file that is not there": text('{"metadata": {}, "weight_map": {"a": "none.safetensors"}}'),
    "no files": text('{"weight_map": {}}'),
    "metadata that are a number": text('{"metadata": 5, "weight_map": {"a": "x.safetensors"}}'),
    **TEXTS,
}
FILES = {
    ONE: WEIGHTS,
    "config.json": CONFIG,
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "generation_config.json": GENERATION,
    INDEX: INDEXES,
}
CASES = [(file, case) for file, cases in FILES.items() for case in cases]


@pytest.fixture
def copied(pair, tmp_path) -> Path:
    return Path(shutil.copytree(pair["student"], tmp_path / "m"))


def changed(folder: Path, file: str, edit: Edit) -> str:
    if file == INDEX:
        (folder / ONE).unlink()
    edit(folder / file)
    return str(folder)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_a_damaged_model_is_one_line(file, case, copied, pair):
    with pytest.raises(InputError) as raised:
        load_pair(settings({**pair, "student": changed(copied, file, FILES[file][case])}), [], Report())
    assert len(str(raised.value).splitlines()) == 1 and str(raised.value).isprintable()


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("file", "edit"),
    [
        (ONE, tensors(lambda t: t.fill_(float("nan")), SOME)),
        (ONE, tensors(lambda t: t.fill_(float("inf")), "down_proj")),
        ("config.json", json_with(rms_norm_eps=float("nan"))),
        ("config.json", json_with(max_position_embeddings=-1)),
    ],
)
def test_a_model_that_says_no_numbers_is_one_line(role, file, edit, copied, pair, tmp_path, capsys):
    shutil.rmtree(copied)
    shutil.copytree(pair[role], copied)
    named = {**pair, role: changed(copied, file, edit)}
    assert main(arguments(named, tmp_path / "runs", steps=1)) == 2
    assert capsys.readouterr().err.count("\n") == 1


# What transformers itself writes back, and what it refuses to, which is left out of the saved student.
WRITTEN = {
    "none for the padding": {"pad_token_id": -1},
    "a flag for nothing": {"output_scores": True},
    "sampling that is off": {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.1},
    "sampling that is on": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
    "beams": {"early_stopping": True, "length_penalty": 2.0},
}


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("ends", [None, 1])
def test_odd_settings_of_generate_do_not_cost_the_student(case, ends, copied, pair, tmp_path, capsys):
    """What can be written is as it was; that of the rest is said."""
    given = WRITTEN[case]
    edit = json_with(**given, **({} if ends is None else {"eos_token_id": ends}))
    named = {**pair, "student": changed(copied, "generation_config.json", edit)}
    assert main(arguments(named, tmp_path / "runs", steps=1)) == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "runs" / "r" / "student" / "generation_config.json").read_text())
    lost = {key for key, value in given.items() if written.get(key) != value}
    assert all("refuses to write" in said and key in said for key in lost), (lost, said)
    assert not {"top_k", "typical_p", "epsilon_cutoff"} & (written.keys() - given.keys())


QUANTISED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    {"load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "fp8"},
]


@pytest.mark.parametrize("settings", QUANTISED)
def test_weights_whose_packing_is_known_are_left_to_transformers(settings):
    assert is_quantised(SimpleNamespace(quantization_config=settings))
    assert not is_quantised(SimpleNamespace(quantization_config={"quant_method": "own", "load_in_4bit": False}))


def test_the_attention_of_the_command_line_counts(copied, pair):
    """Not that of the folder, whose package may not be here."""
    flash = {"attn_implementation": "flash_attention_2"}
    named = {**pair, "student": changed(copied, "config.json", json_with(**flash)), "attn_implementation": "eager"}
    load_pair(settings(named), [], Report())
    json_with(vocab_size=10**6)(copied / "config.json")
    with pytest.raises(InputError, match=r"its config.json describes a model of [\d,]+ weights, and its files hold"):
        load_pair(settings(named), [], Report())


def test_settings_of_generate_that_can_be_written_stay(tmp_path):
    given = {"temperature": 0.6, "top_p": 0.9, "pad_token_id": -1, "output_scores": True}
    GenerationConfig().save_pretrained(tmp_path)
    json_with(**given)(tmp_path / "generation_config.json")
    settings = GenerationConfig.from_pretrained(tmp_path)
    refused = copy.deepcopy(settings)
    refused.eos_token_id = [1]  # what is changed is written with more questions
    assert make_savable("student", "it", settings) in ([], [*given])  # all of it before transformers asked less
    if settings.temperature == 0.6:
        assert settings.to_dict() == GenerationConfig.from_pretrained(tmp_path).to_dict()
    assert {*make_savable("student", "it", refused)} == {*given} and refused.eos_token_id == [1]


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"0": 0, "1": 1, "+": 2, "</s>": 3}),
        models.Unigram([("0", -1.0), ("1", -2.0), ("</s>", -3.0)]),
        models.WordPiece({"0": 0, "1": 1, "</s>": 2}, unk_token="[UNK]"),
    ],
)
def test_a_closed_vocabulary_needs_no_unknown_token(model):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")
    check_tokenizer("student", "digits", tokenizer)
    assert rollout.encode_prompts([{"prompt": "1"}], tokenizer) == [[1]]


TEMPLATES = {
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "has not returned for 0.1 s",
    ),
    "a long range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "an attribute": ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    "no template": ("{% if", "end of template"),
    "codes": ("{{ raise_exception('\x1b[2J') }}", "refuses"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_chat_template_is_a_program_of_somebody_else_s(case, pair, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(rollout, "PATIENCE", 0.1)
    tokenizer = AutoTokenizer.from_pretrained(pair["student"])
    tokenizer.chat_template, said = TEMPLATES[case]
    with pytest.raises(InputError, match=said):
        rollout.encode_prompts([{"prompt": [{"role": "user", "content": "1+1="}]}], tokenizer)


def test_a_prompt_of_megabytes_is_left_out_before_it_is_read(pair, monkeypatch, capsys):
    class Reader:
        """A tokenizer that notes how much it was given."""

        most = 0

        def __call__(self, given: str, **_: Any) -> dict[str, list[int]]:
            self.most = max(self.most, len(given))
            return {"input_ids": [1] * len(given)}

    reader, long = Reader(), "1" * (rollout.LONGEST + 1)
    assert rollout.drop_long_prompts([[{"prompt": long}, {"prompt": "12"}]], reader, 3, Report()) == [
        [{"prompt": "12"}]
    ]
    assert "left out 1 of 2 problems" in capsys.readouterr().out
    with pytest.raises(InputError, match="all prompts are longer, the shortest has more than 2,097,152 characters"):
        rollout.drop_long_prompts([[{"prompt": long}]], reader, 3, Report())
    with pytest.raises(InputError, match=r"has 2,097,153 characters, expected at most 2,097,152; --max-prompt-length"):
        rollout.encode_prompts([{"prompt": long}], reader)
    assert reader.most < 10


def test_a_panic_of_the_tokenizer_names_the_prompt():
    class Panic(BaseException):
        """As that of a library in Rust, which is no Exception."""

    class Panicking:
        def __call__(self, given: str, **_: Any) -> dict[str, list[int]]:
            if given == "evil":
                raise Panic("no entry found\nfor key")
            return {"input_ids": [1]}

    with pytest.raises(InputError, match="the tokenizer cannot read 'evil': no entry found"):
        rollout.encode_prompts([{"prompt": "good"}, {"prompt": "evil"}], Panicking())
