"""Landlock as a second layer: whatever the mounts say, writing is possible below the named places only.

Rights are those of the ABI that the running kernel has (landlock(7)); reading and executing are left to the mounts.
Of newer ABIs nothing more is used, each for a reason: rules for TCP ports (4) know no address, so a rule for the
proxy's port alone would forbid local servers; ioctl on devices (5) is no right to take from the six that there are,
terminals among them; scopes (6) are told of below.
"""

# ruff: noqa: PTH112 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import os
from collections.abc import Iterable
from typing import Final

from sandbox import syscalls

_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_REMOVE_DIR: Final = 1 << 4
_REMOVE_FILE: Final = 1 << 5
_MAKE: Final = 0x7F << 6  # char, dir, regular, socket, fifo, block, symbolic link
_REFER: Final = 1 << 13  # ABI 2
_TRUNCATE: Final = 1 << 14  # ABI 3
_ON_FILES: Final = _WRITE_FILE | _TRUNCATE

ABI: Final = syscalls.landlock_abi()


def rights(abi: int) -> int:
    """Return the rights to write that this ABI knows."""
    known = _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE
    known |= _REFER if abi >= 2 else 0  # noqa: PLR2004 - number of an ABI
    return known | (_TRUNCATE if abi >= 3 else 0)  # noqa: PLR2004 - number of an ABI


def make_ruleset(writable: Iterable[str], abi: int) -> int:
    """Return a ruleset that lets only these paths (directories with all below them, or files) be written.

    No scopes for signals and abstract sockets (ABI 6): a process started later by exec is in a domain of its own, and
    must reach the others of its agent; the pid and network namespaces bound both already.
    """
    access = rights(abi)
    ruleset = syscalls.landlock_create_ruleset(access, abi=abi)
    try:
        for path in writable:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                allowed = access if os.path.isdir(path) else access & _ON_FILES
                syscalls.landlock_add_path(ruleset, allowed, fd)
            finally:
                os.close(fd)
    except OSError:
        os.close(ruleset)
        raise
    return ruleset


def only(*, readable: Iterable[int], writable: Iterable[int] = ()) -> None:
    """Let this process reach nothing but what is below these directories, which are open. Needs no_new_privs."""
    write, read = rights(ABI), _READ_FILE | _READ_DIR
    # Execute is handled and never given.
    ruleset = syscalls.landlock_create_ruleset(write | read | _EXECUTE, abi=ABI)
    try:
        for fd in readable:
            syscalls.landlock_add_path(ruleset, read, fd)
        for fd in writable:
            syscalls.landlock_add_path(ruleset, read | write, fd)
        syscalls.landlock_restrict_self(ruleset)
    finally:
        os.close(ruleset)
