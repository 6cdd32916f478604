"""Whether the gateway answers: probes at intervals, the breaker they and failed connections drive, and what is told."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import structlog

from supervisord.actions.types import Action
from supervisord.breaker import Breaker, Event, State
from supervisord.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

log = structlog.get_logger()

PROBE_SECONDS_MAX: Final = 3.0
"""For a gateway to begin its answer to a probe: it says nothing about a model."""
SOON_SECONDS: Final = 1.0
"""Between probes once one has failed."""
SERVER_ERROR: Final = 500
_STATUS_BYTES: Final = len(b"HTTP/1.1 200")
_PATHS: Final = {"litellm": "/health/liveliness"}  # no key needed, no model asked


class GatewayHealth:
    """Probes the gateway until it is cancelled; `passes` says whether calls may be sent to it."""

    def __init__(
        self,
        probe: Callable[[], Awaitable[None]],
        *,
        kind: str,
        seconds: float,
        note: Callable[[Action], Coroutine[object, object, None]],
    ) -> None:
        self._probe = probe
        self._kind = kind
        self._seconds = seconds
        self._note = note
        self._breaker = Breaker()
        self._soon = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def passes(self) -> bool:
        return self._breaker.passes

    @property
    def cause(self) -> str:
        return self._breaker.cause

    def report(self) -> tuple[bool, str]:
        """What `doctor` and the ready check show."""
        breaker = self._breaker
        return breaker.passes, "" if breaker.passes else f"breaker {breaker.state.value}: {breaker.cause}"

    def cannot_connect(self, cause: str) -> None:
        """Take note of a connection that failed: the next probe comes at once."""
        self._on(Event.FAILED, cause)
        self._soon.set()

    async def watch(self) -> None:
        """Probe for ever."""
        while True:
            if not self._breaker.passes:
                self._on(Event.TRIED)
            try:
                async with asyncio.timeout(PROBE_SECONDS_MAX):
                    await self._probe()
            except (OSError, TimeoutError, Unavailable, asyncio.IncompleteReadError) as error:
                self._on(Event.FAILED, _said(error))
            else:
                self._on(Event.ANSWERED)
            self._soon.clear()
            if not self._breaker.failures:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._seconds):
                        await self._soon.wait()
            await asyncio.sleep(min(SOON_SECONDS, self._seconds) if self._breaker.failures else 0)

    def _on(self, event: Event, cause: str = "") -> None:
        before, self._breaker = self._breaker, self._breaker.after(event, cause)
        now = self._breaker
        if (before.state, now.state) == (State.CLOSED, State.OPEN):
            log.error("the gateway does not answer", cause=cause)
            self._tell("failed", "open", cause)
        elif before.state is not State.CLOSED and now.state is State.CLOSED:
            log.info("the gateway answers again")
            self._tell("done", "closed", "")

    def _tell(self, verdict: str, state: str, cause: str) -> None:
        action = Action("", "daemon", "gateway.state", self._kind, verdict, cause, {"state": state})
        task = asyncio.get_running_loop().create_task(self._note(action))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _said(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    if isinstance(error, asyncio.IncompleteReadError):
        return "it closed the connection"
    return str(getattr(error, "strerror", None) or error)[:200]


async def probe_http(url: str, kind: str) -> None:
    """Ask a gateway for something cheap; any HTTP status below 500 is an answer. Raises OSError or Unavailable.

    Twelve bytes are read and nothing of them is interpreted but the status.
    """
    parts = urlsplit(url)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls)
    try:
        path = parts.path.rstrip("/").removesuffix("/v1") + _PATHS.get(kind, "/health")
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode("ascii"))
        status = await reader.readexactly(_STATUS_BYTES)
    finally:
        writer.transport.abort()
    if not status.startswith(b"HTTP/1.") or not status[9:].isdigit():
        raise Unavailable("cannot use the gateway: it speaks no HTTP", remedy="see gateway.url")
    if int(status[9:]) >= SERVER_ERROR:
        raise Unavailable(f"cannot use the gateway: it answers {int(status[9:])}", remedy="see the gateway's own log")
