"""The name server of one agent in transparent mode: takes look-ups off its socket, asks the daemon, answers.

Whether a name is told is the daemon's to decide, as with every request, and on record; a flood is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from gateway_client.egress.decide import Allow
from gateway_client.egress.exchange import Event
from gateway_client.egress.names import MadeUp, Query, query_bytes_max, read_query
from gateway_client.egress.request import EgressRequest, Form
from gateway_client.egress.share import metered
from gateway_client.egress.wire import Reject

if TYPE_CHECKING:
    import socket

    from gateway_client.egress.flow import Agent, Desk

look_ups_at_once_max: Final = 32
look_ups_per_turn_max: Final = 16
turn_seconds: Final = 0.05


class Resolver:
    """Serves one datagram socket, which it owns."""

    def __init__(self, desk: Desk, agent: Agent, endpoint: socket.socket) -> None:
        self.names = MadeUp()
        self._desk = desk
        self._agent = agent
        self._socket = endpoint
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        endpoint.setblocking(False)
        self._loop.add_reader(endpoint.fileno(), self._readable)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        for task in self._tasks:
            task.cancel()

    def _readable(self) -> None:
        for _ in range(look_ups_per_turn_max):
            try:
                data, peer = self._socket.recvfrom(query_bytes_max + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # the far end has gone
                self.close()
                return
            self._take(data, peer)
        # More than that in one turn is a flood: what does not fit into the socket meanwhile is lost, as datagrams are.
        self._loop.remove_reader(self._socket.fileno())
        self._timer = self._loop.call_later(turn_seconds, self._go_on)

    def _go_on(self) -> None:
        self._timer = None
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def _take(self, data: bytes, peer: tuple[str, int]) -> None:
        query = read_query(data)
        if isinstance(query, Query):
            if query.wants_address and len(self._tasks) < look_ups_at_once_max:
                task = self._loop.create_task(metered(self._look_up(query, peer), self._agent.share))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                return
            if query.wants_address:
                return  # it is asked again
            self._send(query.other(), peer)
        elif query is not None:
            self._desk.rejected(
                self._agent.identity.agent_id, Reject(400, "look_up_malformed", "a look-up is malformed")
            )
            self._send(query, peer)

    async def _look_up(self, query: Query, peer: tuple[str, int]) -> None:
        if self._agent.frozen:
            return
        request = EgressRequest(Form.NAME, "LOOKUP", "dns", query.name, 0, "")
        exchange, verdict = await self._desk.ask(self._agent.identity.agent_id, request)
        allowed = isinstance(verdict, Allow)
        refused_for_now = not allowed and getattr(verdict, "status", 0) == 503  # noqa: PLR2004 - Service Unavailable
        exchange.status = 200 if allowed else getattr(verdict, "status", 0)
        exchange.advance(Event.END)
        self._desk.finish(exchange, None)
        if allowed:
            self._send(query.address(self.names.address(query.name)), peer)
        else:
            self._send(query.failure() if refused_for_now else query.no_name(), peer)

    def _send(self, data: bytes, peer: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):  # a full buffer, or nobody there any more: datagrams get lost
            self._socket.sendto(data, peer)
