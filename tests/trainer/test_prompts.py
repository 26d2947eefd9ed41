"""How a prompt is made of a row that is somebody else's; padding; and models that padding would mislead."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from tiny_pair import PROBLEMS, learner_of, settings, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cmdp_fast.errors import InputError
from cmdp_fast.trainer import material
from cmdp_fast.trainer.dry_run import dry_run
from cmdp_fast.trainer.experience import Collector
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.rollout import encode_prompts, generate
from cmdp_fast.trainer.tasks import data, judge, step_verifiers
from cmdp_fast.trainer.tasks.prompts import with_prompt

NO_ROWS, NO_JSON = "there are no rows in it", "p.jsonl: line 2: Expecting "
BROKEN = {
    "empty": ("", NO_ROWS),
    "null": ("null\n", "p.jsonl begins with null, expected an object for each row"),
    "null in a list": ('[null, {"prompt": "1"}]', "p.jsonl begins with null"),
    "blank lines": ("\n\n", NO_ROWS),
    "one prompt": (
        '{"prompt": "1", "answer": "1"}\n' * 3,
        r"1 problems \(of 3 rows, some of which ask the same\) leave",
    ),
    "JSON in a text": (json.dumps({"prompt": '[{"role": "user"}]'}), "a text that begins as a list of chat messages"),
    "Python in a text": (json.dumps({"prompt": "[{'content': 'a', "}), "a text that begins as a list of chat messages"),
    "not JSON": ('{"prompt": "1", "answer": "1"}\n{nope\n', NO_JSON),
    "zeros": ('{"prompt": "1", "answer": "1"}\n\x00\n', NO_JSON),
    "half a pair": ('{"prompt": "1\\ud800", "answer": "1"}\n', "surrogate pair"),
    "not UTF-8": (b'{"prompt": "1\xff", "answer": "1"}\n', "p.jsonl: line 1 is no text in UTF-8"),
    "no table": ("[1, 2]\n", "--dataset"),
    "texts": ('"a"\n"b"\n', "--dataset"),
    "None": ('{"prompt": "1"}\n{"prompt": null}\n', "row 2, is None, expected a text or a list of chat messages"),
    "NaN": ('{"prompt": NaN}\n', "row 1, is NaN, expected a text or a list of chat messages$"),
    "number": ('{"prompt": 7}\n', r"row 1, is of type int, .* --prompt-template '\{prompt\}' makes a text"),
    "dict": ('{"prompt": {"a": 1}}\n', "row 1, is of type dict"),
    "no message": ('{"prompt": []}\n', "row 1, is an empty list"),
    "messages of text": ('{"prompt": ["a"]}\n', "a message that is of type str, expected a dict with role and content"),
    "no role": ('{"prompt": [{"content": "a"}]}\n', "a message that is of type dict"),
    "no content": ('{"prompt": [{"role": "user"}]}\n', "a message that is of type dict"),
    **{
        name: (json.dumps({"prompt": [message]}), expected)
        for name, message, expected in (
            ("None as content", {"role": "user", "content": None}, "of user whose content is None, expected a text"),
            ("number as content", {"role": "user", "content": 3}, "whose content is of type int, expected a text"),
            ("image", {"role": "user", "content": [{"type": "image"}]}, r"a part that is no text \(image\)"),
            ("text as part", {"role": "user", "content": ["a"]}, r"a part that is no text \(str\)"),
        )
    },
    "tools": ('{"prompt": [{"role": "user", "content": "1"}], "tools": "{"}\n', "tools of .* row 1, is not JSON"),
    "tool": ('{"prompt": [{"role": "user", "content": "1"}], "tools": ["f"]}\n', "must hold JSON schemas"),
    "kwargs": (
        '{"prompt": [{"role": "user", "content": "1"}], "chat_template_kwargs": [1]}\n',
        "chat_template_kwargs of .* is of type list, expected a dict",
    ),
    "another template": (
        '{"prompt": [{"role": "user", "content": "1"}], "chat_template_kwargs": {"chat_template": "x"}}\n',
        "chat_template is no variable of a template",
    ),
}


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def messages(text, *, system=None):
    said = [] if system is None else [{"role": "system", "content": system}]
    return [*said, {"role": "user", "content": text}]


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line(case, pair, tmp_path, capfd):
    content, expected = BROKEN[case]
    path = tmp_path / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as raised:
        data.load_problems(settings(pair, dataset=str(path), answer_column="answer"))
    assert str(path) in str(raised.value) and len(str(raised.value).splitlines()) == 1 and not capfd.readouterr().err


@pytest.mark.parametrize("prompt", ["1\ud800", [{"role": "user", "content": [{"text": "1\ud800"}]}]])
def test_a_text_that_is_not_unicode(prompt, pair):
    with pytest.raises(InputError, match="the prompt of row 7 is not valid Unicode"):
        with_prompt({"prompt": prompt}, settings(pair), "row 7")


def test_one_column_may_be_prompt_and_answer(pair):
    problems = data.load_problems(settings(pair, answer_column="prompt"))
    assert all(row["answer"] == row["prompt"] for part in problems for row in part)


# ------------------------------------------------------------------------------------- the template

ROW = {"prompt": "1+8=", "metadata": {"key": ["a", "b"]}, "a.b": 3, "0": "zero", "none": None, "list": [1], "x": 1.5}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{{prompt}}} {x}", "{1+8=} 1.5"),
        ("{metadata[key][1]}", "b"),
        ("{a.b}{0}", "3zero"),
    ],
)
def test_what_a_template_may_name(template, expected, pair, tmp_path):
    path = written(tmp_path / "p.jsonl", [ROW, {**ROW, "prompt": "2"}])
    config = settings(pair, dataset=path, prompt_template=template + "{prompt}", holdout_fraction=0.5)
    rows = data._dataset_rows(config, data.Source("--dataset", config.dataset, "train"))
    assert [row["prompt"] for row in data._with_prompts(rows, config)] == [
        expected + "1+8=",
        expected.replace("1+8=", "2") + "2",
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{prompt.__class__}", r"there is no \{prompt.__class__\}"),
        ("{metadata[key].__class__}", "there is no"),
        ("{metadata.__init__.__globals__[sys]}", "there is no"),
        ("{prompt[0]}", r"there is no \[0\] in \{prompt\[0\]\}, which is of type str"),
        ("{metadata[key][2]}", r"there is no \[2\]"),
        ("{}", "there is no"),
        ("{7}", "there is no"),
        ("{prompt!r}", "takes neither a format nor a conversion"),
        ("{prompt:>99999999999}", "takes neither a format nor a conversion"),
        ("{prompt:{x}}", "takes neither a format nor a conversion"),
        ("{prompt", "expected '}'"),
        ("{none}", "is None, expected a text or a number"),
        ("{metadata}", "is of type dict, expected a text or a number"),
        ("{list}", "is of type list, expected a text or a number"),
    ],
)
def test_what_a_template_may_not_name(template, expected, pair, tmp_path):
    """Attributes were read, and the text of whatever stood there became a prompt."""
    config = settings(pair, dataset=written(tmp_path / "p.jsonl", [ROW]), prompt_template=template)
    with pytest.raises(InputError, match=f"--prompt-template .*{expected}"):
        data.load_problems(config)


def test_no_template_of_messages(pair, tmp_path):
    """The prompt was the text of a Python list."""
    path = written(tmp_path / "p.jsonl", [{"prompt": messages("1"), "answer": "1"}])
    with pytest.raises(InputError, match=r"\{prompt\} of .* row 1, is a list of messages, expected a text"):
        data.load_problems(settings(pair, dataset=path, prompt_template="{prompt} Think."))


# ------------------------------------------------------------------------------------- the chat

TEMPLATE = (
    "{% for m in messages %}{{ 'A' if m['role'] == 'system' else '=' }}{{ m['content'] }}{% endfor %}"
    "{% for tool in tools or [] %};{{ tool | length }}{% endfor %}"
    "{% if messages | length > 2 %}{{ raise_exception('three messages\nare too many') }}{% endif %}"
    "{{ ';' if add_generation_prompt }}{{ '7' if enable_thinking is defined and not enable_thinking }}"
)


@pytest.fixture(scope="module")
def chatting(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatting") / "student"
    shutil.copytree(pair["student"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return {**pair, "student": str(folder)}


def asked(config):
    """What the student is asked, by the prompt's last number."""
    tokenizer = AutoTokenizer.from_pretrained(config.student)
    rows = [row for part in data.load_problems(config) for row in part]
    return {
        row["answer"]: tokenizer.decode(ids) for row, ids in zip(rows, encode_prompts(rows, tokenizer), strict=True)
    }


