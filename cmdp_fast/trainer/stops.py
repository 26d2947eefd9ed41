"""What ends a completion: a token that a model ends with, a token of the user's, or a string.

A token that ends a completion of the student's or of the teacher's ends those of both. Whoever learns from a teacher
learns to end as it does, and would be sampled past that end if its own tokens alone counted. The student's
`generation_config` gets all of them, so that the saved student stops where it was taught to.

A string (transformers' `stop_strings`) is looked for in the completion's text with its special tokens, and not in the
prompt's. The completion is cut after the token that completes it, its text after the string.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.errors import InputError
from cmdp_fast.teachers.teacher import Teacher
from cmdp_fast.vocabulary import decoded, named_ends

from .causal_lm import CausalLM

_log = logging.getLogger(__name__)

MARGIN = 4  # tokens: a character's bytes may lie in four, and some tokenizers drop a space where a text begins


def end_tokens(model: CausalLM, tokenizer: Any = None) -> tuple[int, ...]:
    """The tokens that end a model's completion: its tokenizer's, if that is given, and those that its generation
    settings name or, where they name none, its configuration."""
    return named_ends((model.generation_config, model.config, model.config.get_text_config()), tokenizer)


def keep_end_tokens(model: CausalLM, ends: Sequence[int]) -> None:
    """Has the model's `generate`, now and once it is saved, end with these tokens."""
    named = model.generation_config.eos_token_id
    if {*ends} != {*(named if isinstance(named, list) else [named])}:
        model.generation_config.eos_token_id = list(ends)
        model.generation_config._from_model_config = False  # or transformers may make it anew from that when it is read


def common_end_tokens(
    student: CausalLM, teacher: CausalLM | Teacher | None, tokenizer: Any, names: Sequence[str], vocab_size: int
) -> tuple[int, ...]:
    """The tokens that end a completion: those of both models and those that the user names. The teacher's tokenizer has
    been asked when it was loaded.

    Raises InputError for a name of none. A model that cannot end with any of its own among the ``vocab_size`` columns
    of the logits that both have is warned of: all of its completions take their full length.
    """
    wanted = [token_named("--stop-tokens", name, tokenizer) for name in names]
    own = {"student": (*end_tokens(student, tokenizer), *wanted)}
    if teacher is not None:
        own["teacher"] = (*(teacher.about.ends if isinstance(teacher, Teacher) else end_tokens(teacher)), *wanted)
    for role, ends in own.items():
        if ends and min(ends) >= vocab_size:
            _log.warning(
                "the %s ends with token %d, beyond the %d columns of the logits that count: its completions take their "
                "full length; --stop-tokens can name another end",
                *(role, min(ends), vocab_size),
            )
    return tuple(sorted({token for ends in own.values() for token in ends}))


def token_named(option: str, name: str, tokenizer: Any) -> int:
    """The number of a token by its name in the vocabulary, or of a text that is one token. Raises InputError for any
    other."""
    vocabulary = tokenizer.get_vocab()
    if name in vocabulary:
        return int(vocabulary[name])
    ids = tokenizer(name, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InputError(f"{option} {name!r} is no token of the student's tokenizer; --stop-strings takes any text")
    return int(ids[0])


def cut_tokens(ids: list[int], strings: Sequence[str], tokenizer: Any) -> list[int]:
    """The tokens up to the first that completes one of the strings; all of them where none does."""

    def has_one(count: int) -> bool:
        return _holds(_text(tokenizer, ids[:count]), strings)

    if not strings or not has_one(len(ids)):
        return ids
    without, with_one = 0, len(ids)
    while with_one - without > 1:
        middle = (without + with_one) // 2
        without, with_one = (without, middle) if has_one(middle) else (middle, with_one)
    return ids[:with_one]


def ends_with_string(ids: list[int], strings: Sequence[str], tokenizer: Any) -> bool:
    """Whether tokens, cut by `cut_tokens`, end with one that completes a string."""
    return bool(strings) and _holds(_text(tokenizer, ids), strings)


def cut_text(text: str, strings: Sequence[str]) -> str:
    """The text up to the end of the first of the strings; all of it where it has none."""
    ends = [text.index(string) + len(string) for string in strings if string in text]
    return text[: min(ends)] if ends else text


def string_criterion(strings: Sequence[str], tokenizer: Any, prompt_width: int) -> Callable[..., Tensor]:
    """For transformers' `generate`: which rows [B, P + T] have completed a string since the prompt, as bools [B].

    transformers' own looks at the prompt as well: a string that begins there would end a completion that has none.
    """
    from transformers import StoppingCriteria

    span = (
        max(len(string.encode("utf-8", "surrogatepass")) for string in strings) + MARGIN
    )  # a token has a byte or more

    class StringCriterion(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            tails = input_ids[:, max(prompt_width, input_ids.shape[1] - span) :].tolist()
            done = [_holds(_text(tokenizer, tail), strings) for tail in tails]
            for row in (i for i, seen in enumerate(done) if seen):  # a part of a text may read otherwise by itself
                done[row] = _holds(_text(tokenizer, input_ids[row, prompt_width:].tolist()), strings)
            return torch.tensor(done, device=input_ids.device)

    return StringCriterion()


def _holds(text: str, strings: Sequence[str]) -> bool:
    return any(string in text for string in strings)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return decoded(tokenizer, ids, special=True, clean_up_tokenization_spaces=False)
