"""A server of vLLM: what it is asked, and its answers as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import requests

from cmdp_fast.errors import InputError, first_line
from cmdp_fast.http_client import HttpClient

from ..settings.config import TrainConfig

DEAD = "is not there, or its engine has died (GET /health)"


class Client(HttpClient):
    """A server of vLLM at ``url``. ``gone`` says why it will not answer any more, "" if it may.

    Every call may come from any thread, and raises InputError, which names the server, if there is no answer within
    ``seconds`` or it is an error.
    """

    def __init__(self, url: str, seconds: float, gone: Callable[[], str] = lambda: "", key: str = "") -> None:
        super().__init__(url, seconds, f"the vLLM server at {url.rstrip('/')}", "--rollout-timeout", key, gone)

    def get(self, path: str) -> Any:
        """The JSON of a page."""
        return _json(self.ask("GET", path), f"{self.url}/{path}")

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a request is answered with, None where that is empty."""
        return _json(self.ask("POST", path, body), f"{self.url}/{path}")

    def check(self) -> None:
        """Raises InputError if it is not in health: a server whose engine has died may answer nothing any more."""
        if not self.answers("health"):
            raise InputError(self.settled() or f"{self.name} {DEAD}")

    def late(self) -> str:
        """vLLM leaves a call that was made as its engine died without an answer, and only its health tells. A server
        that leaves that question open too is slow, or hangs."""
        try:
            dead = not self.found("health")
        except requests.RequestException as error:
            dead = not isinstance(error, requests.Timeout)
        return f"{DEAD}: no answer in {self.seconds:g} s" if dead else super().late()


def client_of(url: str, config: TrainConfig, gone: Callable[[], str] = lambda: "") -> Client:
    """A server as the configuration asks it; its key is the environment's, where vLLM looks for its own."""
    return Client(url, config.rollout_timeout, gone, os.environ.get("VLLM_API_KEY", ""))


def version_of(client: Client) -> str:
    answer = client.get("version")
    return str(answer.get("version", "")) if isinstance(answer, dict) else ""


def served_model(client: Client, longest: int) -> str:
    """The model that a server serves. Raises InputError if it has no room for prompts and completions so long."""
    try:
        model = client.get("v1/models")["data"][0]
        name, room = str(model["id"]), int(model["max_model_len"])
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise InputError(f"{client.name} names no model: expected a server of vLLM") from error
    if room < longest:
        raise InputError(
            f"{client.name} takes {room} tokens, expected {longest}: start it with --max-model-len {longest}"
        )
    return name


def _json(content: bytearray, where: str) -> Any:
    try:
        return json.loads(content) if content.strip() else None
    except (ValueError, RecursionError) as error:
        if content.startswith(b"Success"):  # of the adapters' routes
            return None
        raise InputError(f"{where} answered with something that is not JSON: {first_line(error)}") from error
