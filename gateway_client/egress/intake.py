"""Takes heads and bodies off one agent's connection, under the limits of size and time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway_client.egress.bodyjson import BadCall, Scales
from gateway_client.egress.decide import Reason
from gateway_client.egress.stream import Reset
from gateway_client.egress.wire import End, Head, Reject, RequestReader, WireError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway_client.egress.messages import Limits
    from gateway_client.egress.sealed import Sealed
    from gateway_client.egress.share import Share
    from gateway_client.egress.stream import Stream
    from gateway_client.egress.target import Authority

forward_body_peek_bytes_max: Final = 64 * 1024
read_seconds_min: Final = 0.001
head_pieces_max: Final = 4
head_piece_rest_seconds: Final = 0.1

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(slots=True)
class Buffered:
    """How many bytes of bodies an agent has whole in memory, over all its connections."""

    count: int = 0


class Intake:
    """The reading half of one connection."""

    def __init__(self, stream: Stream, limits: Limits, buffered: Buffered, share: Share) -> None:
        self._stream: Stream | Sealed = stream
        self._share = share
        self._limits = limits
        self._buffered = buffered
        self._held = 0
        self._reader = RequestReader(limits)

    def enter_sealed(self, authority: Authority, sealed: Sealed) -> None:
        """Read on inside TLS for `authority` that ends here; whatever came before it was taken out."""
        self._stream = sealed
        self._reader = RequestReader(self._limits, inside=authority, secure=True)

    def enter(self, authority: Authority) -> None:
        """Read on inside a tunnel to `authority` that is answered here."""
        rest = self._reader.take_rest()
        self._reader = RequestReader(self._limits, inside=authority)
        self._reader.feed(rest)

    def take_rest(self) -> bytes:
        return self._reader.take_rest()

    def release(self) -> None:
        """Say that the bodies given whole are no longer held."""
        self._buffered.count -= self._held
        self._held = 0

    def tell_to_go_on(self) -> None:
        """Answer an `Expect: 100-continue`."""
        self._stream.put(_CONTINUE)

    async def next_head(self) -> Head | None:
        """Give the next head, or None where the agent has ended or sent nothing for long."""
        loop = asyncio.get_running_loop()
        deadline: float | None = None
        pieces = 0
        while True:
            head = self._reader.next_head()
            if head is not None:
                return head
            if deadline is None and self._reader.has_bytes:
                deadline = loop.time() + self._limits.head_seconds_max
            seconds = self._limits.idle_seconds_max if deadline is None else deadline - loop.time()
            try:
                data = await self._stream.read(max(seconds, read_seconds_min))
            except TimeoutError as error:
                if deadline is None:
                    return None
                raise WireError(Reject(408, "head_too_slow", "the head did not come in time")) from error
            if not data:
                return None
            self._reader.feed(data)
            pieces += 1
            if pieces > head_pieces_max:  # a byte at a time on many connections would cost the other agents theirs
                await self._stream.rest(head_piece_rest_seconds)
            await self._share.breathe()

    async def body(self) -> AsyncIterator[bytes]:
        """Give the body piece by piece."""
        while True:
            await self._share.breathe()  # while bytes are there nothing below has to wait
            piece = self._reader.next_body()
            if piece is End.OF_BODY:
                return
            if piece is not None:
                yield piece
                continue
            data = await self._stream.read(self._limits.body_seconds_max)
            if not data:
                raise Reset
            self._reader.feed(data)

    async def whole_body(self, head: Head, bytes_max: int, *, scales: Scales | None = None) -> bytes:
        """Give all of a body, weighed as it comes; what one agent holds this way at a time is bounded too."""
        too_large = WireError(Reject(413, "body_too_large", f"the body is over {bytes_max} bytes"))
        if head.content_length is not None and head.content_length > bytes_max:
            raise too_large
        if head.expects_continue:
            self.tell_to_go_on()
        body = bytearray()
        try:
            async for piece in self.body():
                body += piece
                if len(body) > bytes_max:
                    raise too_large
                if scales is not None:
                    scales.feed(piece)
                self._held += len(piece)
                self._buffered.count += len(piece)
                if self._buffered.count > self._limits.buffered_bytes_per_agent_max:
                    raise WireError(Reject(503, Reason.LIMIT, "the agent has too much in flight"))
        except TimeoutError as error:
            raise WireError(Reject(408, "body_too_slow", "the body did not come in time")) from error
        except BadCall as error:
            raise WireError(Reject(error.status, error.reason, str(error))) from error
        return bytes(body)

    async def checked_body(self, head: Head) -> bytes | AsyncIterator[bytes]:
        """Give a body to pass on: whole where it is short, else what will come.

        A chunked body can turn out malformed, so what is short of it is read whole before anything leaves. A body with
        a length cannot: it is begun only when somebody takes it.
        """
        if not head.has_body:
            return b""
        pieces = self.body()
        if head.content_length is not None:
            return pieces
        if head.expects_continue:
            self.tell_to_go_on()
        begun = bytearray()
        async for piece in pieces:
            begun += piece
            if len(begun) > forward_body_peek_bytes_max:
                return _joined(bytes(begun), pieces)
        return bytes(begun)


async def _joined(begun: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield begun
    async for piece in pieces:
        yield piece
