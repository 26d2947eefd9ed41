"""What a server answered to the request for completions of a prompt, checked before anything is learned from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from cmdp_fast.errors import InputError, shown
from cmdp_fast.vocabulary import decoded

from .. import drawn
from ..rollout import Sampling
from ..stops import cut_text


class Drawn(NamedTuple):
    """A completion as it was sampled."""

    tokens: list[int]
    logprobs: list[float]  # nats
    text: str


def request(model: str, prompt: list[int], count: int, seed: int, sampling: Sampling) -> dict[str, Any]:
    """The body of a request for ``count`` completions of a prompt, `/v1/completions`.

    Every setting is named: a server takes what is left open from its own, or from the model's `generation_config`.
    """
    return {
        "model": model,
        "prompt": prompt,
        "n": count,
        "seed": seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,  # the ends of both models are named
        "stop_token_ids": list(sampling.eos),
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logit_bias": {str(token): -100.0 for token in sampling.suppress} or None,
        "logprobs": 0,
        "return_token_ids": True,
    }


def completions(answer: Any, prompt: list[int], count: int, sampling: Sampling, whose: str) -> list[Drawn]:
    """The completions in an answer; ``whose`` names the server. Raises InputError for anything that it may not be."""
    choices = _field(answer, "choices", list, whose)
    numbers = [choice.get("index") if isinstance(choice, dict) else None for choice in choices]
    if len(numbers) != count or not all(i in numbers for i in range(count)):
        raise InputError(f"{whose} returned the completions {shown(numbers)} for a prompt, expected {count}")
    return [_drawn(choices[numbers.index(i)], prompt, sampling, whose) for i in range(count)]


def _drawn(choice: dict[str, Any], prompt: list[int], sampling: Sampling, whose: str) -> Drawn:
    if choice.get("prompt_token_ids") != prompt:
        raise InputError(
            f"{whose} went on with another prompt than it was given: the tokens {shown(choice.get('prompt_token_ids'))}"
            f", not {shown(prompt)}"
        )
    ids = drawn.tokens(_field(choice, "token_ids", list, whose), sampling, whose)
    values = _field(_field(choice, "logprobs", dict, whose), "token_logprobs", list, whose)
    logprobs = drawn.logprobs(values, len(ids), whose)
    if max(logprobs) > 1e-3:
        raise InputError(f"{whose} returned the log-probability {max(logprobs)}, expected none above 0")
    kept = sampling.cut(ids)
    _check_end(choice.get("finish_reason"), ids, kept, sampling, whose)
    return Drawn(kept, logprobs[: len(kept)], _field(choice, "text", str, whose))


def _check_end(reason: Any, ids: list[int], kept: list[int], sampling: Sampling, whose: str) -> None:
    """Raises InputError unless a completion ended where it should."""
    ended = sampling.is_finished(kept)
    if reason == "length" and not ended and len(ids) < sampling.max_new_tokens:
        raise InputError(
            f"{whose} ended a completion after {len(ids)} of {sampling.max_new_tokens} tokens: its --max-model-len has "
            "no room for prompt and completion"
        )
    if reason not in ("stop", "length") or (reason == "stop" and not ended):
        raise InputError(
            f"{whose} ended a completion with {shown(reason)} at token {ids[-1]}, expected one of the tokens "
            f"{shown(list(sampling.eos))}"
            + (f", one of {shown(sampling.stop_strings)}" if sampling.stop_strings else "")
            + f" or {sampling.max_new_tokens} tokens"
        )


def check_texts(some: list[Drawn], sampling: Sampling, whose: str) -> None:
    """Raises InputError if most of some completions read otherwise to the server than to the trainer: its tokenizer is
    another. Single ones may: half of a character is written in several ways."""
    unlike = [each for each in some if not _alike(each, sampling)]
    if 2 * len(unlike) > len(some):
        text = decoded(sampling.tokenizer, unlike[0].tokens, special=True)
        raise InputError(
            f"{whose} reads its tokens {shown(unlike[0].tokens)} as {shown(unlike[0].text)}, the trainer as "
            f"{shown(text)}: it has another tokenizer"
        )


def _alike(completion: Drawn, sampling: Sampling) -> bool:
    """Whether the text is that of the tokens, or of all but an end of sequence, which a server may leave out. It ends
    with a stop string, where the last token may go on."""
    ends = completion.tokens[-1] in sampling.eos
    candidates = [completion.tokens, *([completion.tokens[:-1]] if ends else [])]
    texts = [decoded(sampling.tokenizer, each, special=True) for each in candidates]
    return _letters(completion.text) in [_letters(cut_text(text, sampling.stop_strings)) for text in texts]


def _letters(text: str) -> str:
    return "".join(text.replace("\N{REPLACEMENT CHARACTER}", "").split())


def _field(value: Any, name: str, kind: type, whose: str) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise InputError(f"{whose} answered without {name}: {shown(value)}")
    return found
