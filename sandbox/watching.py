"""The launcher's side of the watcher: which listener is whose, and a watcher that died or hangs is replaced.

The watcher (`watcher.py`) is a process of its own because it serves calls of hostile programs one after another, and
the launcher must not wait for any of that. It is there from the first agent on of which anything is told. The launcher
keeps every listener open too, and so does pid 1 of the agent: with the watcher gone, calls that ask wait, and are
answered by the next one. A call that it had taken is known by memory that both share, and answered here. With nobody
left who could answer they fail.
"""

# ruff: noqa: PTH100, PTH108, PTH110, PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import mmap
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
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
RESTART_SECONDS_MAX: Final = 5.0
WELL_SECONDS: Final = 30.0  # a watcher that lived so long did not die of how it was started
LOOK_SECONDS: Final = 1.0
HUNG_SECONDS: Final = 5.0  # it comes round once a second
MESSAGES_PER_TURN_MAX: Final = 8
END_SECONDS: Final = 1.0
UNREAD: Final = "unread"  # a file among the agent's


class _Listener:
    """One filter's listener, kept until its agent or stream ends."""

    __slots__ = ("agent_id", "arguments", "directory", "fd", "key", "stream_id", "told")

    def __init__(self, key: int, agent: "Agent", stream_id: str, fd: int) -> None:
        self.key = key
        self.agent_id = agent.agent_id
        self.directory = agent.directory
        self.stream_id = stream_id
        self.fd = fd
        self.arguments = agent.plan.record.arguments
        self.told = True


@dataclass(slots=True, eq=False)
class _Process:
    pid: int
    pidfd: int
    control: "socket.socket"
    began: float


