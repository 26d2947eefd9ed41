"""The names that Python blocks of the README and the guides take as given: `given=NAME` after `python` names a function
of this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def models(family: str = "llama", **settings: Any) -> dict[str, Any]:
    """A student and a teacher with another width, four sequences with prompts of two tokens, and their rewards."""
    from tiny_models import tiny

    ids = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(ids)
    ids[0, 7:], attention_mask[0, 7:] = 0, 0
    completion_mask = attention_mask[:, 1:].bool()
    completion_mask[:, 0] = False
    return {
        "student": tiny(family, **settings).train(),
        "teacher": tiny(family, seed=1, hidden_size=32, **settings),
        "ids": ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "task_reward": torch.zeros(4, 8),
    }


def asked_teacher() -> dict[str, Any]:
    """A random model and a tokenizer that knows its tokens."""
    from types import SimpleNamespace

    from tiny_models import tiny

    return {"model": tiny(), "tokenizer": SimpleNamespace(get_vocab=lambda: {f"t{i}": i for i in range(101)})}


def completions_of_a_teacher() -> dict[str, Any]:
    """A teacher in this process, completions of one prompt as token ids and as a batch, and a name for a folder."""
    from types import SimpleNamespace

    from tiny_models import tiny

    from cmdp_fast.teachers.in_process import TeacherInProcess

    prompt, completions = [5, 6, 7], [[8, 9, 10, 2], [11, 12, 13, 2]]
    shown = torch.ones(2, 4, dtype=torch.bool)
    prompts = torch.tensor([prompt] * 2)
    batch = SimpleNamespace(
        prompt_ids=prompts, prompt_mask=torch.ones_like(prompts).bool(), tokens=torch.tensor(completions), mask=shown
    )
    tokenizer = SimpleNamespace(get_vocab=lambda: {f"t{i}": i for i in range(101)})
    teacher = TeacherInProcess(tiny(), tokenizer, "a teacher")
    return {"teacher": teacher, "prompt": prompt, "completions": completions, "batch": batch, "folder": Path("cache")}


def trl_run() -> dict[str, Any]:
    """A tiny student and teacher, prompts, a reward, and options that make a run one of two steps on the CPU."""
    from datasets import Dataset
    from tiny_pair import PROBLEMS, tiny_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = {name: tiny_model(Path(name), seed) for seed, name in enumerate(("student", "teacher"))}
    return {
        **{name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()},
        "tokenizer": AutoTokenizer.from_pretrained(folders["student"], padding_side="left"),
        "dataset": Dataset.from_list(PROBLEMS),
        "reward": lambda completions, **_: [float(len(text)) for text in completions],
        "options": {
            "max_steps": 2,
            "num_generations": 4,
            "per_device_train_batch_size": 4,
            "max_completion_length": 6,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
        },
    }


def trl_distillation() -> dict[str, Any]:
    """`trl_run` with options that TRL's distillation has."""
    given = trl_run()
    return {**given, "options": {k: v for k, v in given["options"].items() if k != "num_generations"}}


def trl_gkd() -> dict[str, Any]:
    """`trl_run` with what GKD needs: messages, a template for them, and no names of other trainers."""
    from datasets import Dataset

    given = trl_run()
    tokenizer = given["tokenizer"]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": str(row["answer"])}]}
        for row in given["dataset"]
    ]
    options = {k: v for k, v in given["options"].items() if k not in ("num_generations", "max_completion_length")}
    return {**given, "messages": Dataset.from_list(rows), "chat_tokenizer": tokenizer, "options": options}


def trained_student() -> dict[str, Any]:
    """A student in the folder of a run, as a training leaves it."""
    from tiny_pair import tiny_model

    tiny_model(Path("runs/budget-2/student"), 0)
    return {}


def a_run() -> dict[str, Any]:
    """The figures of a run: the line of a step that a training of the tiny pair takes."""
    from tiny_pair import learner_of, settings, tiny_pair

    from cmdp_fast.files import as_json

    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    learner, problems, prompts = learner_of(settings(tiny_pair(Path("pair"))))
    (folder / "metrics.jsonl").write_text(as_json(learner.step(problems, prompts)) + "\n", encoding="utf-8")
    return {}
