"""A small program that answers the system calls of agents that ask, and tells of them (see `watching.py`).

Started as `watcher.py` with a socket to the launcher as descriptor 3, over which it is given listeners of seccomp
filters, and with a piece of shared memory as 4. It gives up everything but the capability to read other processes
(CAP_SYS_PTRACE) and the few calls that this takes. Its answers are fixed: an exec goes on, anything else is refused.
What it reads of a process is bounded, taken apart nowhere, and advisory: another thread can change a path between this
look and the kernel's own (seccomp_unotify(2)). It ends with the launcher; calls that ask then wait for the next one.
"""

# ruff: noqa: PTH100, PTH120, PTH123 - strings and descriptors, as in the launcher

import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before any import, and last: launcher.py

import contextlib
import errno
import hashlib
import mmap
import select
import signal
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Final

from sandbox import capabilities, sync, syscalls
from sandbox.notices import Account, shown

FD_CONTROL: Final = 3
FD_DESK: Final = 4
# Of nobody: above agents' ids and above what systemd hands out (UIDS-GIDS.md).
OWN_ID: Final = 0x7FFFFFF0
OOM_SCORE: Final = "-1000"
PATH_BYTES_MAX: Final = 4096
PATH_CHARACTERS_MAX: Final = 1024
ARGUMENT_BYTES_MAX: Final = 256
ARGUMENT_CHARACTERS_MAX: Final = 256
ARGUMENTS_READ_MAX: Final = 16
ARGUMENTS_SECONDS_MAX: Final = 0.1  # each waits for the lock of that memory
STATUS_BYTES_MAX: Final = 4096
EVENTS_PER_MESSAGE_MAX: Final = 32
PENDING_MAX: Final = 256  # for each listener; more are told as a number
LOOK_SECONDS: Final = 1.0
_CAP_SYS_PTRACE: Final = 19
_EXECVE, _EXECVEAT = (221, 281) if os.uname().machine == "aarch64" else (59, 322)
_REFUSED: Final = errno.EPERM
_AT_FDCWD_LOW: Final = 0xFFFFFF9C
_ALLOWED: Final = (
    # For files: read, write, close, fstat, lseek, poll or ppoll, sendmsg, recvmsg, recvfrom. For memory:
    # process_vm_readv, mmap, munmap, mremap, mprotect, madvise, brk. Then futex, three of signals, restart_syscall,
    # clock_gettime, exit_group and exit.
    (63, 64, 57, 80, 62, 73, 211, 212, 207, 270, 222, 215, 216, 226, 233, 214, 98, 139, 134, 135, 128, 113, 94, 93)
    if os.uname().machine == "aarch64"
    else (0, 1, 3, 5, 8, 7, 46, 47, 45, 310, 9, 11, 25, 10, 28, 12, 202, 15, 13, 14, 219, 228, 231, 60)
)
_OPENAT, _IOCTL = (56, 29) if os.uname().machine == "aarch64" else (257, 16)
_ARCH: Final = 0xC00000B7 if os.uname().machine == "aarch64" else 0xC000003E


@dataclass(slots=True, eq=False)
class Source:
    """One listener: the processes of one program that somebody started, and what of it waits to be told."""

    key: int
    agent_id: str
    fd: int
    account: Account
    arguments: int
    told: bool
    reads: bool  # else its processes' memory is left alone, and execs are told as a number
    pending: list[dict[str, Any]] = field(default_factory=list)


def confine() -> None:
    """Keep one capability and a few system calls; nothing can be opened for writing."""
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
    for number in range(capabilities.LAST + 1):
        syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
    os.setgroups([])
    os.setresgid(OWN_ID, OWN_ID, OWN_ID)
    os.setresuid(OWN_ID, OWN_ID, OWN_ID)
    syscalls.capset(1 << _CAP_SYS_PTRACE, 1 << _CAP_SYS_PTRACE, 0)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.seccomp_filter(own_filter())


