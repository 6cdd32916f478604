"""A small program that answers "no" to every open on mounts that were taken back from agents (see `guard.py`).

Started as `denier.py RUN_DIR` with the fanotify group as descriptor 3 and a socket to the launcher as 4, over which it
is given the pidfds of agents. It ends when the launcher has gone and all of those are dead. Standard library only; the
descriptors that events carry are closed unread.
"""

import contextlib
import os
import select
import signal
import socket
import struct
from pathlib import Path
from typing import Final

FD_GROUP: Final = 3
FD_CONTROL: Final = 4
EVENTS_BYTES_MAX: Final = 4096
PIDFDS_PER_MESSAGE_MAX: Final = 64
OOM_SCORE: Final = "-1000"
_EVENT: Final = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata, fanotify(7)
_ANSWER: Final = struct.Struct("=iI")  # struct fanotify_response
_DENY: Final = 2


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("stockade-guard", encoding="ascii")
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="ascii")
    agents: set[int] = set()
    poll = select.poll()
    poll.register(FD_GROUP, select.POLLIN)
    poll.register(FD_CONTROL, select.POLLIN)
    with socket.socket(fileno=FD_CONTROL) as launcher:
        connected = True
        while connected or agents:
            for fd, _ in poll.poll():
                if fd == FD_GROUP:
                    deny(FD_GROUP)
                elif fd == FD_CONTROL:
                    connected = _hear(launcher, poll, agents)
                else:
                    poll.unregister(fd)
                    agents.discard(fd)
                    os.close(fd)


def _hear(launcher: socket.socket, poll: select.poll, agents: set[int]) -> bool:
    try:
        data, fds, _, _ = socket.recv_fds(launcher, 64, PIDFDS_PER_MESSAGE_MAX, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        data, fds = b"", []
    for fd in fds:
        agents.add(fd)
        poll.register(fd, select.POLLIN)
    if not data:
        poll.unregister(FD_CONTROL)
    return bool(data)


def deny(group: int) -> None:
    """Answer what the group asks now."""
    try:
        events = os.read(group, EVENTS_BYTES_MAX)
    except OSError:
        return  # nothing to read, or one that could not be opened for us: that one the kernel has denied itself
    while len(events) >= _EVENT.size:
        length, _, _, _, _, fd, _ = _EVENT.unpack_from(events)
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.write(group, _ANSWER.pack(fd, _DENY))
            os.close(fd)
        events = events[length:]


if __name__ == "__main__":
    main()
