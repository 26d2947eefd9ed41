"""The problems, and how a prompt is made of one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from .ranges import BETWEEN_0_AND_1, NOT_NEGATIVE, POSITIVE
from .units import COLUMN, DATA, FRACTION, NAME, PATTERN, PROBLEMS, ROWS, TOKENS

Json = Annotated[dict[str, Any], tyro.conf.arg(constructor=json.loads, metavar="JSON")]


@dataclass(frozen=True)
class TaskSettings:
    """The problems, and how a prompt is made of one."""

    task: Annotated[str, NAME] = ""
    """A task of reasoning-gym, or `writing`. It makes its own problems. Either this or `dataset`."""
    task_args: Json = field(default_factory=dict)
    """Arguments of the reasoning-gym task, on the command line as JSON."""
    task_size: Annotated[int, POSITIVE, PROBLEMS] = 4000
    """How many problems reasoning-gym is asked for; repeated ones are dropped."""
    dataset: Annotated[str, DATA] = ""
    """Your problems: a hub id, a folder, or a JSON, JSONL, CSV or Parquet file. It has a column with the prompt and one
    with the answer."""
    dataset_config: Annotated[str, NAME] = ""
    """Configuration of a hub dataset that has several (`main` of `openai/gsm8k`)."""
    dataset_split: Annotated[str, NAME] = "train"
    """Split to train on."""
    streaming: bool = False
    """Read the dataset from where it is, row by row, instead of downloading all of it; needs `max_rows`."""
    max_rows: Annotated[int, NOT_NEGATIVE, ROWS] = 0
    """Take the first so many rows of each split. 0: all."""
    eval_split: Annotated[str, NAME] = ""
    """Split to evaluate on. Empty: a part of the training split is held out, see `holdout_fraction`."""
    prompt_column: Annotated[str, COLUMN] = "prompt"
    """Column with the prompt: a text, or a list of chat messages to which the chat template is applied."""
    answer_column: Annotated[str, COLUMN] = "answer"
    """Column with the reference answer, which the built-in rewards compare with."""
    reference_pattern: Annotated[str, PATTERN] = ""
    """Regular expression whose first group is the answer in that column; the last match counts. Empty: all of it."""
    prompt_template: str = ""
    """A text with columns in braces that makes the prompt, such as `{prompt} Think step by step.`; `{metadata[key]}`
    is a part of one. Of a list of messages it makes none."""
    chat: bool = False
    """The prompt is a user's message: it goes through the student's chat template."""
    system_prompt: str = ""
    """The system's message before it (with `chat`), and before lists of messages, which may have none of their own."""
    chat_template_kwargs: Json = field(default_factory=dict)
    """Variables of the student's chat template as JSON, such as `{"enable_thinking": false}`. A column
    of this name has those of its row, which count more, and a column `tools` its tools as JSON schemas."""
    max_prompt_length: Annotated[int, NOT_NEGATIVE, TOKENS] = 0
    """Problems with a prompt of more tokens are left out, and their number is printed. 0: none may be too long."""
    holdout_fraction: Annotated[float, BETWEEN_0_AND_1, FRACTION] = 0.2
    """Share of the problems that are never trained on; which ones depends on a hash of the prompt alone."""
