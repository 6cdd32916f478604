"""The dialer as the daemon holds it: started, told, waited for where it cuts, and started again when it dies."""

from __future__ import annotations

import asyncio
import itertools
import signal
from typing import TYPE_CHECKING, Final

import structlog

from gateway_client.egress import messages
from supervisord.channel import Channel, close_all
from supervisord.errors import StockadeError
from supervisord.processes import Child, python, spawn_connected, start_again

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

log = structlog.get_logger()

RESTART_SECONDS: Final = 0.2


class DialerProcess:
    """One process. `introduce` tells a new one of everything, `died` is called when one has gone.

    `not_connected` is told why the gateway could not be reached.
    """

    def __init__(
        self,
        *,
        user: str,
        configure: messages.ConfigureDialer,
        record: Path,
        introduce: Callable[[], None],
        died: Callable[[], None],
        not_connected: Callable[[str], None],
        in_background: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        self.ready = asyncio.Event()
        self._user = user
        self._configure = configure
        self._record = record
        self._introduce = introduce
        self._died = died
        self._not_connected = not_connected
        self._in_background = in_background
        self._channel: Channel | None = None
        self._child: Child | None = None
        self._cuts: dict[str, asyncio.Future[messages.CutDone | None]] = {}
        self._tokens = itertools.count(1)
        self._exchange_cuts: dict[int, asyncio.Future[None]] = {}
        self._stopping = False

    def start(self) -> None:
        """Start it and have it told of everything; raises Unavailable."""
        self.ready.clear()
        self._child, ours = spawn_connected(
            "dialer",
            python("gateway_client.egress.dialer", "--user", self._user),
            on_exit=lambda _code: self._exited(),
            record=self._record,
        )
        self._channel = Channel(
            ours,
            name="dialer",
            on_packet=self._heard,
            on_close=self._silent,
            packet_bytes_max=messages.frame_bytes_max,
        )
        self.tell(self._configure)
        self._introduce()

    def _silent(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

    def _exited(self) -> None:
        self.ready.clear()
        if self._channel is not None:
            self._channel.close()
        for told in self._exchange_cuts.values():
            if not told.done():
                told.set_result(None)
        for cut in self._cuts.values():
            if not cut.done():
                cut.set_result(None)
        self._exchange_cuts.clear()
        if self._stopping:
            return
        log.error("dialer died")
        self._died()

        async def start() -> None:
            self.start()

        self._in_background(
            start_again("dialer", start, wanted=lambda: not self._stopping, pause_seconds=RESTART_SECONDS)
        )

    def _heard(self, data: bytes, fds: list[int]) -> None:
        close_all(fds)
        try:
            message = messages.decode(data, messages.FROM_DIALER_TO_DAEMON)
        except messages.BadFrame as error:
            log.error("dialer sent what is no message", cause=str(error))
            self._silent()
            return
        match message:
            case messages.DialerReady():
                self.ready.set()
            case messages.Dialed():
                if not message.ok and message.error != messages.CUT:  # which is our own doing, not the gateway's
                    log.warning("cannot reach the gateway", cause=message.error, worker=message.worker_id)
                    self._not_connected(message.error)
            case messages.ExchangesCut():
                waiting = self._exchange_cuts.pop(message.token, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(None)
            case messages.CutDone():
                future = self._cuts.get(message.agent_id)
                if future is not None and not future.done():
                    future.set_result(message)

    async def end(self) -> None:
        """End it for good."""
        self._stopping = True
        if self._child is not None:
            await self._child.end()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def tell(self, message: object, fds: Sequence[int] = ()) -> bool:
        """Send it; a dialer that cannot be told is ended, and with it everything it has open."""
        if self._channel is None or self._channel.closed:
            return False
        try:
            self._channel.send(messages.encode(message), fds)
        except (StockadeError, messages.BadFrame) as error:
            log.error("cannot tell the dialer, which is ended", cause=str(error))
            self._silent()
            return False
        return True

    def cut(self, agent_id: str) -> asyncio.Future[messages.CutDone | None]:
        """Have every upstream socket of an agent shut down: told once, until `forget_cut`; done when it says so.

        None where it cannot be told or dies, which ends them too.
        """
        future = self._cuts.get(agent_id)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._cuts[agent_id] = future
            if not self.tell(messages.CutUpstreams(agent_id)):
                future.set_result(None)
        return future

    def forget_cut(self, agent_id: str) -> None:
        self._cuts.pop(agent_id, None)

    def cut_exchanges(self, worker_id: str, xs: tuple[int, ...]) -> asyncio.Future[None] | None:
        """Have the sockets of these exchanges shut down, at most as many as a message names.

        Done when it says so or has died, which ends them too; None where it cannot be told.
        """
        token = next(self._tokens)
        if not self.tell(messages.CutExchanges(worker_id, xs, token)):
            return None
        future = self._exchange_cuts[token] = asyncio.get_running_loop().create_future()
        return future
