"""A file system with one file that can be opened and mapped, and whose content never comes: a mount that hangs.

Started as `hanging_files.py PLACE COMMAND…` in a mount namespace of its own: mounts itself at PLACE, serves it from a
child, and becomes the command. Source: fuse(4), include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import sys
from typing import Final

NAME: Final = b"hangs"
SIZE: Final = 4096
_LOOKUP, _FORGET, _READ = 1, 2, 15
_NOSUID_NODEV: Final = 6
_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    place, command = sys.argv[1], sys.argv[2:]
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"hangs", place.encode(), b"fuse", _NOSUID_NODEV, options) < 0:
        raise OSError(ctypes.get_errno(), "cannot mount")
    if os.fork() == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        serve(device)
    os.execv(command[0], command)  # noqa: S606 - what it was given


def serve(device: int) -> None:
    """Answer until the file system is no more; with this process's end, whoever waits gets an error."""
    while True:
        try:
            request = os.read(device, 1 << 17)
        except OSError:
            os._exit(0)
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        if operation in (_FORGET, _READ):
            continue
        body = answer(operation, node, request[40:])
        error = 0 if body is not None else -errno.ENOENT if operation == _LOOKUP else -errno.ENOSYS
        os.write(device, struct.pack("<IiQ", 16 + len(body or b""), error, unique) + (body or b""))


def answer(operation: int, node: int, content: bytes) -> bytes | None:
    match operation:
        case 26:  # INIT
            return struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 0, 0, SIZE, 1, 0, 0, 0, *[0] * 7)
        case 1 if content.rstrip(b"\0") == NAME:
            return struct.pack("<QQQQII", 2, 0, 60, 60, 0, 0) + attributes(2)
        case 3:  # GETATTR
            return struct.pack("<QII", 60, 0, 0) + attributes(node)
        case 14 | 27:  # OPEN, OPENDIR
            return struct.pack("<QII", 0, 0, 0)
        case 18 | 28 | 29:  # RELEASE, READDIR, RELEASEDIR
            return b""
    return None


def attributes(node: int) -> bytes:
    mode = 0o40755 if node == 1 else 0o100644
    return struct.pack("<6Q10I", node, SIZE, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, SIZE, 0)


if __name__ == "__main__":
    main()
