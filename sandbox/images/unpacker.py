"""The process that unpacks one image. It is started as root, gives everything up, and only then reads the first byte.

What it has afterwards: the image by descriptor, one directory that is its root directory, and a socket to who started
it. No other file, no network, no capability, an id of its own. Messages, each a JSON object in a packet of its own:

    started with  {kind, selector, limits, user} and descriptors: the directory, then the archive where there is one
    it says       {need: NAME}                    of a layout: the file is opened for it, or {missing: CAUSE}
                  {resolved: DIGEST, form, path}  and waits for {unpack: true}, or for its end
                  {done: COUNTS} or {error, remedy}
"""

import errno
import os
import pwd
import resource
import select
import signal
import socket
import sys
from typing import Any, Final

import pyseccomp  # type: ignore[import-untyped]  # ships no types

from sandbox import confine, landlock, syscalls
from sandbox.images.blobs import Archive, Layout, Source
from sandbox.images.limits import BadImage, ImageLimits
from sandbox.images.unpack import Unpacking, resolve
from sandbox.sync import StepError, receive, send

CHANNEL: Final = 3
MEMORY_BYTES_MAX: Final = 1 << 30
OPEN_FILES_MAX: Final = 64 + 2 * 128  # descriptors of a walk as deep as an image may be

# landlock(7): what it does below its directory, where the kernel has it. No execute, no special files, no sockets.
_READ_FILE, _READ_DIR, _MAKE_REG, _MAKE_DIR, _MAKE_SYM = 1 << 2, 1 << 3, 1 << 8, 1 << 7, 1 << 12
_WRITE_FILE, _REMOVE_DIR, _REMOVE_FILE, _REFER = 1 << 1, 1 << 4, 1 << 5, 1 << 13
_BELOW: Final = _READ_FILE | _READ_DIR | _MAKE_REG | _MAKE_DIR | _MAKE_SYM | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE
_REFER_ABI: Final = 2
_NEW_NAMESPACES: Final = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS

# fmt: off
_CALLS: Final = (
    "brk", "clock_gettime", "close", "dup", "exit_group", "fcntl", "fstat", "fsync", "futex", "getdents64", "getpid",
    "getrandom", "gettid", "linkat", "lseek", "madvise", "mkdirat", "mmap", "mremap", "munmap", "newfstatat", "openat",
    "poll", "ppoll", "pread64", "read", "recvfrom", "recvmsg", "restart_syscall", "rseq", "rt_sigaction",
    "rt_sigprocmask", "rt_sigreturn", "sendmsg", "sendto", "sigaltstack", "symlinkat", "syncfs", "unlinkat",
    "utimensat", "write", "writev",
)
# fmt: on


def main() -> None:
    channel = socket.socket(fileno=CHANNEL)
    request, fds = receive(channel)
    if request is None:
        return
    try:
        give_up_everything(str(request["user"]), fds[0], ImageLimits(**request["limits"]), channel)
        work(channel, request, fds)
    except BadImage as error:
        _answer(channel, {"error": error.message, "remedy": error.remedy})
    except MemoryError:
        _answer(channel, {"error": f"the image: it takes more than {MEMORY_BYTES_MAX} bytes of memory to read"})
    except StepError as error:
        _answer(channel, {"error": str(error), "remedy": error.remedy, "ours": True})
    except OSError as error:
        _answer(channel, _trouble(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits must hear of it
        _answer(channel, {"error": f"the image: {type(error).__name__} in its unpacker", "remedy": "report it"})


def _answer(channel: socket.socket, message: dict[str, Any]) -> None:
    send(channel, message)


def _trouble(error: OSError) -> dict[str, Any]:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return {
        "error": f"the image: {error.strerror or error}",
        "remedy": "make room where state_dir is" if full else "see the daemon's journal",
        "ours": True,
    }


def work(channel: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    """Find the image that is meant, and unpack it when told to. Raises `BadImage`, `OSError`."""
    limits = ImageLimits(**request["limits"])
    source: Source = Archive(fds[1]) if request["kind"] == "archive" else Layout(lambda name: _ask(channel, name))
    image, form = resolve(source, str(request["selector"]), limits)
    send(channel, {"resolved": image.digest, "form": form, "path": image.path})
    answer, _ = receive(channel)
    if answer is None or answer.get("unpack") is not True:
        return
    counts = Unpacking(source, image, fds[0], limits).run()
    syscalls.syncfs(fds[0])
    send(channel, {"done": counts})


def _ask(channel: socket.socket, name: str) -> int | None:
    send(channel, {"need": name})
    answer, fds = receive(channel)
    if answer is None:
        sys.exit(1)
    return fds[0] if fds else None


def give_up_everything(user: str, directory: int, limits: ImageLimits, channel: socket.socket) -> None:
    """Keep the directory and the channel alone, for good. Raises `StepError` or `OSError`."""
    entry = pwd.getpwnam(user)
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise StepError("become the images' user", 0, f"{user} is root", "name a system user in [users]")
    seccomp = _filter()
    # Standard output and error are the daemon's journal; what there is to say goes through the channel.
    for stream in (1, 2):
        os.dup2(0, stream)
    _enter(directory)
    os.umask(0o077)
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES_MAX),
        (resource.RLIMIT_FSIZE, limits.unpacked_bytes_max),
        (resource.RLIMIT_CPU, limits.unpack_seconds_max),
        (resource.RLIMIT_NOFILE, OPEN_FILES_MAX),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(what, (most, most))
    confine.become(entry.pw_uid, entry.pw_gid)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    # After the change of ids, which clears it. Whoever died before that has closed the other end.
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    waiting = select.poll()
    waiting.register(channel, 0)
    if waiting.poll(0):
        sys.exit(1)
    if landlock.ABI >= _REFER_ABI:
        _restrict(directory)
    seccomp.load()


def _enter(directory: int) -> None:
    """Make the directory the only thing there is: in namespaces of its own, without links, devices or programs."""
    tree = syscalls.open_tree(directory, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
    safe = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
    syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH, set_=safe | syscalls.MOUNT_ATTR_NOSYMFOLLOW)
    syscalls.unshare(_NEW_NAMESPACES)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    # /proc is a directory that is always there; it goes with the old root.
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, "/proc", syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    os.fchdir(tree)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")
    # What was opened before is of the mount outside; from here on it is of this one.
    inside = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.dup2(inside, directory, inheritable=False)
    os.close(inside)
    os.close(tree)


def _restrict(directory: int) -> None:
    every = (1 << 13) - 1  # all rights on files of ABI 1
    ruleset = syscalls.landlock_create_ruleset(every | _REFER, abi=_REFER_ABI)
    syscalls.landlock_add_path(ruleset, _BELOW | _REFER, directory)
    syscalls.landlock_restrict_self(ruleset)
    os.close(ruleset)


def _filter() -> pyseccomp.SyscallFilter:
    """Compile an allow-list; what is not on it fails with EPERM. No set-id bit can be put on a file."""
    seccomp = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in _CALLS:
        seccomp.add_rule(pyseccomp.ALLOW, name)
    seccomp.add_rule(pyseccomp.ALLOW, "fchmod", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, 0o7000, 0))
    seccomp.add_rule(pyseccomp.ALLOW, "mprotect", pyseccomp.Arg(2, pyseccomp.MASKED_EQ, 4, 0))
    return seccomp


if __name__ == "__main__":
    main()
