"""The embedded gateway's unix socket: who may connect, the preface, then the API or one destination."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import Counter
from typing import TYPE_CHECKING, Final

import structlog

from gateway_client.gateways import preface as prefaces
from gateway_client.gateways.embedded import forward
from gateway_client.gateways.embedded.api import malformed
from gateway_client.gateways.embedded.http import READ_BYTES, Connection, Limits
from gateway_client.gateways.embedded.mcp import McpGateway
from gateway_client.gateways.preface import Api as ApiAllowed
from gateway_client.gateways.preface import Mcp, Preface, PrefaceError

if TYPE_CHECKING:
    from pathlib import Path

    from gateway_client.gateways.embedded.api import Api
    from gateway_client.gateways.embedded.forward import Resolve, Rules

CONNECTIONS_MAX: Final = 4096
CONNECTIONS_PER_AGENT_MAX: Final = 256
PREFACE_SECONDS_MAX: Final = 5.0
BACKLOG: Final = 1024

_log = structlog.get_logger()


def bind(path: Path, allowed_uid: int) -> socket.socket:
    """Return a listening unix socket that only `allowed_uid` (and root) can connect to; replaces a stale one."""
    if path.is_socket():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        # Before listen(): nobody can connect while the owner is not yet set.
        path.chmod(0o600)
        os.chown(path, allowed_uid, -1, follow_symlinks=False)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def peer_uid(connection: socket.socket) -> int:
    """Return the uid that called connect(2), as the kernel says (unix(7), SO_PEERCRED)."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


class Server:
    """Serves connections that begin with a preface."""

    def __init__(
        self,
        api: Api,
        rules: Rules,
        resolve: Resolve,
        *,
        allowed_uid: int,
        limits: Limits | None = None,
        mcp: McpGateway | None = None,
    ) -> None:
        self._api = api
        self._rules = rules
        self._resolve = resolve
        self._allowed_uid = allowed_uid
        self._limits = limits or Limits()
        self._mcp = mcp or McpGateway(())
        self._open: Counter[str] = Counter()

    async def start(self, listener: socket.socket) -> asyncio.Server:
        return await asyncio.start_unix_server(self._accepted, sock=listener, limit=READ_BYTES * 4, backlog=BACKLOG)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            uid = peer_uid(writer.get_extra_info("socket"))
            if uid != self._allowed_uid or self._open.total() >= CONNECTIONS_MAX:
                _log.warning("connection refused", uid=uid, open=self._open.total())
                return
            async with asyncio.timeout(PREFACE_SECONDS_MAX):
                fixed = await reader.readexactly(prefaces.FIXED_BYTES)
                rest = await reader.readexactly(prefaces.length_after_fixed(fixed))
            await self._serve(prefaces.decode_rest(rest), reader, writer)
        except PrefaceError as error:
            _log.warning("connection refused", reason=str(error))
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the other side went away, which it may
        except Exception:  # noqa: BLE001 - one connection's fault is logged and ends with it
            _log.exception("connection broken")
        finally:
            writer.transport.abort() if writer.is_closing() else writer.close()

    async def _serve(self, who: Preface, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open[who.agent_id] >= CONNECTIONS_PER_AGENT_MAX:
            _log.warning("connection refused", agent_id=who.agent_id, reason="too many connections of this agent")
            return
        self._open[who.agent_id] += 1
        try:
            if isinstance(who.allow, ApiAllowed):
                await Connection(reader, writer, self._limits).serve(
                    lambda request, respond: self._api.handle(request, respond, agent_id=who.agent_id, x=who.x),
                    malformed,
                )
            elif isinstance(allow := who.allow, Mcp):
                await Connection(reader, writer, self._limits).serve(
                    lambda request, respond: self._mcp.handle(request, respond, allow=allow, agent_id=who.agent_id),
                    malformed,
                )
            else:
                await self._forward(who, reader, writer)
        finally:
            self._open[who.agent_id] -= 1
            self._open += Counter()  # drops those at zero, so that the table does not grow with every agent there was

    async def _forward(self, who: Preface, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert not isinstance(who.allow, ApiAllowed | Mcp)  # noqa: S101 - told apart by the caller
        try:
            far = await forward.connect(who.allow, self._rules, self._resolve)
        except forward.ForwardError as error:
            _log.info("destination refused", agent_id=who.agent_id, x=who.x, reason=str(error))
            writer.write(forward.failed(str(error)))
            await writer.drain()
            return
        writer.write(forward.OK)
        await forward.splice((reader, writer), far)
