"""Frames of HTTP/2 by hand, and nghttpd: a real server, which owes nothing to the library that we speak with."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import time
from typing import TYPE_CHECKING, Final

from hpack import Encoder

if TYPE_CHECKING:
    import asyncio
    import ssl
    from collections.abc import Iterator
    from pathlib import Path

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
LISTEN_SECONDS = 10.0


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def settings(*values: tuple[int, int]) -> bytes:
    return frame(SETTINGS, b"".join(struct.pack(">HI", *each) for each in values))


def block(*fields: tuple[str, str]) -> bytes:
    """Give fields as HPACK without its dynamic table, so that blocks can be sent in any order."""
    return bytes(Encoder().encode([(name.encode("latin-1"), value.encode("latin-1"), True) for name, value in fields]))


def headers(*fields: tuple[str, str], end: bool = False, status: str = "200") -> bytes:
    flags = END_HEADERS | (END_STREAM if end else 0)
    return frame(HEADERS, block((":status", status), *fields), flags=flags, stream=1)


def trailers(*fields: tuple[str, str]) -> bytes:
    return frame(HEADERS, block(*fields), flags=END_HEADERS | END_STREAM, stream=1)


def data(body: bytes = b"", *, end: bool = False, padding: int | None = None) -> bytes:
    flags = (END_STREAM if end else 0) | (0 if padding is None else PADDED)
    payload = body if padding is None else bytes((padding,)) + body + bytes(padding)
    return frame(DATA, payload, flags=flags, stream=1)


def goaway(*, last: int = 1, code: int = 0) -> bytes:
    return frame(GOAWAY, struct.pack(">II", last, code))


def rst(code: int) -> bytes:
    return frame(RST, struct.pack(">I", code), stream=1)


def window(count: int, *, stream: int = 1) -> bytes:
    return frame(WINDOW, struct.pack(">I", count), stream=stream)


def frames_of(stream: bytes) -> list[tuple[int, int, int, bytes]]:
    """Give (kind, flags, stream, payload) of whole frames; what is left over must be nothing."""
    found = []
    while stream:
        length = int.from_bytes(stream[:3], "big")
        assert len(stream) >= 9 + length
        found.append((stream[3], stream[4], int.from_bytes(stream[5:9], "big"), stream[9 : 9 + length]))
        stream = stream[9 + length :]
    return found


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, int, int, bytes]:
    head = await reader.readexactly(9)
    return head[3], head[4], int.from_bytes(head[5:9], "big"), await reader.readexactly(int.from_bytes(head[:3], "big"))


@contextlib.contextmanager
def nghttpd(pem: Path, root: Path, *options: str, log: Path) -> Iterator[int]:
    """Run nghttpd with a key and certificate in one file on a port of its own; `root` is what it serves.

    `log` has every frame it got and sent.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    arguments = ["/usr/sbin/nghttpd", "-v", "-a", "127.0.0.1", "-d", str(root), *options, str(port), str(pem), str(pem)]
    with log.open("wb") as out, subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=out) as process:
        try:
            _wait_for(port, process)
            yield port
        finally:
            process.kill()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LISTEN_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert process.poll() is None, "nghttpd ended"
            assert time.monotonic() < deadline, "nghttpd did not listen in time"
            time.sleep(0.01)
        else:
            return


def offering(context: ssl.SSLContext, *protocols: str) -> ssl.SSLContext:
    """Give a site's context that chooses from these only, in this order."""
    context.set_alpn_protocols(list(protocols))
    return context
