"""A launcher that goes as the daemon comes: the daemon finds the next one, and its loss is told once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from supervisord.config import Config
from supervisord.errors import Unavailable
from supervisord.launcher_link import LauncherLink
from supervisord.recovery import reach_launcher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


class Launchers:
    """Launchers one after the other: the first few go before or while they are greeted."""

    def __init__(self, run_dir: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(run_dir / "launcher.sock"))
        self.listener.listen()
        self.listener.setblocking(False)

    async def serve(self, *, gone: int) -> socket.socket:
        loop = asyncio.get_running_loop()
        for number in range(gone):
            sock, _ = await loop.sock_accept(self.listener)
            if number:
                await loop.sock_recv(sock, 4096)
            sock.close()
        sock, _ = await loop.sock_accept(self.listener)
        message = json.loads(await loop.sock_recv(sock, 4096))
        await loop.sock_sendall(sock, json.dumps({"rq": message["rq"], "ok": True}).encode())
        return sock


def hello(link: LauncherLink) -> Callable[[], Awaitable[None]]:
    async def greet() -> None:
        await link.call("hello")

    return greet


async def test_launchers_that_go_as_one_comes_are_no_failure(tmp_path: Path) -> None:
    lost = asyncio.Event()
    link = LauncherLink(path=tmp_path / "launcher.sock", on_event=lambda *_: None, on_lost=lost.set)
    launchers = Launchers(tmp_path)
    with closing(launchers.listener):
        serving = asyncio.create_task(launchers.serve(gone=2))
        await reach_launcher(link, dataclasses.replace(Config(), run_dir=tmp_path), managed=True, greet=hello(link))
        assert link.connected
        assert not lost.is_set(), "those that went before they were greeted are nobody's loss"
        (await serving).close()
        await asyncio.wait_for(lost.wait(), 5)  # the twin: this one's loss is told
        assert not link.connected


async def test_one_that_is_there_and_says_no_is_a_failure_at_once(tmp_path: Path) -> None:
    link = LauncherLink(path=tmp_path / "launcher.sock", on_event=lambda *_: None, on_lost=lambda: None)

    async def greet() -> None:
        raise Unavailable("cannot hello: the launcher did not answer", remedy="see its journal")

    launchers = Launchers(tmp_path)
    with closing(launchers.listener):
        with pytest.raises(Unavailable, match="did not answer"):
            await reach_launcher(link, dataclasses.replace(Config(), run_dir=tmp_path), managed=True, greet=greet)
        link.close()
