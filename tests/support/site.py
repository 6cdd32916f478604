"""A web site on loopback that a gateway is pinned to: it remembers what reached it."""

from __future__ import annotations

import base64
import hashlib
import http.server
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import ssl
    from types import TracebackType

PIECE_SECONDS = 0.02
REQUEST_SECONDS_MAX = 60.0


class Site:
    """`/slow` sends pieces until the client goes, `/endless` as much as it takes, `/big` eight megabytes.

    `/take` reads for ever; all else is `ok`. With a context it speaks TLS. A WebSocket's bytes come back as they are.

    `seen` has what arrived, as `METHOD path`; `pieces` counts what was taken of the first two; `cut` is set when a
    client of theirs has gone.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.pieces = 0
        self.cut = threading.Event()
        self._stopping = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        if tls is not None:  # the handshake at the first read, so in the connection's thread and not in accept
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
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

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:  # noqa: C901 - a method a path
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
                if self.path == "/endless":
                    self._slow(b"10000\r\n" + bytes(65536) + b"\r\n", pause=0)
                    return
                if self.path == "/take":
                    self._take()
                    return
                if "Sec-WebSocket-Key" in self.headers:
                    self._echo()
                    return
                body = b"x" * (8 << 20) if self.path == "/big" else b"ok"
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True

            do_POST = do_GET  # noqa: N815 - http.server calls it so

            def _take(self) -> None:
                """Read whatever comes, and answer nothing before its end."""
                try:
                    while self.rfile.read1(65536):
                        pass
                except OSError:
                    pass
                self.close_connection = True

            def _slow(self, piece: bytes = b"6\r\npiece\n\r\n", pause: float = PIECE_SECONDS) -> None:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                try:
                    while not site._stopping.wait(pause):
                        self.wfile.write(piece)
                        self.wfile.flush()
                        site.pieces += 1
                except OSError:
                    site.cut.set()
                self.close_connection = True

            def _echo(self) -> None:
                key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
                self.send_response(101)
                self.send_header("Upgrade", "websocket")
                self.send_header("Connection", "Upgrade")
                proof = hashlib.sha1(key.encode()).digest()  # noqa: S324 - RFC 6455 has it
                self.send_header("Sec-WebSocket-Accept", base64.b64encode(proof).decode())
                self.end_headers()
                try:
                    while data := self.connection.recv(65536):
                        self.connection.sendall(data)
                except OSError:
                    pass
                site.cut.set()
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        return Handler