def test_a_system_message_before_messages(chatting, tmp_path):
    """It was left out without a word."""
    rows = [{"prompt": messages(f"{i}"), "answer": f"{i}"} for i in range(9)]
    path = written(tmp_path / "p.jsonl", rows)
    config = settings(chatting, dataset=path, chat=True, system_prompt="+")
    assert asked(config) == {f"{i}": f"A+={i};" for i in range(9)}
    rows[4]["prompt"] = messages("4", system="1")
    written(tmp_path / "p.jsonl", rows)
    with pytest.raises(InputError, match=r"--system-prompt: .* row 5, has a system message of its own"):
        asked(config)
    assert asked(settings(chatting, dataset=path))["4"] == "A1=4;"


def test_a_table_s_none_is_no_part_of_a_message(pair):
    """Where one row has calls of tools a table has them for all: Llama's template refused each of the others."""
    rows = [{"role": "user", "content": "1"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    table = [{"role": "user", "content": "1", "tool_calls": None}, {**rows[1], "name": None}]
    table[1]["tool_calls"] = [{"name": "f", "arguments": None}]
    rows.append({"role": "user", "content": [{"text": "2"}]})
    table.append({"role": "user", "content": [{"text": "2", "image": None}], "name": None})
    assert with_prompt({"prompt": table}, settings(pair), "row 1")["prompt"] == rows


def test_a_part_that_is_a_thought_is_a_text(pair):
    """Templates of models that think, Magistral's for one, tell the two kinds apart."""
    parts = [{"type": "text", "text": "1"}, {"type": "thinking", "thinking": "2", "closed": True}]
    row = {"prompt": [{"role": "system", "content": parts}]}
    assert with_prompt(row, settings(pair), "row 1") == row


def test_an_answer_that_has_begun_goes_on(pair):
    """It was closed, and another one opened behind it. A template that changes it is refused."""
    rows = [{"prompt": [*messages(f"{i}"), {"role": "assistant", "content": f"{i}+"}]} for i in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(pair["student"])
    template = "{% for m in messages %}={{ m['content'] }};{% endfor %}"
    tokenizer.chat_template = template + "{{ 'A' if add_generation_prompt }}"
    assert [tokenizer.decode(ids) for ids in encode_prompts(rows, tokenizer)] == ["=0;=0+", "=1;=1+"]
    tokenizer.chat_template = template.replace("m['content']", "m['content'][:1]")
    with pytest.raises(InputError, match="the chat template refuses the prompt"):
        encode_prompts(rows[:1], tokenizer)


def test_arguments_of_the_chat_template(chatting, tmp_path):
    """Those of a row count more; as JSON or as the columns of a table, which are filled with None."""
    tools = [{"a": 1}, {"b": 2, "c": 3}]  # a table makes three columns of them
    rows = [
        {"prompt": messages("1"), "answer": "1", "tools": tools},
        {"prompt": messages("1"), "answer": "1 without", "tools": []},
        {"prompt": messages("2"), "answer": "2", "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": messages("3"), "answer": "3", "chat_template_kwargs": {"other": 1}},
        *({"prompt": messages(f"{i}"), "answer": f"{i}"} for i in range(4, 9)),
    ]
    expected = {**{f"{i}": f"={i};" for i in range(9)}, "1": "=1;1;2;", "1 without": "=1;"}
    del expected["0"]
    config = settings(chatting, dataset=written(tmp_path / "p.jsonl", rows))
    assert asked(config) == expected
    off = settings(chatting, dataset=config.dataset, chat_template_kwargs={"enable_thinking": False})
    assert asked(off) == {answer: text + "7" * (answer != "2") for answer, text in expected.items()}
    as_text = [
        {name: json.dumps(value) if name in ("tools", "chat_template_kwargs") else value for name, value in row.items()}
        for row in rows
    ]
    assert asked(settings(chatting, dataset=written(tmp_path / "t.jsonl", as_text))) == expected
    with pytest.raises(InputError, match=r"--chat-template-kwargs: tokenize is no variable of a template"):
        data.load_problems(settings(chatting, chat_template_kwargs={"tokenize": True}))
    with pytest.raises(InputError, match=r"--chat-template-kwargs is part of a chat, .* add --chat"):
        data.load_problems(settings(chatting, chat_template_kwargs={"enable_thinking": False}))


def test_a_variable_that_the_template_does_not_read(chatting):
    config = settings(chatting, chat=True, chat_template_kwargs={"enable_thinking": False, "enable_thinkin": False})
    with pytest.raises(InputError, match="the student's chat template has no variable 'enable_thinkin'"):
        material.load(config, Report())


def test_parts_that_a_template_writes_as_a_list(chatting):
    tokenizer = AutoTokenizer.from_pretrained(chatting["student"])
    rows = [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "1"}]}]}]
    with pytest.raises(InputError, match="the chat template writes the parts of a content as a Python list"):
        encode_prompts(rows, tokenizer)
    tokenizer.chat_template = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}="
    assert tokenizer.decode(encode_prompts(rows, tokenizer)[0]) == "1="


