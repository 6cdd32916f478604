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

import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from sandbox import attach, examine, kept_layers, launching, livebinds, mounted, sockets, stopping, streams, sync
from sandbox.attach import ExecOrder, Stream
from sandbox.channel import Answer, Channel, Connection
from sandbox.decoding import InvalidPlan, decode
from sandbox.filters import unpack_filters
from sandbox.limits_watch import Kind, Watch
from sandbox.notices import Kept
from sandbox.plan import Bind, SandboxPlan, Tty
from sandbox.posture import posture
from sandbox.running import Agent, State, agent_error
from sandbox.sync import StepError
from sandbox.workshop import Workshop

if TYPE_CHECKING:
    from sandbox.following import Follow

VERSION: Final = 1
FILTER_BYTES_MAX: Final = 256 << 10
FILTERS_MAX: Final = 256
SUPERVISOR_LOSS_SECONDS: Final = 5.0  # a daemon that is restarted or upgraded is back by then


class Server:
    """Answers requests; holds the agents."""

    def __init__(self, workshop: Workshop, listener: socket.socket) -> None:
        self.workshop = workshop
        self.loop = workshop.loop
        self.agents: dict[str, Agent] = {}
        self.on_change: list[Callable[[Agent, str], None]] = []
        self.watch = Watch(self.loop, self.agents, self._met_limit)
        self.told = Kept()
        workshop.watching.say = self._told
        self._follows: dict[str, Follow] = {}
        self._waiting: dict[str, Answer] = {}  # launches that wait for their home, by agent
        self._unsupervised = 0  # the timer that ends who must not run without a daemon
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
        self.channel = Channel(self.loop, listener, heard=self.perform, flushed=self.tell_kept, left=self._left)

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

    def agent(self, message: dict[str, Any]) -> Agent:
        agent = self.agents.get(str(message["agent_id"]))
        if agent is None:
            raise agent_error(str(message["agent_id"]), str(message["op"]))
        return agent

    def _left(self) -> None:
        """A daemon has gone: what it had half built is undone now, and what must not run without one ends soon."""
        for agent in list(self.agents.values()):
            if agent.state in (State.BUILDING, State.BUILT):
                agent.end()
        for agent_id in list(self._waiting):
            self._give_up(agent_id)
        self.expect_daemon()

    def expect_daemon(self) -> None:
        """End what must not run without a daemon unless one is there soon, counted from now."""
        self.loop.cancel(self._unsupervised)
        self._unsupervised = self.loop.later(SUPERVISOR_LOSS_SECONDS, self._end_unsupervised)

    def _end_unsupervised(self) -> None:
        if self.channel.greeted:
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
            if a.pidfd >= 0 and a.state not in (State.BUILDING, State.BUILT):  # those it aborts, as the list says
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
        if self.workshop.filters.get(digest) == blob:
            return  # every daemon sends all: what is whole is not begun anew
        # A launcher that is restarted needs it for exec into agents that are older than itself.
        path = f"{self.workshop.run_dir}/filters/{digest}"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(blob)
        self.workshop.filters[digest] = blob

    def _launch(self, _connection: Connection, message: dict[str, Any], fds: list[int], answer: Answer) -> None:
        began = time.perf_counter_ns()
        plan = SandboxPlan.from_json(message["plan"])
        if plan.home is None:
            self._launch_plan(plan, began, message, fds, answer)
            return
        # The last agent that had this home has ended; what it wrote may still be on its way to the disk.
        held = [os.dup(fd) for fd in fds]
        self._waiting[plan.agent_id] = answer

        def launch() -> None:
            try:
                if self._waiting.pop(plan.agent_id, None) is not None:  # it was not given up meanwhile
                    self._answering(answer, "launch", lambda: self._launch_plan(plan, began, message, held, answer))
            finally:
                sync.close_all(held)

        self.workshop.when_free(self.workshop.stock.home_path(plan.home), launch)

    def _give_up(self, agent_id: str) -> None:
        """Forget a launch that waits for its home."""
        answer = self._waiting.pop(agent_id, None)
        if answer is not None:
            answer(StepError("launch", 0, f"agent {agent_id} was killed before it ran"))

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
            agent.posture = posture(agent, self.workshop.layout)
            agent.timings_us["launch"] = (time.perf_counter_ns() - began) // 1000
            fds = (agent.pidfd, agent.listener)
            answer(pid=agent.pid, cgroup=agent.group_name, posture=agent.posture, timings_us=agent.timings_us, fds=fds)

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
            self.channel.broadcast(
                {
                    "ev": "exec_exited",
                    "agent_id": stream.agent.agent_id,
                    "stream_id": stream.stream_id,
                    "status": status,
                }
            )

        attach.start(agent, order, started=started, exited=exited)

    def _stdin(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        process = streams.find(self.agents, message)
        streams.write(process, message.get("data") or "", eof=bool(message.get("eof")), answer=answer)

    def _resize(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        streams.resize(streams.find(self.agents, message), Tty(int(message["rows"]), int(message["cols"])))
        answer()

    def _signal(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        streams.find(self.agents, message).signal(int(signal.Signals(int(message["signal"]))))
        answer()

    def _kill(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        agent_id = str(message["agent_id"])
        agent = self.agents.get(agent_id)
        if agent is None:
            self._give_up(agent_id)
            stopping.kill_gone(self.workshop, agent_id, answer)
            return
        stopping.kill(self.loop, agent, int(message.get("deadline_ms", stopping.KILL_DEADLINE_MS)), answer)

    def _end_exec(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        stopping.end_exec(self.loop, self.agent(message), str(message["stream_id"]), answer)

    def _freeze(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        stopping.freeze(self.loop, self._running(message), answer)

    def _thaw(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        stopping.thaw(self._running(message), answer)

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
                kept, now = agent.keeper.pid(), agent.group.stats()
                if kept and not agent.keeper.pid():  # it went meanwhile, and nobody knows whether it is counted
                    kept, now = 0, agent.group.stats()
                stats[agent_id] = {name: getattr(now, name) for name in now.__slots__}
                stats[agent_id]["pids"] -= kept > 0  # ours, not the agent's
        answer(stats=stats)

    def _layer(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        kept_layers.show(self.workshop, str(message["agent_id"]), answer)

    def _drop(self, _connection: Connection, message: dict[str, Any], _fds: list[int], answer: Answer) -> None:
        if str(message["agent_id"]) in self.agents:
            raise StepError("drop", errno.EBUSY, "the agent has not ended")
        kept_layers.drop(self.workshop, str(message["agent_id"]), answer)

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
        met = {"agent_id": agent.agent_id, "kind": kind.value, "details": details}
        self.channel.broadcast({"ev": "met_limit", **met})

    def _told(self, agent_id: str, stream_id: str, events: list[dict[str, Any]]) -> None:
        listening = self.channel.greeted
        if listening and not any(connection.behind for connection in listening):
            self.channel.broadcast({"ev": "called", "agent_id": agent_id, "stream_id": stream_id, "events": events})
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
            self.channel.broadcast(
                {"ev": "exited", "agent_id": agent.agent_id, "status": status, "oom": agent.status["oom"]}
            )
        else:
            launching.remove_directory(agent.directory)

    def _forget(self, agent: Agent) -> None:
        self.agents.pop(agent.agent_id, None)
        self._follows.pop(agent.agent_id, None)
