"""A small process that lets go of images: freeing a gigabyte of pages takes longer than a launch may wait.

The launcher sends it descriptors; it shuts the file system down (an image without a name: nothing of it is to be
written) or lets it be written out (one that is kept), closes it, and says so. When the launcher is gone, so is it.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn

from sandbox import sync, syscalls
from sandbox.loop import READ

if TYPE_CHECKING:
    from sandbox.loop import Loop
    from sandbox.scratch import Image

_STANDARD_STREAMS: Final = 3


class Sweeper:
    """The launcher's side; without a process that lives it lets go itself."""

    def __init__(self, loop: "Loop") -> None:
        self._loop = loop
        self._number = 0
        self._waiting: dict[int, Callable[[], None]] = {}
        self._sock, theirs = sync.pair()
        self.pid, self._pidfd = syscalls.clone3(0)
        if self.pid == 0:
            _serve(theirs)
        theirs.close()
        loop.watch(self._sock.fileno(), READ, self._said)

    def put_away(self, image: "Image", done: Callable[[], None] | None = None) -> None:
        """Let go of an image; `done` is called when it is unmounted."""
        image.close_mount()
        if image.root < 0:
            return
        self._number += 1
        message = {"number": self._number, "keep": bool(image.kept)}
        try:
            self._sock.setblocking(False)
            sync.send(self._sock, message, [fd for fd in (image.root, image.file) if fd >= 0])
        except OSError:
            image.drop()
            if done is not None:
                done()
            return
        sync.close_all([fd for fd in (image.root, image.file) if fd >= 0])
        image.root = image.file = -1
        if done is not None:
            self._waiting[self._number] = done

    def _said(self, _events: int) -> None:
        try:
            message, fds = sync.receive(self._sock)
        except (OSError, ValueError):
            message, fds = None, []
        sync.close_all(fds)
        if message is None:
            self._loop.forget(self._sock.fileno())
            self._sock.close()
            for number in list(self._waiting):
                self._waiting.pop(number)()
            return
        done = self._waiting.pop(int(message["number"]), None)
        if done is not None:
            done()

    def close(self) -> None:
        """Let it finish and end."""
        if self._sock.fileno() >= 0:
            self._loop.forget(self._sock.fileno())
            self._sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self._pidfd)


def _serve(sock: socket.socket) -> NoReturn:
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it ends when its work is done
        own = sock.fileno()
        if own > _STANDARD_STREAMS:
            syscalls.close_range(_STANDARD_STREAMS, own - 1)
        syscalls.close_range(own + 1)
        syscalls.set_process_name("stockade-sweep")
        while True:
            message, fds = sync.receive(sock)
            if message is None:
                os._exit(0)
            with contextlib.suppress(OSError):
                if not message["keep"]:
                    syscalls.shut_file_system_down(fds[0])
            os.close(fds[0])
            with contextlib.suppress(OSError):
                for fd in fds[1:] if message["keep"] else ():
                    os.fsync(fd)
            sync.close_all(fds[1:])
            with contextlib.suppress(OSError):
                sync.send(sock, {"number": message["number"]})
    finally:
        os._exit(1)
