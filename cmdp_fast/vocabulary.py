"""The vocabulary that student and teacher share: a divergence compares their logits column by column."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cmdp_fast.errors import InputError, first_line, readable, shown

TOKENS = 1 << 31  # more than any vocabulary has


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Raises InputError unless a token has the same number in both tokenizers.

    One of them may have tokens after the other's last: they lie beyond the columns that both models have.
    """
    ours, theirs = ({number: token for token, number in t.get_vocab().items()} for t in (student, teacher))
    common = min(max(ours, default=-1), max(theirs, default=-1))
    differing = next((i for i in range(common + 1) if ours.get(i) != theirs.get(i)), None)
    if differing is not None:
        raise InputError(
            f"student and teacher must share a tokenizer, but token {differing} is {shown(ours.get(differing))} in one "
            f"({len(ours)} tokens) and {shown(theirs.get(differing))} in the other ({len(theirs)} tokens)"
        )


def vocabulary_digest(tokenizer: Any) -> str:
    """sha256 of a tokenizer's tokens with their numbers: what has to be equal for two models to be compared."""
    entries = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def named_ends(settings: Iterable[Any], tokenizer: Any = None) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's, and those of the first settings that name any as
    ``eos_token_id``. Raises InputError for anything but numbers of tokens there."""
    named: Any = next((s.eos_token_id for s in settings if getattr(s, "eos_token_id", None) is not None), [])
    each = [getattr(tokenizer, "eos_token_id", None), *(named if isinstance(named, (list, tuple)) else [named])]
    if wrong := [token for token in each if token is not None and (type(token) is not int or token >= TOKENS)]:
        raise InputError(f"a model's eos_token_id is {shown(wrong[0])}, expected the number of a token, or a list")
    return tuple(sorted({token for token in each if token is not None and token >= 0}))  # some write -1 for none


def encoded(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The numbers of a text's tokens. Raises InputError where the tokenizer, which is somebody else's, fails on it."""
    with _naming("read", text):
        ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


def decoded(tokenizer: Any, ids: Sequence[int], special: bool = False, **options: Any) -> str:
    """The text of some tokens, those of no text left out unless ``special``. Raises InputError where the tokenizer
    fails on them."""
    with _naming("write", ids):
        text: str = tokenizer.decode(ids, skip_special_tokens=not special, **options)
    return text


def all_decoded(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of several rows of tokens, as `decoded` has them."""
    with _naming("write", rows):
        texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts


@contextmanager
def _naming(what: str, given: Any) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the library in Rust is no Exception
        raise InputError(f"the tokenizer cannot {what} {shown(given)}: {readable(first_line(error))}") from error


def common_vocabulary(*models: Any) -> int:
    """The number of columns that all models' logits have; models of a family may pad their vocabulary differently."""
    return min(columns_of(model) for model in models)


def columns_of(model: Any) -> int:
    """The number of columns of a model's logits, or of those that a `Teacher` says it has."""
    return int(model.about.vocab_size if hasattr(model, "about") else model.get_output_embeddings().weight.shape[0])
