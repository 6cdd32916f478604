"""Reads the server name out of a TLS ClientHello (RFC 8446 §4.1.2, RFC 6066 §3). Pure: bytes in, a value out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from gateway_client.egress.target import BadTarget, address_of, normalise_host

hello_bytes_max: Final = 64 * 1024
record_bytes_max: Final = 16 * 1024 + 256
records_max: Final = 64
"""A hello of 64 KiB is four records; clients that split it to fool middleboxes make two or three."""

_CLIENT_HELLO: Final = 1
_EXTENSION_SERVER_NAME: Final = 0
_HOST_NAME: Final = 0


class Peek(Enum):
    NEED_MORE = auto()
    NOT_TLS = auto()


@dataclass(frozen=True, slots=True)
class Hello:
    server_name: str | None
    """Normalised; None where the client sent none."""


class _Malformed(Exception):  # noqa: N818 - never leaves this module
    pass


class _Cursor:
    """Reads big-endian lengths and vectors, and never past the end."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _Malformed
        self._position += count
        return self._data[self._position - count : self._position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))


def peek(data: bytes) -> Hello | Peek:
    """Look at the first bytes a client sent: the ClientHello if it is whole, else whether more may make one."""
    return Peeker().feed(data)


class Peeker:
    """Reads a ClientHello as its bytes come, every byte once."""

    __slots__ = ("_begun", "_left", "_message", "_records")

    def __init__(self) -> None:
        self._begun = b""  # of a record's header
        self._left = 0  # bytes of the record still to come
        self._records = 0
        self._message = bytearray()

    def feed(self, data: bytes) -> Hello | Peek:
        """Take the next bytes; after anything but NEED_MORE this is of no more use."""
        position = 0
        while position < len(data):
            if not self._left:
                step = 5 - len(self._begun)  # type, version, length
                self._begun += data[position : position + step]
                position += step
                if not b"\x16\x03".startswith(self._begun[:2]):
                    return Peek.NOT_TLS
                if len(self._begun) < 5:  # noqa: PLR2004
                    return Peek.NEED_MORE
                self._left = int.from_bytes(self._begun[3:5], "big")
                self._begun = b""
                self._records += 1
                if not 0 < self._left <= record_bytes_max or self._records > records_max:
                    return Peek.NOT_TLS
                continue
            piece = data[position : position + self._left]
            self._message += piece
            position += len(piece)
            self._left -= len(piece)
            found = self._look()
            if found is not Peek.NEED_MORE:
                return found
        return Peek.NEED_MORE

    def _look(self) -> Hello | Peek:
        message = self._message
        if message[0] != _CLIENT_HELLO:
            return Peek.NOT_TLS
        if len(message) < 4:  # noqa: PLR2004 - type, length
            return Peek.NEED_MORE
        whole = 4 + int.from_bytes(message[1:4], "big")
        if not 4 < whole <= hello_bytes_max:  # noqa: PLR2004
            return Peek.NOT_TLS
        return _parse(bytes(message[4:whole])) if len(message) >= whole else Peek.NEED_MORE


def _parse(body: bytes) -> Hello | Peek:
    try:
        hello = _Cursor(body)
        hello.take(2 + 32)  # legacy version, random
        hello.vector(1)  # session id
        hello.vector(2)  # cipher suites
        hello.vector(1)  # compression methods
        extensions = _Cursor(hello.vector(2) if hello.left else b"")
        if hello.left:
            raise _Malformed
        names: list[str] = []
        while extensions.left:
            kind, value = extensions.number(2), extensions.vector(2)
            if kind == _EXTENSION_SERVER_NAME:
                names += _server_names(value)
        if len(names) > 1:
            raise _Malformed
        return Hello(server_name=names[0] if names else None)
    except (_Malformed, BadTarget, UnicodeDecodeError):
        return Peek.NOT_TLS


def _server_names(value: bytes) -> list[str]:
    entries = _Cursor(_Cursor(value).vector(2))
    names = []
    while entries.left:
        kind, name = entries.number(1), entries.vector(2)
        if kind != _HOST_NAME:
            raise _Malformed
        names.append(normalise_host(name.decode("ascii")))
    return names


def fits(hello: Hello, host: str) -> bool:
    """Whether a ClientHello is for this host. Clients send no name for an address (RFC 6066 §3)."""
    if address_of(host) is not None:
        return hello.server_name in (None, host)
    return hello.server_name == host
