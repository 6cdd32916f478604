"""What agents tell does not pile up for a daemon that does not read: it is kept as a bounded number, and told later."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from sandbox import channel, notices, sync
from sandbox.loop import Loop
from sandbox.serve import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sandbox.workshop import Workshop

MANY = 20_000
EVENT = {"kind": "exec", "path": "x" * 900}


def received(loop: Loop, peer: socket.socket) -> Iterator[dict[str, Any]]:
    """What comes until nothing does any more."""
    while True:
        loop.turn(0)
        try:
            message, _ = sync.receive(peer)
        except BlockingIOError:
            return
        assert message is not None
        yield message


def test_a_daemon_that_does_not_read_is_told_the_first_and_how_many_more(tmp_path: Path) -> None:
    workshop = SimpleNamespace(loop=Loop(), watching=SimpleNamespace(say=None))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        server = Server(cast("Workshop", workshop), listener)
        near, far = sync.pair()
        with near, far:
            far.setblocking(False)
            connection = server.channel.add(near)
            connection.greeted = True
            for _ in range(MANY):
                workshop.watching.say("ag_1", "ag_1", [EVENT])
            assert connection.behind
            assert len(connection._queue) == channel.TOLD_QUEUED_MAX + 1
            server.channel.broadcast({"ev": "exited", "agent_id": "ag_1"})
            messages = list(received(workshop.loop, far))
            assert not connection.behind
            events = [event for message in messages for event in message.get("events", ())]
            whole = [event for event in events if event["kind"] == "exec"]
            assert whole == [EVENT] * len(whole)
            assert notices.KEPT_MAX < len(whole) < MANY
            assert [event["times"] for event in events if event["kind"] == "execs"] == [MANY - len(whole)]
            assert [message["ev"] for message in messages].count("exited") == 1
            assert server.told.take() == [], "the twin: a daemon that reads is told all at once"
            workshop.watching.say("ag_1", "ag_1", [EVENT])
            assert [message["events"] for message in received(workshop.loop, far)] == [[EVENT]]
