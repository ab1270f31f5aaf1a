"""A real HTTP server on this machine that behaves as badly as a judge's can."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-5d1f0a27c4"
"""The key in tests; whatever is written or said must not contain it."""


@dataclass
class Reply:
    """What the server does with one request.

    Attributes:
        text: What the model says, in a chat completion.
        body: Sent instead of a chat completion.
        status: Of HTTP.
        headers: Further ones.
        delay: Seconds before the reply.
        drop: Close the connection without a reply.
    """

    text: str | None = None
    body: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False


def soon(status: int, text: str = "") -> Reply:
    """A failure after which the client may try again at once."""
    body = json.dumps({"error": {"message": text or f"status {status}"}})
    return Reply(body=body, status=status, headers={"retry-after-ms": "1"})


@dataclass
class Server:
    """What a running server was asked.

    Attributes:
        answer: Called with a question and how often it was put before.
        url: The endpoint's base_url.
        questions: Every question that arrived, repeated ones too.
        requests: Fields of every request for a chat completion.
        keys: The key that came with each request, of any kind.
        models: What a request for the list of models gets.
        probes: How many of these there were.
        most: Requests that were there at once.
    """

    answer: Callable[[str, int], Reply | str]
    url: str = ""
    questions: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    models: Reply = field(default_factory=lambda: Reply(body='{"object": "list", "data": []}'))
    probes: int = 0
    most: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(answer: Callable[[str, int], Reply | str] | str) -> Iterator[Server]:
    """Runs a server on a free port of this machine inside the block.

    Args:
        answer: Given a question and how often it was put before, a reply or what the model says;
            or always the same.
    """
    state = Server(answer if callable(answer) else lambda *_: answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.probes += 1
            self._note_key()
            self._send(state.models)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = asked["messages"][0]["content"]
            with state.lock:
                times = state.questions.count(question)
                state.questions.append(question)
                state.requests.append(asked)
                state.now += 1
                state.most = max(state.most, state.now)
            self._note_key()
            try:
                said = state.answer(question, times)
                reply = Reply(text=said) if isinstance(said, str) else said
                time.sleep(reply.delay)
                if reply.drop:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
            finally:
                with state.lock:
                    state.now -= 1
            self._send(reply)

        def _note_key(self) -> None:
            state.keys.append(self.headers["Authorization"].removeprefix("Bearer "))

        def _send(self, reply: Reply) -> None:
            body = reply.body
            if body is None:
                message = {"role": "assistant", "content": reply.text}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                body = json.dumps({"object": "chat.completion", "choices": [choice]})
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that went away

    server = Quiet(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
