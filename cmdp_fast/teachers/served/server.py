"""The side with the model: an HTTP server of the standard library, bounded in all that a stranger could make grow.

A thread for each connection reads questions and writes answers; one thread runs the model (`batching.py`). Nothing that
came is evaluated, written to a file, or quoted raw.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import os
import socket
import socketserver
import stat
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from cmdp_fast.errors import InputError, first_line

from ..teacher import Teacher, about_digest
from . import protocol
from .batching import Batching, Busy
from .tensors import Malformed

CONNECTIONS = 128  # at once
IDLE = 600.0  # seconds that a connection may say nothing between two requests
SENDING = 60.0  # seconds for a request from its first byte to its last, and for a piece of an answer
HEADERS = 1 << 14  # bytes of a request's first line and headers
PIECE = 1 << 24  # bytes of an answer that are sent at once
ANSWER = 1 << 32  # bytes of an answer
LINGER = 1.0  # seconds that a client who was refused may go on to send
RETRY = 1  # seconds after which a client that was told to wait may ask again
GRACE = 30.0  # seconds for answers that are on their way at the end


class TeacherServer:
    """A teacher that answers with hidden states, asked over HTTP at ``host`` and ``port`` (0: any that is free), or at
    a Unix socket that its owner alone may open.

    ``token``: the word that every request has to bring, "" for none. Serves from `start` on, in threads of its own,
    until `close`. Raises InputError where nothing can be listened at.
    """

    def __init__(
        self,
        teacher: Teacher,
        vocabulary: dict[str, int],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        path: str = "",
        token: str = "",
        batch_tokens: int = 1 << 16,
        merge: bool = False,
        waiting: int = 256,
    ) -> None:
        self.about, self.token = teacher.about, token.encode()
        self.digest = about_digest(teacher.about)
        head = protocol.head_bytes(teacher.own_head())
        self.pages: dict[str, _Page] = {
            "/about": ("application/json", [protocol.about_bytes(teacher.about)]),
            "/head": ("application/octet-stream", head),
            "/vocabulary": ("application/json", [protocol.vocabulary_bytes(vocabulary)]),
        }
        self._path = path
        self._server = _listening(host, port, path)
        self._server.owner = self
        self.batching = Batching(teacher, batch_tokens, merge, waiting)
        self.url = f"unix:{path}" if path else _url(self._server)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    def start(self) -> TeacherServer:
        """Begins to serve."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Takes no connection any more, answers what was asked, and ends."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        if self._path:
            Path(self._path).unlink(missing_ok=True)
        self.batching.close()
        until = time.monotonic() + GRACE
        while self._server.answering and time.monotonic() < until:
            time.sleep(0.01)
        self._server.drop()


def _listening(host: str, port: int, path: str) -> _Listener:
    try:
        if not path:
            return (_Listener6 if ":" in host else _Listener)((host, port), _Handler)
        _clear(Path(path))
        mask = os.umask(0o177)  # the socket is its owner's from the first moment on
        try:
            return _UnixListener(path, _Handler)
        finally:
            os.umask(mask)
    except (OSError, OverflowError) as error:
        place = f"--socket {path}" if path else f"--host {host} --port {port}"
        raise InputError(f"{place}: cannot be listened at: {first_line(error)}") from error


def _clear(path: Path) -> None:
    """Removes a socket that a server has left which is no more."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise InputError(f"--socket {path} is there, and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise InputError(f"--socket {path}: another server listens there")


def _url(server: HTTPServer) -> str:
    host, port = server.socket.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Listener(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS
    owner: TeacherServer

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, _Incoming | None] = {}
        self.answering = 0  # requests that were read and are not answered yet
        super().__init__(*arguments)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # that of HTTPServer asks the network for the machine's name

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False) or (self._end_idle() and self._free.acquire(timeout=1.0)):
            with self._lock:
                self._open[request] = None
            super().process_request(request, client_address)
            return
        request.settimeout(1.0)
        with contextlib.suppress(OSError):  # nobody is there any more
            busy = f"HTTP/1.1 503 Busy\r\nRetry-After: {RETRY}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            request.sendall(busy.encode())
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._open[request]
            self._free.release()

    def reads(self, connection: socket.socket, incoming: _Incoming) -> None:
        """By what it is seen whether a connection is idle."""
        with self._lock:
            self._open[connection] = incoming

    def _end_idle(self) -> bool:
        """Ends the connection that has said nothing for the longest time, if there is one between two requests: who
        kept it for later connects again."""
        with self._lock:
            idle = [(each.until, place) for place, each in enumerate(self._open.values()) if each and each.idle]
            if idle:
                with contextlib.suppress(OSError):  # it has ended by itself
                    list(self._open)[min(idle)[1]].shutdown(socket.SHUT_RDWR)
        return bool(idle)

    def count(self, change: int) -> None:
        with self._lock:
            self.answering += change

    def drop(self) -> None:
        """Ends the connections that are left."""
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):  # it has ended by itself
                    each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was lost is nobody's concern here."""


class _Listener6(_Listener):
    address_family = socket.AF_INET6


class _UnixListener(_Listener):
    address_family = getattr(socket, "AF_UNIX", socket.AF_INET)
    allow_reuse_address = False


