"""The processes of the egress path as the daemon holds them: workers, and the dialer beside them.

They are started here, told what to serve, and started again when they die; while one is gone its agents have no egress.
What is *decided* about a request is not here (exchanges.py).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from gateway_client.egress import messages
from supervisord.channel import Channel, close_all
from supervisord.dialer_process import RESTART_SECONDS, DialerProcess
from supervisord.errors import StockadeError, Unavailable
from supervisord.processes import Child, end_leftover, python, spawn_connected, start_again

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence
    from pathlib import Path

    from supervisord.config import UsersConfig

log = structlog.get_logger()

READY_SECONDS_MAX: Final = 20.0
RETIRE_SECONDS_MAX: Final = 1.0
RETIRE_LOOK_SECONDS: Final = 0.01
CUT_SECONDS_MAX: Final = 2.0
CUT_FIRST_SECONDS_MAX: Final = 0.1
"""What is given to the dialer before those act who would end the connections that it is to cut and count."""
DIALER_FD: Final = 4


class Judge(Protocol):
    """Who answers what workers ask."""

    def ask(self, worker_id: str, ask: messages.Ask) -> None: ...
    def outcome(self, worker_id: str, outcome: messages.Outcome) -> None: ...
    def moved(self, worker_id: str, moved: messages.Moved) -> None: ...
    def open_count(self, agent_id: str) -> int: ...
    def rejected(self, rejected: messages.Rejected) -> None: ...
    def not_connected(self, cause: str) -> None: ...
    def worker_lost(self, worker_id: str) -> None: ...


@dataclass(slots=True)
class Served:
    """An agent's listener, and which worker has it."""

    agent_id: str
    name: str
    labels: dict[str, str]
    listener: int
    place: str
    frozen: bool = False
    authority: messages.Authority | None = None
    gate: dict[int, int] = field(default_factory=dict)
    """Of a transparent network: descriptors by port, 0 is the name server's for datagrams."""


@dataclass(slots=True)
class Worker:
    """One egress worker process.

    `place` outlives it: what is served there is served by the process that is started next. `worker_id` does not, so
    that an answer or a socket meant for a process that died never reaches another agent through its successor.
    """

    worker_id: str
    place: str
    dedicated: bool
    child: Child
    channel: Channel
    dialer_end: socket.socket
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    posture: tuple[str, ...] = ()


