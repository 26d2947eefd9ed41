"""Sampling completions: the batch in which prompts and completions lie, and the function that fills it.

Prompts are padded on the left, completions on the right, so that every completion starts in the same column. `mask`
marks the completion's real tokens: everything up to the end-of-sequence token or the one that completes a stop string
(`stops.py`), which counts, or up to the length limit if there is none (a truncated completion).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.errors import InputError, first_line, shown
from cmdp_fast.teachers.teacher import Teacher
from cmdp_fast.time_limits import Limit, Overdue, told_of
from cmdp_fast.unmasked import Lengths
from cmdp_fast.vocabulary import common_vocabulary, encoded

from .causal_lm import CausalLM
from .records.report import Report
from .settings.config import TrainConfig
from .stops import common_end_tokens, cut_tokens, ends_with_string, string_criterion
from .tasks.data import Problem

# Characters of a prompt, some 500,000 tokens of English: to read more takes gigabytes, before one knows how many they
# are. No number of characters follows from one of tokens: a tokenizer may make one token of any number of spaces.
LONGEST = 1 << 21
PATIENCE = 20.0  # seconds for the chat template on one prompt, which takes a thousandth


@dataclass
class Rollout:
    """B completions of up to T tokens: shapes [B, P] and [B, T]; masks are bool."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    finished: Tensor  # [B]: ends with an end-of-sequence token or a stop string
    sampler_logprob: Tensor | None = None  # [B, T], where the sampler reports it
    lengths: Lengths | None = None  # where the host knows them already: masks are then as long, and without holes
    teacher_index: Tensor | None = None  # [B], the number of each row's teacher where there are several

    def __len__(self) -> int:
        return len(self.tokens)

    def without_truncated(self) -> Rollout:
        """The same completions with nothing marked of those that are not finished (TRL's `mask_truncated_completions`):
        they count for no loss."""
        return replace(self, mask=self.mask & self.finished[:, None], lengths=None)

    def completion_ids(self) -> list[list[int]]:
        """The completions without padding."""
        return _lists(self.tokens, self.mask)


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled, in the words of `GenerationConfig`.

    Unless `top_k` or `top_p` say otherwise, from the whole softmax at a temperature: only then is the sampled
    distribution the one that is scored.
    """

    max_new_tokens: int
    temperature: float  # 0: the most likely token each time (greedy)
    eos: tuple[int, ...]
    pad: int
    vocab_size: int  # columns that all models have, the tokens that may be sampled
    suppress: tuple[int, ...] = ()  # columns that one of the models does not have
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 0  # prompts at once; 0: all
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None  # which these need

    def cut(self, ids: list[int]) -> list[int]:
        """A completion up to its first stop string."""
        return cut_tokens(ids, self.stop_strings, self.tokenizer)

    def is_finished(self, ids: list[int]) -> bool:
        """Whether a completion, which has been cut, has come to its end."""
        return ids[-1] in self.eos or ends_with_string(ids, self.stop_strings, self.tokenizer)


def make_sampling(
    config: TrainConfig, student: CausalLM, teacher: CausalLM | Teacher | None, tokenizer: Any
) -> Sampling:
    """As a configuration says, for both models; one that is asked is not sampled.

    Raises InputError for stop tokens that there are not, and for a model that cannot end with any of its own.
    """
    sampled = None if isinstance(teacher, Teacher) else teacher
    models = (student,) if sampled is None else (student, sampled)
    vocab_size = common_vocabulary(student, *([] if teacher is None else [teacher]))
    width = max(common_vocabulary(each) for each in models)
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        eos=common_end_tokens(student, teacher, tokenizer, config.stop_tokens, vocab_size),
        pad=padding_token(tokenizer, models),
        vocab_size=vocab_size,
        suppress=tuple(range(vocab_size, width)),
        top_k=config.top_k,
        top_p=config.top_p,
        batch_size=config.rollout_batch_size,
        stop_strings=config.stop_strings,
        tokenizer=tokenizer,
    )


def padding_token(tokenizer: Any, models: Sequence[CausalLM]) -> int:
    """The tokenizer's padding where every model has an embedding of it, else its end of sequence, else token 0: padding
    is masked, and read all the same."""
    rows = min(embedding_rows(model) for model in models)
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token < rows), 0)


def embedding_rows(model: CausalLM) -> int:
    """The number of tokens that a model has an embedding for; of one without embeddings, as many as there can be."""
    embeddings = model.get_input_embeddings()
    return sys.maxsize if embeddings is None else int(embeddings.weight.shape[0])


def encode_prompts(rows: Sequence[Problem], tokenizer: Any) -> list[list[int]]:
    """Token ids of the rows' prompts; the chat template is applied to lists of messages, with the row's `tools` and
    `chat_template_kwargs`. Where the last message is the assistant's the completion goes on with it.

    What a tokenizer puts in front of a text stays, what it puts behind, an end of sequence, does not: the completion
    goes on there. Raises InputError for a prompt without tokens or of more than `LONGEST` characters, and for messages
    that the template refuses.
    """
    behind = _tokens_behind(tokenizer)
    return [_ids(_text(row, tokenizer), row, tokenizer, behind) for row in rows]


def _text(row: Problem, tokenizer: Any) -> str:
    """What is tokenised of a row's prompt."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else _rendered(row, tokenizer)


