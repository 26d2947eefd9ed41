"""The part of a causal language model that the trainer uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class CausalLM(Protocol):
    """A model of transformers, a student with an adapter, or a `FrozenBase`; before accelerate wraps it, or unwrapped.

    A wrapped one is an ``nn.Module`` that is called and differentiated, and nothing else.
    """

    generation_config: Any

    @property
    def config(self) -> Any:
        """transformers' configuration of the architecture."""

    @property
    def device(self) -> torch.device:
        """The device of its weights."""

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """transformers' output, with the logits [B, T, V]."""

    def generate(self, **options: Any) -> Any:
        """Prompts with completions, token ids [B, P + T]."""

    def get_input_embeddings(self) -> Any:
        """The embedding of tokens, with its weight [V, H]."""

    def get_output_embeddings(self) -> Any:
        """The head's linear layer, with its weight [V, H]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of an ``nn.Module``."""

    def modules(self) -> Iterator[nn.Module]:
        """As of an ``nn.Module``."""

    def state_dict(self) -> dict[str, Tensor]:
        """As of an ``nn.Module``."""

    def to(self, device: torch.device) -> Any:
        """As of an ``nn.Module``."""
