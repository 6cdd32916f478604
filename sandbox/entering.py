"""What a child of the launcher does in the mount namespace of an agent that runs: attach a bind, take one away.

The child is root of the host in a file system that hostile code uses. So: nothing of the launcher but what it needs,
not dumpable, no import and no program after it has entered; every place is walked from the root's descriptor, without
links, and through directories of root of the host alone, which only that can change: those of the root file system,
and below the sticky /tmp. A mount is named by its descriptor, or looked up and compared by its id, which no other mount
has.
"""

# ruff: noqa: PTH123, PTH208 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import errno
import gc
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from sandbox import guard, sync, syscalls
from sandbox.init import forget_launcher
from sandbox.mounted import Mounted, field_of, mount_id
from sandbox.running import Agent
from sandbox.sync import StepError, send, step

GRACE_SECONDS: Final = 0.03  # for writes under way: what is opened from now on is denied already
KILL_SECONDS: Final = 2.0
PAUSE_SECONDS: Final = 0.001
_RO: Final = syscalls.MOUNT_ATTR_RDONLY
_TAKEN: Final = _RO | syscalls.MOUNT_ATTR_NOEXEC | syscalls.MOUNT_ATTR_NOSYMFOLLOW
_NO_LINKS: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_ON_ROOT: Final = _NO_LINKS | syscalls.RESOLVE_NO_XDEV
CROSSED: Final = "/tmp"  # noqa: S108 - inside
_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")
_WRITING: Final = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True, slots=True)
class Taking:
    """How a bind is taken: the guard's group, whom to look through for descriptors that write, how long to wait."""

    guard: int
    pids: tuple[int, ...]
    grace_seconds: float


class WritersError(StepError):
    """Something of the mount is open for writing."""


def run(control: socket.socket, keep: list[int], what: str, act: Callable[[socket.socket], None]) -> NoReturn:
    """Do it and tell; in the child, right after the fork."""
    try:
        gc.disable()
        forget_launcher(control, keep=keep)
        # A child of a launcher that is gone has nobody to answer to, and the next one begins anew.
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        sync.end_if_alone(control)
        os.umask(0o022)
        act(control)
    except StepError as error:
        _tell(control, {"error": error.to_json(), "writers": isinstance(error, WritersError)})
    except BaseException as error:  # noqa: BLE001 - the launcher must hear of it and this child must end
        _tell(control, {"error": StepError(what, 0, f"{type(error).__name__}: {error}").to_json()})
    finally:
        os._exit(0)


def _tell(control: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        send(control, message)


# --- entering --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Inside:
    """Descriptors of the host's /proc, opened before entering, and of the agent's root.

    `workshop` is a mount of the root file system that is this child's alone, and writable: places are made there. The
    agent's own mount of it stays read-only, so there is no moment at which anything could be tried.
    """

    own_fds: int
    own_info: int
    agent: int
    root: int
    workshop: int

    def mount_id(self, fd: int) -> int:
        info = os.open(str(fd), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.own_info)
        try:
            return field_of(os.read(info, 4096), b"mnt_id:", 10)
        finally:
            os.close(info)

    def find(self, mount: int) -> str:
        """Return where the agent has the mount, empty where it has it no more; the kernel's list is what counts.

        The place may be another than that it was given: in a directory that belongs to it, an agent can rename what is
        above a bind of its launch.
        """
        fd = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.agent)
        try:
            text = b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
        finally:
            os.close(fd)
        for line in text.splitlines():
            words = line.split(b" ")
            if int(words[0]) == mount:
                return _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), words[4]).decode(
                    "utf-8", "surrogateescape"
                )
        return ""