def own_filter() -> bytes:
    """Allow `_ALLOWED`, openat without a flag that writes or makes, ioctl of listeners; the rest is EPERM.

    Source: <linux/filter.h>.
    """
    load, equal, bits, end = 0x20, 0x15, 0x45, 0x06
    lines = [(load, 0, 0, 4), (equal, 1, 0, _ARCH), (end, 0, 0, 0x00050000 | errno.EPERM), (load, 0, 0, 0)]
    for number in _ALLOWED:
        lines += [(equal, 0, 1, number), (end, 0, 0, 0x7FFF0000)]
    lines += [
        (equal, 0, 6, _IOCTL),
        (load, 0, 0, 16 + 8),
        (equal, 2, 0, syscalls.NOTIF_RECV),
        (equal, 1, 0, syscalls.NOTIF_SEND),
        (equal, 0, 1, syscalls.NOTIF_ID_VALID),
        (end, 0, 0, 0x7FFF0000),
        (end, 0, 0, 0x00050000 | errno.EPERM),
        (equal, 0, 3, _OPENAT),
        (load, 0, 0, 16 + 8 * 2),
        (bits, 1, 0, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND),
        (end, 0, 0, 0x7FFF0000),
        (end, 0, 0, 0x00050000 | errno.EPERM),
    ]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


class Watcher:
    """Answers all listeners in turn, one call of each a turn."""

    def __init__(self, control: socket.socket, desk: syscalls.Desk) -> None:
        self._control = control
        self._desk = desk
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._sources: dict[int, Source] = {}  # by descriptor
        self._accounts: dict[str, Account] = {}
        self._paused: dict[int, float] = {}  # descriptor -> when it is read again
        self._looked = 0.0

    def run(self) -> None:
        while True:
            self._desk.turns += 1
            until = min([self._looked + LOOK_SECONDS, *self._paused.values()]) - time.monotonic()
            wait_ms = max(0, int(until * 1000) + 1) if self._sources else None
            for fd, events in self._poll.poll(wait_ms):
                if fd == FD_CONTROL:
                    if not self._hear():
                        return
                elif fd in self._sources:
                    self._serve(self._sources[fd], events)
            self._resume(time.monotonic())

    def _resume(self, now: float) -> None:
        for fd, at in list(self._paused.items()):
            if now >= at:
                del self._paused[fd]
                self._poll.register(fd, select.POLLIN)
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            for source in list(self._sources.values()):
                source.pending += source.account.due(now)
                self._tell(source)

    def _hear(self) -> bool:
        message, fds = sync.receive(self._control)
        if message is None:
            return False
        key = int(message["key"])
        if fds:
            account = self._accounts.setdefault(message["agent_id"], Account.opened(time.monotonic()))
            arguments, told, reads = int(message["arguments"]), bool(message["told"]), bool(message["reads"])
            self._sources[fds[0]] = Source(key, message["agent_id"], fds[0], account, arguments, told, reads)
            self._poll.register(fds[0], select.POLLIN)
        for source in [source for source in self._sources.values() if source.key == key and not fds]:
            if message.get("told"):
                source.told = True
            else:
                self._forget(source)
        return True

    def _forget(self, source: Source) -> None:
        """Tell what is left and let go: nobody is there to ask any more, or the agent has ended."""
        others = any(s.agent_id == source.agent_id and s is not source for s in self._sources.values())
        source.pending += source.account.due(time.monotonic(), everything=not others)
        self._tell(source)
        with contextlib.suppress(OSError):  # else the launcher keeps it until its agent ends
            sync.send(self._control, {"key": source.key, "events": [], "ended": True})
        if self._paused.pop(source.fd, None) is None:
            self._poll.unregister(source.fd)
        del self._sources[source.fd]
        if not others:
            self._accounts.pop(source.agent_id, None)
        os.close(source.fd)

    def _serve(self, source: Source, events: int) -> None:
        if not events & select.POLLIN:
            self._forget(source)
            return
        notice = self._desk.notice
        try:
            syscalls.notice_receive(source.fd, notice)
        except OSError:
            return  # who called is dead
        now = time.monotonic()
        account = source.account
        account.asked.take(now)
        event = None
        answer = answer_to(notice)
        if not source.told:
            pass
        elif answer:
            account.refuses(notice.number, now)
        elif not source.reads:
            account.leave_out(1, now)
        elif account.executes(now):
            event = look(source, notice)
            account.read.take(now, time.monotonic() - now)
        with contextlib.suppress(OSError):
            syscalls.notice_answer(source.fd, notice.cookie, answer)
        notice.cookie = 0
        source.pending += ([event] if event is not None else []) + account.due(now)
        self._tell(source)
        wait = account.asked.wait_seconds(now)
        if wait:
            self._poll.unregister(source.fd)
            self._paused[source.fd] = now + wait

    def _tell(self, source: Source) -> None:
        """Say what waits; a launcher that does not listen hears numbers later."""
        while source.pending:
            some = source.pending[:EVENTS_PER_MESSAGE_MAX]
            try:
                sync.send(self._control, {"key": source.key, "events": some})
            except OSError:
                break
            del source.pending[: len(some)]
        if len(source.pending) > PENDING_MAX:
            execs = [event for event in source.pending if event["kind"] == "exec"]
            source.pending = [event for event in source.pending if event["kind"] != "exec"]
            source.account.leave_out(len(execs), time.monotonic())


