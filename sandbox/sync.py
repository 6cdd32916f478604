"""Messages between processes that trust each other: one JSON object a SEQPACKET message, descriptors beside it.

Used on the daemon's channel and between the launcher and the child that builds a sandbox. In the child the socket is
also the sync pipe: it is close-on-exec, so end-of-file means that `execve` happened, and anything else names the step
that failed.
"""

import array
import contextlib
import errno
import json
import os
import select
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Final

MESSAGE_BYTES_MAX: Final = 1 << 20
FDS_MAX: Final = 250  # SCM_MAX_FD is 253
SEND_BUFFER_BYTES: Final = 4 << 20


class StepError(Exception):
    """A step of launch or exec could not be done; nothing of it is left."""

    def __init__(self, step: str, number: int, message: str, remedy: str = "") -> None:
        super().__init__(f"cannot {step}: {message}")
        self.step = step
        self.number = number
        self.message = message
        self.remedy = remedy

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "errno": errno.errorcode.get(self.number, str(self.number)) if self.number else "",
            "message": str(self),
            "remedy": self.remedy,
        }

    @classmethod
    def from_os(cls, step: str, error: OSError, remedy: str = "") -> "StepError":
        place = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return cls(step, error.errno or 0, place + (error.strerror or str(error)), remedy)


class ToldError(StepError):
    """An error that the child described itself."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__(str(told.get("step", "")), 0, str(told.get("message", "")))
        self._told = told

    def to_json(self) -> dict[str, Any]:
        return self._told


@contextlib.contextmanager
def step(name: str, remedy: str = "") -> Iterator[None]:
    """Give the name of the step to whatever fails in it."""
    try:
        yield
    except OSError as error:
        raise StepError.from_os(name, error, remedy) from error


def pair() -> tuple[socket.socket, socket.socket]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (left, right):
        enlarge(end)
    return left, right


def enlarge(sock: socket.socket) -> None:
    """Let a message of the largest size through; SO_SNDBUFFORCE needs CAP_NET_ADMIN, which the launcher has."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_SNDBUFFORCE", 32), SEND_BUFFER_BYTES)


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message; raises `BlockingIOError` where the socket does not block and is full."""
    send_bytes(sock, dumps(message), fds)


def send_bytes(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Do the same with a message that is bytes already."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise OSError(errno.EMSGSIZE, f"message of {len(data)} bytes is longer than {MESSAGE_BYTES_MAX}")
    if len(fds) > FDS_MAX:
        raise OSError(errno.E2BIG, f"{len(fds)} descriptors are more than {FDS_MAX}")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Return one message and its descriptors (close-on-exec), or `(None, [])` at end-of-file.

    Raises `ValueError` on a message that is cut, not JSON, or not an object; its descriptors are closed.
    """
    data, fds = receive_bytes(sock)
    if not data and not fds:
        return None, []
    try:
        message = json.loads(data.decode("utf-8", "surrogateescape"))
        if not isinstance(message, dict):
            raise ValueError("message is not a JSON object")  # noqa: TRY004 - one class for what the peer sent
    except (ValueError, RecursionError) as error:
        close_all(fds)
        raise ValueError(f"cannot read message: {error}") from error
    return message, fds


def receive_bytes(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Do the same with a message of `send_bytes`; both are empty at end-of-file. Raises `ValueError` on a cut one."""
    # Room for what comes and not for the most that may: a mebibyte that is freed again stays with the heap.
    size = sock.recv_into(bytearray(1), 0, socket.MSG_PEEK | socket.MSG_TRUNC)
    data, ancillary, flags, _ = sock.recvmsg(
        min(size, MESSAGE_BYTES_MAX) + 1, socket.CMSG_SPACE(4 * (FDS_MAX + 3)), socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received = array.array("i")
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
            fds += received
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) > MESSAGE_BYTES_MAX:
        close_all(fds)
        raise ValueError(
            f"cannot read message: it is longer than {MESSAGE_BYTES_MAX} bytes or has more than {FDS_MAX} descriptors"
        )
    return data, fds


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def dumps(value: object) -> bytes:
    """Write a message: compact JSON in UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogateescape")


def end_if_alone(control: socket.socket) -> None:
    """End this process where the one at the other end has gone.

    For a child that has just asked for PR_SET_PDEATHSIG: of a parent that went before, no signal comes (prctl(2)). A
    process closes its files before its children have another parent, so its end of the socket tells.
    """
    poll = select.poll()
    poll.register(control, 0)
    if poll.poll(0):  # POLLHUP, POLLERR
        os._exit(1)
