"""What is kept in memory, and what is computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .ranges import NOT_NEGATIVE, POSITIVE
from .units import COMPLETIONS, MIB, NAME, TOKENS


@dataclass(frozen=True)
class MemorySettings:
    """What is kept in memory, and what is computed again."""

    micro_batch_size: Annotated[int, POSITIVE, COMPLETIONS] = 32
    """Completions that go through a model at once, at most; gradients of a minibatch are accumulated over them."""
    micro_batch_tokens: Annotated[int, NOT_NEGATIVE, TOKENS] = 0
    """Tokens that go through a model at once, at most: prompts and completions, with the padding between completions of
    like length (with `padding_free` there is none). A completion that is longer goes alone. 0: any number."""
    padding_free: bool = False
    """Whether the completions of a micro-batch are read one after another in a single row, without padding. It is
    meant for an `attn_implementation` of flash attention; others compute, and mask, each token of the row against all
    others. Models that mix such sequences (Bloom, Mamba, OPT, …) are refused. Sampling has padding in any case."""
    logits: Literal["tiled", "full"] = "tiled"
    """tiled: scoring and update go from hidden states to statistics a tile of the vocabulary at a time, and hold no
    logits; full: both models' logits are made in full, for a model whose head is not a plain linear layer."""
    teacher_cache_mb: Annotated[int, NOT_NEGATIVE, MIB] = 512
    """The teacher's hidden states (or logits) are kept from scoring to update for as many completions as fit in this;
    those of the others are computed, or asked for, again."""
    teacher_cache_cpu: bool = False
    """Keep them in the host's memory, which is pinned for a GPU."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, more time."""
    attn_implementation: Annotated[str, NAME] = ""
    """How the models compute attention, by transformers' name: `sdpa`, `eager`, `flash_attention_2`, … Empty: as
    transformers chooses."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory but for the update."""