def _enter(agent: Agent) -> _Inside:
    own_fds = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    own_info = os.open("/proc/self/fdinfo", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with step("enter the agent's mounts"):
        its = os.open(f"/proc/{agent.pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        syscalls.setns(agent.pidfd, syscalls.CLONE_NEWNS)
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        workshop = syscalls.open_tree(root, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
        syscalls.mount_setattr(workshop, "", syscalls.AT_EMPTY_PATH, clear=_RO)
    return _Inside(own_fds, own_info, its, root, workshop)


# --- attach ----------------------------------------------------------------------------------------------------------


def attach(agent: Agent, mounted: Mounted, group: int, control: socket.socket) -> None:
    """Make the place and put the mount there; nothing is left where that fails."""
    _check_guard(mounted, group)
    inside = _enter(agent)
    made: list[str] = []
    try:
        with step(f"bind {mounted.target}"):
            try:
                directory = stat.S_ISDIR(os.fstat(mounted.fd).st_mode)
                place = _make(inside, mounted.place, made, directory=directory)
                if mounted.linked:
                    _link(inside, mounted.target, mounted.place, made)
                flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
                syscalls.move_mount(mounted.fd, "", place, "", flags)
            except BaseException:
                _remove(inside, made)
                raise
    except StepError as error:
        _tell(control, {"error": error.to_json(), "absent": not inside.find(mounted.mount_id)})
    else:
        _tell(control, {"made": made})


def _check_guard(mounted: Mounted, group: int) -> None:
    """Try the mark that will deny opens, and take it off: nothing is shown that could not be taken back."""
    path = f"/proc/self/fd/{mounted.fd}"
    for deed in (syscalls.FAN_MARK_ADD, syscalls.FAN_MARK_REMOVE):
        with step(f"bind {mounted.target}", "a path of another file system: of this one opens cannot be denied"):
            flags = deed | syscalls.FAN_MARK_MOUNT
            syscalls.fanotify_mark(group, flags, guard.DENIED, syscalls.AT_FDCWD, path)


def _make(inside: _Inside, path: str, made: list[str], *, directory: bool) -> int:
    """Make the place, which must not be there, and return its descriptor in the agent's own tree."""
    with _parent(inside, path, made) as (seen, here, name):
        try:
            if directory:
                os.mkdir(name, 0o755, dir_fd=here)
            else:
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=here))
        except FileExistsError as error:
            raise _taken(path) from error
        made.append(path)
        return syscalls.openat2(seen, name, os.O_PATH | os.O_NOFOLLOW, resolve=_ON_ROOT)


def _link(inside: _Inside, path: str, to: str, made: list[str]) -> None:
    with _parent(inside, path, made) as (_, here, name):
        try:
            os.symlink(to, name, dir_fd=here)
        except FileExistsError as error:
            raise _taken(path) from error
        made.append(path)


def _taken(path: str) -> StepError:
    return StepError(
        f"bind {path}", errno.EEXIST, "there is something in this place", "choose another: fs:ro:/host/path=/in/agent"
    )


@contextlib.contextmanager
def _parent(inside: _Inside, path: str, made: list[str]) -> Iterator[tuple[int, int, str]]:
    """Give the directory a path is to be made in, as the agent sees it and in the workshop, and the last name.

    Missing parents are made. What the agent sees decides: a part that is a link there, or of another mount, is refused.
    """
    *parents, name = path.strip("/").split("/")
    seen, here = os.dup(inside.root), os.dup(inside.workshop)
    walked = ""
    try:
        for part in parents:
            walked += f"/{part}"
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=here)
                made.append(walked)
            try:
                seen, here = _descend(seen, here, part, crossing=walked == CROSSED)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ELOOP, errno.ENOTDIR, errno.EPERM):
                    raise
                raise StepError(
                    f"bind {path}",
                    error.errno,
                    f"{walked} is not a directory of the sandbox's own",
                    f"choose a place below /grants: fs:ro:/host/path=/grants{path}",
                ) from error
        yield seen, here, name
    finally:
        os.close(seen)
        os.close(here)


