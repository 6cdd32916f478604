"""What the two processes of a sandbox say from the plan they are sent until the agent's program runs."""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from sandbox import canaries, capabilities, examine, keeper, sync
from sandbox.loop import READ
from sandbox.running import Agent, State
from sandbox.stdio import Feed, Pump, RotatingFile
from sandbox.sync import StepError, ToldError, receive, send

# Below what the daemon waits for an answer (launcher_link): it hears of a failure, and that nothing is left.
BUILD_SECONDS_MAX: Final = 20.0
GO_SECONDS_MAX: Final = 60.0  # for the word to come; nothing runs meanwhile

Built = Callable[[Agent, StepError | None], None]


class Follow:
    """Hears what the two processes say until the agent's program runs: `builder` is pid 1, `control` the stub."""

    def __init__(self, agent: Agent, built: Built) -> None:
        assert agent.control is not None  # noqa: S101 - begin() made both
        assert agent.builder is not None  # noqa: S101
        self._agent = agent
        self._built: Built | None = built
        self._went: Built | None = None
        self._sealed = False
        self._wanted = False
        self._began = time.perf_counter_ns()
        agent.loop.watch(agent.control.fileno(), READ, lambda _e: self._stub_said())
        agent.loop.watch(agent.builder.fileno(), READ, lambda _e: self._builder_said())
        agent.loop.watch(agent.pidfd, READ, lambda _e: self._died())
        self._deadline = agent.loop.later(BUILD_SECONDS_MAX, self._late)
        # Whoever waits hears of the end, however it came; only when everything is undone, so that it may launch again
        # with the same ids.
        self._error = StepError("launch", 0, f"agent {agent.agent_id} was killed before it ran")
        agent.gone.append(lambda _agent: self._answer(self._error))

    def _late(self) -> None:
        if self._agent.state in (State.BUILDING, State.BUILT, State.STARTING):
            what = {State.BUILDING: "build sandbox", State.BUILT: "go", State.STARTING: "exec"}[self._agent.state]
            self._fail(StepError(what, errno.ETIMEDOUT, "not done in time"))

    def _died(self) -> None:
        # What they said last comes first.
        self._drain_builder()
        if self._agent.state in (State.BUILDING, State.BUILT):
            self._fail(StepError("build sandbox", 0, "pid 1 died; out of memory, or killed from outside"))
        elif self._agent.state is State.STARTING:
            self._stub_said()
        self._agent.end()

    def _drain_builder(self) -> None:
        while self._agent.builder is not None and self._more():
            self._builder_said()

    def _more(self) -> bool:
        builder = self._agent.builder
        try:
            return builder is not None and bool(builder.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def _builder_said(self) -> None:
        agent = self._agent
        if agent.builder is None:
            return
        message, fds = _hear(agent.builder)
        if message is None:
            # It lets go of everything when its work is done; if it died instead, its pidfd tells.
            agent.close_builder()
        elif "error" in message:
            sync.close_all(fds)
            self._fail(ToldError(message["error"]))
        elif "forked" in message:
            agent.agent_pidfd = fds[0]
            # Now, while the launcher waits for the child anyway. One that died meanwhile is told of by its pidfd.
            with contextlib.suppress(OSError):
                agent.agent_pid = examine.pid_of(fds[0])
        elif message.get("terminal"):
            self._adopt_terminal(fds[0])
        elif message.get("sealed"):
            self._sealed = True
            self._perhaps_go()

    def _stub_said(self) -> None:
        agent = self._agent
        if agent.control is None:
            return
        message, fds = _hear(agent.control)
        try:
            if message is not None and message.get("kept"):
                self._change_channel(fds.pop(0), fds.pop(0))
            self._take_listener(message or {}, fds)
        finally:
            sync.close_all(fds)
        if message is None:
            self._ended()
        elif "error" in message:
            self._fail(ToldError(message["error"]))
        elif message.get("ready"):
            agent.timings_us |= {f"child.{name}": value for name, value in message["timings_us"].items()}
            # pid 1 has said all it had to say before the stub could be ready.
            self._drain_builder()
            try:
                _verify(agent, message)
            except StepError as error:
                self._fail(error)
                return
            self._is_built()

    def _change_channel(self, kept: int, channel: int) -> None:
        """Go on by a channel of which the keeper of the stub's memory has no copy."""
        agent = self._agent
        agent.close_control()
        agent.keeper.hold(agent.loop, kept)
        agent.control = socket.socket(fileno=channel)
        agent.loop.watch(channel, READ, lambda _e: self._stub_said())

    def _take_listener(self, message: dict[str, Any], fds: list[int]) -> None:
        """Have the agent's calls answered from now on, and told of once it is ready: canaries are not its acts."""
        agent = self._agent
        if agent.watching is None or agent.state is not State.BUILDING:
            return
        ready = bool(message.get("ready"))
        if fds:
            agent.listening = agent.watching.add(agent, agent.agent_id, fds.pop(), told=ready)
        elif ready and agent.listening:
            agent.watching.begin_telling(agent.listening)

    def _adopt_terminal(self, master: int) -> None:
        agent = self._agent
        agent.terminal = master
        file = RotatingFile(f"{agent.directory}/stdout.log", agent.plan.limits.output_bytes // 2)
        agent.pumps.append(Pump(agent.loop, os.dup(master), file))
        agent.feed = Feed(agent.loop, os.dup(master), terminal=True)

    def _is_built(self) -> None:
        agent = self._agent
        if agent.state is State.BUILDING and self._built is not None:
            agent.timings_us["child"] = (time.perf_counter_ns() - self._began) // 1000
            agent.state = State.BUILT
            agent.loop.cancel(self._deadline)
            self._deadline = agent.loop.later(GO_SECONDS_MAX, self._late)
            built, self._built = self._built, None
            built(agent, None)

    def go(self, went: Built) -> None:
        """Let the agent exec; `went` is called when it has, or could not. Raises `StepError`."""
        agent = self._agent
        if agent.state is not State.BUILT or agent.control is None:
            raise StepError("go", 0, f"agent {agent.agent_id} is {agent.state.value}, not {State.BUILT.value}")
        self._went = went
        agent.state = State.STARTING
        agent.loop.cancel(self._deadline)
        self._deadline = agent.loop.later(agent.exec_seconds, self._late)
        self._wanted = True
        self._perhaps_go()

    def _perhaps_go(self) -> None:
        """Let it go when that is wanted and pid 1 has given up everything too."""
        agent = self._agent
        if self._wanted and self._sealed and agent.control is not None:
            self._wanted = False
            try:
                send(agent.control, {"go": True})
            except OSError as error:
                self._fail(StepError.from_os("go", error))

    def _ended(self) -> None:
        """End-of-file: `execve` happened, or the child is dead before it said anything."""
        agent = self._agent
        agent.close_control()
        agent.loop.later(keeper.END_SECONDS, agent.keeper.end)
        if agent.state is State.STARTING:
            agent.loop.cancel(self._deadline)
            agent.state = State.RUNNING
            agent.started_at = time.time()
            self._answer(None)
        elif agent.state in (State.BUILDING, State.BUILT):
            self._drain_builder()
            self._fail(StepError("build sandbox", 0, "a process of the sandbox ended without a word"))

    def _fail(self, error: StepError) -> None:
        agent = self._agent
        if agent.state in (State.ENDING, State.GONE):
            return
        agent.loop.cancel(self._deadline)
        self._error = error
        agent.end()

    def _answer(self, error: StepError | None) -> None:
        call = self._built or self._went
        self._built = self._went = None
        if call is not None:
            call(self._agent, error)


def _hear(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    try:
        return receive(sock)
    except (OSError, ValueError):
        return None, []


def _verify(agent: Agent, said: dict[str, Any]) -> None:
    """Read back what is in force before the program runs; raises `StepError` where that is not what was planned."""
    began = time.perf_counter_ns()
    try:
        agent.seen = examine.at_launch(agent)
    except OSError as error:
        raise StepError.from_os("read back confinement", error, "it may have been killed") from error
    except (LookupError, ValueError) as error:
        # Of a kernel that tells it in another way: whatever it is, it must not end the process that holds every agent.
        raise StepError("read back confinement", 0, f"{type(error).__name__}: {error}", "report this") from error
    if agent.plan.listens and not agent.listening:
        raise StepError("confine agent", 0, "no listener came with its filter", "report this")
    agent.seen["securebits"] = hex(said["securebits"])
    if "canary" in said:
        agent.seen["canary"] = {"digest": canaries.digest(), **said["canary"]}
    drift = examine.drift(agent.plan, examine.programs(agent), agent.seen)
    # Only the process itself can read these (capabilities(7)); it was ours when it said so.
    if said["securebits"] != capabilities.SECUREBITS and "capabilities" not in agent.plan.weaken:
        drift.append(f"securebits: {said['securebits']:#x}, not {capabilities.SECUREBITS:#x}")
    agent.timings_us["read back"] = (time.perf_counter_ns() - began) // 1000
    if drift:
        raise StepError(
            "confine agent", 0, f"not in force as planned: {'; '.join(drift)}", "see `stockadectl doctor`; report this"
        )