class Watching:
    """Gives listeners to the watcher; `say(agent_id, stream_id, events)` is called for what it tells."""

    def __init__(self, loop: Loop, path: str) -> None:
        self._loop = loop
        self._process: _Process | None = None
        self._number = 0
        self._listeners: dict[int, _Listener] = {}
        self._unread: set[str] = set()  # agents at whose calls a watcher ended
        self._in_hand = _left_in_hand(path)
        # Not that memory again: a watcher that hung when its launcher died may come back and write to it.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, mmap.PAGESIZE)
        memory = mmap.mmap(self._fd, mmap.PAGESIZE)
        memory.madvise(mmap.MADV_DONTFORK)  # not for what the launcher forks: pid 1 of each agent, for one
        self._desk = syscalls.Desk.from_buffer(memory)
        self._failures = 0
        self._looking = self._starting = False
        self._turns, self._turned = 0, 0.0
        self.say: Callable[[str, str, list[dict[str, Any]]], None] = lambda _agent, _stream, _events: None

    def ensure(self) -> None:
        """Have a watcher, started now where there is none; raises `StepError`."""
        if self._process is None and not self._starting:
            self._start()

    def _start(self) -> None:
        with step("start watcher"):
            ours, theirs = sync.pair()
            with theirs:
                pid, pidfd = syscalls.clone3(0)
                if pid == 0:
                    _become(theirs, self._fd)
        ours.setblocking(False)
        process = _Process(pid, pidfd, ours, time.monotonic())
        self._process = process
        self._loop.watch(pidfd, READ, lambda _events: self._died(process))
        self._loop.watch(ours.fileno(), READ, lambda _events: self._hear())
        self._listeners = {key: listener for key, listener in self._listeners.items() if listener.fd >= 0}
        for listener in self._listeners.values():
            self._give(listener)
        self._turned = process.began
        self._look_later()

    def add(self, agent: "Agent", stream_id: str, fd: int, *, told: bool = True) -> int:
        """Have a listener served, which is owned from now on; returns its key. Not `told`: only answered, for now."""
        self._number += 1
        listener = _Listener(self._number, agent, stream_id, fd)
        listener.told = told
        self._listeners[self._number] = listener
        if self._process is None:
            self._again()
        else:
            self._give(listener)
        self._look_later()
        return self._number

    def restore(self, agent: "Agent", fd: int) -> int:
        """Take up the listener of an agent that an earlier launcher started, whose watcher ended with it."""
        if self._answer_in_hand(fd) or os.path.exists(f"{agent.directory}/{UNREAD}"):
            self._read_no_more(agent.agent_id, agent.directory)
        key = self.add(agent, agent.agent_id, fd)
        unread = agent.agent_id in self._unread
        self.say(agent.agent_id, agent.agent_id, [{"kind": "interrupted", "unread": unread}])
        return key

    def _read_no_more(self, agent_id: str, directory: str) -> None:
        """Count what it executes, from now on and under every launcher to come."""
        self._unread.add(agent_id)
        # Where there is no room for that, the next launcher learns it anew, as this one did.
        with contextlib.suppress(OSError), open(f"{directory}/{UNREAD}", "wb"):
            pass

    def begin_telling(self, key: int) -> None:
        self._listeners[key].told = True
        self._send({"key": key, "told": True})

    def end_agent(self, agent_id: str) -> None:
        """Let go of the listeners of an agent that is over; the watcher says its last of each."""
        self._unread.discard(agent_id)
        for listener in [one for one in self._listeners.values() if one.agent_id == agent_id and one.fd >= 0]:
            os.close(listener.fd)
            listener.fd = -1
            self._send({"key": listener.key, "told": False})

    def close(self) -> None:
        """End the process, as far as it can be ended: one that reads memory that never comes dies when it has it."""
        process, self._process = self._process, None
        if process is not None:
            self._loop.forget(process.pidfd)
            _kill(process)
            self._hang_up(process)
            dead = select.poll()
            dead.register(process.pidfd, select.POLLIN)
            if dead.poll(END_SECONDS * 1000):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, 0)
            os.close(process.pidfd)
        sync.close_all([listener.fd for listener in self._listeners.values() if listener.fd >= 0])

    def _give(self, listener: _Listener) -> None:
        if listener.fd >= 0:
            reads = listener.agent_id not in self._unread
            message = {"agent_id": listener.agent_id, "arguments": listener.arguments, "told": listener.told}
            self._send({"key": listener.key, "reads": reads, **message}, (listener.fd,))

    def _send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        if self._process is None:
            return  # the next one is told of all when it is started
        try:
            sync.send(self._process.control, message, fds)
        except OSError:
            _kill(self._process)  # it reads nothing: the next one will

    def _hear(self) -> None:
        process = self._process
        for _ in range(MESSAGES_PER_TURN_MAX):
            if process is None or process.control.fileno() < 0:
                return
            try:
                message, fds = sync.receive(process.control)
            except BlockingIOError:
                return
            except (OSError, ValueError):
                message, fds = None, []
            sync.close_all(fds)
            if message is None:
                self._hang_up(process)
                return
            try:
                self._take(message)
            except (LookupError, TypeError, ValueError, AttributeError):
                _kill(process)  # not what our program says: it is somebody else's by now
                self._hang_up(process)
                return

    def _take(self, message: dict[str, Any]) -> None:
        listener = self._listeners.get(message["key"])
        if listener is None:
            return
        if message["events"]:
            self.say(listener.agent_id, listener.stream_id, message["events"])
        if message.get("ended"):
            # Nobody uses that filter any more: the last process of a stream may end long after its first.
            del self._listeners[listener.key]
            sync.close_all([listener.fd] if listener.fd >= 0 else [])

    def _hang_up(self, process: _Process) -> None:
        if process.control.fileno() >= 0:
            self._loop.forget(process.control.fileno())
            process.control.close()

    # --- one that died or hangs

    def _look_later(self) -> None:
        if not self._looking and self._listeners:
            self._looking = True
            self._loop.later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """See that it comes round: one that waits for memory of one process must not hold up all the others."""
        self._looking = False
        now = time.monotonic()
        if self._desk.turns != self._turns:
            self._turns, self._turned = self._desk.turns, now
        elif self._process is not None and now - self._turned >= HUNG_SECONDS:
            process = self._process
            _kill(process)  # and no wait for its death, which may take as long
            self._lost(process)
        self._look_later()

    def _died(self, process: _Process) -> None:
        self._loop.forget(process.pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)
        os.close(process.pidfd)
        if self._process is process:
            self._lost(process)

    def _lost(self, process: _Process) -> None:
        """Answer in its place what it had in hand, say that what it had not told is lost, and have another soon."""
        self._hear()
        self._hang_up(process)
        self._process = None
        self._in_hand = _taken(self._desk)
        for listener in [one for one in self._listeners.values() if one.fd >= 0]:
            if self._answer_in_hand(listener.fd):
                self._read_no_more(listener.agent_id, listener.directory)
        for agent_id in dict.fromkeys(one.agent_id for one in self._listeners.values() if one.fd >= 0):
            self.say(agent_id, agent_id, [{"kind": "interrupted", "unread": agent_id in self._unread}])
        self._failures = 0 if time.monotonic() - process.began >= WELL_SECONDS else self._failures + 1
        self._starting = True
        pause = RESTART_SECONDS * 2 ** min(self._failures, 10)
        self._loop.later(min(pause, RESTART_SECONDS_MAX), self._retry)

    def _answer_in_hand(self, fd: int) -> bool:
        """Answer the call that a watcher took and did not answer, if it is one of this listener's: nobody else can.

        Cookies begin at a random number for each filter, so that no other call has this one (kernel/seccomp.c).
        """
        if self._in_hand is None:
            return False
        try:
            syscalls.notice_answer(fd, *self._in_hand)
        except OSError:
            return False
        self._in_hand = None
        return True

    def _retry(self) -> None:
        self._starting = False
        self._again()

    def _again(self) -> None:
        if self._process is not None or self._starting:
            return
        try:
            self._start()
        except StepError:
            self._starting = True
            self._loop.later(RESTART_SECONDS_MAX, self._retry)


def _left_in_hand(path: str) -> tuple[int, int] | None:
    """Return the same of the watcher of an earlier launcher, if there was one."""
    try:
        with open(path, "rb") as file:
            text = file.read(syscalls.DESK_BYTES)
    except FileNotFoundError:
        return None
    return _taken(syscalls.Desk.from_buffer_copy(text)) if len(text) == syscalls.DESK_BYTES else None


def _taken(desk: syscalls.Desk) -> tuple[int, int] | None:
    """Return the cookie of the call that a watcher has in hand, if any, and its answer; from then on there is none."""
    notice = desk.notice
    taken = (int(notice.cookie), watcher.answer_to(notice)) if notice.cookie else None
    notice.cookie = 0
    return taken


def _kill(process: _Process) -> None:
    with contextlib.suppress(OSError):
        syscalls.pidfd_send_signal(process.pidfd, signal.SIGKILL)


def _become(control: "socket.socket", desk: int) -> None:
    try:
        forget_launcher(control, keep=[desk])
        os.setsid()
        beyond = max(control.fileno(), desk, watcher.FD_DESK) + 1
        os.dup2(control.fileno(), beyond)
        os.dup2(desk, beyond + 1)
        os.dup2(beyond, watcher.FD_CONTROL, inheritable=True)
        os.dup2(beyond + 1, watcher.FD_DESK, inheritable=True)
        syscalls.close_range(watcher.FD_DESK + 1)
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-E", PROGRAM])  # noqa: S606 - our own program
    finally:
        os._exit(1)
