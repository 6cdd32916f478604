"""A small HTTP/1.1 server connection on h11 and asyncio streams, with a limit on everything that comes in."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import h11

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import Protocol

    class Answering(Protocol):
        """What an answer is written to: a connection, or a guard before one."""

        @property
        def started(self) -> bool: ...

        async def whole(self, status: int, headers: Headers, body: bytes) -> None: ...

        async def start(self, status: int, headers: Headers) -> None: ...

        async def send(self, data: bytes) -> None: ...

        async def end(self) -> None: ...


Headers = tuple[tuple[bytes, bytes], ...]

READ_BYTES: Final = 16 * 1024  # h11 checks its size limit between calls only: never feed it more at once


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may send and how long it may take. Times are seconds."""

    head_bytes_max: int = 64 * 1024
    target_bytes_max: int = 4 * 1024
    body_bytes_max: int = 32 * 1024 * 1024
    idle_seconds_max: float = 120.0
    body_seconds_max: float = 120.0
    write_seconds_max: float = 60.0
    """For the other side to take what is buffered; a reader that stopped reading is dropped."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    query: str
    headers: Headers = field(repr=False)
    body: bytes = field(repr=False)

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)


class UnacceptableError(Exception):
    """A request that is too large or too slow; `status` is the answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Responder:
    """Writes one response: `whole()`, or `start()`, then `send()`s, then `end()`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.started = False
        self.head_only = False
        """A HEAD is answered with the headers of its GET and nothing after them."""

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, (*headers, length))
        await self.send(body)
        await self.end()

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        await self._connection.write(h11.Response(status_code=status, headers=list(headers)))

    async def send(self, data: bytes) -> None:
        if data and not self.head_only:
            await self._connection.write(h11.Data(data=data))

    async def end(self) -> None:
        await self._connection.write(h11.EndOfMessage())


class Connection:
    """Serves the requests of one connection, one after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits) -> None:
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._wire = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes_max)

    async def serve(
        self,
        handle: Callable[[Request, Responder], Awaitable[None]],
        refuse: Callable[[int, str], tuple[Headers, bytes]],
    ) -> None:
        """Call `handle` for each request until the connection ends; `refuse` renders what is malformed."""
        while True:
            responder = Responder(self)
            try:
                request = await self._next_request()
                if request is None:
                    return
                responder.head_only = request.method == "HEAD"
                await handle(request, responder)
            except (h11.RemoteProtocolError, UnacceptableError) as error:
                status = error.status if isinstance(error, UnacceptableError) else error.error_status_hint
                if not responder.started and self._wire.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    headers, body = refuse(status, f"cannot read request: {error}")
                    await responder.whole(status, (*headers, (b"connection", b"close")), body)
                return
            if self._wire.our_state is not h11.DONE or self._wire.their_state is not h11.DONE:
                return
            self._wire.start_next_cycle()

    async def write(self, event: h11.Event) -> None:
        data = self._wire.send(event)
        if data:
            self._writer.write(data)
            async with asyncio.timeout(self._limits.write_seconds_max):
                await self._writer.drain()

    async def _next_request(self) -> Request | None:
        try:
            async with asyncio.timeout(self._limits.idle_seconds_max):
                head = await self._next_event()
        except TimeoutError:
            return None
        if not isinstance(head, h11.Request):
            return None
        if len(head.target) > self._limits.target_bytes_max:
            raise UnacceptableError(f"the target is longer than {self._limits.target_bytes_max} bytes", 414)
        try:
            async with asyncio.timeout(self._limits.body_seconds_max):
                body = await self._body(head.headers)
        except TimeoutError as error:
            raise UnacceptableError("the body took too long", 408) from error
        path, _, query = head.target.decode("ascii", "replace").partition("?")
        return Request(head.method.decode("ascii"), path, query, tuple(head.headers), body)

    async def _body(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        announced = next((int(value) for name, value in headers if name == b"content-length"), 0)
        self._check_length(announced)
        if self._wire.they_are_waiting_for_100_continue:
            await self.write(h11.InformationalResponse(status_code=100, headers=[]))
        body = bytearray()
        while isinstance(event := await self._next_event(), h11.Data):
            body += event.data
            self._check_length(len(body))
        if not isinstance(event, h11.EndOfMessage):
            raise UnacceptableError("the connection ended inside the body", 400)
        return bytes(body)

    def _check_length(self, length: int) -> None:
        if length > self._limits.body_bytes_max:
            raise UnacceptableError(f"the body is larger than {self._limits.body_bytes_max} bytes", 413)

    async def _next_event(self) -> type[h11.NEED_DATA | h11.PAUSED] | h11.Event:
        while (event := self._wire.next_event()) is h11.NEED_DATA:
            self._wire.receive_data(await self._reader.read(READ_BYTES))
        return event