def _ids(text: str, row: Problem, tokenizer: Any, behind: int) -> list[int]:
    prompt = row["prompt"]
    if len(text) > LONGEST:
        raise InputError(
            f"the prompt {shown(text[:60])}... has {len(text):,} characters, expected at most {LONGEST:,}; "
            "--max-prompt-length leaves such problems out"
        )
    ids = encoded(tokenizer, text, add_special_tokens=isinstance(prompt, str))
    ids = ids[: len(ids) - behind] if isinstance(prompt, str) else ids
    if not ids:
        raise InputError(f"the prompt {shown(prompt)} has no tokens")
    return ids


def _tokens_behind(tokenizer: Any) -> int:
    """How many tokens a tokenizer puts behind every text, seen at one that it knows."""
    for text in ("a", "1", "."):
        try:
            plain, given = (encoded(tokenizer, text, add_special_tokens=special) for special in (False, True))
        except InputError:
            continue  # a closed vocabulary without it
        for front in range(len(given) - len(plain) + 1 if plain else 0):
            if given[front : front + len(plain)] == plain:
                return len(given) - len(plain) - front
    return 0


def _rendered(row: Problem, tokenizer: Any) -> str:
    if tokenizer.chat_template is None:
        raise InputError("the prompts are chat messages, but the student's tokenizer has no chat template")
    begun = row["prompt"][-1]["role"] == "assistant"
    try:
        with told_of("the chat template", limit=Limit(PATIENCE, "what it has for a prompt")):
            try:
                text: str = tokenizer.apply_chat_template(
                    row["prompt"],
                    tools=row.get("tools") or None,  # some templates announce an empty list
                    add_generation_prompt=not begun,
                    continue_final_message=begun,
                    tokenize=False,
                    **(row.get("chat_template_kwargs") or {}),
                )
            except Exception as error:  # of the template's own, in whatever form
                refused = f"the chat template refuses the prompt {shown(row['prompt'])}: {first_line(error)}"
                raise InputError(refused) from error
    except InputError as error:
        if isinstance(error.__cause__, Overdue):
            raise InputError(f"{error}: the prompt {shown(row['prompt'])}") from error
        raise
    if any(isinstance(message["content"], list) and str(message["content"]) in text for message in row["prompt"]):
        raise InputError(
            "the chat template writes the parts of a content as a Python list: give one text as the content, not "
            f"{shown(row['prompt'])}"
        )
    return text


def check_variables(names: Iterable[str], tokenizer: Any) -> None:
    """Raises InputError for a variable of `--chat-template-kwargs` that the chat template does not read."""
    template = tokenizer.chat_template
    for name in names:
        if isinstance(template, str) and not re.search(rf"\b{re.escape(name)}\b", template):
            raise InputError(f"--chat-template-kwargs: the student's chat template has no variable {name!r}")


def check_tokens(prompts: Sequence[list[int]], models: Sequence[CausalLM]) -> None:
    """Raises InputError for a token of a prompt that a model has no embedding for: its tokenizer has more than it."""
    most = max(max(ids) for ids in prompts)
    if most >= (rows := min(embedding_rows(model) for model in models)):
        raise InputError(f"token {most} of a prompt has no embedding: the tokenizer knows it, the models have {rows}")


def drop_long_prompts(
    problems: Sequence[list[Problem]], tokenizer: Any, limit: int, report: Report
) -> list[list[Problem]]:
    """Those problems of some sets whose prompt has at most `limit` tokens (0: all) and `LONGEST` characters; prints how
    many were left out.

    Raises InputError if none are left of a set.
    """
    if not limit:
        return list(problems)
    parts, behind = [], _tokens_behind(tokenizer)
    for rows in problems:
        lengths = [_length(row, tokenizer, behind) for row in rows]
        parts.append([row for row, length in zip(rows, lengths, strict=True) if length <= limit])
        if not parts[-1]:
            least = min(lengths)
            shortest = f"{least} tokens" if least < math.inf else f"more than {LONGEST:,} characters"
            raise InputError(f"--max-prompt-length {limit}: all prompts are longer, the shortest has {shortest}")
    if dropped := sum(map(len, problems)) - sum(map(len, parts)):
        report.say(f"left out {dropped} of {sum(map(len, problems))} problems: prompts of more than {limit} tokens")
    return parts


