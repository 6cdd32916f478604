"""The daemon's end of the launcher's socket: requests with replies, and events (docs/ARCHITECTURE.md, channel 1)."""

from __future__ import annotations

import asyncio
import base64
import errno
import itertools
import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from supervisord.channel import Channel, close_all
from supervisord.errors import CannotLaunch, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

SEND_BUFFER_BYTES: Final = 4 << 20
REPLY_SECONDS_MAX: Final = 30.0  # above every deadline of the launcher (sandbox/following.py, attach.py)
STDIN_SECONDS_MAX: Final = 366 * 86400.0
Message: TypeAlias = dict[str, object]

_PEERCRED: Final = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Reply:
    """What the launcher answered, with the descriptors that came along (the receiver closes them)."""

    body: Message
    fds: tuple[int, ...]


class LauncherFailed(CannotLaunch):
    """The launcher did what it could and names the step that failed."""

    def __init__(self, error: Mapping[str, object]) -> None:
        message = str(error.get("message", "the launcher gave no reason"))
        super().__init__(
            message,
            remedy=str(error.get("remedy") or "see `stockadectl doctor`"),
            step=str(error.get("step", "launcher")),
            errno=getattr(errno, str(error.get("errno") or ""), 0),
        )


class LauncherLink:
    """Talks to the launcher; `on_event` gets each event and owns its descriptors."""

    def __init__(
        self, *, path: Path, on_event: Callable[[Message, list[int]], None], on_lost: Callable[[], None]
    ) -> None:
        self._path = path
        self._on_event = on_event
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._first: dict[int, Callable[[], None]] = {}
        self._channel: Channel | None = None
        self._greeted = False

    @property
    def connected(self) -> bool:
        return self._channel is not None and not self._channel.closed

    def greeted(self) -> None:
        """Have its loss told from here on; raises Unavailable where it has gone since it was connected to."""
        if not self.connected:
            raise _gone()
        self._greeted = True

    def connect(self) -> None:
        """Connect, once; raises OSError while nobody listens, PermissionError when it is not root that does."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(str(self._path))
            _, uid, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
            if uid != os.geteuid():
                raise PermissionError(f"the launcher's socket {self._path} is held by uid {uid}")
            sock.setsockopt(socket.SOL_SOCKET, 32, SEND_BUFFER_BYTES)  # SO_SNDBUFFORCE, socket(7)
        except OSError:
            sock.close()
            raise
        self._greeted = False
        if self._channel is not None:
            self._channel.close()  # one that could not be greeted: its end is not to be taken for the next one's
        self._channel = Channel(sock, name="launcher", on_packet=self._packet, on_close=self._closed)

    async def call(
        self,
        op: str,
        /,
        fds: Sequence[int] = (),
        *,
        seconds_max: float = REPLY_SECONDS_MAX,
        first: Callable[[], None] | None = None,
        **fields: object,
    ) -> Reply:
        """Order `op`; raises LauncherFailed with the failing step, Unavailable when there is no answer.

        `first` is called on success before any later message is looked at: what awaits this runs after those that came
        with the answer.
        """
        if self._channel is None:
            raise Unavailable("cannot reach the launcher: it is not running", remedy="try again in a moment")
        number = next(self._numbers)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        if first is not None:
            self._first[number] = first
        try:
            self._channel.send(json.dumps({"op": op, "rq": number, **fields}, separators=(",", ":")).encode(), fds)
            async with asyncio.timeout(seconds_max):
                reply = await future
        except TimeoutError as error:
            raise Unavailable(
                f"cannot {op}: the launcher did not answer in {seconds_max:g} s", remedy="see the launcher's journal"
            ) from error
        finally:
            self._waiting.pop(number, None)
            self._first.pop(number, None)
        if reply.body.get("ok") is not True:
            close_all(reply.fds)
            error_body = reply.body.get("error")
            raise LauncherFailed(error_body if isinstance(error_body, dict) else {})
        return reply

    async def stdin(self, stream_id: str, data: bytes, *, eof: bool) -> None:
        """Write to a program's standard input; returns when it is in the pipe. Waits as long as the program does."""
        text = base64.b64encode(data).decode()
        await self.call("stdin", stream_id=stream_id, data=text, eof=eof, seconds_max=STDIN_SECONDS_MAX)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._fail_waiting()

    def _packet(self, data: bytes, fds: list[int]) -> None:
        message: Message = json.loads(data)  # the launcher runs as root: what it sends is ours
        if "ev" in message:
            self._on_event(message, fds)
            return
        number = message.get("rq")
        future = self._waiting.get(number) if isinstance(number, int) else None
        if future is None or future.done():
            close_all(fds)  # its caller has given up
        else:
            first = self._first.get(number) if isinstance(number, int) and message.get("ok") is True else None
            future.set_result(Reply(message, tuple(fds)))
            if first is not None:
                first()

    def _closed(self) -> None:
        self._fail_waiting()
        if self._greeted:
            self._greeted = False
            self._on_lost()

    def _fail_waiting(self) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_gone())


def _gone() -> Unavailable:
    return Unavailable("cannot reach the launcher: it has gone", remedy="try again in a moment")
