"""Datasets: streams, references in answers, chats from plain prompts, long prompts; and models that are not safe."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pair import settings
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.models.pair import load_alone, load_pair
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.rollout import drop_long_prompts
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks import data


def lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_stream_ends_at_max_rows(form, pair, tmp_path):
    """A line that is not JSON stands at the end: whoever reads no further than asked does not meet it."""
    folder = tmp_path / "d"
    folder.mkdir()
    path = folder / "train.jsonl"
    lines(path, [{"prompt": f"{i}+1=", "answer": str(i + 1), "filling": "x" * 2000} for i in range(20_000)])
    with path.open("a") as file:
        file.write("no json\n")
    config = settings(pair, dataset=str(path if form == "file" else folder), streaming=True, max_rows=12)
    problems = data.load_problems(config)
    assert sorted(int(row["prompt"][:-3]) for part in problems for row in part) == list(range(12))
    with pytest.raises(InputError, match="--dataset"):
        data.load_problems(settings(pair, dataset=config.dataset))


def test_max_rows_without_a_stream(pair):
    assert sum(map(len, data.load_problems(settings(pair, max_rows=9, holdout_fraction=0.5)))) == 9


def test_stream_needs_an_end(pair):
    with pytest.raises(InputError, match="--max-rows"):
        settings(pair, streaming=True)
    with pytest.raises(InputError, match="--streaming reads a --dataset"):
        settings({**pair, "dataset": ""}, task="chain_sum", streaming=True, max_rows=9)


def test_reference_within_the_answer(pair, tmp_path):
    rows = [{"prompt": f"{i}", "answer": f"#### 1\nso {i}+1=<<{i}+1={i + 1}>>.\n#### {i + 1} "} for i in range(10)]
    path = lines(tmp_path / "p.jsonl", rows)
    problems = data.load_problems(settings(pair, dataset=path, reference_pattern=r"####\s*(.+)"))
    assert {row["prompt"]: row["answer"] for part in problems for row in part} == {
        str(i): str(i + 1) for i in range(10)
    }
    with pytest.raises(InputError, match=r"finds nothing in the answer '#### 1.*p\.jsonl"):
        data.load_problems(settings(pair, dataset=path, reference_pattern=r"boxed(.+)"))
    with pytest.raises(InputError, match="--reference-pattern '####' has no group"):
        settings(pair, reference_pattern="####")


def test_chat_from_plain_prompts(pair):
    said = data.load_problems(settings(pair, chat=True, system_prompt="Add.")).train[0]["prompt"]
    plain = data.load_problems(settings(pair)).train
    assert [message["role"] for message in said] == ["system", "user"] and said[0]["content"] == "Add."
    assert said[1]["content"] in {p["prompt"] for part in data.load_problems(settings(pair)) for p in part}
    assert all(isinstance(row["prompt"], str) for row in plain)
    with pytest.raises(InputError, match="--system-prompt is part of a chat"):
        settings(pair, system_prompt="Add.")


def test_long_prompts_are_left_out_and_counted(pair, tmp_path, capsys):
    rows = [{"prompt": "1" * (2 + i % 4), "answer": "9", "note": i} for i in range(4)]
    rows += [{"prompt": f"{i}+1", "answer": "9"} for i in range(40)]
    problems = data.load_problems(settings(pair, dataset=lines(tmp_path / "p.jsonl", rows)))
    tokenizer = AutoTokenizer.from_pretrained(pair["student"])
    report = Report()
    assert drop_long_prompts(problems, tokenizer, 0, report) == list(problems) and not capsys.readouterr().out
    kept = drop_long_prompts(problems, tokenizer, 3, report)
    everything = [row["prompt"] for part in problems for row in part]
    assert [row["prompt"] for part in kept for row in part] == [p for p in everything if len(p) <= 3]
    too_long = sum(len(prompt) > 3 for prompt in everything)
    assert too_long and f"left out {too_long} of {len(everything)} problems" in capsys.readouterr().out
    with pytest.raises(InputError, match="--max-prompt-length 1: all prompts are longer, the shortest has"):
        drop_long_prompts(problems, tokenizer, 1, report)


def test_pickled_weights_are_refused(pair, tmp_path):
    """A .bin file is a pickle, which can run code as it is read."""
    folder = tmp_path / "m"
    model = AutoModelForCausalLM.from_pretrained(pair["student"])
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pair["student"]).save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"--student .*: no safetensors in this folder"):
        load_pair(settings(pair, student=str(folder)), [], Report())


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("file", ["a.bin", "../other/model.safetensors"])
def test_an_index_leads_to_no_other_files(role, file, pair, tmp_path, monkeypatch):
    """Neither to a pickle nor out of the folder, in which all is that a run notes of its models."""
    folder = Path(shutil.copytree(pair[role], tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    shutil.copytree(pair[role], tmp_path / "other")
    torch.save(weights, folder / "a.bin")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(torch, "load", lambda *given, **options: pytest.fail("a pickle is read"))
    config = settings({**pair, role: str(folder)})
    with pytest.raises(InputError, match=rf"--{role} .*index\.json names '{re.escape(file)}' as a file of weights"):
        load_pair(config, [], Report())
    with pytest.raises(InputError, match=rf"--model .*index\.json names '{re.escape(file)}'"):
        load_alone("model", replace(config, teacher=str(folder)), None, list, Report())


def test_code_of_a_dataset_is_not_run(pair, tmp_path):
    """A script of the folder's name is what `datasets` once ran."""
    folder, mark = tmp_path / "problems", tmp_path / "mark"
    folder.mkdir()
    (folder / "problems.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(InputError, match="--dataset"):
        data.load_problems(settings(pair, dataset=str(folder)))
    assert not mark.exists()


def test_code_of_a_model_runs_by_flag_alone(pair, tmp_path, monkeypatch):
    """Such a model says in its config which file of its own to import; this one leaves a mark when that happens."""
    folder, mark = tmp_path / "m", tmp_path / "mark"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    AutoModelForCausalLM.from_pretrained(pair["student"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pair["student"]).save_pretrained(folder)
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_pair(settings(pair, student=str(folder)), [], Report())
    assert not mark.exists()
    student, _, _ = load_pair(settings(pair, student=str(folder), trust_remote_code=True), [], Report())
    assert mark.exists() and type(student).__name__ == "OwnModel"


class LeavesMark:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", ["pandas", "json", "webdataset", "hf://datasets/pandas"])
def test_a_format_is_not_a_dataset(name, folder, tmp_path, monkeypatch):
    """To the library it is whatever lies in the working directory, pickles too with datasets 4.8: whether or not a
    folder has that name, and with the hub's address before it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(LeavesMark(tmp_path / "mark")))
    if folder:
        Path(name.rpartition("/")[2]).mkdir()
    with pytest.raises(InputError, match=f"--dataset {name}: that is a format, not a dataset"):
        data.load_problems(TrainConfig(dataset=name))
    assert not (tmp_path / "mark").exists()
