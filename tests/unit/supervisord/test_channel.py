"""Channels to Stockade's own processes: whole packets and descriptors, back-pressure, and one word at the end."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from supervisord import channel as module
from supervisord.channel import Channel
from supervisord.errors import Unavailable


class Ends:
    """A channel and the bare socket at its other end."""

    def __init__(self, packet_bytes_max: int = 1000) -> None:
        self.packets: list[tuple[bytes, int]] = []
        self.closed = 0
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = Channel(
            ours, name="peer", on_packet=self._packet, on_close=self._close, packet_bytes_max=packet_bytes_max
        )

    def _packet(self, data: bytes, fds: list[int]) -> None:
        self.packets.append((data, len(fds)))
        module.close_all(fds)

    def _close(self) -> None:
        self.closed += 1

    async def until(self, condition: object) -> None:
        assert callable(condition)
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - what is waited for is a callback's trace, not an event
                await asyncio.sleep(0)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count


async def test_packets_keep_their_borders_order_and_descriptors() -> None:
    ends = Ends()
    before = descriptors()
    socket.send_fds(ends.peer, [b"one"], [0, 1])
    ends.peer.send(b"two")
    await ends.until(lambda: len(ends.packets) == 2)
    assert ends.packets == [(b"one", 2), (b"two", 0)]
    assert descriptors() == before
    ends.channel.send(b"three", (0,))
    data, fds, _, _ = socket.recv_fds(ends.peer, 100, 4)
    assert (data, len(fds)) == (b"three", 1)
    module.close_all(fds)
    ends.channel.close()
    ends.peer.close()
    assert ends.closed == 0


async def test_a_packet_at_the_limit_passes_and_one_beyond_does_not() -> None:
    ends = Ends(packet_bytes_max=100)
    ends.channel.send(b"x" * 100)
    with pytest.raises(Unavailable, match="limit is 100"):
        ends.channel.send(b"x" * 101)
    assert len(ends.peer.recv(1000)) == 100
    ends.peer.send(b"y" * 100)
    await ends.until(lambda: ends.packets)
    ends.peer.send(b"y" * 101)
    await ends.until(lambda: ends.closed)
    assert len(ends.packets) == 1
    ends.peer.close()


async def test_a_peer_that_does_not_read_is_waited_for_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUED_PACKETS_MAX", 5)
    ends = Ends()
    before = descriptors()
    read, write = os.pipe()
    sent = 0
    with pytest.raises(Unavailable, match="does not read"):  # noqa: PT012 - one of the sends, none knows which
        for _ in range(10_000):
            ends.channel.send(b"%06d" % sent, (read,))
            sent += 1
    os.close(read)
    os.close(write)
    received = 0
    while received < sent:
        await asyncio.sleep(0)
        try:
            data, fds, _, _ = socket.recv_fds(ends.peer, 100, 4, socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        assert data == b"%06d" % received
        module.close_all(fds)
        received += 1
    assert descriptors() == before
    ends.channel.send(b"goes on")
    ends.channel.close()
    ends.peer.close()


async def test_the_end_is_told_once_and_descriptors_that_waited_are_closed() -> None:
    ends = Ends()
    before = descriptors()
    ends.peer.close()
    await ends.until(lambda: ends.closed)
    assert ends.closed == 1
    with pytest.raises(Unavailable, match="has gone"):
        ends.channel.send(b"late", (0,))
    ends.channel.close()
    assert ends.closed == 1
    assert descriptors() == before - 2
