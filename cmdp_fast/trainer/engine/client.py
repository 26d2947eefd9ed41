"""One server's HTTP interface: what it is asked, how long it may take, and how often it is asked again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ReadTimeoutError

from cmdp_fast.errors import InputError, first_line, readable

from ..settings.config import TrainConfig

WAITS = (0.5, 2.0, 5.0)  # seconds before it is asked again, where it may only have been busy or between two starts
LONGEST = 1 << 30  # bytes of an answer; an honest one of 64 completions with 32k tokens each has a quarter
CONNECT = 10.0  # seconds
CONCURRENT = 128  # requests at once; a server batches their sequences as it has room
PASSING = (429, 502, 503, 504)  # states that may pass


class Client:
    """A server of vLLM at ``url``. ``gone`` says why it will not answer any more, "" if it may.

    Every call may come from any thread, and raises InputError, which names the server, if there is no answer within
    ``seconds`` or it is an error.
    """

    def __init__(self, url: str, seconds: float, gone: Callable[[], str] = lambda: "", key: str = "") -> None:
        self.url, self.seconds, self.gone = url.rstrip("/"), seconds, gone
        self.name = f"the vLLM server at {self.url}"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy of the environment's is for the world outside
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=CONCURRENT))

    def get(self, path: str) -> Any:
        """The JSON of a page."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a request is answered with, None where that is empty."""
        return self._ask("POST", path, body)

    def answers(self) -> bool:
        """Whether it is there and in health, asked once."""
        try:
            return self._session.get(f"{self.url}/health", headers=self._headers, timeout=CONNECT).status_code == 200
        except requests.RequestException:
            return False

    def check(self) -> None:
        """Raises InputError if it is not in health: a server whose engine has died may answer nothing any more."""
        if not self.answers():
            raise InputError(self._settled() or f"{self.name} is not there, or its engine has died (GET /health)")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        until = time.monotonic() + self.seconds
        why = ""
        for wait in (*WAITS, None):
            try:
                status, content = self._once(method, path, body, until)
                if status < 400:
                    return _json(content, f"{self.url}/{path}")
                why = f"answered {status}{_reason(content)}"
                if status not in PASSING:
                    break
            except requests.ConnectTimeout:
                why = f"cannot be reached: no connection in {CONNECT:g} s"
            except (requests.RequestException, HTTPError, OSError) as error:
                if isinstance(error, (requests.Timeout, ReadTimeoutError)) or time.monotonic() > until:
                    why = f"has not answered in {self.seconds:g} s (--rollout-timeout)"
                    break
                why = f"cannot be reached: {_cause(error)}"
            if wait is None or time.monotonic() + wait > until or self.gone():
                break
            time.sleep(wait)
        if gone := self._settled():
            raise InputError(gone)
        raise InputError(f"{self.name} {why} ({method} /{path})")

    def _settled(self) -> str:
        """`gone`, a moment after an error: a process that fails closes its connections before it ends."""
        for _ in range(10):
            if gone := self.gone():
                return gone
            time.sleep(0.1)
        return ""

    def _once(self, method: str, path: str, body: dict[str, Any] | None, until: float) -> tuple[int, bytes]:
        """(status, content). A server that sends a byte now and then is not waited for any longer than a silent one."""
        left = max(until - time.monotonic(), 0.1)
        content = bytearray()
        with self._session.request(
            *(method, f"{self.url}/{path}"), json=body, headers=self._headers, stream=True, timeout=(CONNECT, left)
        ) as response:
            # What is there; `iter_content` waits for as much as it was asked for
            while piece := response.raw.read1(1 << 16, decode_content=True):
                content += piece
                if len(content) > LONGEST:
                    raise InputError(f"{self.url}/{path} answered with more than {LONGEST} bytes")
                if time.monotonic() > until:
                    raise requests.Timeout
            return response.status_code, bytes(content)


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


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content) if content.strip() else None
    except (ValueError, RecursionError) as error:
        if content.startswith(b"Success"):  # of the adapters' routes
            return None
        raise InputError(f"{where} answered with something that is not JSON: {first_line(error)}") from error


def _reason(content: bytes) -> str:
    """The message of an error that vLLM answers with."""
    try:
        error = json.loads(content)
        error = error.get("error", error)
        message = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        message = content.decode(errors="replace")
    return f": {readable(str(message).strip())}" if message else ""


def _cause(error: BaseException) -> str:
    """The innermost reason of a connection that was not made or was lost, without the objects around it."""
    inner: BaseException | None = error
    while inner is not None:
        error = inner
        within = (getattr(error, "reason", None), *error.args)
        inner = next((each for each in within if isinstance(each, BaseException)), None)
    return readable(first_line(error).rpartition(": ")[2].strip())