class _Incoming(io.RawIOBase):
    """What a connection brings, within a time and a number of bytes for all of it together: a timeout of a socket is
    for each byte anew."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.until, self.left, self._sending = 0.0, 0, False

    def expect_request(self) -> None:
        """Another request may come, whose time begins with its first byte."""
        self.until, self.left, self._sending = time.monotonic() + IDLE, HEADERS, False

    @property
    def idle(self) -> bool:
        """Whether no byte of the next request has come yet."""
        return not self._sending

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.left <= 0:
            raise _TooMuch
        if (seconds := self.until - time.monotonic()) <= 0:
            raise TimeoutError("it sends too slowly")
        self._connection.settimeout(seconds)
        count = self._connection.recv_into(memoryview(buffer)[: self.left])
        self.left -= count
        if not self._sending:
            self._sending, self.until = True, time.monotonic() + SENDING
        return count


class _TooMuch(Exception):
    """A request has more bytes than it may have."""


class _Refused(Exception):
    """A request that is answered with a line and a status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


_Page = tuple[str, Sequence[bytes | memoryview]]  # the kind of an answer, and its pieces


class _Handler(BaseHTTPRequestHandler):
    request_version, requestline, command = "HTTP/1.0", "", ""  # before the first line has been read
    protocol_version = "HTTP/1.1"
    server_version = "cmdp-fast"
    sys_version = ""
    server: _Listener

    def setup(self) -> None:
        super().setup()
        if self.connection.family != getattr(socket, "AF_UNIX", None):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a header waits for nothing
        self.incoming = _Incoming(self.connection)
        self.incoming.expect_request()
        self.rfile = io.BufferedReader(self.incoming)
        self.server.reads(self.connection, self.incoming)

    def handle_one_request(self) -> None:
        self.incoming.expect_request()
        try:
            super().handle_one_request()
        except _TooMuch:
            self.send_error(431)

    def do_GET(self) -> None:
        self._serve(self._page)

    def do_POST(self) -> None:
        self._serve(self._asked)

    def _serve(self, answer: Callable[[], _Page]) -> None:
        self.server.count(1)
        try:
            self._check()
            self._answer(*answer())
        except _Refused as refusal:
            self._refuse(refusal.status, str(refusal))
        finally:
            self.server.count(-1)

    def _page(self) -> _Page:
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            raise _Refused(400, "a GET has no body")
        if (page := self.server.owner.pages.get(self.path)) is None:
            raise _Refused(404, "there are /about, /head, /vocabulary and /ask")
        return page

    def _asked(self) -> _Page:
        owner = self.server.owner
        if self.path != "/ask":
            raise _Refused(404, "what can be posted goes to /ask")
        if self.headers.get("Content-Type") != "application/octet-stream":  # a page in a browser may not send that
            raise _Refused(400, "a question is application/octet-stream")
        try:
            question = protocol.read_question(self._body(protocol.question_size()), owner.about)
            if question.teacher != owner.digest:
                raise _Refused(409, f"another teacher is asked for than {owner.about.model}, which is here now")
            if protocol.answer_size(owner.about, sum(question.wanted)) > ANSWER:
                raise _Refused(413, f"an answer has {ANSWER} bytes at most: ask for fewer tokens at once")
            answer = owner.batching.ask(question.rows, question.wanted)
            if error := answer.exception():  # an OSError may be of the model's files
                raise _Refused(500, f"the model failed: {first_line(error)}") from error
            return "application/octet-stream", protocol.answer_bytes(question, answer.result())
        except Malformed as error:
            raise _Refused(400, str(error)) from error
        except Busy as error:
            raise _Refused(503, str(error)) from error
        except (_Refused, OSError):  # the latter of the connection
            raise
        except Exception as error:  # of a device: the line goes to who asked
            raise _Refused(500, f"the model failed: {first_line(error)}") from error

    def _check(self) -> None:
        """Refuses what the headers say that is the same for all requests."""
        if token := self.server.owner.token:
            given = self.headers.get("Authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, b"Bearer " + token):
                raise _Refused(401, "expected the token of --token-file")
        if self.request_version not in ("HTTP/1.0", "HTTP/1.1"):
            raise _Refused(400, "expected HTTP/1.1")

    def _body(self, most: int) -> bytearray:
        """The body of a request, of at most so many bytes."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1:
            raise _Refused(411, "expected one Content-Length, and no Transfer-Encoding")
        if not (lengths[0].isascii() and lengths[0].isdigit() and len(lengths[0]) < 20):
            raise _Refused(400, "Content-Length is no number")
        if (length := int(lengths[0])) > most:
            raise _Refused(413, f"a question has {most} bytes at most")
        self.incoming.left = length
        content = bytearray()
        while len(content) < length:  # grows with what comes, and not with what was announced
            if not (piece := self.rfile.read1(min(length - len(content), 1 << 20))):
                raise ConnectionError("the connection ended in a question")
            content += piece
        return content

    def _answer(self, kind: str, pieces: Sequence[bytes | memoryview], status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(sum(len(piece) for piece in pieces)))
        if status == 503:
            self.send_header("Retry-After", str(RETRY))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.connection.settimeout(SENDING)
        self.end_headers()
        for piece in pieces:
            for start in range(0, len(piece), PIECE):
                self.wfile.write(piece[start : start + PIECE])  # within the timeout as a whole

    def _refuse(self, status: int, why: str) -> None:
        """One line, and an end but where that may pass: what else came is not understood."""
        self.close_connection = status != 503
        if self.request_version == "HTTP/0.9":  # it would get a line without a status
            self.request_version = "HTTP/1.0"
        self._answer("text/plain; charset=utf-8", [protocol.one_line(why)], status)
        if self.close_connection:
            self._read_on()

    def _read_on(self) -> None:
        """What is left unread would have the system drop the answer that was just sent."""
        until = time.monotonic() + LINGER
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER)
            while time.monotonic() < until and self.connection.recv(1 << 16):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request, which it would quote."""
        self._refuse(code, f"this is no request that is understood here ({code})")

    def version_string(self) -> str:
        return self.server_version

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a request may say anything."""
