"""The way of a step's weights to the servers: through a folder, as a whole model or as an adapter.

The folder is on a disk that both sides see, or in memory (`/dev/shm`). A server reads it with vLLM's `reload_weights`,
or as an adapter that takes the place of the one before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cmdp_fast.files import open_as_others, writing

from ..models.adapter import has_adapter, whole_adapted
from ..models.saving import save_student
from ..settings.config import TrainConfig
from .client import Client

ADAPTER = "student"  # the name under which an adapter is asked for
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


def dtype_name(config: TrainConfig) -> str:
    """The dtype that servers compute in: that of the student's forward pass."""
    return "bfloat16" if config.precision == "bf16" else "float32"


class Weights(Protocol):
    """What a server of a model needs."""

    changes: bool
    """Whether a step changes them."""
    begun_with: bool
    """Whether a server begins with them, or has to load them first."""
    at_once: bool
    """Whether several servers may load them at the same time."""

    def write(self, model: Any, state: dict[str, Tensor] | None, folder: Path) -> Path:
        """Puts those of the model into the folder; ``state`` where the model does not hold them all itself."""

    def options(self, written: Path) -> list[str]:
        """vLLM's options for a server that begins with what was written."""

    def load(self, client: Client, written: Path) -> None:
        """Has a server that runs take them."""

    def name(self, served: str) -> str:
        """The model to ask a server for that serves ``served``."""


class WholeModel:
    """A student of which any weight is trained; written in the dtype that servers compute in."""

    changes = begun_with = at_once = True

    def __init__(self, tokenizer: Any, dtype: torch.dtype, untied: bool = False) -> None:
        """``untied``: a head that is the embedding is written a second time, as a weight of its own."""
        self.tokenizer, self.dtype, self.untied = tokenizer, dtype, untied

    def write(self, model: Any, state: dict[str, Tensor] | None, folder: Path) -> Path:
        """In place of those of the step before, once they are complete."""
        with untied(model.config) if self.untied else nullcontext():
            if not has_adapter(model):
                state = _cast(model.state_dict() if state is None else state, self.dtype, tied=not self.untied)
            save_student(model, self.tokenizer, folder, state, "weights")
        return folder / "weights"

    def options(self, written: Path) -> list[str]:
        return ["--model", str(written)]

    def load(self, client: Client, written: Path) -> None:
        client.post("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(written)}})
        client.post("reset_prefix_cache")  # keys and values of the weights before

    def name(self, served: str) -> str:
        return served


class Adapter:
    """The adapter of a student whose own weights stay as they are."""

    changes, begun_with, at_once = True, False, True

    def __init__(self, base: str, rank: int) -> None:
        self.base, self.rank = base, rank

    def write(self, model: Any, state: dict[str, Tensor] | None, folder: Path) -> Path:
        """Into a folder of its own, for a server that reads one late finds what it was told of."""
        with writing(folder / "adapter"):
            written = Path(tempfile.mkdtemp(prefix="adapter-", dir=folder))
            (model if state is None else whole_adapted(model, state)).save_pretrained(written)
            written.chmod(0o755)
            open_as_others(written)
        return written

    def options(self, written: Path) -> list[str]:
        most = next((rank for rank in RANKS if rank >= self.rank), self.rank)
        return ["--model", self.base, "--enable-lora", "--max-lora-rank", str(most), "--max-loras", "1"]

    def load(self, client: Client, written: Path) -> None:
        client.post("v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": str(written), "load_inplace": True})
        client.post("reset_prefix_cache")

    def name(self, served: str) -> str:
        return ADAPTER


class Fixed:
    """A model that is not trained, read from where it came from."""

    changes, begun_with, at_once = False, True, True

    def __init__(self, source: str) -> None:
        self.source = source

    def write(self, model: Any, state: dict[str, Tensor] | None, folder: Path) -> Path:
        return Path(self.source)

    def options(self, written: Path) -> list[str]:
        return ["--model", self.source]

    def load(self, client: Client, written: Path) -> None:
        return None

    def name(self, served: str) -> str:
        return served


@contextmanager
def untied(config: Any) -> Iterator[None]:
    """A model's configuration says that its head is a weight of its own."""
    parts = {id(part): part for part in (config, config.get_text_config())}.values()
    own = [(part, part.tie_word_embeddings) for part in parts]
    for part in parts:
        part.tie_word_embeddings = False
    try:
        yield
    finally:
        for part, tied in own:
            part.tie_word_embeddings = tied


def _cast(state: dict[str, Tensor], dtype: torch.dtype, tied: bool) -> dict[str, Tensor]:
    """The weights in a dtype, on the CPU; those that are ``tied`` stay one, or become two."""
    read: dict[int, Tensor] = {}
    written: dict[str, Tensor] = {}
    for name, weight in state.items():
        place, again = weight.data_ptr(), weight.data_ptr() in read
        whole = read.setdefault(place, weight.to("cpu", dtype if weight.is_floating_point() else weight.dtype))
        written[name] = whole.clone() if again and not tied else whole
    return written
