"""What a server of vLLM is asked, and what it may answer: anything else is an InputError that names the server.

Last hidden states come from a server that was started to pool (`/pooling`), as bytes; log-probabilities of prompts from
one that was started to generate (`/v1/completions`), as JSON. Both are given token ids.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from cmdp_fast.errors import InputError, readable, shown
from cmdp_fast.http_client import LONGEST, HttpClient

from ..about import LONGEST as LONGEST_NAME
from ..served.tensors import Malformed, read_json

ENTRY = 512  # bytes of a token's entry in the log-probabilities of a prompt; an honest one has some 60 and the token
ROUNDED = 1e-4  # of the sum of a token's probabilities, which the server rounded to float32


@dataclass(frozen=True)
class Served:
    """What a server says of itself."""

    name: str  # by which it wants the model called
    root: str  # the folder or the id on the hub that it loaded
    positions: int  # tokens of a row, with those that it generates


class VLLM:
    """A server of vLLM."""

    def __init__(self, client: HttpClient) -> None:
        self._client, self.name = client, client.name
        page = self._json("GET", "v1/models", None, 1 << 20)
        try:
            model = page["data"][0]  # adapters stand behind it
            name, root, positions = model["id"], model["root"], model["max_model_len"]
            if not (type(name) is type(root) is str and type(positions) is int and 2 < positions < 1 << 31):
                raise TypeError
            self.served = Served(readable(name, LONGEST_NAME), root, positions)
        except (TypeError, KeyError, IndexError) as error:
            raise InputError(f"{self.name} names no model with a root and a max_model_len: expected vLLM's") from error

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, without any that the tokenizer would add."""
        body = {"model": self.served.name, "prompt": text, "add_special_tokens": False}
        answer = self._json("POST", "tokenize", body, 1 << 20)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or not all(type(each) is int for each in tokens):
            self._refuse("tokens that are no list of integers", tokens)
        return tokens

    def hidden(self, rows: Sequence[Sequence[int]], size: int, wire: torch.dtype) -> tuple[Tensor, int]:
        """(the last hidden states of all tokens of the rows, row behind row, [N, ``size``] of the dtype ``wire``; the
        bytes that came). ``size`` 0: as many as come."""
        body = {
            "model": self.served.name,
            "input": [list(row) for row in rows],
            "task": "token_embed",
            "use_activation": False,  # which would norm them to length 1
            "encoding_format": "bytes_only",
            "embed_dtype": str(wire).removeprefix("torch."),
            "endianness": sys.byteorder,
        }
        count = sum(map(len, rows))
        content = self._client.ask("POST", "pooling", body, longest=count * (size or 1 << 16) * wire.itemsize)
        width = len(content) // (count * wire.itemsize)
        if not width or width * count * wire.itemsize != len(content) or width != (size or width):
            expected = f"{count * size * wire.itemsize}" if size else "as many for each of them"
            raise InputError(
                f"{self.name} returned {len(content)} bytes of hidden states of {count} tokens, expected {expected}"
            )
        hidden = torch.frombuffer(content, dtype=wire).view(count, width)
        if not hidden.isfinite().all():
            raise InputError(f"{self.name} returned hidden states that are not finite")
        return hidden, len(content)

    def prompt_logprobs(self, rows: Sequence[Sequence[int]], k: int, vocab_size: int) -> tuple[list[Entries], int]:
        """(the log-probabilities of the ``k`` likeliest tokens and of the one that is there, at each token of the rows
        but their first, row behind row; the bytes that came)."""
        body = {
            "model": self.served.name,
            "prompt": [list(row) for row in rows],
            "prompt_logprobs": k,
            "max_tokens": 1,
            "temperature": 0.0,
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        longest = min(LONGEST, (1 << 16) + sum(map(len, rows)) * (k + 2) * ENTRY)
        content = self._client.ask("POST", "v1/completions", body, longest)
        answer = self._parsed("v1/completions", content)
        try:
            choices = sorted(answer["choices"], key=lambda each: each["index"])
            if [each["index"] for each in choices] != list(range(len(rows))):
                self._refuse("answers to other prompts", [each["index"] for each in choices])
            entries: list[Entries] = []
            for row, choice in zip(rows, choices, strict=True):
                if (said := choice.get("prompt_token_ids", row)) != list(row):
                    self._refuse("another prompt", said)
                at_tokens = choice["prompt_logprobs"]
                if len(at_tokens) != len(row):
                    raise InputError(
                        f"{self.name} returned log-probabilities at {len(at_tokens)} tokens of a prompt of {len(row)}"
                    )
                entries += [
                    self._entries(at_token, token, k, vocab_size)
                    for at_token, token in zip(at_tokens[1:], row[1:], strict=True)
                ]
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{self.name} answered without the prompts' log-probabilities: {shown(answer)}") from error
        return entries, len(content)

    def _entries(self, at_token: dict[str, Any], given: int, k: int, vocab_size: int) -> Entries:
        """Tokens and their log-probabilities, the likeliest first; ``given`` is one of them."""
        if len(at_token) not in (k, k + 1):
            raise InputError(f"{self.name} returned {len(at_token)} log-probabilities at a token, {k} were asked for")
        entries = []
        for name, entry in at_token.items():
            value = entry["logprob"]
            if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
                self._refuse(f"the log-probability of a token that is none of {vocab_size}", name)
            if type(value) not in (float, int) or not -sys.float_info.max <= value <= ROUNDED:  # an int has no bound
                self._refuse("something that is no log-probability", value)
            entries.append((int(name), float(value)))
        if len({token for token, _ in entries}) != len(entries):
            self._refuse("a token's log-probability twice", list(at_token))
        entries.sort(key=lambda each: -each[1])
        if math.fsum(math.exp(value) for _, value in entries) > 1 + ROUNDED:
            raise InputError(
                f"{self.name} returned log-probabilities of a token whose sum of probabilities is more than 1; start "
                "it with --logprobs-mode raw_logprobs"
            )
        if all(token != given for token, _ in entries):
            self._refuse("log-probabilities without that of the prompt's own token", given)
        return Entries([token for token, _ in entries], [value for _, value in entries])

    def _json(self, method: str, path: str, body: dict[str, Any] | None, longest: int) -> Any:
        return self._parsed(path, self._client.ask(method, path, body, longest))

    def _parsed(self, path: str, content: bytearray) -> Any:
        try:
            return read_json(content)
        except Malformed as error:
            raise InputError(f"{self.name} answered /{path} with something else: {error}") from error

    def _refuse(self, what: str, given: Any) -> NoReturn:
        raise InputError(f"{self.name} returned {what}: {readable(shown(given), 100)}")


@dataclass(frozen=True)
class Entries:
    """Tokens at one place of a prompt and their log-probabilities, the likeliest first."""

    tokens: list[int]
    logprobs: list[float]

    def of(self, token: int) -> float:
        return self.logprobs[self.tokens.index(token)]
