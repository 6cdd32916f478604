"""TLS over a stream: the same awaited reads and writes, with records in between. Towards agents and towards hosts.

Both ends are engines that do no input or output: bytes of the wire in, bytes of the wire out. So TLS costs its agent
what it costs (share.py), ends with a cut like anything else, and begins wherever the bytes before it have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from OpenSSL import SSL

from gateway_client.egress.messages import HttpVersion
from gateway_client.egress.stream import Reset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress.stream import Stream

piece_bytes_max: Final = 64 * 1024
handshake_bytes_max: Final = 256 * 1024
"""Taken from a side before its handshake is done: a hello of 64 KiB, a long chain of certificates."""


class BrokenSeal(Exception):  # noqa: N818 - named for what it says
    """The other side does not speak TLS as it must; the text says what of it, in a few words."""


class Engine(Protocol):
    """One end of TLS; every method may raise BrokenSeal."""

    def feed(self, data: bytes) -> None:
        """Take bytes of the wire."""
        ...

    def outgoing(self) -> bytes:
        """Give the bytes for the wire that have gathered."""
        ...

    def shake(self) -> bool:
        """Go on with the handshake; give whether it is done."""
        ...

    def read(self) -> bytes | None:
        """Give what the other side said, b"" at its orderly end, None where more of the wire is needed."""
        ...

    def write(self, data: bytes) -> None: ...

    def end(self) -> None:
        """Say that nothing more will be written."""
        ...


class ServerEngine:
    """The end towards an agent, with a certificate of its own authority."""

    def __init__(self, context: SSL.Context) -> None:
        self._connection = SSL.Connection(context, None)
        self._connection.set_accept_state()

    @property
    def server_name(self) -> str | None:
        """The name the agent asked for, as OpenSSL read it."""
        name = self._connection.get_servername()
        return None if name is None else name.decode("ascii", "replace")

    def feed(self, data: bytes) -> None:
        self._connection.bio_write(data)

    def outgoing(self) -> bytes:
        pieces = []
        with contextlib.suppress(SSL.WantReadError):
            while True:
                pieces.append(self._connection.bio_read(piece_bytes_max))
        return b"".join(pieces)

    def shake(self) -> bool:
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return False
        except SSL.Error as error:
            raise BrokenSeal(_said(error)) from error
        return True

    def read(self) -> bytes | None:
        try:
            return self._connection.recv(piece_bytes_max)
        except SSL.WantReadError:
            return None
        except SSL.ZeroReturnError:
            return b""
        except SSL.Error as error:
            raise BrokenSeal(_said(error)) from error

    def write(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except SSL.Error as error:
            raise BrokenSeal(_said(error)) from error

    def end(self) -> None:
        with contextlib.suppress(SSL.Error):
            self._connection.shutdown()


class ClientEngine:
    """The end towards a host, which is verified against the authorities of the operator's host and by its name."""

    def __init__(self, context: ssl.SSLContext, host: str, offered: Sequence[HttpVersion] = ()) -> None:
        """`offered` is what the context offers (ALPN)."""
        self._offered = offered
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def feed(self, data: bytes) -> None:
        self._incoming.write(data)

    def outgoing(self) -> bytes:
        return self._outgoing.read()

    def shake(self) -> bool:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLCertVerificationError as error:
            raise BrokenSeal(f"its certificate is not trusted: {error.verify_message}") from error
        except ssl.SSLError as error:
            raise BrokenSeal(error.reason or "no TLS") from error
        if self._object.selected_alpn_protocol() not in (None, *self._offered):
            raise BrokenSeal("it chose a protocol that was not offered")
        return True

    @property
    def chosen(self) -> HttpVersion:
        """What the host chose to speak; one that chose nothing speaks HTTP/1.1 (RFC 9112 section 9)."""
        return HttpVersion(self._object.selected_alpn_protocol() or HttpVersion.HTTP11)

    def read(self) -> bytes | None:
        try:
            return self._object.read(piece_bytes_max)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLError as error:
            raise BrokenSeal(error.reason or "no TLS") from error

    def write(self, data: bytes) -> None:
        try:
            self._object.write(data)
        except ssl.SSLError as error:
            raise BrokenSeal(error.reason or "no TLS") from error

    def end(self) -> None:
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()


