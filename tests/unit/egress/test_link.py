"""A channel whose descriptors do not all come goes on: the frame holds, and who misses one says so."""

from __future__ import annotations

import array
import asyncio
import os
import socket

from gateway_client.egress.link import Link, descriptors_per_frame_max


async def test_a_frame_whose_descriptors_were_cut_off_ends_no_channel() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    came: list[tuple[bytes, int]] = []
    gone: list[bool] = []

    def take(frame: bytes, fds: list[int]) -> None:
        came.append((frame, len(fds)))
        for fd in fds:
            os.close(fd)

    link = Link(asyncio.get_running_loop(), ours, on_frame=take, on_gone=lambda: gone.append(True))
    for frame, count in ((b"more", 8 * descriptors_per_frame_max), (b"one", 1)):
        rights = array.array("i", [theirs.fileno()] * count)
        theirs.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    for _ in range(100):
        await asyncio.sleep(0.005)
        if len(came) == 2:
            break
    assert [frame for frame, _ in came] == [b"more", b"one"]
    assert came[0][1] <= descriptors_per_frame_max + 1
    assert came[1] == (b"one", 1)
    assert gone == []
    theirs.close()
    for _ in range(100):
        await asyncio.sleep(0.005)
        if gone:
            break
    assert gone == [True]
    assert link.gone
