"""A web site on loopback that a gateway is pinned to: it remembers what reached it."""

from __future__ import annotations

import http.server
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

PIECE_SECONDS = 0.02
REQUEST_SECONDS_MAX = 60.0


class Site:
    """`/slow` sends pieces until the client goes, `/big` eight megabytes; every other path answers `ok`.

    `seen` has what arrived, as `METHOD path`; `cut` is set when a client of `/slow` has gone.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.cut = threading.Event()
        self._stopping = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = int(self._server.server_port)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = REQUEST_SECONDS_MAX

            def do_GET(self) -> None:
                site.seen.append(f"{self.command} {self.path}")
                site.headers.append(dict(self.headers))
                if self.path == "/slow":
                    self._slow()
                    return
                body = b"x" * (8 << 20) if self.path == "/big" else b"ok"
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815 - http.server calls it so

            def _slow(self) -> None:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                try:
                    while not site._stopping.wait(PIECE_SECONDS):
                        self.wfile.write(b"6\r\npiece\n\r\n")
                        self.wfile.flush()
                except OSError:
                    site.cut.set()
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        return Handler