class EgressPlane:
    """Starts and holds workers and dialer; `judge` is set before `start`."""

    def __init__(
        self,
        *,
        users: UsersConfig,
        configure: messages.Configure,
        dialer: messages.ConfigureDialer,
        workers: int,
        records: Path,
        ca_file: Path | None = None,
    ) -> None:
        self.judge: Judge
        self._users = users
        self._configure = configure
        self._shared = workers
        self._records = records
        self._ca = () if ca_file is None else ("--ca-file", str(ca_file))
        self._numbers = itertools.count(1)
        self._starts = itertools.count(1)
        self._workers: dict[str, Worker] = {}
        self._at: dict[str, Worker] = {}
        self._missing: set[str] = set()  # places whose worker died and has no successor yet
        self._served: dict[str, Served] = {}
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._dialer = DialerProcess(
            user=users.dialer,
            configure=dialer,
            record=records / "egress-dialer.json",
            introduce=self._introduce,
            died=self._dialer_died,
            not_connected=lambda cause: self.judge.not_connected(cause),  # noqa: PLW0108 - the judge is set later
            in_background=self._in_background,
        )

    async def start(self) -> None:
        """Start everything and wait until it is confined and ready; raises Unavailable."""
        for record in self._records.glob("egress-*.json"):
            if end_leftover(record):
                log.warning("ended a process of a former daemon", record=record.name)
        self._dialer.start()
        for _ in range(self._shared):
            self._start_worker(dedicated=False)
        await self._wait_ready("dialer", self._dialer.ready)
        for worker in list(self._workers.values()):
            await self._wait_ready("egress worker", worker.ready)

    async def stop(self) -> None:
        """End all processes; agents then have no egress until a daemon starts again."""
        self._stopping = True
        await asyncio.gather(*(worker.child.end() for worker in self._workers.values()), self._dialer.end())
        for worker in self._workers.values():
            worker.channel.close()
            worker.dialer_end.close()
        self._dialer.close()
        for record in self._records.glob("egress-*.json"):
            record.unlink(missing_ok=True)

    def health(self) -> dict[str, tuple[bool, str]]:
        """Which of the processes is there and ready."""
        ready = sum(worker.ready.is_set() for worker in self._workers.values())
        wanted = len(self._workers) + len(self._missing)
        return {
            "dialer": (self._dialer.ready.is_set(), "" if self._dialer.ready.is_set() else "is being started"),
            "egress": (
                bool(ready) and ready == wanted,
                f"{ready} of {wanted} workers are ready",
            ),
        }

    # --- what agents get

    def listen(
        self,
        agent_id: str,
        *,
        name: str,
        labels: dict[str, str],
        listener: int,
        dedicated: bool,
        frozen: bool = False,
        authority: messages.Authority | None = None,
    ) -> None:
        """Serve an agent's listener (the descriptor is duplicated); raises Unavailable where no worker runs."""
        try:
            own = os.dup(listener)  # before a worker is started for it alone
        except OSError as error:
            raise Unavailable(
                f"cannot open the gate: {error.strerror}", remedy="see how many files stockaded may have open"
            ) from error
        try:
            worker = self._choose(dedicated=dedicated)
        except BaseException:
            os.close(own)
            raise
        served = Served(agent_id, name, labels, own, worker.place, frozen, authority)
        self._served[agent_id] = served
        self._give(worker, served)
        self._dialer.tell(messages.Listener(agent_id), (served.listener,))

    def has_gate(self, agent_id: str) -> bool:
        """Tell whether the sockets of an agent's transparent network are served."""
        served = self._served.get(agent_id)
        return served is not None and bool(served.gate)

    def open_gate(self, agent_id: str, sockets: Mapping[int, int]) -> bool:
        """Serve the sockets of a transparent network too (they are taken); False where the agent is not served."""
        served = self._served.get(agent_id)
        if served is None:
            return False
        served.gate |= sockets
        worker = self._at.get(served.place)
        for port, fd in sockets.items():
            if worker is not None:
                self._tell(worker, messages.Gate(agent_id, port), (fd,))
            if port:
                self._dialer.tell(messages.Listener(agent_id), (fd,))
        return True

    def unlisten(self, agent_id: str) -> None:
        """Forget an agent: what it has open is reset, and its listener closed."""
        served = self._served.pop(agent_id, None)
        if served is None:
            return
        worker = self._at.get(served.place)
        if worker is not None:
            self._tell(worker, messages.Unlisten(agent_id))
            if worker.dedicated:
                self._in_background(self._retire(worker, agent_id))
        self._dialer.tell(messages.Forget(agent_id))
        close_all([served.listener, *served.gate.values()])

    async def cut(self, agent_id: str) -> messages.CutDone | None:
        """Close the gate: listener and every upstream socket are shut down, then the worker is told.

        Nobody has to co-operate: the listener is shut down here, and the dialer holds duplicates of the rest. The
        worker waits for its turn, though not for a dialer that hangs: what it ends itself the dialer counts no more.
        Gives None where the dialer did not answer in time.
        """
        served = self._served.get(agent_id)
        if served is None:
            return None
        for fd in (served.listener, *(fd for port, fd in served.gate.items() if port)):
            shut_listener(fd)
        future = self._dialer.cut(agent_id)
        try:
            await asyncio.wait({future}, timeout=CUT_FIRST_SECONDS_MAX)
            worker = self._at.get(served.place)
            if worker is not None:
                self._tell(worker, messages.Cut(agent_id=agent_id))
            await asyncio.wait({future}, timeout=CUT_SECONDS_MAX)
            return future.result() if future.done() else None
        finally:
            self._dialer.forget_cut(agent_id)

    def cut_exchanges(self, worker_id: str, xs: Sequence[int]) -> list[asyncio.Future[None]]:
        """Reset these exchanges of a worker: dialer and worker are both told before this returns, and neither is asked.

        The futures are done when the dialer has shut the sockets down, or has died, which ends them too. Never raises:
        whoever cannot be told is ended, and its sockets with it.
        """
        told = []
        worker = self._workers.get(worker_id)
        for start in range(0, len(xs), messages.xs_per_cut_max):
            part = tuple(xs[start : start + messages.xs_per_cut_max])
            future = self._dialer.cut_exchanges(worker_id, part)
            if future is not None:
                told.append(future)
            if worker is not None:
                self._tell(worker, messages.Cut(xs=part))
        return told

    def freeze(self, agent_id: str) -> None:
        self._switch(agent_id, frozen=True)

    def thaw(self, agent_id: str) -> None:
        self._switch(agent_id, frozen=False)

    def is_frozen(self, agent_id: str) -> bool:
        """Tell whether an agent's gate is closed for as long as it is to stand still."""
        served = self._served.get(agent_id)
        return served is not None and served.frozen

    def _switch(self, agent_id: str, *, frozen: bool) -> None:
        served = self._served.get(agent_id)
        if served is not None:
            served.frozen = frozen
            self._to_worker_of(agent_id, messages.Freeze(agent_id) if frozen else messages.Thaw(agent_id))

    def answer(self, worker_id: str, x: int, verdict: messages.Verdict) -> None:
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        try:
            messages.encode(messages.Answer(x, verdict))
        except messages.BadFrame as error:
            log.error("an answer does not fit a frame", worker=worker_id, cause=str(error))
            verdict = messages.Refuse(503, "limit", "the answer is too long")
        self._tell(worker, messages.Answer(x, verdict))

    def lend(self, worker_id: str, agent_id: str, count: int, last: bool) -> bool:  # noqa: FBT001 - as Loans tells it
        """Tell a worker that so many more bytes of an agent may pass; False where that worker is gone."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            self._tell(worker, messages.Lend(agent_id, count, last))
        return worker is not None

    def dial(self, order: messages.Dial) -> bool:
        """Have a socket connected and passed on; the worker learns of a failure from the dialer.

        False where there is no dialer to tell just now: nobody will answer the worker then.
        """
        return self._dialer.tell(order)

    # --- workers

    def _choose(self, *, dedicated: bool) -> Worker:
        if dedicated:
            return self._start_worker(dedicated=True)
        shared = [worker for worker in self._workers.values() if not worker.dedicated]
        if not shared:
            raise Unavailable("cannot open the gate: no egress worker runs", remedy="try again in a moment")
        load = {worker.place: 0 for worker in shared}
        for served in self._served.values():
            if served.place in load:
                load[served.place] += 1
        return min(shared, key=lambda worker: load[worker.place])

    def _start_worker(self, *, dedicated: bool, place: str = "") -> Worker:
        place = place or f"w{next(self._numbers)}"
        worker_id = f"{place}.{next(self._starts)}"
        to_dialer, dialer_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with to_dialer:
            try:
                child, ours = spawn_connected(
                    f"egress worker {worker_id}",
                    python("gateway_client.egress.server", "--user", self._users.egress, *self._ca),
                    fds={DIALER_FD: to_dialer.fileno()},
                    on_exit=lambda _code: self._worker_exited(worker_id),
                    record=self._records / f"egress-{place}.json",
                )
            except Unavailable:
                dialer_end.close()
                raise
        self._missing.discard(place)
        channel = Channel(
            ours,
            name=f"egress worker {worker_id}",
            on_packet=lambda data, fds: self._from_worker(worker_id, data, fds),
            on_close=lambda: self._worker_silent(worker_id),
            packet_bytes_max=messages.frame_bytes_max,
        )
        worker = Worker(worker_id, place, dedicated, child, channel, dialer_end)
        self._workers[worker_id] = self._at[place] = worker
        self._tell(worker, self._configure)
        self._dialer.tell(messages.AttachWorker(worker_id), (dialer_end.fileno(),))
        return worker

    def _end_worker(self, worker: Worker) -> None:
        self._remove(worker)
        worker.channel.close()
        worker.dialer_end.close()
        self.judge.worker_lost(worker.worker_id)
        (self._records / f"egress-{worker.place}.json").unlink(missing_ok=True)
        self._in_background(worker.child.end())

    async def _retire(self, worker: Worker, agent_id: str) -> None:
        """End the worker of one agent alone once it has told how what it had open ended."""
        deadline = asyncio.get_running_loop().time() + RETIRE_SECONDS_MAX
        while self.judge.open_count(agent_id) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(RETIRE_LOOK_SECONDS)
        if self._workers.get(worker.worker_id) is worker:
            self._end_worker(worker)

    def _remove(self, worker: Worker) -> None:
        del self._workers[worker.worker_id]
        if self._at.get(worker.place) is worker:
            del self._at[worker.place]

    def _worker_silent(self, worker_id: str) -> None:
        """A worker that closed its channel or sent too much is ended; its exit starts another."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.child.signal(signal.SIGKILL)

    def _worker_exited(self, worker_id: str) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or self._stopping:
            return
        log.error("egress worker died", worker=worker_id)
        self._remove(worker)
        worker.channel.close()
        worker.dialer_end.close()
        self.judge.worker_lost(worker_id)
        self._missing.add(worker.place)

        async def start() -> None:
            self._replace_worker(worker)

        self._in_background(
            start_again(
                f"egress worker {worker.place}",
                start,
                wanted=lambda: self._wants(worker),
                pause_seconds=RESTART_SECONDS,
            )
        )

    def _wants(self, dead: Worker) -> bool:
        orphaned = any(served.place == dead.place for served in self._served.values())
        wanted = not self._stopping and (orphaned or not dead.dedicated)
        if not wanted:
            self._missing.discard(dead.place)
        return wanted

    def _replace_worker(self, dead: Worker) -> None:
        worker = self._start_worker(dedicated=dead.dedicated, place=dead.place)
        for served in [served for served in self._served.values() if served.place == dead.place]:
            self._give(worker, served)

    def _give(self, worker: Worker, served: Served) -> None:
        order = messages.Listen(served.agent_id, served.name, served.labels, served.authority)
        self._tell(worker, order, (served.listener,))
        for port, fd in served.gate.items():
            self._tell(worker, messages.Gate(served.agent_id, port), (fd,))
        if served.frozen:
            self._tell(worker, messages.Freeze(served.agent_id))

    def _from_worker(self, worker_id: str, data: bytes, fds: list[int]) -> None:
        close_all(fds)  # a worker has nothing to give us
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        try:
            message = messages.decode(data, messages.FROM_WORKER_TO_DAEMON)
        except messages.BadFrame as error:
            log.error("egress worker sent what is no message", worker=worker_id, cause=str(error))
            worker.child.signal(signal.SIGKILL)
            return
        match message:
            case messages.Ready():
                worker.posture = message.posture
                worker.ready.set()
            case messages.Moved():
                # Of an agent that has ended, too: its labels go on. More is lent to whoever serves the agent alone.
                served = self._served.get(message.agent_id)
                mine = served is not None and served.place == worker.place
                self.judge.moved(worker_id, message if mine else replace(message, want=0))
            case messages.Ask() | messages.Outcome() | messages.Rejected():
                # A worker that was taken over may name any agent: it speaks for those it serves alone.
                served = self._served.get(message.agent_id)
                if served is not None and served.place == worker.place:
                    self._pass_on(worker_id, message)
                elif isinstance(message, messages.Ask):
                    self.answer(worker_id, message.x, messages.Refuse(503, "agent_not_running", "the agent has ended"))
                elif isinstance(message, messages.Outcome):
                    self.judge.outcome(worker_id, message)

    def _pass_on(self, worker_id: str, message: messages.Ask | messages.Outcome | messages.Rejected) -> None:
        match message:
            case messages.Ask():
                self.judge.ask(worker_id, message)
            case messages.Outcome():
                self.judge.outcome(worker_id, message)
            case messages.Rejected():
                self.judge.rejected(message)

    # --- dialer

    def _introduce(self) -> None:
        """Tell a dialer that has just been started of every worker and listener."""
        for worker in self._workers.values():
            self._dialer.tell(messages.AttachWorker(worker.worker_id), (worker.dialer_end.fileno(),))
        for served in self._served.values():
            for fd in (served.listener, *(fd for port, fd in served.gate.items() if port)):
                self._dialer.tell(messages.Listener(served.agent_id), (fd,))

    def _dialer_died(self) -> None:
        """Cut everything: nobody may wait for one that is gone, and nothing it had duplicates of may stay open."""
        for served in self._served.values():
            self._to_worker_of(served.agent_id, messages.Cut(agent_id=served.agent_id))

    # --- telling

    def _to_worker_of(self, agent_id: str, message: object) -> None:
        served = self._served.get(agent_id)
        worker = None if served is None else self._at.get(served.place)
        if worker is not None:
            self._tell(worker, message)

    def _tell(self, worker: Worker, message: object, fds: Sequence[int] = ()) -> None:
        """Send it; a worker that cannot be told is ended: what it missed may have been a cut."""
        try:
            worker.channel.send(messages.encode(message), fds)
        except (StockadeError, messages.BadFrame) as error:
            if self._stopping:
                return
            log.error("cannot tell an egress worker, which is ended", worker=worker.worker_id, cause=str(error))
            worker.child.signal(signal.SIGKILL)

    async def _wait_ready(self, what: str, event: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(READY_SECONDS_MAX):
                await event.wait()
        except TimeoutError as error:
            raise Unavailable(
                f"cannot start: the {what} is not ready after {READY_SECONDS_MAX:g} s",
                remedy="its messages are above in the daemon's journal; `stockaded --check` tests the host",
            ) from error

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def shut_listener(listener: int) -> None:
    """Shut a listening socket down: nobody's duplicate of it accepts any more (shutdown(2))."""
    with socket.socket(fileno=os.dup(listener)) as sock:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("the listener was shut down before")
