"""What agents ask and people answer, told to a URL of the operator's by a process of its own (webhook_sender.py).

Events wait in a bounded queue, go out in order, and each stays until it was taken: at least once, as long as the daemon
lives. Nothing here waits for the other end, so a receiver that is down delays nobody.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import TYPE_CHECKING, Final

import structlog

from gateway_client.egress.scope import format_scope
from supervisord.channel import Channel, close_all
from supervisord.errors import Unavailable
from supervisord.processes import Child, end_leftover, python, spawn_connected, start_again
from supervisord.question import RequestState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from supervisord.question import Request

log = structlog.get_logger()

READY_SECONDS_MAX: Final = 10.0
RESTART_SECONDS: Final = 1.0
EVENTS_QUEUED_MAX: Final = 1024
PACKET_BYTES_MAX: Final = 64 * 1024

_NAMES: Final = {
    RequestState.APPROVED: "request.approved",
    RequestState.DENIED: "request.denied",
    RequestState.EXPIRED: "request.expired",
}


class Webhook:
    """Tells one URL of every change of a request."""

    def __init__(
        self, *, url: str, key: str, user: str, instance: str, record: Path, now_ns: Callable[[], int]
    ) -> None:
        self._order = {"url": url, "key": key, "user": user}
        self._instance = instance
        self._record = record
        self._now_ns = now_ns
        self._queue: deque[dict[str, object]] = deque()
        self._dropped = 0
        self._ready = asyncio.Event()
        self._sent = False
        self._problem = ""
        self._child: Child | None = None
        self._channel: Channel | None = None
        self._stopping = False
        self._restart: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the sender and wait until it is confined; raises Unavailable."""
        end_leftover(self._record)
        await self._spawn()
        try:
            async with asyncio.timeout(READY_SECONDS_MAX):
                await self._ready.wait()
        except TimeoutError as error:
            raise Unavailable(
                "cannot start the sender of the webhook: it is not ready", remedy="see the daemon's journal"
            ) from error

    async def _spawn(self) -> None:
        self._child, ours = spawn_connected(
            "webhook sender", python("supervisord.webhook_sender"), on_exit=self._exited, record=self._record
        )
        self._channel = Channel(
            ours,
            name="webhook sender",
            on_packet=self._packet,
            on_close=self._ready.clear,
            packet_bytes_max=PACKET_BYTES_MAX,
        )
        self._channel.send(json.dumps(self._order).encode())

    async def stop(self) -> None:
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
        if self._channel is not None:
            self._channel.close()
        if self._child is not None:
            await self._child.end()
        self._record.unlink(missing_ok=True)

    def health(self) -> tuple[bool, str]:
        waiting = f"{len(self._queue)} events wait" if self._queue else ""
        lost = f"{self._dropped} events were dropped" if self._dropped else ""
        words = "; ".join(word for word in (waiting, lost, self._problem) if word)
        return self._ready.is_set(), words

    def tell(self, request: Request) -> None:
        """Queue what a request is by now. Where too many wait already the oldest is dropped, and that is said."""
        if len(self._queue) >= EVENTS_QUEUED_MAX:
            del self._queue[1 if self._sent else 0]
            self._dropped += 1
            log.error("an event for the webhook is dropped: too many wait", dropped=self._dropped)
        self._queue.append(self._event(request))
        self._pump()

    def _event(self, request: Request) -> dict[str, object]:
        name = _NAMES.get(request.state) or ("request.approval" if request.offers else "request.created")
        return {
            "event": name,
            "event_id": f"{request.request_id}.{request.version}",
            "instance": self._instance,
            "time_unix_ms": self._now_ns() // 10**6,
            "request": {
                "request_id": request.request_id,
                "agent_id": request.agent_id,
                "agent_name": request.agent_name,
                "scope": format_scope(request.scope),
                "reason": request.reason,
                "digest": request.digest,
                "state": request.state.value,
                "approved_by": list(request.approved_by),
                "approvers": request.approvers,
                "decided_by": request.decided_by,
                "answer": request.answer,
                "grant_id": request.grant_id,
            },
        }

    def _pump(self) -> None:
        if not self._queue or self._sent or not self._ready.is_set() or self._channel is None:
            return
        try:
            self._channel.send(json.dumps(self._queue[0]).encode())
        except Unavailable as error:  # its end is noticed by itself, and then it is sent again
            log.error("cannot tell the webhook", cause=error.message)
            return
        self._sent = True

    def _packet(self, data: bytes, fds: list[int]) -> None:
        close_all(fds)
        try:
            said = json.loads(data)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            log.error("the webhook sender made no sense")
            return
        if "ready" in said:
            self._ready.set()
        elif "failed" in said:
            self._problem = str(said.get("why", ""))[:200]
            log.error("the webhook did not take an event; it is tried again", cause=self._problem)
        elif self._queue and said.get("delivered") == self._queue[0]["event_id"]:
            self._problem, self._sent = "", False
            self._queue.popleft()
        self._pump()

    def _exited(self, code: int) -> None:
        self._ready.clear()
        self._sent = False
        if self._channel is not None:
            self._channel.close()
        if not self._stopping:
            log.error("the webhook sender died", code=code)
            again = start_again(
                "webhook sender", self._spawn, wanted=lambda: not self._stopping, pause_seconds=RESTART_SECONDS
            )
            self._restart = asyncio.get_running_loop().create_task(again)
