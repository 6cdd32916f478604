"""The dialer process: on the daemon's word it passes a worker one connected socket to the gateway, and nothing else.

`python -I -m gateway_client.egress.dialer --user NAME`, daemon on fd 3. The destinations are fixed by the first
message, names resolved before it gives everything up. It keeps a duplicate of every socket it passed and of every
listener, so a cut is shutdown(2) here, whatever a worker does. It parses nothing an agent sends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import signal
import socket
import sys
import termios
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, assert_never

import uvloop

from gateway_client.egress import messages
from gateway_client.egress.codec import BadFrame, frame_bytes_max
from gateway_client.egress.confine import DIAL, STEADY, Confinement, confine, forbid_io_uring
from gateway_client.egress.decide import Upstream
from gateway_client.egress.link import Link
from gateway_client.egress.target import BadTarget, parse_authority
from gateway_client.gateways import preface as preface_format

if TYPE_CHECKING:
    from collections.abc import Callable

DAEMON_FD: Final = 3
duplicates_max: Final = 16384
listeners_per_agent_max: Final = 16
connect_retry_seconds: Final = 0.01
refused_retry_seconds: Final = 0.05
refused_seconds_max: Final = 1.0


@dataclass(frozen=True, slots=True)
class Destination:
    """One address, resolved."""

    family: socket.AddressFamily
    address: str | tuple[str, int]


class CannotDial(Exception):  # noqa: N818 - named for what it says
    """A connection could not be made; the text goes to the worker and the log."""


def resolve(text: str) -> Destination:
    """Give the address of `unix:/path` or `host:port`; raise CannotDial."""
    if text.startswith("unix:"):
        return Destination(socket.AF_UNIX, text.removeprefix("unix:"))
    try:
        authority = parse_authority(text, default=None)
        found = socket.getaddrinfo(authority.host, authority.port, type=socket.SOCK_STREAM)
    except (BadTarget, OSError) as error:
        raise CannotDial(f"cannot resolve {text}: {error}; check [gateway] url and forward_proxy") from error
    family, _, _, _, address = found[0]
    return Destination(family, (str(address[0]), int(address[1])))


def preface_bytes(preface: messages.Preface) -> bytes:
    return preface_format.encode(
        preface_format.Preface(
            agent_id=preface.agent_id,
            name=preface.name,
            x=preface.x,
            allow=preface_format.parse_allow(preface.allow),
            labels=preface.labels,
        )
    )


@dataclass(slots=True)
class Kept:
    """A duplicate of an upstream socket that a worker has."""

    agent_id: str
    key: tuple[str, int]
    endpoint: socket.socket


@dataclass(slots=True)
class Table:
    """The duplicates, by exchange; bounded, and emptied by `Done`, a cut and a worker's end.

    Not by a gateway that hangs up: what it sent before is still on its way to the agent, and a cut has to stop that.
    """

    by_key: dict[tuple[str, int], Kept] = field(default_factory=dict)

    def add(self, kept: Kept) -> None:
        self.by_key[kept.key] = kept

    def drop(self, kept: Kept) -> None:
        self.by_key.pop(kept.key, None)
        kept.endpoint.close()

    def of_agent(self, agent_id: str) -> list[Kept]:
        return [kept for kept in self.by_key.values() if kept.agent_id == agent_id]

    def of_worker(self, worker_id: str) -> list[Kept]:
        return [kept for kept in self.by_key.values() if kept.key[0] == worker_id]


@dataclass(slots=True)
class Dialing:
    """A connection under way; whoever cuts it cancels `task`."""

    agent_id: str
    task: asyncio.Task[None]


class Dialer:
    def __init__(
        self, daemon: socket.socket, configuration: messages.ConfigureDialer, *, stop: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._configuration = configuration
        self._gateway = resolve(configuration.gateway)
        self._proxy = resolve(configuration.forward_proxy) if configuration.forward_proxy else None
        self._workers: dict[str, Link] = {}
        self._listeners: dict[str, list[socket.socket]] = {}
        self._table = Table()
        self._dialing: dict[tuple[str, int], Dialing] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._daemon = Link(self._loop, daemon, on_frame=self._from_daemon, on_gone=stop)

    def ready(self, posture: tuple[str, ...]) -> None:
        self._tell(messages.DialerReady(pid=os.getpid(), uid=os.getuid(), posture=posture))

    def _tell(self, message: messages.FromDialerToDaemon) -> None:
        self._daemon.send(messages.encode(message))

    def _from_daemon(self, frame: bytes, fds: list[int]) -> None:
        try:
            message: messages.FromDaemonToDialer = messages.decode(frame, messages.FROM_DAEMON_TO_DIALER)
        except BadFrame as error:
            self._daemon.close()
            sys.stderr.write(f"dialer: {error}\n")
        else:
            self._obey(message, fds)
        for fd in fds:
            os.close(fd)

    def _obey(self, message: messages.FromDaemonToDialer, fds: list[int]) -> None:
        match message:
            case messages.ConfigureDialer():
                pass  # the first one counts: destinations never change
            case messages.AttachWorker():
                if fds:
                    self._attach(message.worker_id, socket.socket(fileno=fds.pop(0)))
            case messages.Dial():
                self._begin(message)
            case messages.CutUpstreams():
                self._cut(message.agent_id)
            case messages.CutExchanges():
                self._cut_exchanges(message)
            case messages.Listener():
                kept = self._listeners.setdefault(message.agent_id, [])
                if fds and len(kept) < listeners_per_agent_max:
                    kept.append(socket.socket(fileno=fds.pop(0)))
            case messages.Forget():
                self._forget(message.agent_id)
            case _:
                assert_never(message)

    # --- workers

    def _attach(self, worker_id: str, endpoint: socket.socket) -> None:
        previous = self._workers.pop(worker_id, None)
        if previous is not None:
            previous.close()
        link: Link | None = None

        def gone() -> None:
            # What this worker had is closed with it; another channel of the same name may have come meanwhile.
            if self._workers.get(worker_id) is link:
                del self._workers[worker_id]
            for kept in self._table.of_worker(worker_id):
                self._table.drop(kept)
            for key in [key for key in self._dialing if key[0] == worker_id]:
                self._stop_dialing(key)

        def frame_came(frame: bytes, fds: list[int]) -> None:
            self._from_worker(worker_id, frame, fds)

        link = Link(self._loop, endpoint, on_frame=frame_came, on_gone=gone)
        self._workers[worker_id] = link

    def _from_worker(self, worker_id: str, frame: bytes, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        try:
            message: messages.Done = messages.decode(frame, messages.FROM_WORKER_TO_DIALER)
        except BadFrame as error:
            self._workers[worker_id].close()
            sys.stderr.write(f"dialer: worker {worker_id}: {error}\n")
            return
        kept = self._table.by_key.get((worker_id, message.x))
        if kept is not None:
            self._table.drop(kept)

    # --- dialing

    def _begin(self, order: messages.Dial) -> None:
        """Start to dial. It counts as under way from this moment: a cut may be the very next message in the queue."""
        key = (order.worker_id, order.x)
        if key in self._dialing or key in self._table.by_key:
            self._failed(order.worker_id, order.x, "cannot connect: this exchange has a connection")
            return
        task = self._loop.create_task(self._dial(order))
        self._dialing[key] = Dialing(order.agent_id, task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dial(self, order: messages.Dial) -> None:
        key = (order.worker_id, order.x)
        try:
            endpoint = await self._connected(order)
        except (CannotDial, OSError, TimeoutError, ValueError) as error:
            self._dialing.pop(key, None)
            self._failed(
                order.worker_id, order.x, str(error) or "cannot connect to the gateway: it did not answer in time"
            )
            return
        if self._dialing.pop(key, None) is None:  # cut in the moment in which it was connected
            endpoint.close()
            return
        # Ours is kept before theirs is sent: a cut that comes in between finds it.
        self._table.add(Kept(order.agent_id, key, endpoint))
        self._to_worker(order.worker_id, messages.UpstreamReady(order.x), fd=endpoint.fileno())
        self._tell(messages.Dialed(order.worker_id, order.x, ok=True))

    def _failed(self, worker_id: str, x: int, why: str) -> None:
        self._to_worker(worker_id, messages.UpstreamFailed(x, why[:200]))
        self._tell(messages.Dialed(worker_id, x, ok=False, error=why[:200]))

    async def _connected(self, order: messages.Dial) -> socket.socket:
        destination = self._gateway if order.upstream is Upstream.API or order.preface is not None else self._proxy
        if destination is None or not order.upstream.opens:
            raise CannotDial("cannot connect: no forward proxy is configured")
        if order.worker_id not in self._workers:
            raise CannotDial("cannot connect: the worker is gone")
        if len(self._table.by_key) + len(self._dialing) > duplicates_max:
            raise CannotDial("cannot connect: too many connections are open")
        first = preface_bytes(order.preface) if order.preface is not None else b""
        endpoint = await self._connect_patiently(destination)
        try:
            # A fresh socket takes all of a preface at once; less than all would be a preface cut short.
            if first and endpoint.send(first, socket.MSG_NOSIGNAL) != len(first):
                raise CannotDial("cannot connect to the gateway: it does not take the preface")
            if destination.family != socket.AF_UNIX:
                endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            endpoint.close()
            raise CannotDial(
                f"cannot connect to the gateway: {error.strerror or 'it did not answer in time'}"
            ) from error
        except BaseException:
            endpoint.close()
            raise
        return endpoint

    async def _connect_patiently(self, destination: Destination) -> socket.socket:
        """Connect, again where nobody listens just now: a gateway that is started anew is back in a moment.

        Nothing has been sent at that point, so this repeats no call; once a byte has been, nothing is ever repeated.
        """
        deadline = self._loop.time() + refused_seconds_max
        while True:
            endpoint = socket.socket(destination.family, socket.SOCK_STREAM)
            try:
                endpoint.setblocking(False)
                async with asyncio.timeout(self._configuration.connect_seconds_max):
                    await self._connect(endpoint, destination)
            except (ConnectionRefusedError, FileNotFoundError) as error:
                endpoint.close()
                if self._loop.time() > deadline:
                    raise CannotDial(f"cannot connect to the gateway: {error.strerror}") from error
            except OSError as error:
                endpoint.close()
                raise CannotDial(
                    f"cannot connect to the gateway: {error.strerror or 'it did not answer in time'}"
                ) from error
            except BaseException:
                endpoint.close()
                raise
            else:
                return endpoint
            await asyncio.sleep(refused_retry_seconds)

    async def _connect(self, endpoint: socket.socket, destination: Destination) -> None:
        """Connect without the loop's own helper, which would start a resolver thread."""
        number = endpoint.connect_ex(destination.address)
        while (
            number == errno.EAGAIN
        ):  # a unix listener whose backlog is full (connect(2)); nothing tells when it is not
            await asyncio.sleep(connect_retry_seconds)
            number = endpoint.connect_ex(destination.address)
        if number == errno.EINPROGRESS:
            connected: asyncio.Future[None] = self._loop.create_future()
            self._loop.add_writer(endpoint.fileno(), _settle, connected)
            try:
                await connected
            finally:
                self._loop.remove_writer(endpoint.fileno())
            number = endpoint.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))  # Python picks the subclass by the number

    def _to_worker(self, worker_id: str, message: messages.FromDialerToWorker, *, fd: int | None = None) -> None:
        link = self._workers.get(worker_id)
        if link is not None:
            link.send(messages.encode(message), fd=fd)

    # --- cutting

    def _cut(self, agent_id: str) -> None:
        started = time.monotonic()
        for key in [key for key, dialing in self._dialing.items() if dialing.agent_id == agent_id]:
            self._stop_dialing(key)
        relays = self._table.of_agent(agent_id)
        waiting = 0
        for kept in relays:
            waiting += _unread(kept.endpoint)
            self._shut(kept)
        listeners = self._listeners.pop(agent_id, [])
        for listener in listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        milliseconds = (time.monotonic() - started) * 1000
        self._tell(
            messages.CutDone(
                agent_id, relays=len(relays), bytes_waiting=waiting, listeners=len(listeners), ms=milliseconds
            )
        )

    def _cut_exchanges(self, order: messages.CutExchanges) -> None:
        relays = 0
        for x in order.xs:
            key = (order.worker_id, x)
            self._stop_dialing(key)
            kept = self._table.by_key.get(key)
            if kept is not None:
                self._shut(kept)
                relays += 1
        self._tell(messages.ExchangesCut(order.token, relays))

    def _stop_dialing(self, key: tuple[str, int]) -> None:
        dialing = self._dialing.pop(key, None)
        if dialing is not None:
            # A task that has not begun never runs then, so what it would say is said here.
            dialing.task.cancel()
            self._failed(*key, messages.CUT)

    def _shut(self, kept: Kept) -> None:
        with contextlib.suppress(OSError):  # the far end may have gone first
            kept.endpoint.shutdown(socket.SHUT_RDWR)
        self._table.drop(kept)

    def _forget(self, agent_id: str) -> None:
        for key in [key for key, dialing in self._dialing.items() if dialing.agent_id == agent_id]:
            self._stop_dialing(key)
        for kept in self._table.of_agent(agent_id):
            self._table.drop(kept)
        for listener in self._listeners.pop(agent_id, []):
            listener.close()