def answer_to(notice: syscalls.Notice) -> int:
    """Return 0 where a call may go on, else its errno; nothing that a process can change has a say in it."""
    return 0 if notice.arch == _ARCH and notice.number in (_EXECVE, _EXECVEAT) else _REFUSED


def look(source: Source, notice: syscalls.Notice) -> dict[str, Any] | None:
    """Return what a process is about to execute, as far as can be read; None where it is dead."""
    pid, words = int(notice.pid), tuple(notice.arguments)
    event: dict[str, Any] = {"kind": "exec", "pid": 0, "ppid": 0, "path": "", "argc": -1, "args": [], "digest": ""}
    with contextlib.suppress(OSError, LookupError):
        event["pid"], event["ppid"] = _pids(pid)
    at, words = (words[0], words[1:]) if notice.number == _EXECVEAT else (_AT_FDCWD_LOW, words)
    with contextlib.suppress(OSError):
        path = _text(pid, words[0], PATH_BYTES_MAX)
        if not path.startswith(b"/") and at & 0xFFFFFFFF != _AT_FDCWD_LOW:
            # Not what that is the descriptor of: a duplicate could be the last one, and closing it may take for ever.
            path = b"fd:%d%s%s" % (at & 0xFFFFFFFF, b"/" if path else b"", path)
        event["path"] = shown(path, PATH_CHARACTERS_MAX)
        event["argc"], read = _arguments(pid, words[1], until=time.monotonic() + ARGUMENTS_SECONDS_MAX)
        if len(read) == min(event["argc"], ARGUMENTS_READ_MAX):
            event["digest"] = "sha256:" + hashlib.sha256(b"\0".join(read)).hexdigest()
        event["args"] = [shown(argument, ARGUMENT_CHARACTERS_MAX) for argument in read[: source.arguments]]
    # Asked last: whoever waits still is who was read, and the pid was never somebody else's (seccomp_unotify(2)).
    return event if syscalls.notice_valid(source.fd, notice.cookie) else None


def _text(pid: int, address: int, most: int) -> bytes:
    """Return the bytes up to a NUL."""
    return syscalls.read_memory(pid, address, most).partition(b"\0")[0]


def _arguments(pid: int, address: int, *, until: float) -> tuple[int, list[bytes]]:
    """Return how many there are (one more than are read: or more) and the first of them, each cut; fewer if late."""
    if not address:
        return 0, []
    pointers = syscalls.read_memory(pid, address, 8 * (ARGUMENTS_READ_MAX + 1))
    addresses = struct.unpack(f"={len(pointers) // 8}Q", pointers[: len(pointers) // 8 * 8])
    count = addresses.index(0) if 0 in addresses else len(addresses)
    read = []
    for place in addresses[: min(count, ARGUMENTS_READ_MAX)]:
        if time.monotonic() > until:
            break
        read.append(_text(pid, place, ARGUMENT_BYTES_MAX))
    return count, read


def _pids(pid: int) -> tuple[int, int]:
    """Return a thread's process and its parent as they are known inside; 0 for a parent that is outside, or ended."""
    status = _status(pid)
    inside = status[b"NStgid"]
    parent = 0
    with contextlib.suppress(OSError, LookupError):
        above = _status(int(status[b"PPid"][0]))[b"NStgid"]
        # The same after as before: it lived meanwhile, and the pid was not another's.
        same = _status(pid)[b"PPid"] == status[b"PPid"]
        parent = int(above[-1]) if same and len(above) >= len(inside) > 1 else 0
    return int(inside[-1]), parent


def _status(pid: int) -> dict[bytes, list[bytes]]:
    fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, STATUS_BYTES_MAX)
    finally:
        os.close(fd)
    lines = (line.partition(b":") for line in text.splitlines())
    return {name: value.split() for name, _, value in lines if name in (b"PPid", b"NStgid")}


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    syscalls.set_process_name("stockade-watch")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(OOM_SCORE)
    os.chdir("/")
    memory = mmap.mmap(FD_DESK, mmap.PAGESIZE)
    os.close(FD_DESK)
    with socket.socket(fileno=FD_CONTROL) as control:
        control.setblocking(False)
        confine()
        Watcher(control, syscalls.Desk.from_buffer(memory)).run()


if __name__ == "__main__":
    main()