def _descend(seen: int, here: int, part: str, *, crossing: bool) -> tuple[int, int]:
    """Go one part further in both, closing what was; raises `OSError` where that is no directory of root's alone."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    inner = syscalls.openat2(seen, part, flags, resolve=_NO_LINKS if crossing else _ON_ROOT)
    try:
        status = os.fstat(inner)
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid != 0 or (others and not status.st_mode & stat.S_ISVTX):
            raise PermissionError(errno.EPERM, "it is not root's alone")
        # /tmp is a mount of its own, and writable: there is no workshop of it.
        next_here = os.dup(inner) if crossing else os.open(part, flags | os.O_CLOEXEC, dir_fd=here)
    except OSError:
        os.close(inner)
        raise
    os.close(seen)
    os.close(here)
    return inner, next_here


def _remove(inside: _Inside, made: Iterable[str]) -> list[str]:
    """Remove what was made and is empty, innermost first; return what had to stay."""
    left = []
    for path in sorted(set(made), key=len, reverse=True):
        fresh: list[str] = []
        try:
            # A place in a bind of the launch is on somebody's disk, and refused here.
            with _parent(inside, path, fresh) as (_, here, name):
                status = os.stat(name, dir_fd=here, follow_symlinks=False)
                if status.st_uid == 0:
                    (os.rmdir if stat.S_ISDIR(status.st_mode) else os.unlink)(name, dir_fd=here)
        except (FileNotFoundError, StepError):
            pass
        except OSError:
            left.append(path)
    return left


# --- detach ----------------------------------------------------------------------------------------------------------


def detach(agent: Agent, mounted: Mounted, taking: Taking, stubs: Iterable[str], control: socket.socket) -> None:
    """Take the bind away: nothing of it is opened, run or changed from now on, by whatever way it was reached.

    Order: opens are denied first, so that nobody gets a new descriptor while the rest is done; then the mount itself is
    made read-only, which a detached mount stays, against mkdir, rename, chmod and the like, which open nothing; then it
    is detached. Descriptors that are open for reading go on reading; none is left that could write.
    """
    killed = 0
    deadline = time.monotonic() + taking.grace_seconds
    if taking.pids:
        with step("find who writes"):
            killed = _kill_writers(taking.pids, mounted.mount_id, deadline)
    inside = _enter(agent)
    what = f"take {mounted.target} away"
    try:
        with step(what):
            if inside.find(mounted.mount_id):
                fd = mounted.fd if mounted.fd >= 0 else _look_up(inside, mounted)
                _disarm(inside, fd, taking, deadline, what)
            if inside.find(mounted.mount_id):
                raise StepError(what, errno.EBUSY, "it is still there")
            left = _remove(inside, stubs)
    except StepError as error:
        _tell(control, {"error": error.to_json(), "writers": isinstance(error, WritersError), "killed": killed})
    else:
        _tell(control, {"killed": killed, "left": left})


def _disarm(inside: _Inside, fd: int, taking: Taking, deadline: float, what: str) -> None:
    mark = syscalls.FAN_MARK_ADD | syscalls.FAN_MARK_MOUNT
    # By the number of our own descriptor: the path that leads to it is the agent's.
    syscalls.fanotify_mark(taking.guard, mark, guard.DENIED, inside.own_fds, str(fd))
    while True:
        try:
            syscalls.mount_setattr(fd, "", syscalls.AT_EMPTY_PATH, set_=_TAKEN)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() < deadline:
                time.sleep(PAUSE_SECONDS)
                continue
            raise WritersError(
                what, errno.EBUSY, "something of it stays open for writing", "kill the agent: it is frozen"
            ) from error
        break
    os.fchdir(inside.own_fds)
    syscalls.umount2(str(fd), syscalls.MNT_DETACH)
    os.fchdir(inside.root)


def _look_up(inside: _Inside, mounted: Mounted) -> int:
    """Return a descriptor of the mount, wherever it is by now: its id says that it is this one. Raises `OSError`."""
    fd = syscalls.openat2(inside.root, inside.find(mounted.mount_id), os.O_PATH | os.O_NOFOLLOW, resolve=_NO_LINKS)
    if inside.mount_id(fd) != mounted.mount_id:
        raise OSError(errno.ESTALE, "another mount is in its place")
    return fd


def _kill_writers(pids: Iterable[int], mount: int, deadline: float) -> int:
    """Kill the processes, of these frozen ones, that hold a file of the mount open for writing; return how many."""
    killed = 0
    for pid in pids:
        if time.monotonic() > deadline:
            break
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            pidfd = syscalls.pidfd_open(pid)
            try:
                if _writes(pid, mount):
                    syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
                    killed += 1
            finally:
                os.close(pidfd)
    return killed


def _writes(pid: int, mount: int) -> bool:
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/fdinfo/{name}", "rb") as file:
            text = file.read(4096)
            if field_of(text, b"mnt_id:", 10) == mount and field_of(text, b"flags:", 8) & _WRITING:
                return True
    # A mapping keeps its file open after the descriptor was closed; the link's mode is how it was opened.
    for name in os.listdir(f"/proc/{pid}/map_files"):
        with contextlib.suppress(OSError):
            path = f"/proc/{pid}/map_files/{name}"
            if not os.lstat(path).st_mode & stat.S_IWUSR:
                continue
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                if mount_id(fd) == mount:
                    return True
            finally:
                os.close(fd)
    return False
