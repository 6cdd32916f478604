"""The launcher's channel: one JSON object a SEQPACKET message; requests have `rq`, answers the same `rq`, events `ev`.

    hello    [group of an earlier guard]   -> version, pid, agents, filters + [group of the guard, if there is one];
                                              then an event `adopt` for each live agent
    filter   digest + [memfd]              -> ok
    launch   plan, meta + [fds of the plan] -> pid, cgroup, posture, timings_us + [pidfd of pid 1, listener]
    go       agent_id                      -> after execve: pid, started_at
    abort    agent_id                      -> when undone
    exec     agent_id, stream_id, argv, env, cwd, tty, stdin -> after execve: pid
    stdin    stream_id, data (base64), eof -> when written
    resize   stream_id, rows, cols         -> ok
    signal   agent_id or stream_id, signal -> ok
    kill     agent_id, deadline_ms         -> processes_killed, egress_cut_ms, dead_ms, verified_empty, already, left,
                                              problem
    end_exec agent_id, stream_id           -> known, processes_killed, verified_empty, left: of all descendants
    freeze   agent_id; thaw agent_id       -> frozen
    stats    agent_ids                     -> stats
    layer    agent_id                      -> ok + [top of what the agent changed, read-only]
    drop     agent_id                      -> ok; the layer of an agent that has ended is no more
    counters agent_id                      -> counters
    examine  agent_id                      -> effective: what the kernel says is in force now, and its drift
    gate     agent_id, ports               -> ok + [name server's socket, a listener a port] of a transparent network
    adopt    agent_id + [listener]         -> ok; a restarted launcher gets the door back
    show     agent_id, bind + [source]     -> when it is there: place, degraded + [group of the guard]
    take     agent_id, target              -> when nothing of it can be opened: already, processes_killed + [the group]

Errors: `{"rq", "ok": false, "error": {"step", "errno", "message", "remedy"}}`, errno by name. Events: `adopt`
(agent_id, meta, posture, ids: the first of its range + [pidfd, listener]), `exited` (agent_id, status, oom),
`exec_exited` (agent_id, stream_id, status), `met_limit` (agent_id, kind, details: sandbox/limits_watch.py, bounded
there) and `called` (agent_id, stream_id, events: sandbox/watcher.py, bounded there); a status is `{"code", "signal"}`,
one of them null. The stream_id of an agent's first process is its agent_id. The peer must be root (SO_PEERCRED).
Nothing here blocks; what takes time answers later.
"""

# ruff: noqa: PTH108, PTH110, PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import base64
import binascii
import contextlib
import errno
import json
import os
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from sandbox import attach, confine, examine, launching, livebinds, mounted, sockets, sync
from sandbox.attach import ExecOrder, Stream
from sandbox.cgroups import CannotConfine
from sandbox.launching import Follow, Workshop
from sandbox.limits_watch import Kind, Watch
from sandbox.loop import READ, WRITE
from sandbox.notices import Kept
from sandbox.plan import Bind, InvalidPlan, SandboxPlan, Tty, check_terminal, decode, unpack_filters
from sandbox.running import PIDS_SHOWN_MAX, Agent, State, agent_error, read_status
from sandbox.scratch import CannotMakeScratch
from sandbox.sync import StepError

VERSION: Final = 1
CONNECTIONS_MAX: Final = 64
QUEUE_MAX: Final = 8192  # messages; a daemon that reads none for so long has to connect anew
TOLD_QUEUED_MAX: Final = 256  # of some KiB each, and agents say how many there are
FILTER_BYTES_MAX: Final = 256 << 10
FILTERS_MAX: Final = 256
KILL_DEADLINE_MS: Final = 10_000
FREEZE_SECONDS_MAX: Final = 5.0
FREEZE_POLL_SECONDS: Final = 0.002
DESCRIPTORS_MAX: Final = 2
ACCEPT_PAUSE_SECONDS: Final = 0.1
SUPERVISOR_LOSS_SECONDS: Final = 5.0  # a daemon that is restarted or upgraded is back by then

