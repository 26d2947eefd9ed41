"""The way of a step's weights to the servers over NCCL, by vLLM's own weight transfer: from GPU to GPU, past any disk.

vLLM has to be there beside the trainer, and a model's parameters to have the names that they have in its checkpoint
(transformers fuses those of experts, which go through a folder). It was written after vLLM 0.32, with whose classes its
calls are compared (tests/trainer/test_vllm.py); no GPU has run it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from cmdp_fast.errors import InputError, first_line

from .client import Client
from .weights import WholeModel


class Nccl(WholeModel):
    """A student of which any weight is trained. A server begins with a folder, and gets every later step over NCCL."""

    at_once = False  # NCCL of several communicators may wait for itself

    def __init__(self, tokenizer: Any, dtype: torch.dtype, device: torch.device, elsewhere: bool) -> None:
        """``elsewhere``: the servers run already, and read no folder."""
        super().__init__(tokenizer, dtype)
        self.device, self._begun = device, elsewhere
        self._state: dict[str, Tensor] = {}
        self._senders: dict[str, Any] = {}  # by the server

    def write(self, model: Any, state: dict[str, Tensor] | None, folder: Path) -> Path:
        """The first time for a server that begins, then nothing."""
        self._state = dict(model.named_parameters()) if state is None else state
        if not self._begun:
            self._begun = True
            return super().write(model, state, folder)
        return folder

    def options(self, written: Path) -> list[str]:
        return [*super().options(written), "--weight-transfer-config", '{"backend": "nccl"}']

    def load(self, client: Client, written: Path) -> None:
        try:
            if client.url not in self._senders:
                self._senders[client.url] = self._sender(client)
            self._senders[client.url].send_weights()
        except Exception as error:  # vLLM's own, of whatever kind, from either side
            raise InputError(f"{client.name} did not get the weights over NCCL: {first_line(error)}") from error
        client.post("reset_prefix_cache")

    def metadata(self) -> list[Any]:
        """What is sent, as vLLM asks a source of weights."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, self._dtype_of(weight), tuple(weight.shape)) for name, weight in self._state.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._state.items():
            yield name, weight.detach().to(self.device, self._dtype_of(weight))

    def _dtype_of(self, weight: Tensor) -> torch.dtype:
        return self.dtype if weight.is_floating_point() else weight.dtype

    def _sender(self, client: Client) -> Any:
        from accelerate.utils.other import get_free_port
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        workers = int(client.get("get_world_size")["world_size"])
        about = NCCLTrainerInitInfo(
            master_address=_own_address(client.url), master_port=get_free_port(), world_size=1 + workers, rank=0
        )
        control = HTTPVLLMWeightSyncClient(client.url, timeout=client.seconds)
        return NCCLTrainerWeightTransferEngine.trainer_init(about, client=control, source=self)


def _own_address(url: str) -> str:
    """The address of this machine on the way to a server."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((parts.hostname, parts.port or 80))  # of a datagram nothing is sent yet
        return str(way.getsockname()[0])
