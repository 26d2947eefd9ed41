"""The text of each token of a completion, to be shown beside what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmdp_fast.vocabulary import decoded

LONGEST = 8  # tokens that may wait for the rest of a character; one of UTF-8 has four bytes
BROKEN = "\ufffd"  # what a tokenizer puts where a character is not whole


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text, which all of them together are; for a tokenizer whose texts do not grow by
    their tokens, what each would be alone.

    The last of several tokens that make one character has it, and the others, like special tokens, are "". A token is
    read behind a few before it: many tokenizers write a first one without its space.
    """
    texts: list[str] = []
    start = read = 0  # what is known already is ids[start:read], read again as a beginning
    known = ""
    for end in range(1, len(ids) + 1):
        text = decoded(tokenizer, ids[start:end])
        if text.endswith(BROKEN) and end - read < LONGEST and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(known) :])
        start, read = read, end
        known = decoded(tokenizer, ids[start:read])
    whole = decoded(tokenizer, ids)
    if "".join(texts) == whole:
        return texts
    return [decoded(tokenizer, [token]) for token in ids]


def cut_texts(texts: Sequence[str], length: int) -> list[str]:
    """The texts of a completion's tokens where only its first ``length`` characters are shown: a stop string is not."""
    cut, left = list[str](), length
    for text in texts:
        cut.append(text[:left])
        left -= len(cut[-1])
    return cut