Answer = Callable[..., None]


class Connection:
    """One peer; what does not fit into its socket waits in a bounded queue."""

    def __init__(self, server: "Server", sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._queue: deque[tuple[dict[str, Any], list[int]]] = deque()
        self.greeted = False
        sock.setblocking(False)
        sync.enlarge(sock)
        server.loop.watch(sock.fileno(), READ, self._ready)

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & ~WRITE and self._sock.fileno() >= 0:
            self._read()

    def _read(self) -> None:
        try:
            message, fds = sync.receive(self._sock)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            message, fds = None, []
        if message is None:
            self.close()
            return
        try:
            self._server.perform(self, message, fds)
        finally:
            sync.close_all(fds)

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Send now or later; descriptors are duplicated where they have to wait."""
        if self._sock.fileno() < 0:
            return
        if not self._queue:
            try:
                sync.send(self._sock, message, fds)
            except BlockingIOError:
                self._server.loop.change(self._sock.fileno(), READ | WRITE)
            except OSError:
                self.close()
                return
            else:
                return
        self._queue.append((message, [os.dup(fd) for fd in fds]))
        if len(self._queue) > QUEUE_MAX:
            self.close()

    @property
    def behind(self) -> bool:
        """Whether so much waits for its peer that what agents have told is kept for later, as a bounded number."""
        return len(self._queue) > TOLD_QUEUED_MAX

    def _flush(self) -> None:
        while self._queue:
            message, fds = self._queue[0]
            try:
                sync.send(self._sock, message, fds)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            self._queue.popleft()
            sync.close_all(fds)
        self._server.loop.change(self._sock.fileno(), READ)
        self._server.tell_kept()

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._server.loop.forget(self._sock.fileno())
            self._sock.close()
            while self._queue:
                sync.close_all(self._queue.popleft()[1])
            self._server.connections.discard(self)
            if self.greeted:
                self._server.peer_gone()


class Server:
    """Answers requests; holds the agents."""

    def __init__(self, workshop: Workshop, listener: socket.socket) -> None:
        self.workshop = workshop
        self.loop = workshop.loop
        self.agents: dict[str, Agent] = {}
        self.connections: set[Connection] = set()
        self.on_change: list[Callable[[Agent, str], None]] = []
        self.watch = Watch(self.loop, self.agents, self._met_limit)
        self.told = Kept()
        workshop.watching.say = self._told
        self._follows: dict[str, Follow] = {}
        self._listener = listener
        listener.setblocking(False)
        self._listen()
        self._operations: dict[str, Callable[[Connection, dict[str, Any], list[int], Answer], None]] = {
            "hello": self._hello,
            "filter": self._filter,
            "launch": self._launch,
            "go": self._go,
            "abort": self._abort,
            "exec": self._exec,
            "stdin": self._stdin,
            "resize": self._resize,
            "signal": self._signal,
            "kill": self._kill,
            "end_exec": self._end_exec,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "stats": self._stats,
            "counters": self._counters,
            "examine": self._examine,
            "adopt": self._adopt,
            "gate": self._gate,
            "show": self._show,
            "take": self._take,
            "layer": self._layer,
            "drop": self._drop,
        }

    # --- channel ---

    def _listen(self) -> None:
        self.loop.watch(self._listener.fileno(), READ, self._accept)

    def _accept(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                # Who waits is served when descriptors are free again; asking at once would only keep this busy.
                self.loop.forget(self._listener.fileno())
                self.loop.later(ACCEPT_PAUSE_SECONDS, self._listen)
                return
            _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != 0 or len(self.connections) >= CONNECTIONS_MAX:
                sock.close()
                return
            self.connections.add(Connection(self, sock))

    def perform(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> None:
        """Do one request; whatever goes wrong is the answer."""
        number = message.get("rq")

        def answer(error: StepError | None = None, fds: tuple[int, ...] = (), **fields: Any) -> None:
            if error is not None:
                connection.send({"rq": number, "ok": False, "error": error.to_json()})
            else:
                connection.send({"rq": number, "ok": True, **fields}, fds)

        operation = self._operations.get(str(message.get("op")))
        if operation is None:
            answer(StepError("read request", 0, f"there is no operation {str(message.get('op'))[:64]!r}"))
            return
        self._answering(answer, str(message.get("op")), lambda: operation(connection, message, fds, answer))

    def _answering(self, answer: Answer, name: str, act: Callable[[], None]) -> None:
        """Do something; whatever goes wrong is the answer."""
        try:
            act()
        except StepError as error:
            answer(error)
        except InvalidPlan as error:
            answer(StepError("check request", 0, str(error)))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            answer(StepError("check request", 0, f"{type(error).__name__}: {error}"))
        except Exception as error:  # noqa: BLE001 - one bad request must not end the process that holds every agent
            answer(StepError(name, getattr(error, "errno", 0) or 0, f"{type(error).__name__}: {error}"))

    def broadcast(self, event: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        for connection in list(self.connections):
            if connection.greeted:
                connection.send(event, fds)

    def agent(self, message: dict[str, Any]) -> Agent:
        agent = self.agents.get(str(message["agent_id"]))
        if agent is None:
            raise agent_error(str(message["agent_id"]), str(message["op"]))
        return agent

    def peer_gone(self) -> None:
        """A daemon has gone: what it had half built is undone now, and what must not run without one ends soon."""
        if any(connection.greeted for connection in self.connections):
            return
        for agent in list(self.agents.values()):
            if agent.state in (State.BUILDING, State.BUILT):
                agent.end()
        self.loop.later(SUPERVISOR_LOSS_SECONDS, self._end_unsupervised)

    def _end_unsupervised(self) -> None:
        if any(connection.greeted for connection in self.connections):
            return
        for agent in list(self.agents.values()):
            if agent.meta.get("on_supervisor_loss") == "kill":
                agent.end()

    # --- operations ---

    def _hello(self, connection: Connection, _message: dict[str, Any], fds: list[int], answer: Answer) -> None:
        connection.greeted = True
        if fds and self.workshop.guard.group < 0:
            self.workshop.guard.adopt(os.dup(fds[0]))
            for a in self.agents.values():
                if a.pidfd >= 0:
                    self.workshop.guard.watch(a.pid, a.pidfd)
        agents = [
            {
                "agent_id": a.agent_id,
                "state": "FROZEN" if a.frozen and a.state is State.RUNNING else a.state.value,
                "pid": a.pid,
                "started_at": a.started_at,
                "ids": a.plan.ids.start,
                "cgroup": a.group_name,
                "binds": mounted.listed(a),
            }
            for a in self.agents.values()
        ]
        group = self.workshop.guard.group
        answer(
            version=VERSION,
            pid=os.getpid(),
            agents=agents,
            filters=sorted(self.workshop.filters),
            fds=() if group < 0 else (group,),
        )
        for a in self.agents.values():
            if a.pidfd >= 0:
                its = (a.pidfd, a.listener) if a.listener >= 0 else (a.pidfd,)
                shown = {"meta": a.meta, "posture": a.posture, "ids": a.plan.ids.start}
                connection.send({"ev": "adopt", "agent_id": a.agent_id, **shown}, its)
        self.tell_kept()

    def _filter(self, _connection: Connection, message: dict[str, Any], fds: list[int], answer: Answer) -> None:
        blob = os.pread(fds[0], FILTER_BYTES_MAX + 1, 0)
        if len(blob) > FILTER_BYTES_MAX or len(self.workshop.filters) >= FILTERS_MAX:
            raise StepError("take filter", 0, f"at most {FILTER_BYTES_MAX} bytes and {FILTERS_MAX} filters")
        unpack_filters(blob)
        self.keep_filter(str(message["digest"]), blob)
        answer()

    def keep_filter(self, digest: str, blob: bytes) -> None:
        if not digest or not all(c.isascii() and (c.isalnum() or c in ":-_") for c in digest):
            raise InvalidPlan("digest: must be letters, digits, ':', '-' or '_'")
        self.workshop.filters[digest] = blob
        # A launcher that is restarted needs it for exec into agents that are older than itself.
        path = f"{self.workshop.run_dir}/filters/{digest}"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(blob)

    def _launch(self, _connection: Connection, message: dict[str, Any], fds: list[int], answer: Answer) -> None:
        began = time.perf_counter_ns()
        plan = SandboxPlan.from_json(message["plan"])
        if plan.home is None:
            self._launch_plan(plan, began, message, fds, answer)
            return
        # The last agent that had this home has ended; what it wrote may still be on its way to the disk.
        held = [os.dup(fd) for fd in fds]

        def launch() -> None:
            try:
                self._answering(answer, "launch", lambda: self._launch_plan(plan, began, message, held, answer))
            finally:
                sync.close_all(held)

        self.workshop.when_free(self.workshop.stock.home_path(plan.home), launch)

    def _launch_plan(
        self, plan: SandboxPlan, began: int, message: dict[str, Any], fds: list[int], answer: Answer
    ) -> None:
        meta = dict(message.get("meta") or {})
        if len(json.dumps(meta)) > launching.META_BYTES_MAX:
            raise StepError("check plan", errno.E2BIG, f"meta is longer than {launching.META_BYTES_MAX} bytes")
        self.workshop.check(plan, fds, self.agents.values())
        decode_us = (time.perf_counter_ns() - began) // 1000

        def built(agent: Agent, error: StepError | None) -> None:
            if error is not None:
                self._forget(agent)
                answer(error)
                return
            self._notify(agent, "built")
            agent.posture = posture = launching.posture(self.workshop, agent)
            agent.timings_us["launch"] = (time.perf_counter_ns() - began) // 1000
            fds = (agent.pidfd, agent.listener)
            answer(pid=agent.pid, cgroup=agent.group_name, posture=posture, timings_us=agent.timings_us, fds=fds)

        agent, follow = launching.begin(self.workshop, plan, wire=message["plan"], meta=meta, fds=fds, built=built)
        agent.timings_us["decode"] = decode_us
        # First: whoever hears of a failed launch finds nothing of it.
        agent.gone.insert(0, self.agent_gone)
        sockets.look(agent)
        self.agents[plan.agent_id] = agent
        self._follows[plan.agent_id] = follow

    def _go(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent = self.agent(message)
        follow = self._follows.get(agent.agent_id)
        if follow is None:
            raise StepError("go", 0, f"agent {agent.agent_id} is {agent.state.value}")

        def went(agent: Agent, error: StepError | None) -> None:
            if error is not None:
                self._forget(agent)
                answer(error)
            else:
                answer(pid=agent.pid, started_at=agent.started_at)
                self.watch.add(agent, fresh=True)

        follow.go(went)

    def _abort(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        # Not in STARTING: there the program may run, and only `kill` proves that nothing is left.
        agent = self.agent(message)
        if agent.state not in (State.BUILDING, State.BUILT):
            raise StepError("abort", 0, f"agent {agent.agent_id} is {agent.state.value}; use kill")
        agent.gone.append(lambda _agent: answer())
        agent.end()

    def _exec(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent = self.agent(message)
        names = ("stream_id", "argv", "env", "cwd", "tty", "stdin")
        env = message.get("env", [])
        # What the agent's own program was started with, and what this one sets beside it.
        given = list(env.items()) if isinstance(env, dict) else list(env)
        merged = list((dict(agent.plan.env) | dict(given)).items())
        order = decode(ExecOrder, {name: message[name] for name in names} | {"env": merged}, "exec")

        def started(stream: Stream, error: StepError | None) -> None:
            if error is not None:
                answer(error)
            else:
                answer(pid=stream.pid)

        def exited(stream: Stream, status: dict[str, Any]) -> None:
            self.broadcast(
                {
                    "ev": "exec_exited",
                    "agent_id": stream.agent.agent_id,
                    "stream_id": stream.stream_id,
                    "status": status,
                }
            )

        attach.start(agent, order, started=started, exited=exited)

    def _find(self, message: dict[str, Any]) -> Agent | Stream:
        name = str(message.get("stream_id") or message["agent_id"])
        if name in self.agents:
            return self.agents[name]
        for agent in self.agents.values():
            if name in agent.streams:
                return agent.streams[name]
        raise agent_error(name, str(message["op"]))

    def _stdin(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        target = self._find(message)
        try:
            data = base64.b64decode(message.get("data") or "", validate=True)
        except binascii.Error as error:
            raise StepError("write stdin", 0, "data is not base64") from error

        def written(ok: bool) -> None:  # noqa: FBT001 - a callback of one word
            answer(None if ok else StepError("write stdin", errno.EPIPE, "the stream is closed"))

        if target.feed is None or not target.feed.give(data, eof=bool(message.get("eof")), written=written):
            raise StepError("write stdin", 0, "there is no open stdin, or its buffer is full")

    def _resize(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        target = self._find(message)
        tty = Tty(int(message["rows"]), int(message["cols"]))
        check_terminal(tty)
        if target.terminal < 0:
            raise StepError("resize", 0, "there is no terminal")
        confine.resize(target.terminal, tty)
        answer()

    def _signal(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        self._find(message).signal(int(signal.Signals(int(message["signal"]))))
        answer()

    def _kill(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent_id = str(message["agent_id"])
        agent = self.agents.get(agent_id)
        if agent is None:
            self._killed_before(agent_id, answer)
            return
        already = agent.state is State.ENDING
        deadline_ms = min(max(int(message.get("deadline_ms", KILL_DEADLINE_MS)), 1), 600_000)
        answered = False

        def report(agent: Agent) -> None:
            nonlocal answered
            if answered or agent.ending is None:
                return
            answered = True
            ending = agent.ending
            over = agent.state is State.GONE
            left = list(ending.left) if over else agent.group.pids() if agent.group is not None else []
            answer(
                processes_killed=ending.processes,
                egress_cut_ms=round(ending.egress_cut_ms, 3),
                dead_ms=round(ending.dead_ms, 3),
                verified_empty=over and agent.pidfd < 0 and not ending.problem and not left,
                already=already,
                left=left[:PIDS_SHOWN_MAX],
                problem=ending.problem,
            )

        agent.gone.append(report)
        self.loop.later(deadline_ms / 1000, lambda: report(agent))
        agent.end()

    def _killed_before(self, agent_id: str, answer: Answer) -> None:
        if "/" in agent_id or not os.path.exists(f"{self.workshop.run_dir}/agents/{agent_id}/exit"):
            raise agent_error(agent_id, "kill")
        left = self._left_of(f"{self.workshop.run_dir}/agents/{agent_id}")
        answer(
            processes_killed=0,
            egress_cut_ms=0.0,
            dead_ms=0.0,
            verified_empty=not left,
            already=True,
            left=left,
            problem="processes that no launcher holds: end them by hand" if left else "",
        )

    def _left_of(self, directory: str) -> list[int]:
        """Processes in the group of an agent that is not held here any more: there should be none."""
        try:
            with open(f"{directory}/state.json", encoding="utf-8") as file:
                group = self.workshop.layout.open(self.workshop.instance, str(json.load(file)["group"]))
        except (OSError, ValueError, KeyError, TypeError, CannotConfine):
            return []  # it never was let go, or its group was removed, which takes an empty one
        try:
            return group.pids()[:PIDS_SHOWN_MAX]
        finally:
            group.close()

    def _end_exec(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent, stream_id = self.agent(message), str(message["stream_id"])
        tree = None if agent.group is None else agent.trees().of.get(stream_id)
        if tree is None:  # nothing of it is left, or never was
            answer(known=False, processes_killed=0, verified_empty=True, left=[])
            return
        count = len(tree.pids())
        tree.kill()
        self._await_empty(agent, stream_id, (count, time.monotonic() + KILL_DEADLINE_MS / 1000), answer)

    def _await_empty(self, agent: Agent, stream_id: str, since: tuple[int, float], answer: Answer) -> None:
        """Answer when the kernel says that nothing of it is left, or the time is over."""
        count, deadline = since
        tree = None if agent.exec_trees is None else agent.exec_trees.of.get(stream_id)
        if tree is not None and tree.populated():
            if time.monotonic() < deadline:
                self.loop.later(FREEZE_POLL_SECONDS, lambda: self._await_empty(agent, stream_id, since, answer))
                return
            answer(known=True, processes_killed=count, verified_empty=False, left=tree.pids()[:PIDS_SHOWN_MAX])
            return
        agent.drop_trees()
        answer(known=True, processes_killed=count, verified_empty=True, left=[])

    def _freeze(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent = self._running(message)
        assert agent.group is not None  # noqa: S101 - it runs
        agent.group.freeze()
        agent.frozen = True
        self._await_frozen(agent, answer, FREEZE_SECONDS_MAX)

    def _await_frozen(self, agent: Agent, answer: Answer, seconds: float) -> None:
        if agent.group is None:
            answer(StepError("freeze", 0, "the agent ended"))
        elif agent.group.frozen():
            answer(frozen=True)
        elif seconds <= 0:
            answer(StepError("freeze", errno.ETIMEDOUT, "a process did not stop in time", "kill it instead"))
        else:
            self.loop.later(
                FREEZE_POLL_SECONDS, lambda: self._await_frozen(agent, answer, seconds - FREEZE_POLL_SECONDS)
            )

    def _thaw(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent = self._running(message)
        assert agent.group is not None  # noqa: S101 - it runs
        if not agent.pausing:  # else when that is over
            agent.group.thaw()
        agent.frozen = False
        answer(frozen=False)

    def _running(self, message: dict[str, Any]) -> Agent:
        agent = self.agent(message)
        if agent.state is not State.RUNNING or agent.group is None:
            raise StepError(str(message["op"]), 0, f"agent {agent.agent_id} is {agent.state.value}")
        return agent

    def _stats(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        stats = {}
        for agent_id in list(message["agent_ids"]):
            agent = self.agents.get(agent_id)
            if agent is not None and agent.group is not None:
                now = agent.group.stats()
                stats[agent_id] = {name: getattr(now, name) for name in now.__slots__}
                stats[agent_id]["pids"] -= agent.keeper.pid() > 0  # ours, not the agent's
        answer(stats=stats)

    def _layer_path(self, message: dict[str, Any]) -> str:
        agent_id = str(message["agent_id"])
        if not agent_id or not all(c.isascii() and (c.isalnum() or c in "-_") for c in agent_id):
            raise InvalidPlan("agent_id: must be letters, digits, '-' or '_'")
        path = self.workshop.stock.layer_path(agent_id)
        if not os.path.exists(path):
            raise StepError(str(message["op"]), errno.ENOENT, f"there is no layer of {agent_id}")
        return path

    def _layer(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        path = self._layer_path(message)

        def read() -> None:
            try:
                top = self.workshop.stock.read(path)
            except CannotMakeScratch as error:
                answer(StepError("layer", error.number, str(error), error.remedy))
                return
            answer(fds=(top,))
            os.close(top)

        self.workshop.when_free(path, read)

    def _drop(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        if str(message["agent_id"]) in self.agents:
            raise StepError("drop", errno.EBUSY, "the agent has not ended")
        path = self._layer_path(message)

        def drop() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            answer()

        self.workshop.when_free(path, drop)

    def _counters(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent = self._running(message)
        assert agent.group is not None  # noqa: S101 - it runs
        now = agent.group.counters()
        answer(counters={name: getattr(now, name) for name in now.__slots__})

    def _examine(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent = self._running(message)
        try:
            effective = examine.examine(agent)
        except (OSError, LookupError, ValueError) as error:
            raise StepError("examine", getattr(error, "errno", 0) or 0, f"{error}", "it may have ended") from error
        answer(effective=effective | {"launcher": {"pid": os.getpid(), "protocol": VERSION}})

    def _adopt(self, _connection: Connection, message: dict[str, Any], fds: list[int], answer: Answer) -> None:
        agent = self.agent(message)
        if agent.listener < 0 and fds:
            agent.listener = os.dup(fds[-1])
            self._notify(agent, "built")
        answer()

    def _gate(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent = self.agent(message)
        if not agent.plan.network.transparent or agent.listener < 0:
            raise StepError("open gate", errno.EINVAL, "the agent's network is not transparent, or it has ended")
        try:
            made = self.workshop.pool.open_gate(agent.listener, [int(port) for port in message["ports"]])
        except (OSError, ValueError) as error:
            raise StepError("open gate", getattr(error, "errno", 0) or 0, str(error)) from error
        try:
            answer(ports=list(made), fds=tuple(made.values()))
        finally:
            sync.close_all(tuple(made.values()))

    def _met_limit(self, agent: Agent, kind: Kind, details: dict[str, Any]) -> None:
        limits = agent.plan.limits
        limit = {Kind.PIDS_LIMIT: limits.pids, Kind.THROTTLED: limits.cpus, Kind.MEMORY_PRESSURE: limits.memory_bytes}
        if kind in limit:
            details["limit"] = limit[kind]
        self.broadcast({"ev": "met_limit", "agent_id": agent.agent_id, "kind": kind.value, "details": details})

    def _told(self, agent_id: str, stream_id: str, events: list[dict[str, Any]]) -> None:
        listening = [connection for connection in self.connections if connection.greeted]
        if listening and not any(connection.behind for connection in listening):
            self.broadcast({"ev": "called", "agent_id": agent_id, "stream_id": stream_id, "events": events})
        else:
            self.told.add(agent_id, stream_id, events)

    def tell_kept(self) -> None:
        """Tell what was kept while nobody listened, or whoever did was behind."""
        for agent_id, stream_id, event in self.told.take():
            self._told(agent_id, stream_id, [event])

    def _show(self, _connection: Connection, message: dict[str, Any], fds: list[int], answer: Answer) -> None:
        bind = decode(Bind, message["bind"], "bind")
        livebinds.show(self.workshop, self.agent(message), bind, fds[bind.fd], self._outcome(answer))

    def _take(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        livebinds.take(self.workshop, self.agent(message), str(message["target"]), self._outcome(answer))

    def _outcome(self, answer: Answer) -> livebinds.Done:
        """Answer with the guard's group, which the daemon keeps open too."""

        def done(error: StepError | None, fields: dict[str, Any]) -> None:
            group = self.workshop.guard.group
            if error is not None:
                answer(error)
            else:
                answer(**fields, launcher=os.getpid(), fds=() if group < 0 else (group,))

        return done

    # --- ends ---

    def _notify(self, agent: Agent, what: str) -> None:
        for call in self.on_change:
            call(agent, what)

    def agent_gone(self, agent: Agent) -> None:
        self.workshop.holders.end_used()
        self.agents.pop(agent.agent_id, None)
        self._follows.pop(agent.agent_id, None)
        self.watch.remove(agent)
        self._notify(agent, "gone")
        if agent.started_at:
            status = {"code": agent.status["code"], "signal": agent.status["signal"]}
            self.broadcast({"ev": "exited", "agent_id": agent.agent_id, "status": status, "oom": agent.status["oom"]})
        else:
            launching.remove_directory(agent.directory)

    def _forget(self, agent: Agent) -> None:
        self.agents.pop(agent.agent_id, None)
        self._follows.pop(agent.agent_id, None)

    def tell_ended(self, agent_id: str, directory: str) -> None:
        """Tell of an agent that ended while no launcher was there."""
        with contextlib.suppress(OSError):
            fd = os.open(f"{directory}/exit", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            status = read_status(fd)
            os.close(fd)
            self.broadcast({"ev": "exited", "agent_id": agent_id, "status": status, "oom": status["oom"]})