class Sealed:
    """A stream inside of TLS, with the methods of the stream that it is made of."""

    def __init__(self, inner: Stream, engine: Engine) -> None:
        self._inner = inner
        self._engine = engine
        self._unread: deque[bytes] = deque()
        self._ended = False
        self.received_bytes = 0
        """Of what is inside, not of the wire."""

    async def shake(self, begun: bytes, seconds: float) -> None:
        """Do the handshake, of which `begun` has come; raise BrokenSeal, Reset or TimeoutError."""
        engine, inner = self._engine, self._inner
        deadline = asyncio.get_running_loop().time() + seconds
        taken = len(begun)
        if begun:
            engine.feed(begun)
        while True:
            try:
                done = engine.shake()
            finally:
                self._flush()  # also the alert that says why not
            if done:
                return
            data = await inner.read(max(deadline - asyncio.get_running_loop().time(), 0.001))
            if not data:
                raise Reset
            taken += len(data)
            if taken > handshake_bytes_max:
                raise BrokenSeal("its handshake has no end")
            engine.feed(data)

    @property
    def lost(self) -> bool:
        return self._inner.lost

    @property
    def writable(self) -> bool:
        return self._inner.writable

    async def read(self, seconds: float) -> bytes:
        """Give the next bytes, b"" at their orderly end; raise Reset, also where TLS was cut off, or TimeoutError.

        Records with nothing inside, as tickets and updates of keys, do not prolong the wait.
        """
        if self._unread:
            return self._unread.popleft()
        now = asyncio.get_running_loop().time
        deadline = now() + seconds
        while True:
            try:
                data = self._engine.read()
            except BrokenSeal as error:
                self._flush_if_open()
                raise Reset(str(error)) from error
            if data is not None:
                self.received_bytes += len(data)
                return data
            self._flush_if_open()
            left = deadline - now()
            if left <= 0:
                raise TimeoutError
            wire = await self._inner.read(left)
            if not wire:
                # Without the close_notify anybody on the way could have cut it short (RFC 8446 section 6.1).
                raise Reset("TLS was cut off")
            self._engine.feed(wire)

    async def rest(self, seconds: float) -> None:
        await self._inner.rest(seconds)

    def unread(self, data: bytes) -> None:
        """Put bytes back, to be read first."""
        if data:
            self._unread.appendleft(data)

    async def write(self, data: bytes, seconds: float) -> None:
        """Write, and wait while the other side does not take it; raise Reset, or TimeoutError after `seconds`."""
        self.put(data)
        await self._inner.write(b"", seconds)

    def put(self, data: bytes) -> None:
        """Write without waiting: for what is bounded by something else."""
        if self._ended:
            raise Reset
        try:
            if data:
                self._engine.write(data)
        except BrokenSeal as error:
            raise Reset(str(error)) from error
        self._flush()

    def end(self) -> None:
        """Say that nothing more will be written."""
        if not self._ended:
            self._ended = True
            self._engine.end()
            self._flush_if_open()
        self._inner.end()

    def close(self) -> None:
        """Close after what is buffered is sent."""
        if not self._ended:
            self._ended = True
            self._engine.end()
            self._flush_if_open()
        self._inner.close()

    def reset(self) -> None:
        self._inner.reset()

    def freeze(self, *, frozen: bool) -> None:
        self._inner.freeze(frozen=frozen)

    def _flush(self) -> None:
        data = self._engine.outgoing()
        if data:
            self._inner.put(data)

    def _flush_if_open(self) -> None:
        with contextlib.suppress(Reset):
            self._flush()


def _said(error: SSL.Error) -> str:
    """Give OpenSSL's own words: of its queue of errors the last is the nearest."""
    if error.args and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][-1][-1])[:120]
    return "no TLS"
