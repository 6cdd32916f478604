"""Stockade's own processes as children of the daemon: start, notice the end, end.

`posix_spawn` and never `os.fork`: gRPC has threads (CONVENTIONS 10). What is left by a daemon that was killed is found
by a file that names pid and start time, for a pid alone may be somebody else by now.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.errors import StockadeError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

log = structlog.get_logger()

CHANNEL_FD: Final = 3  # of a child that is spoken with
HIGH_FD: Final = 100  # sources of dup2 are moved above every target first
END_SECONDS: Final = 2.0
AGAIN_SECONDS_MAX: Final = 5.0
ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


class Child:
    """A running child process, held by pidfd."""

    def __init__(self, name: str, pid: int, on_exit: Callable[[int], None] | None) -> None:
        self.name = name
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.exited = asyncio.Event()
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.pidfd, self._ended)

    def _ended(self) -> None:
        self._loop.remove_reader(self.pidfd)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.exited.set()
        log.info("process ended", process=self.name, pid=self.pid, code=os.waitstatus_to_exitcode(status))
        if self._on_exit is not None:
            self._on_exit(os.waitstatus_to_exitcode(status))

    def signal(self, number: signal.Signals) -> None:
        if not self.exited.is_set():
            signal.pidfd_send_signal(self.pidfd, number)

    async def end(self) -> None:
        """SIGTERM, a moment, SIGKILL; nobody is told of this exit."""
        self._on_exit = None
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(END_SECONDS):
                await self.exited.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.exited.wait()


def spawn(
    name: str,
    argv: Sequence[str],
    *,
    fds: Mapping[int, int],
    on_exit: Callable[[int], None] | None = None,
    new_session: bool = False,
    record: Path | None = None,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> Child:
    """Start `argv` with standard input empty and `fds` as {number in the child: ours}.

    Raises Unavailable, and then nothing of it runs.
    """
    pid = 0
    try:
        pid = _spawn(argv, fds, new_session=new_session, environment=environment)
        if record is not None:
            # Whole or not at all: who reads it after a crash must know whose process it was.
            fresh = record.with_suffix(".new")
            fresh.write_text(json.dumps({"pid": pid, "start": start_time(pid)}))
            fresh.replace(record)
        child = Child(name, pid, on_exit)
    except OSError as error:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise _lacking(name, error) from error
    log.info("process started", process=name, pid=pid)
    return child


def spawn_connected(
    name: str,
    argv: Sequence[str],
    *,
    record: Path,
    fds: Mapping[int, int] | None = None,
    kind: socket.SocketKind = socket.SOCK_SEQPACKET,
    on_exit: Callable[[int], None] | None = None,
) -> tuple[Child, socket.socket]:
    """As `spawn`, in a session of its own, with a socket as CHANNEL_FD whose other end is returned."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    except OSError as error:
        raise _lacking(name, error) from error
    with theirs:
        try:
            fds = {CHANNEL_FD: theirs.fileno(), **(fds or {})}
            return spawn(name, argv, fds=fds, on_exit=on_exit, new_session=True, record=record), ours
        except Unavailable:
            ours.close()
            raise


def _lacking(name: str, error: OSError) -> Unavailable:
    return Unavailable(
        f"cannot start {name}: {error.strerror or error}",
        remedy="see what stockaded may have of processes and files, and what room run_dir has",
    )


async def start_again(
    name: str, start: Callable[[], Awaitable[None]], *, wanted: Callable[[], bool], pause_seconds: float
) -> None:
    """Start a process that died, after a pause, and try until it could be started or is wanted no more.

    What it takes to start one may be lacking for a moment: memory, descriptors, room in `run_dir`.
    """
    while True:
        await asyncio.sleep(pause_seconds)
        if not wanted():
            return
        try:
            await start()
        except (OSError, StockadeError) as error:
            log.error("a process that died cannot be started again yet", process=name, cause=str(error))
            pause_seconds = min(2 * pause_seconds, AGAIN_SECONDS_MAX)
        else:
            return


def _spawn(argv: Sequence[str], fds: Mapping[int, int], *, new_session: bool, environment: Mapping[str, str]) -> int:
    with contextlib.ExitStack() as undo:
        moved = {}
        for target, source in fds.items():
            moved[target] = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
            undo.callback(os.close, moved[target])
        actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
        ]
        actions += [(os.POSIX_SPAWN_DUP2, source, target) for target, source in moved.items()]
        return os.posix_spawn(argv[0], list(argv), dict(environment), file_actions=actions, setsid=new_session)


def python(module: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules, isolated from the caller's environment."""
    return [sys.executable, "-I", "-m", module, *arguments]


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started, or None when there is none (proc_pid_stat(5))."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def end_leftover(record: Path) -> bool:
    """End the process that a former daemon recorded there, if it is still the same; tells whether it was."""
    try:
        kept = json.loads(record.read_text())
        pid, start = int(kept["pid"]), int(kept["start"])
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError, KeyError, TypeError):
        record.unlink(missing_ok=True)
        return False
    try:
        if start_time(pid) != start:
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], END_SECONDS)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
        record.unlink(missing_ok=True)
    return True
