"""A real worker and dialer as processes; the test plays the daemon over their channels, and owns the upstream."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateway_client.egress import messages
from gateway_client.egress.decide import AgentView, GrantView, decide
from gateway_client.egress.link import Link
from gateway_client.egress.scope import parse_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

AGENT = "ag_test"
WORKER = "w1"


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    """Poll a condition with a deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)
    return value


def spawn(
    module: str, user: str, *endpoints: socket.socket, files_max: int = 0, more: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start a module with the sockets as descriptors 3, 4, ..., and no more than `files_max` in all."""
    high = [fcntl.fcntl(endpoint.fileno(), fcntl.F_DUPFD, 20) for endpoint in endpoints]
    redirections = " ".join(f"{3 + index}<&{fd} {fd}<&-" for index, fd in enumerate(high))
    limit = f"ulimit -n {files_max}; " if files_max else ""
    process = subprocess.Popen(
        [
            "/bin/bash",
            "-c",
            f'{limit}exec "$@" {redirections}',
            "sh",
            sys.executable,
            "-I",
            "-m",
            module,
            "--user",
            user,
            *more,
        ],
        pass_fds=high,
        stdin=subprocess.DEVNULL,
    )
    for fd in high:
        os.close(fd)
    return process


@dataclass
class Plane:
    """The daemon's side of both channels."""

    configuration: messages.Configure
    dialer_configuration: messages.ConfigureDialer
    view: AgentView = field(
        default_factory=lambda: AgentView(agent_id=AGENT, name="tester", policy="default", state="RUNNING")
    )
    asks: list[messages.Ask] = field(default_factory=list)
    outcomes: list[messages.Outcome] = field(default_factory=list)
    rejected: list[messages.Rejected] = field(default_factory=list)
    dialed: list[messages.Dialed] = field(default_factory=list)
    cuts: list[messages.CutDone] = field(default_factory=list)
    exchanges_cut: list[messages.ExchangesCut] = field(default_factory=list)
    answer: Callable[[messages.Ask], messages.Verdict | None] | None = None
    moved: list[messages.Moved] = field(default_factory=list)
    budget_bytes: int = 0
    """What is left to lend of the agent's budget, 10,000 bytes at a time."""
    port: int = 0
    files_max: int = 0
    """Descriptors of the worker, where not what it takes by itself."""
    ca_file: Path | None = None
    """Authorities that the worker trusts beside the host's."""
    authority: messages.Authority | None = None
    """What it answers TLS of agents with."""
    ready: messages.Ready | None = None
    dialer_ready: messages.DialerReady | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        to_dialer, to_worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        dialer_ours, dialer_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.worker_process = spawn(
            "gateway_client.egress.server",
            "stockade-egress",
            theirs,
            to_dialer,
            files_max=self.files_max,
            more=() if self.ca_file is None else ("--ca-file", str(self.ca_file)),
        )
        self.dialer_process = spawn("gateway_client.egress.dialer", "stockade-dialer", dialer_theirs)
        theirs.close()
        to_dialer.close()
        dialer_theirs.close()
        self.worker = Link(loop, ours, on_frame=self._from_worker, on_gone=lambda: None)
        self.dialer = Link(loop, dialer_ours, on_frame=self._from_dialer, on_gone=lambda: None)
        self.to_dialer(self.dialer_configuration)
        self.to_dialer(messages.AttachWorker(WORKER), fd=to_worker.fileno())
        to_worker.close()
        self.to_worker(self.configuration)
        self.port = self.listen(AGENT)
        await until(lambda: self.ready and self.dialer_ready, 15)

    def listen(self, agent_id: str, **labels: str) -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(512)
            self.to_worker(messages.Listen(agent_id, "tester", labels, self.authority), fd=listener.fileno())
            self.to_dialer(messages.Listener(agent_id), fd=listener.fileno())
            return int(listener.getsockname()[1])

    def stop(self) -> None:
        self.worker.close()
        self.dialer.close()
        for process in (self.worker_process, self.dialer_process):
            process.kill()
            process.wait()

    def to_worker(self, message: messages.FromDaemonToWorker, *, fd: int | None = None) -> None:
        self.worker.send(messages.encode(message), fd=fd)

    def to_dialer(self, message: messages.FromDaemonToDialer, *, fd: int | None = None) -> None:
        self.dialer.send(messages.encode(message), fd=fd)

    def grant(self, *scopes: str) -> None:
        grants = tuple(GrantView(grant_id=f"gr_{n}", scope=parse_scope(scope)) for n, scope in enumerate(scopes))
        self.view = AgentView(agent_id=AGENT, name="tester", policy="default", state="RUNNING", grants=grants)

    def _from_worker(self, frame: bytes, fds: list[int]) -> None:
        assert not fds
        message: messages.FromWorkerToDaemon = messages.decode(frame, messages.FROM_WORKER_TO_DAEMON)
        match message:
            case messages.Ready():
                self.ready = message
            case messages.Ask():
                self.asks.append(message)
                self._judge(message)
            case messages.Outcome():
                self.outcomes.append(message)
            case messages.Moved():
                self.moved.append(message)
                self.budget_bytes += message.back
                if message.want:
                    lent = min(self.budget_bytes, max(10_000, message.want))
                    self.budget_bytes -= lent
                    self.to_worker(messages.Lend(message.agent_id, lent, not self.budget_bytes))
            case messages.Rejected():
                self.rejected.append(message)

    def _judge(self, ask: messages.Ask) -> None:
        judge = self.answer or (lambda ask: decide(ask.request, self.view, now=time.monotonic()))
        verdict = judge(ask)
        if verdict is None:
            return
        if isinstance(verdict, messages.Allow) and verdict.upstream.opens:
            preface = None
            if self.configuration.forward_mode is messages.ForwardMode.PREFACE:
                where = {
                    messages.Upstream.API: "api",
                    messages.Upstream.FORWARD: f"http://{ask.request.authority}",
                    messages.Upstream.TUNNEL: f"tcp:{ask.request.authority}",
                    messages.Upstream.SEALED: f"tcp:{ask.request.authority}",
                }[verdict.upstream]
                preface = messages.Preface(agent_id=ask.agent_id, name="tester", x=ask.x, allow=where)
            self.to_dialer(messages.Dial(WORKER, ask.x, ask.agent_id, verdict.upstream, preface))
        self.to_worker(messages.Answer(ask.x, verdict))

    def _from_dialer(self, frame: bytes, fds: list[int]) -> None:
        assert not fds
        message: messages.FromDialerToDaemon = messages.decode(frame, messages.FROM_DIALER_TO_DAEMON)
        match message:
            case messages.DialerReady():
                self.dialer_ready = message
            case messages.Dialed():
                self.dialed.append(message)
            case messages.ExchangesCut():
                self.exchanges_cut.append(message)
            case messages.CutDone():
                self.cuts.append(message)

    async def exchange(self, data: bytes, *, port: int = 0, seconds: float = 5.0) -> bytes:
        """Send bytes as the agent and give everything that comes back until the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port or self.port)
        with contextlib.closing(writer):
            writer.write(data)
            async with asyncio.timeout(seconds):
                return await reader.read(-1)


Handler = "Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]"


@dataclass
class Upstream:
    """A server that notes what it gets and answers as told."""

    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] | None = None
    received: list[bytes] = field(default_factory=list)
    answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if self.handler is not None:
                await self.handler(reader, writer)
                return
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            body = await reader.readexactly(length) if length else b""
            self.received.append(head + body)
            writer.write(self.answer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def running(
    upstream: Upstream,
    *,
    limits: messages.Limits | None = None,
    gateway: str = "",
    files_max: int = 0,
    ca_file: Path | None = None,
    authority: messages.Authority | None = None,
    **configuration: Any,
) -> AsyncIterator[Plane]:
    """A plane in front of an upstream on a TCP port."""
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    proxy = address if configuration.get("forward_mode") is messages.ForwardMode.PROXY else ""
    plane = Plane(
        configuration=messages.Configure(
            gateway="openai",
            host=address,
            limits=limits or messages.Limits(),
            **{"credential": "sk-secret", **configuration},
        ),
        dialer_configuration=messages.ConfigureDialer(gateway=gateway or address, forward_proxy=proxy),
        files_max=files_max,
        ca_file=ca_file,
        authority=authority,
    )
    try:
        await plane.start()
        yield plane
    finally:
        plane.stop()
        server.close()
