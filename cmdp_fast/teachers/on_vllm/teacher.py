"""The two teachers on vLLM: one that answers with hidden states, one with the k likeliest tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, NoReturn
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import torch
from torch import Tensor

from cmdp_fast.errors import InputError, readable
from cmdp_fast.http_client import HttpClient

from ..served.client import read_token
from ..teacher import Asking, Teacher, TeacherAbout, TeacherOutputs, TopK, head_digest
from .asked import VLLM, Entries
from .stored_head import StoredModel

WIRES = ("float32", "bfloat16", "float16")  # dtypes in which vLLM sends hidden states that are ours too
TEXT = "The quick brown fox jumps over 13 lazy dogs: 7 * (8 - 2) = 42.\n"  # whose tokens both sides must agree on
PROBES, PROBE_TOKENS = 4, 16  # rows, and tokens of each
LOOKED_AT = 16  # hidden states of an answer
NORM = 0.01  # of a norm's mean square, which its epsilon may take
APART = {"float32": 0.02, "float16": 0.05, "bfloat16": 0.2}
"""Nats, in the mean, between log-probabilities of a server and those of hidden states and head, by the server's dtype:
what the layers' rounding makes of them, as between a trainer and the server that samples for it."""


class TeacherOnVLLM(Teacher):
    """A teacher at ``place``, the address of a server of vLLM, and what is asked of it:

    - `http://host:8000`: hidden states, from a server that pools;
    - `http://host:8000?k=20`: the 20 likeliest tokens and their log-probabilities, from a server that generates.

    With `model=FOLDER` (or a hub's id) the model's files are there, and not where the server says that it loaded them.
    With `check=http://host:8001` hidden states and head are held against the log-probabilities of a server that
    generates with the same model.
    """

    elsewhere = True

    def __init__(self, vllm: VLLM, client: HttpClient, model: StoredModel) -> None:
        self._vllm, self._client, self._model = vllm, client, model
        ours = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        if vllm.tokens(TEXT) != list(ours):
            raise InputError(f"{vllm.name} has another tokenizer than {readable(model.name)}: a text has other tokens")

    @classmethod
    def open(cls, place: str, asking: Asking) -> TeacherOnVLLM:
        """Raises InputError if no server of vLLM is there, or if it does not serve what is asked of it."""
        wanted = _Place.of(place)
        client = _client(wanted.url, asking)
        vllm = VLLM(client)
        model = StoredModel(wanted.model or vllm.served.root)
        if wanted.k:
            return TopKOnVLLM(vllm, client, model, wanted.k)
        return HiddenOnVLLM(vllm, client, model, asking, wanted.check)

    def vocabulary(self) -> dict[str, int]:
        """Its tokens with their numbers."""
        return dict(self._model.tokenizer.get_vocab())

    def close(self) -> None:
        """Ends its connections."""
        super().close()
        self._client.close()


