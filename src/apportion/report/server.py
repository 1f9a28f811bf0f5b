"""The prompt explorer with somebody to answer: a small server for one person on one machine.

It listens on 127.0.0.1 alone and answers only to that name, so that a page from elsewhere that a browser was led to
cannot ask it (DNS rebinding); and it takes questions as JSON only, which such a page could not send without leave.
"""

import json
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from apportion.errors import InputError
from apportion.report.explorer import Explorer, render

_LONGEST_QUESTION = 2**18


class ExplorerServer(ThreadingHTTPServer):
    """Serves one explorer; see `explorer_server`."""

    daemon_threads = True

    def __init__(self, explorer: Explorer, prompts: Sequence[str], port: int, report: Path | None) -> None:
        self.explorer = explorer
        self.report = report if report is not None and report.exists() else None
        # One question at a time: the model's hooks are shared.
        self.one_at_a_time = threading.Lock()
        explored = [explorer.explore(each) for each in prompts]
        self.page = render(explorer, explored, report=self.report is not None, live=True).encode("utf-8")
        super().__init__(("127.0.0.1", port), _Handler)

    def answer(self, where: str, question: dict[str, Any]) -> dict[str, Any]:
        """What the page asked for.

        Raises:
            InputError: it cannot be answered; says why.
        """
        with self.one_at_a_time:
            try:
                if where == "/explore":
                    return self.explorer.explore(_text(question["prompt"]))
                path = [int(each) for each in question["path"]]
                feature, position = int(question["feature"]), int(question["position"])
                return self.explorer.follow(_text(question["prompt"]), feature, position, path)
            except (KeyError, TypeError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"the question lacks or misstates something ({error})") from error


class _Handler(BaseHTTPRequestHandler):
    server: ExplorerServer

    def do_GET(self) -> None:
        """The page, and the report beside it."""
        if not self._is_meant_for_here():
            return
        if self.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif self.path == "/report.html" and self.server.report is not None:
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.report.read_bytes())
        elif self.path == "/favicon.ico":
            self._send(HTTPStatus.NO_CONTENT, "image/x-icon", b"")
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is nothing here")

    def do_POST(self) -> None:
        """Questions of the page."""
        if not self._is_meant_for_here():
            return
        size = int(self.headers.get("Content-Length", 0))
        kind = self.headers.get("Content-Type", "").split(";")[0].strip()
        if self.path not in ("/explore", "/follow") or kind != "application/json" or size > _LONGEST_QUESTION:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": "only questions of the page itself are answered here"})
            return
        try:
            question = json.loads(self.rfile.read(size))
            self._send_json(HTTPStatus.OK, self.server.answer(self.path, dict(question)))
        except (InputError, ValueError, TypeError) as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _is_meant_for_here(self) -> bool:
        here = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        if self.headers.get("Host") in here:
            return True
        self._send(HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", b"this server answers on its own address only")
        return False

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content).encode("utf-8"))

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: prompts are nobody else's business."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the prompt is {type(value).__name__}, not text")
    return value


def explorer_server(
    explorer: Explorer, prompts: Sequence[str], port: int = 8484, report: Path | None = None
) -> ExplorerServer:
    """A server, on 127.0.0.1, for a page on which a person types prompts; call its ``serve_forever``.

    Args:
        explorer: what answers.
        prompts: explored beforehand.
        port: 0 takes a free one; ``server_port`` says which.
        report: the report of the same run, to link to, if it exists.

    Raises:
        InputError: the port is taken; a prompt that cannot be explored.
    """
    try:
        return ExplorerServer(explorer, prompts, port, report)
    except OSError as error:
        raise InputError(
            f"port {port} cannot be used ({error.strerror}): choose another one, or 0 for a free one"
        ) from error
