"""The launcher's side of the watcher: which listener is whose, and a watcher that died is started again.

The watcher (`watcher.py`) is a process of its own because it serves calls of hostile programs one after another, and
the launcher must not wait for any of that. The launcher keeps every listener open too, and so does pid 1 of the agent:
with the watcher gone, calls that ask wait, and are answered by the next one. With nobody left who could answer they
fail.
"""

# ruff: noqa: PTH100 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

from sandbox import sync, syscalls, watcher
from sandbox.init import forget_launcher
from sandbox.loop import READ, Loop
from sandbox.sync import StepError, step

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from sandbox.running import Agent

PROGRAM: Final = os.path.abspath(watcher.__file__)
RESTART_SECONDS: Final = 0.05
MESSAGES_PER_TURN_MAX: Final = 64


class _Listener:
    """One filter's listener, kept until its agent or stream ends."""

    __slots__ = ("agent_id", "arguments", "fd", "key", "stream_id", "told")

    def __init__(self, key: int, agent: "Agent", stream_id: str, fd: int) -> None:
        self.key = key
        self.agent_id = agent.agent_id
        self.stream_id = stream_id
        self.fd = fd
        self.arguments = agent.plan.record.arguments
        self.told = True


class Watching:
    """Gives listeners to the watcher; `say(agent_id, stream_id, events)` is called for what it tells."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._pid = 0
        self._pidfd = -1
        self._control: socket.socket | None = None
        self._number = 0
        self._listeners: dict[int, _Listener] = {}
        self.say: Callable[[str, str, list[dict[str, Any]]], None] = lambda _agent, _stream, _events: None

    def start(self) -> None:
        """Start the process; raises `StepError`."""
        ours, theirs = sync.pair()
        with theirs, step("start watcher"):
            pid, pidfd = syscalls.clone3(0)
            if pid == 0:
                _become(theirs)
        ours.setblocking(False)
        self._pid, self._pidfd, self._control = pid, pidfd, ours
        self._loop.watch(pidfd, READ, lambda _events: self._died())
        self._loop.watch(ours.fileno(), READ, lambda _events: self._hear())
        self._listeners = {key: listener for key, listener in self._listeners.items() if listener.fd >= 0}
        for listener in self._listeners.values():
            self._give(listener)

    def add(self, agent: "Agent", stream_id: str, fd: int, *, told: bool = True) -> int:
        """Have a listener served, which is owned from now on; returns its key. Not `told`: only answered, for now."""
        self._number += 1
        listener = _Listener(self._number, agent, stream_id, fd)
        listener.told = told
        self._listeners[self._number] = listener
        self._give(listener)
        return self._number

    def begin_telling(self, key: int) -> None:
        self._listeners[key].told = True
        self._send({"key": key, "told": True})

    def end_agent(self, agent_id: str) -> None:
        """Let go of the listeners of an agent that is over; the watcher says its last of each."""
        for listener in [one for one in self._listeners.values() if one.agent_id == agent_id and one.fd >= 0]:
            os.close(listener.fd)
            listener.fd = -1
            self._send({"key": listener.key, "told": False})

    def close(self) -> None:
        """End the process; it would end by itself, and nothing here is to wait for that."""
        if self._pidfd >= 0:
            self._loop.forget(self._pidfd)
            with contextlib.suppress(OSError):
                syscalls.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        self._hang_up()
        sync.close_all([listener.fd for listener in self._listeners.values() if listener.fd >= 0])
        if self._pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)

    def _give(self, listener: _Listener) -> None:
        if listener.fd >= 0:
            message = {"agent_id": listener.agent_id, "arguments": listener.arguments, "told": listener.told}
            self._send({"key": listener.key, **message}, (listener.fd,))

    def _send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        if self._control is None:
            return  # it is told of all when it is started again
        try:
            sync.send(self._control, message, fds)
        except OSError:
            # It reads nothing: the next one will.
            with contextlib.suppress(OSError):
                syscalls.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _hear(self) -> None:
        for _ in range(MESSAGES_PER_TURN_MAX):
            if self._control is None:
                return
            try:
                message, fds = sync.receive(self._control)
            except BlockingIOError:
                return
            except (OSError, ValueError):
                message, fds = None, []
            sync.close_all(fds)
            if message is None:
                self._hang_up()
                return
            listener = self._listeners.get(message["key"])
            if listener is None:
                continue
            if message["events"]:
                self.say(listener.agent_id, listener.stream_id, message["events"])
            if message.get("ended"):
                # Nobody uses that filter any more: the last process of a stream may end long after its first.
                del self._listeners[listener.key]
                sync.close_all([listener.fd] if listener.fd >= 0 else [])

    def _hang_up(self) -> None:
        if self._control is not None:
            self._loop.forget(self._control.fileno())
            self._control.close()
            self._control = None

    def _died(self) -> None:
        self._hear()
        self._loop.forget(self._pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        self._pidfd, self._pid = -1, 0
        self._hang_up()
        self._loop.later(RESTART_SECONDS, self._again)

    def _again(self) -> None:
        with contextlib.suppress(StepError):
            self.start()
            return
        self._loop.later(RESTART_SECONDS, self._again)


def _become(control: "socket.socket") -> None:
    try:
        forget_launcher(control)
        os.setsid()
        if control.fileno() != watcher.FD_CONTROL:
            os.dup2(control.fileno(), watcher.FD_CONTROL, inheritable=True)
        else:
            os.set_inheritable(watcher.FD_CONTROL, True)
        syscalls.close_range(watcher.FD_CONTROL + 1)
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-E", PROGRAM])  # noqa: S606 - our own program
    finally:
        os._exit(1)