def _unread(endpoint: socket.socket) -> int:
    """Return how many bytes have arrived that nobody has read (FIONREAD, tcp(7) and unix(7)); 0 where none can tell."""
    try:
        return int.from_bytes(fcntl.ioctl(endpoint, termios.FIONREAD, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def first_message(daemon: socket.socket) -> messages.ConfigureDialer:
    """Wait for the destinations; raise BadFrame for anything else."""
    daemon.setblocking(True)
    return messages.decode(daemon.recv(frame_bytes_max), (messages.ConfigureDialer,))


async def serve(user: str, daemon: socket.socket, configuration: messages.ConfigureDialer) -> None:
    stopped = asyncio.Event()
    dialer = Dialer(daemon, configuration, stop=stopped.set)
    posture = confine(Confinement(user=user, system_calls=(*STEADY, *DIAL), own_network=False))
    dialer.ready(posture)
    await stopped.wait()  # without a daemon there is nobody to dial for
    os._exit(0)  # an orderly end of the loop opens sockets, which the filter refuses


def main() -> int:
    parser = argparse.ArgumentParser(prog="gateway_client.egress.dialer")
    parser.add_argument("--user", required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    forbid_io_uring()
    os.closerange(DAEMON_FD + 1, 1 << 20)
    gc.freeze()
    daemon = socket.socket(fileno=DAEMON_FD)
    try:
        uvloop.run(serve(arguments.user, daemon, first_message(daemon)))
    except (OSError, BadFrame, CannotDial) as error:
        sys.stderr.write(f"dialer: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