def _length(row: Problem, tokenizer: Any, behind: int) -> float:
    """The tokens of a row's prompt; infinite for one that is too long to be counted."""
    text = _text(row, tokenizer)
    return math.inf if len(text) > LONGEST else len(_ids(text, row, tokenizer, behind))


def generate(
    policy: CausalLM,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    mixed_with: Callable[[Tensor], Any] | None = None,
    synced_gpus: bool = False,
) -> Rollout:
    """Samples a completion of each prompt with transformers: batched, cached, prompts of like length together.

    ``mixed_with`` makes a logits processor for a batch from its prompts' mask [B, P] (`methods/minillm.py`).
    ``synced_gpus``: every process runs as many steps as the slowest, as a model spread over them needs.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if sampling.batch_size else range(len(prompts))
    size = sampling.batch_size or len(prompts)
    completions: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), size):
        some = order[start : start + size]
        for i, ids in zip(
            some, _generate([prompts[i] for i in some], policy, sampling, mixed_with, synced_gpus), strict=True
        ):
            completions[i] = ids
    return assemble(prompts, completions, sampling, policy.device)


def assemble(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    sampling: Sampling,
    device: torch.device,
    logprobs: Sequence[Sequence[float]] | None = None,
) -> Rollout:
    """The batch of prompts and completions given as lists of token ids; nothing may follow an end of sequence."""
    prompt_ids, prompt_mask = _left_padded(prompts, sampling.pad, device)
    width = max(len(ids) for ids in completions)
    tokens = torch.tensor([ids + [sampling.pad] * (width - len(ids)) for ids in completions], device=device)
    lengths = torch.tensor([len(ids) for ids in completions], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    finished = torch.tensor([sampling.is_finished(ids) for ids in completions], device=device)
    drawn = None
    if logprobs is not None:
        drawn = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in logprobs], device=device)
    return Rollout(prompt_ids, prompt_mask, tokens, mask, finished, drawn)


def completion_mask(tokens: Tensor, eos: Sequence[int]) -> Tensor:
    """mask [B, T]: a token counts if no end-of-sequence token came before it.

    The first end-of-sequence token counts itself. Padding is recognised by its position and not by its number: many
    models pad with a token that also ends a sequence.
    """
    ends = torch.isin(tokens, torch.tensor(eos, device=tokens.device))
    return ends.long().cumsum(1) - ends.long() == 0


@torch.no_grad()
def _generate(
    prompts: Sequence[list[int]], policy: CausalLM, sampling: Sampling, mixed_with: Any, synced_gpus: bool
) -> list[list[int]]:
    from transformers import LogitsProcessorList, StoppingCriteriaList

    prompt_ids, prompt_mask = _left_padded(prompts, sampling.pad, policy.device)
    criteria = []
    if sampling.stop_strings:
        criteria.append(string_criterion(sampling.stop_strings, sampling.tokenizer, prompt_ids.shape[1]))
    with _plain_sampling(policy, sampling if mixed_with is None else replace(sampling, temperature=1.0)):
        sequences = policy.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            logits_processor=None if mixed_with is None else LogitsProcessorList([mixed_with(prompt_mask)]),
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=synced_gpus,
        )
    tokens = sequences[:, prompt_ids.shape[1] :]
    return [sampling.cut(ids) for ids in _lists(tokens, completion_mask(tokens, sampling.eos))]


def _lists(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    """The masked beginning of each row, with one copy from the device for all."""
    lengths = mask.sum(1).tolist()
    return [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]


def _left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids in prompts)
    prompt_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    return prompt_ids, torch.arange(width, device=device) >= width - lengths[:, None]


@contextmanager
def _plain_sampling(policy: CausalLM, sampling: Sampling) -> Iterator[None]:
    """Generation settings under which `sampling` alone changes the softmax.

    `generate` takes a setting that a call leaves open from the model's own, and many models come with a top-p, a top-k
    or a repetition penalty. So the model's own are put aside while it runs.
    """
    from transformers import GenerationConfig

    own = policy.generation_config
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    policy.generation_config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        **(drawn if sampling.temperature > 0 else {}),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.eos),
        pad_token_id=sampling.pad,
        suppress_tokens=list(sampling.suppress) or None,
    )
    try:
        yield
    finally:
        policy.generation_config = own
