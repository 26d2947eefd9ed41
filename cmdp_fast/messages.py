"""A completion as functions of the user's see it: a text, or for a chat a list of one message."""

from __future__ import annotations

from typing import Any


def text_of(completion: Any) -> str:
    """The text of a completion; of a list of messages the last one's."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def as_completion(prompt: Any, text: str) -> Any:
    """The completion of a prompt: a text where the prompt is a text, else a list of one message."""
    return text if isinstance(prompt, str) else as_message(text)


def as_message(text: str) -> list[dict[str, str]]:
    """A list of one message, the assistant's."""
    return [{"role": "assistant", "content": text}]