def test_a_template_that_refuses_a_prompt(chatting, tmp_path):
    rows = [{"prompt": [*messages(f"{i}")] * 3, "answer": "1"} for i in range(9)]
    with pytest.raises(InputError, match=r"the chat template refuses the prompt .*: three messages$"):
        asked(settings(chatting, dataset=written(tmp_path / "p.jsonl", rows)))


# ------------------------------------------------------------------------------------- columns of any name

NAMES = ("prompts", "completions", "completion_ids", "completion", "trainer_state", "log_extra", "first", "second")


@pytest.mark.parametrize("name", NAMES)
def test_a_column_with_the_name_of_an_argument(name, pair, tmp_path):
    """For rewards, step verifiers and judges; the column is left out where the argument has its name."""
    path = written(tmp_path / "p.jsonl", [{**row, name: "x"} for row in PROBLEMS])
    config = settings(pair, dataset=path)
    seen = []

    def verifier(prompt, completion, **columns):
        seen.append(columns)

    learner, rows, prompts = learner_of(config)
    learner.collector.step_verifier = verifier
    learner.step(rows, prompts)
    assert (seen and name not in seen[0]) or name in ("first", "second")
    compared = judge.compare_pairs(lambda prompt, first, second, **_: "tie", rows, ["1"] * 3, ["2"] * 3)
    assert compared.tie == 1.0
    assert step_verifiers.call_step_verifier(verifier, rows[:1], ["1"])


