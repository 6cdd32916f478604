"""The name server of one agent in transparent mode: takes look-ups off its sockets, asks the daemon, answers.

Whether a name is told is the daemon's to decide, as with every request, and on record. Look-ups come as datagrams and
over connections (RFC 7766), at one rate for both; a flood of datagrams is dropped, one on a connection waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from gateway_client.egress.decide import Allow
from gateway_client.egress.exchange import Event
from gateway_client.egress.names import BadLength, Framed, MadeUp, Query, framed, query_bytes_max, read_query
from gateway_client.egress.request import EgressRequest, Form
from gateway_client.egress.share import metered
from gateway_client.egress.stream import Reset, Stream
from gateway_client.egress.wire import Reject

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine

    from gateway_client.egress.connection import Agent, Desk

look_ups_at_once_max: Final = 32
look_ups_per_turn_max: Final = 32
turn_seconds: Final = 0.05
lines_max: Final = 8
"""Connections for look-ups that one agent may have open."""
line_idle_seconds_max: Final = 10.0
"""Between two look-ups on a connection (RFC 7766 section 6.2.3: a few seconds)."""
query_seconds_max: Final = 5.0
"""From the first byte of a look-up on a connection to its last, and for a client to take its answer."""
rest_seconds_min: Final = 0.001


class Resolver:
    """Serves one datagram socket, which it owns, and the connections that it is given."""

    def __init__(self, desk: Desk, agent: Agent, endpoint: socket.socket) -> None:
        self.names = MadeUp()
        self._desk = desk
        self._agent = agent
        self._socket = endpoint
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._turn_ends = 0.0
        self._turn_left = 0
        self._lines: set[Stream] = set()
        endpoint.setblocking(False)
        self._loop.add_reader(endpoint.fileno(), self._readable)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        self.cut()
        for task in self._tasks:
            task.cancel()

    # --- datagrams

    def _readable(self) -> None:
        for _ in range(look_ups_per_turn_max):
            if wait := self._turn():
                # What does not fit into the socket meanwhile is lost, as datagrams are.
                self._loop.remove_reader(self._socket.fileno())
                self._timer = self._loop.call_later(wait, self._go_on)
                return
            try:
                data, peer = self._socket.recvfrom(query_bytes_max + 1)
            except (BlockingIOError, InterruptedError):
                self._turn_left += 1
                return
            except OSError:  # the far end has gone
                self.close()
                return
            self._take(data, peer)

    def _go_on(self) -> None:
        self._timer = None
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def _take(self, data: bytes, peer: tuple[str, int]) -> None:
        query = read_query(data)
        if isinstance(query, Query) and query.wants_address:
            if len(self._tasks) < look_ups_at_once_max:  # else it is asked again
                self._spawn(self._look_up_for(query, peer))
            return
        answer = self._answer_at_once(query)
        if answer is not None:
            self._send(answer, peer)

    async def _look_up_for(self, query: Query, peer: tuple[str, int]) -> None:
        answer = await self._look_up(query)
        if answer is not None:
            self._send(answer, peer)

    def _send(self, data: bytes, peer: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):  # a full buffer, or nobody there any more: datagrams get lost
            self._socket.sendto(data, peer)

    # --- connections

    @property
    def lines(self) -> int:
        """How many connections are open."""
        return len(self._lines)

    def serve(self, accepted: socket.socket) -> bool:
        """Serve look-ups on a connection, which is taken; False where the agent has too many already."""
        if len(self._lines) >= lines_max:
            return False
        line = Stream()
        self._lines.add(line)  # here, not in the task: a burst is accepted before any task runs
        self._spawn(self._serve_line(line, accepted))
        return True

    def cut(self) -> None:
        """Reset all connections."""
        for line in self._lines:
            line.reset()

    def freeze(self, *, frozen: bool) -> None:
        for line in self._lines:
            line.freeze(frozen=frozen)

    async def _serve_line(self, line: Stream, accepted: socket.socket) -> None:
        try:
            accepted.setblocking(False)
            await self._loop.connect_accepted_socket(lambda: line, accepted)
            if self._agent.frozen:
                line.freeze(frozen=True)
            await self._answer_all(line)
            line.close()
        except BadLength:
            self._malformed()
            line.reset()
        except OSError:  # TimeoutError and Reset are some, too
            line.reset()
        except asyncio.CancelledError:
            line.reset()
            raise
        finally:
            self._lines.discard(line)

    async def _answer_all(self, line: Stream) -> None:
        """Answer one look-up after the other, in order; return at the end, raise Reset, TimeoutError or BadLength."""
        coming = Framed()
        while (data := await self._next(line, coming)) is not None:
            while wait := self._turn():  # noqa: ASYNC110 - it is a rate: nothing happens then but that time has passed
                await asyncio.sleep(wait)
            query = read_query(data)
            if isinstance(query, Query) and query.wants_address:
                answer = await self._look_up(query)
            else:
                answer = self._answer_at_once(query)
            if answer is None:
                raise Reset
            await line.write(framed(answer), query_seconds_max)

    async def _next(self, line: Stream, coming: Framed) -> bytes | None:
        """Give the next look-up, None at the end of the connection."""
        deadline = None
        while (data := coming.next()) is None:
            if coming.begun and deadline is None:
                deadline = self._loop.time() + query_seconds_max
            rest = line_idle_seconds_max if deadline is None else deadline - self._loop.time()
            if rest <= 0:
                raise TimeoutError
            try:
                more = await line.read(max(rest, rest_seconds_min))
            except TimeoutError:
                if coming.begun:
                    raise
                return None
            if not more:
                return None
            coming.feed(more)
        return data

    # --- both

    def _turn(self) -> float:
        """Take one look-up of this turn's; give how long to wait where there is none left."""
        now = self._loop.time()
        if now >= self._turn_ends:
            self._turn_ends, self._turn_left = now + turn_seconds, look_ups_per_turn_max
        if not self._turn_left:
            return max(self._turn_ends - now, rest_seconds_min)
        self._turn_left -= 1
        return 0.0

    def _answer_at_once(self, query: Query | bytes | None) -> bytes | None:
        """Give the answer to what nobody has to be asked about; None where it deserves none."""
        if isinstance(query, Query):
            return query.other()
        if query is not None:
            self._malformed()
        return query

    def _malformed(self) -> None:
        self._desk.rejected(self._agent.identity.agent_id, Reject(400, "look_up_malformed", "a look-up is malformed"))

    async def _look_up(self, query: Query) -> bytes | None:
        """Ask the daemon, and give the answer; None while the agent is frozen."""
        if self._agent.frozen:
            return None
        request = EgressRequest(Form.NAME, "LOOKUP", "dns", query.name, 0, "")
        exchange, verdict = await self._desk.ask(self._agent.identity.agent_id, request)
        allowed = isinstance(verdict, Allow)
        refused_for_now = not allowed and getattr(verdict, "status", 0) == 503  # noqa: PLR2004 - Service Unavailable
        exchange.status = 200 if allowed else getattr(verdict, "status", 0)
        exchange.advance(Event.END)
        self._desk.finish(exchange, None)
        if allowed:
            return query.address(self.names.address(query.name))
        return query.failure() if refused_for_now else query.no_name()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(metered(work, self._agent.share))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
