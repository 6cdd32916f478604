"""TLS over a stream: what is inside counts, and records of nothing do not pass for it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from gateway_client.egress.sealed import Sealed
from gateway_client.egress.stream import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Records:
    """An engine to which `!` is a record with something in it, and all else one of TLS's own."""

    def __init__(self) -> None:
        self.wire = b""

    def feed(self, data: bytes) -> None:
        self.wire += data

    def outgoing(self) -> bytes:
        return b""

    def shake(self) -> bool:
        return True

    def read(self) -> bytes | None:
        found, self.wire = b"!" * self.wire.count(b"!"), b""
        return found or None

    def write(self, data: bytes) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError


@contextlib.asynccontextmanager
async def fed(record: bytes) -> AsyncIterator[Sealed]:
    """A stream on which such a record comes again and again."""
    stream = Stream()

    async def feed() -> None:
        while True:
            await asyncio.sleep(0.005)
            stream.data_received(record)

    task = asyncio.get_running_loop().create_task(feed())
    try:
        yield Sealed(stream, Records())
    finally:
        task.cancel()


async def test_records_of_nothing_do_not_prolong_a_wait() -> None:
    async with fed(b".") as sealed:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await sealed.read(0.05)
        assert loop.time() - began < 1
    async with fed(b"!") as sealed:
        assert set(await sealed.read(1)) == {ord("!")}