class HiddenOnVLLM(TeacherOnVLLM):
    """Hidden states [N, H] behind the final norm, and the head of the model's files.

    The server's dtype is seen: what a model computes in bfloat16 has no more digits than that. On the wire they are
    in that dtype, or in ``asking.dtype``. A server that pools has no head and reports no log-probability. What it can
    be held to is the final norm, whose numbers are read with the head: its outputs without them have the mean square 1.
    """

    def __init__(self, vllm: VLLM, client: HttpClient, model: StoredModel, asking: Asking, check: str = "") -> None:
        super().__init__(vllm, client, model)
        if asking.dtype not in ("", *WIRES):
            raise InputError(f"{vllm.name} sends no {asking.dtype}: expected one of {', '.join(WIRES)}")
        rows = _probes(vllm, model)
        hidden, _ = vllm.hidden(rows, 0, torch.float32)
        self._dtype = dtype = _dtype_of(hidden)
        head, gain = model.head(dtype)
        if hidden.shape[1] != head.weight.shape[1]:
            raise InputError(
                f"{vllm.name} returned hidden states of {hidden.shape[1]} numbers; the head of {readable(model.name)} "
                f"reads {head.weight.shape[1]}"
            )
        self._gain = gain
        self._check_norm(hidden)
        if check:
            with torch.no_grad():
                logprobs = head._replace(weight=head.weight.float()).logits(hidden).log_softmax(-1)
            _check_logprobs(logprobs, rows, _client(check, asking), dtype, f"{vllm.name} and {readable(model.name)}")
        self.head = head
        self._wire = getattr(torch, asking.dtype) if asking.dtype else dtype
        self.about = TeacherAbout(
            answers="hidden",
            model=vllm.served.name,
            revision=model.revision(),
            dtype=str(dtype).removeprefix("torch."),
            vocab_size=head.weight.shape[0],
            hidden_size=head.weight.shape[1],
            tokenizer=model.vocabulary,
            head=head_digest(head),
            positions=vllm.served.positions,
            ends=model.ends(),
        )

    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        since = time.perf_counter()
        asked = [(row, count) for row, count in zip(rows, wanted, strict=True) if count]
        hidden, size = torch.empty(0, self.about.hidden_size, dtype=self._dtype), 0
        if asked:  # of every token: vLLM has no way to ask for the last ones
            of_all, size = self._vllm.hidden([row for row, _ in asked], self.about.hidden_size, self._wire)
            self._check_norm(of_all[:: -(-len(of_all) // LOOKED_AT)])  # it may have been started again
            parts = of_all.split([len(row) for row, _ in asked])
            kept = [part[len(part) - count :] for part, (_, count) in zip(parts, asked, strict=True)]
            hidden = torch.cat(kept).to(self._dtype)
        return TeacherOutputs(hidden=hidden, head=self.head, bytes=size, seconds=time.perf_counter() - since)

    def _check_norm(self, hidden: Tensor) -> None:
        """Raises InputError unless the final norm may have given these hidden states."""
        squares = self._gain.mean_square(hidden)
        eps = max(torch.finfo(each).eps for each in (hidden.dtype, self._dtype))
        rounded = self._gain.rounding(hidden, 2 * eps) + 1e-5
        if ((squares > 1 + rounded) | (squares < 1 - NORM - rounded) | squares.isnan()).any():
            worst = float((squares - 1).abs().max())
            raise InputError(
                f"{self._vllm.name} and {readable(self._model.name)} do not belong together: hidden states that the "
                "final norm gave have the mean square 1 without its weights, and these are off by "
                f"{worst:.3g}; expected the files of the model that is served, and a server started with --runner "
                "pooling --convert embed"
            )


class TopKOnVLLM(TeacherOnVLLM):
    """The ``k`` likeliest tokens and their log-probabilities, at temperature 1 whatever a request says: vLLM reports
    those of prompts before a sampler's settings. A server lets 20 be asked for unless `--max-logprobs` says more."""

    def __init__(self, vllm: VLLM, client: HttpClient, model: StoredModel, k: int) -> None:
        super().__init__(vllm, client, model)
        if k > model.vocab_size:
            raise InputError(f"?k={k}: {readable(model.name)} has {model.vocab_size} tokens")
        self._k = k
        self.about = TeacherAbout(
            answers="topk",
            model=vllm.served.name,
            revision=model.revision(),
            dtype="",  # which it does not say
            vocab_size=model.vocab_size,
            hidden_size=0,
            tokenizer=model.vocabulary,
            head="",
            positions=vllm.served.positions - 2,  # one more is put behind a row, and it generates one
            ends=model.ends(),
        )
        self.answer(_probes(vllm, model)[:1], [1])  # a k that it does not give is refused at once

    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        since = time.perf_counter()
        asked = [(row, count) for row, count in zip(rows, wanted, strict=True) if count]
        entries, size = list[Entries](), 0
        if asked:
            # A prompt's log-probabilities are those of its own tokens: what comes behind a row needs one there
            longer = [[*row, row[0]] for row, _ in asked]
            of_all, size = self._vllm.prompt_logprobs(longer, self._k, self.about.vocab_size)
            end = 0
            for row, count in asked:
                end += len(row)
                entries += of_all[end - count : end]
        k = self._k
        topk = TopK(
            ids=torch.tensor([each.tokens[:k] for each in entries], dtype=torch.int64).view(-1, k),
            logprobs=torch.tensor([each.logprobs[:k] for each in entries]).view(-1, k).clamp(max=0.0),
        )
        return TeacherOutputs(topk=topk, bytes=size, seconds=time.perf_counter() - since)


class _Place(NamedTuple):
    url: str
    k: int
    model: str
    check: str

    @classmethod
    def of(cls, place: str) -> _Place:
        def refuse(why: str) -> NoReturn:
            raise InputError(
                f"vllm:{readable(place)}: {why}; expected vllm:http://host:port, and behind it ?k=20, ?model=FOLDER or "
                "?check=http://host:port"
            )

        try:
            parts = urlsplit(place)
            fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none
            fine = False
        if not fine or parts.username or parts.fragment:
            refuse("no address of a server")
        given = parse_qsl(parts.query, keep_blank_values=True)
        options = dict(given)
        if len(options) != len(given) or not options.keys() <= {"k", "model", "check"} or "" in options.values():
            refuse(f"the options {parts.query}")
        k = options.get("k", "0")
        if not (k.isascii() and k.isdigit() and len(k) < 7) or ("k" in options and not int(k)):
            refuse(f"k={k}")
        if "k" in options and "check" in options:
            refuse("log-probabilities are checked by nothing")
        return cls(urlunsplit(parts._replace(query="")), int(k), options.get("model", ""), options.get("check", ""))


def _client(url: str, asking: Asking) -> HttpClient:
    key = read_token(asking.token_file) if asking.token_file else ""
    return HttpClient(url, asking.seconds, f"the vLLM server at {url}", "--teacher-timeout", key)


def _probes(vllm: VLLM, model: StoredModel) -> list[list[int]]:
    """Some rows of a text's tokens."""
    count = max(2, min(PROBE_TOKENS, vllm.served.positions - 2))
    # Not of numbers drawn: a token may stand for an image
    tokens = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"] * count
    return [list(tokens[i : i + count]) for i in range(PROBES)]


def _dtype_of(hidden: Tensor) -> torch.dtype:
    """In what numbers in float32 were computed."""
    narrow = (each for each in (torch.bfloat16, torch.float16) if torch.equal(hidden.to(each).float(), hidden))
    return next(narrow, torch.float32)


def _check_logprobs(
    logprobs: Tensor, rows: list[list[int]], client: HttpClient, dtype: torch.dtype, whose: str
) -> None:
    """Raises InputError unless a server that generates reports these log-probabilities of the rows' tokens."""
    vllm = VLLM(client)
    entries, _ = vllm.prompt_logprobs(rows, 1, logprobs.shape[1])
    after = [token for row in rows for token in row[1:]]
    ours = [
        float(logprob[token])
        for row, part in zip(rows, logprobs.split([len(row) for row in rows]), strict=True)
        for logprob, token in zip(part, row[1:], strict=False)
    ]
    theirs = [each.of(token) for each, token in zip(entries, after, strict=True)]
    apart = float((torch.tensor(ours) - torch.tensor(theirs)).abs().mean())
    expected = APART[str(dtype).removeprefix("torch.")]
    client.close()
    if not apart <= expected:  # not NaN
        raise InputError(
            f"{whose} give other log-probabilities than {vllm.name}: they differ by {apart:.3g} nats in the mean, "
            f"expected at most {expected:g}; it has another model, or this one has another head"
        )
