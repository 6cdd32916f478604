"""One side of a connection on the event loop: awaited reads while HTTP is parsed, then a splice at callback speed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway_client.egress.allowance import Allowance, Loan

unread_bytes_max: Final = 64 * 1024
unsent_bytes_max: Final = 256 * 1024

_LINGER_ZERO: Final = struct.pack("ii", 1, 0)


class Reset(ConnectionError):  # noqa: N818 - named for what it says
    """The other side is gone or the connection was cut; nothing more can be read or written."""


class Stream(asyncio.Protocol):
    """A transport with bounded buffers in both directions."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._chunks: deque[bytes] = deque()
        self._unread = 0
        self._eof = False
        self._lost = False
        self._reading = True
        self._writable = True
        self._frozen = False
        self._peer: Stream | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._relay_end: asyncio.Future[None] | None = None
        self._allowance: Allowance | None = None
        self._loan: Loan | None = None
        self._held = False
        self.on_lost: Callable[[], None] | None = None
        self.received_bytes = 0

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")  # noqa: S101 - uvloop's has no base
        self._transport = transport  # type: ignore[assignment]
        self._transport.set_write_buffer_limits(high=unsent_bytes_max)  # type: ignore[union-attr]
        endpoint = transport.get_extra_info("socket")
        if endpoint is not None and endpoint.family == socket.AF_INET:
            endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        peer = self._peer
        if peer is not None and peer._transport is not None:  # noqa: SLF001 - the two ends of one relay
            if self._allowance is not None and not self._allowance.take(len(data)):
                self.reset()
                peer.reset()
                return
            if self._held or (self._loan is not None and not self._loan.take_now(len(data))):
                self._chunks.append(data)
                self._hold()
                return
            peer._transport.write(data)  # noqa: SLF001
            return
        self._chunks.append(data)
        self._unread += len(data)
        if self._unread > unread_bytes_max:
            self._pause()
        self._wake(self._reader)

    def eof_received(self) -> bool:
        self._eof = True
        if self._peer is not None and not self._held:
            self._end_relayed()
        self._wake(self._reader)
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the cause is the same to the other side
        self._lost = True
        self._finish_relay()
        self._wake(self._reader)
        self._wake(self._writer)
        if self.on_lost is not None:
            self.on_lost()

    def pause_writing(self) -> None:
        self._writable = False
        if self._peer is not None:
            self._peer._pause()  # noqa: SLF001

    def resume_writing(self) -> None:
        self._writable = True
        if self._peer is not None:
            self._peer._resume()  # noqa: SLF001
        self._wake(self._writer)

    # --- the HTTP side

    @property
    def lost(self) -> bool:
        return self._lost

    @property
    def ended(self) -> bool:
        """Whether the other side will send nothing more, and nothing of it is unread."""
        return self._eof and not self._chunks

    @property
    def writable(self) -> bool:
        """Whether what was written fits in the buffers, the other side's included."""
        return self._writable

    async def read(self, seconds: float) -> bytes:
        """Give the next bytes, b"" at end of file; raise Reset, or TimeoutError after `seconds` without any."""
        while not self._chunks:
            if self._lost:
                raise Reset
            if self._eof:
                return b""
            self._reader = asyncio.get_running_loop().create_future()
            await self._wait(self._reader, seconds)
        data = self._chunks.popleft()
        self._unread -= len(data)
        if self._unread <= unread_bytes_max:
            self._resume()
        return data

    async def rest(self, seconds: float) -> None:
        """Read nothing for that long: what comes meanwhile comes in one piece then."""
        self._pause()
        await asyncio.sleep(seconds)
        self._resume()

    def unread(self, data: bytes) -> None:
        """Put bytes back, to be read first."""
        if data:
            self._chunks.appendleft(data)
            self._unread += len(data)

    async def write(self, data: bytes, seconds: float) -> None:
        """Write, and wait while the other side does not take it; raise Reset, or TimeoutError after `seconds`."""
        self.put(data)
        while not self._writable:
            if self._lost:
                raise Reset
            self._writer = asyncio.get_running_loop().create_future()
            await self._wait(self._writer, seconds)

    def put(self, data: bytes) -> None:
        """Write without waiting: for what is bounded by something else."""
        if self._lost or self._transport is None:
            raise Reset
        self._transport.write(data)

    def end(self) -> None:
        """Say that nothing more will be written."""
        if self._transport is not None and not self._lost and self._transport.can_write_eof():
            with contextlib.suppress(OSError, RuntimeError):
                self._transport.write_eof()

    def close(self) -> None:
        """Close after what is buffered is sent."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Cut at once: the other side of a TCP connection gets RST, unsent bytes are dropped."""
        if self._transport is None or self._lost:
            return
        endpoint = self._transport.get_extra_info("socket")
        if endpoint is not None and endpoint.family == socket.AF_INET:
            with contextlib.suppress(OSError):
                endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._transport.abort()

    def freeze(self, *, frozen: bool) -> None:
        """Stop taking bytes, or go on."""
        self._frozen = frozen
        if self._transport is None or self._lost:
            return
        if frozen and self._reading:
            self._transport.pause_reading()
        elif not frozen and self._reading:
            self._transport.resume_reading()

    # --- the relay

    def splice(
        self, other: Stream, allowance: Allowance | None = None, loan: Loan | None = None
    ) -> asyncio.Future[None]:
        """Join two streams: every byte of one is written to the other until both have ended or one is lost.

        With an `allowance`, both are reset before a byte too many passes; what is unread by now counts as well. So
        with a `loan`, whose bytes may have to be waited for.
        """
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if allowance is not None and not allowance.take(self._unread + other._unread):
            self.reset()
            other.reset()
            end.set_result(None)
            return end
        for near, far in ((self, other), (other, self)):
            near._relay_end = end  # noqa: SLF001
            near._allowance, near._loan = allowance, loan  # noqa: SLF001
            near._unread = 0  # noqa: SLF001
            near._peer = far  # noqa: SLF001
        for near, far in ((self, other), (other, self)):
            near._pass_held()  # noqa: SLF001
            if near._lost:  # noqa: SLF001
                self._finish_relay()
            elif far._writable:  # noqa: SLF001
                near._resume()  # noqa: SLF001
            else:
                near._pause()  # noqa: SLF001
        return end

    def _hold(self) -> None:
        """Take nothing more, and go on when the loan has what is here."""
        if self._held or self._loan is None:
            return
        self._pause()
        self._held = True
        self._loan.when_taken(len(self._chunks[0]), self._lent)

    def _lent(self, there: bool) -> None:  # noqa: FBT001 - it is the answer
        peer = self._peer
        if peer is None or peer._transport is None or self._lost or peer._lost:  # noqa: SLF001
            return
        if not there:
            self.reset()
            peer.reset()
            return
        self._held = False
        peer._transport.write(self._chunks.popleft())  # noqa: SLF001
        self._pass_held()

    def _pass_held(self) -> None:
        """Pass what was read before the relay began, or while it waited for its loan."""
        peer = self._peer
        if peer is None or self._held:
            return
        while self._chunks:
            if self._loan is not None and not self._loan.take_now(len(self._chunks[0])):
                self._hold()
                return
            peer.put(self._chunks.popleft())
        if self._eof:
            self._end_relayed()
        if peer._writable:  # noqa: SLF001
            self._resume()

    def _end_relayed(self) -> None:
        peer = self._peer
        if peer is None:
            return
        peer.end()
        if peer._eof and not peer._held:  # noqa: SLF001
            self._finish_relay()

    def _finish_relay(self) -> None:
        self._wake(self._relay_end)

    # --- inside

    def _pause(self) -> None:
        if self._reading and self._transport is not None and not self._lost:
            self._reading = False
            if not self._frozen:
                self._transport.pause_reading()

    def _resume(self) -> None:
        if not self._reading and self._transport is not None and not self._lost and not self._held:
            self._reading = True
            if not self._frozen:
                self._transport.resume_reading()

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self, waiter: asyncio.Future[None], seconds: float) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, _time_out, waiter)
        try:
            await waiter
        finally:
            timer.cancel()


def _time_out(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