def test_the_prompt_may_stand_in_such_a_column(pair, tmp_path):
    path = written(tmp_path / "p.jsonl", [{"prompts": row["prompt"], "answer": "9"} for row in PROBLEMS])
    problems = data.load_problems(settings(pair, dataset=path, prompt_column="prompts"))
    assert {row["prompt"] for part in problems for row in part} == {row["prompt"] for row in PROBLEMS}
    assert all(row.keys() == {"prompt", "answer"} for part in problems for row in part)


# ------------------------------------------------------------------------------------- padding


def with_tokens(pair, folder, **special):
    """A student whose tokenizer has more tokens than it has embeddings."""
    shutil.copytree(pair["student"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return {**pair, "student": str(folder), "teacher": str(folder)}


def test_padding_without_an_embedding(pair, tmp_path):
    """It was an index error in the model; prompts of different length are read as ever."""
    given = with_tokens(pair, tmp_path / "s", pad_token="<|pad|>")
    learner, rows, prompts = learner_of(settings(given))
    assert learner.collector.tokenizer.pad_token_id == 17
    other, _, _ = learner_of(settings({**pair, "teacher": pair["student"]}))
    assert learner.collector.sampling.pad != other.collector.sampling.pad
    prompts = [ids[: 1 + i] for i, ids in enumerate(prompts)]
    greedy = (dataclasses.replace(each.collector.sampling, temperature=0.0) for each in (learner, other))
    ours, theirs = (
        generate(each.student, prompts, sampling) for each, sampling in zip((learner, other), greedy, strict=True)
    )
    assert ours.completion_ids() == theirs.completion_ids() and not ours.prompt_mask.all()
    assert math.isfinite(learner.step(rows, prompts)["grad_norm"])


def test_a_prompt_with_a_token_without_an_embedding(pair, tmp_path):
    given = with_tokens(pair, tmp_path / "s", additional_special_tokens=["<|x|>"])
    path = written(tmp_path / "p.jsonl", [{"prompt": f"{i}<|x|>", "answer": "1"} for i in range(9)])
    with pytest.raises(
        InputError, match="token 17 of a prompt has no embedding: the tokenizer knows it, the models have 17"
    ):
        material.load(settings(given, dataset=path), Report())


@pytest.mark.parametrize("device", ["", "cpu"])
def test_a_prompt_with_a_token_that_the_teacher_lacks(device, pair, tmp_path):
    """Wherever the teacher is."""
    teacher = tiny_model(tmp_path / "narrow", seed=2, spare=-1)
    path = written(tmp_path / "p.jsonl", [{"prompt": f"{i}A=", "answer": "1"} for i in range(9)])
    with pytest.raises(InputError, match="token 16 of a prompt has no embedding"):
        material.load(settings({**pair, "teacher": teacher}, dataset=path, teacher_device=device), Report())


@pytest.fixture(scope="module")
def forgetful(pair, tmp_path_factory):
    """An RWKV, whose state takes in padding."""
    folder = tmp_path_factory.mktemp("rwkv")
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("rwkv", vocab_size=17, bos_token_id=0, eos_token_id=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pair["student"]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("logits", ["tiled", "full"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_reads_padding_is_refused(role, logits, pair, forgetful):
    config = settings({**pair, role: forgetful}, logits=logits)
    for work in (learner_of, dry_run):
        with pytest.raises(InputError, match=f"the {role} cannot be used: RwkvForCausalLM reads a prompt otherwise"):
            work(config)


def test_a_model_that_counts_columns_is_given_positions(pair, tmp_path):
    given = {**pair, "student": tiny_model(tmp_path, seed=1, family="gpt2")}
    assert isinstance(learner_of(settings(given))[0].collector, Collector)
