"""One server, asked over HTTP: how long it may take, how much it may answer, and how often it is asked again."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import HTTPError, ReadTimeoutError

from cmdp_fast.errors import InputError, first_line, readable

WAITS = (0.5, 2.0, 5.0)  # seconds before it is asked again, where it may only have been busy or between two starts
LONGEST = 1 << 30  # bytes of an answer; an honest one of 64 completions with 32k tokens each has a quarter
CONNECT = 10.0  # seconds
CONCURRENT = 128  # requests at once; a server batches their sequences as it has room
PASSING = (429, 502, 503, 504)  # states that may pass
LATER = 60  # seconds that a server may ask to be left alone


class HttpClient:
    """A server at ``url``, `http://…`, `https://…` or `unix:/path`, which messages call ``name``. ``setting`` is the
    option that says how many ``seconds`` an answer may take, ``key`` the word that it wants to hear. ``gone``, where
    there is one, says why it will not answer any more, "" if it may.

    Every call may come from any thread, and raises InputError, which names the server, if there is no answer in time or
    it is an error. A call may reach the server twice: it has to change nothing, or the same.
    """

    def __init__(
        self,
        url: str,
        seconds: float,
        name: str,
        setting: str,
        key: str = "",
        gone: Callable[[], str] | None = None,
    ) -> None:
        self.seconds, self.gone = seconds, gone
        self.url, self.name, self._setting = url.rstrip("/"), name, setting
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy of the environment's is for the world outside
        over: HTTPAdapter = HTTPAdapter(pool_maxsize=CONCURRENT)
        self._base = self.url
        if self.url.startswith("unix:"):
            over, self._base = _OverSocket(self.url.removeprefix("unix:")), "http://localhost"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, over)

    def answers(self, path: str) -> bool:
        """Whether a page is there, asked once."""
        try:
            return self.found(path)
        except requests.RequestException:
            return False

    def found(self, path: str) -> bool:
        """The same, and raises the error of requests where there is no answer."""
        seconds = min(CONNECT, self.seconds)
        return self._session.get(f"{self._base}/{path}", headers=self._headers, timeout=seconds).status_code == 200

    def late(self) -> str:
        """What is said of a server that has not answered in time."""
        return f"has not answered in {self.seconds:g} s ({self._setting})"

    def ask(
        self, method: str, path: str, body: bytes | Mapping[str, Any] | None = None, longest: int | None = None
    ) -> bytearray:
        """What a request is answered with, of ``longest`` bytes at most (`LONGEST`); a mapping is sent as JSON."""
        longest = LONGEST if longest is None else longest
        until = time.monotonic() + self.seconds
        waits = iter(WAITS)
        while True:
            later: int | None = None  # who is only busy says so, and is asked again as long as there is time
            try:
                status, content, later = self._once(method, path, body, until, longest)
                if status < 300:
                    return content
                why = f"answered {status}{_reason(content)}"
                if status not in PASSING:
                    break
            except requests.ConnectTimeout:
                why = f"cannot be reached: no connection in {CONNECT:g} s"
            except (requests.RequestException, HTTPError, OSError) as error:
                if isinstance(error, (requests.Timeout, ReadTimeoutError)) or time.monotonic() > until:
                    why = self.late()
                    break
                why = f"cannot be reached: {_cause(error)}"
            wait = next(waits, None) if later is None else later
            if wait is None or time.monotonic() + wait > until or (self.gone and self.gone()):
                break
            time.sleep(wait)
        if gone := self.settled():
            raise InputError(gone)
        raise InputError(f"{self.name} {why} ({method} /{path})")

    def settled(self) -> str:
        """`gone`, a moment after an error: a process that fails closes its connections before it ends."""
        for _ in range(10 if self.gone else 0):
            if self.gone and (gone := self.gone()):
                return gone
            time.sleep(0.1)
        return ""

    def close(self) -> None:
        """Ends its connections."""
        self._session.close()

    def _once(
        self, method: str, path: str, body: bytes | Mapping[str, Any] | None, until: float, longest: int
    ) -> tuple[int, bytearray, int | None]:
        """(status, content, seconds after which a busy server wants to be asked again). A server that sends a byte of
        its content now and then is not waited for any longer than a silent one."""
        left = max(until - time.monotonic(), 0.1)
        content = bytearray()
        sent: dict[str, Any] = {"json": body, "headers": self._headers}
        if isinstance(body, bytes):
            sent = {"data": body, "headers": self._headers | {"Content-Type": "application/octet-stream"}}
        with self._session.request(
            *(method, f"{self._base}/{path}"), **sent, stream=True, timeout=(CONNECT, left), allow_redirects=False
        ) as response:
            # What is there; `iter_content` waits for as much as it was asked for
            while piece := response.raw.read1(1 << 20, decode_content=True):
                content += piece
                if len(content) > longest:
                    raise InputError(f"{self.url}/{path} answered with more than {longest} bytes")
                if time.monotonic() > until:
                    raise requests.Timeout
            said = response.headers.get("Retry-After", "") if response.status_code in PASSING else ""
            later = int(said) if said.isascii() and said.isdigit() and len(said) < 3 else None
            return response.status_code, content, None if later is None else min(max(later, 1), LATER)


class _OverSocket(HTTPAdapter):
    """Connections to a Unix socket, whatever the address says."""

    def __init__(self, path: str) -> None:
        class Connection(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                made.settimeout(CONNECT)
                made.connect(path)
                return made

        super().__init__()
        self._pool = HTTPConnectionPool("localhost", maxsize=CONCURRENT)
        self._pool.ConnectionCls = Connection

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> HTTPConnectionPool:
        return self._pool

    def close(self) -> None:
        self._pool.close()


def _reason(content: bytes | bytearray) -> str:
    """The message of an error that a server answers with."""
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
