"""Linux system calls that Python 3.11 does not have, one wrapper for one call.

Nobody else in the project touches ctypes. Each wrapper checks the result and raises `OSError` with the errno of the
call and a text that names the call and its object, so that a failed launch says where. Descriptors come back O_CLOEXEC.

Numbers are those of the unified table (Linux 5.0 and later use the same number on every architecture from 403 upwards);
the two older ones used here are looked up by machine. Source: man-pages 6.x and include/uapi/linux/*.h.
"""

import ctypes
import errno as _errno
import fcntl
import os
import platform
import struct
from ctypes import (
    POINTER,
    c_char_p,
    c_int,
    c_long,
    c_size_t,
    c_uint,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_ulong,
    c_void_p,
)
from typing import Final, NoReturn

_libc: Final = ctypes.CDLL(None, use_errno=True)
# A second handle that keeps the interpreter lock: clone3 returns twice, and the child must hold what it had.
_libc_locked: Final = ctypes.PyDLL(None, use_errno=True)

# --- numbers -------------------------------------------------------------------------------------------------------

_NR: Final = {
    "pidfd_send_signal": 424,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "pidfd_open": 434,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
} | (
    {"pivot_root": 41, "keyctl": 219, "seccomp": 277, "capset": 91, "capget": 90, "process_vm_readv": 270, "ioctl": 29}
    if platform.machine() == "aarch64"
    else {
        "pivot_root": 155,
        "keyctl": 250,
        "seccomp": 317,
        "capset": 126,
        "capget": 125,
        "process_vm_readv": 310,
        "ioctl": 16,
    }
)

# Values of clone(2), unshare(2), setns(2).
CLONE_VM: Final = 0x00000100
CLONE_PIDFD: Final = 0x00001000
CLONE_PARENT: Final = 0x00008000
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000
CLONE_NEWTIME: Final = 0x00000080
CLONE_CLEAR_SIGHAND: Final = 0x100000000
CLONE_INTO_CGROUP: Final = 0x200000000

# Values of mount(2), umount(2).
MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_MOVE: Final = 8192
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

# Values of open_tree(2), move_mount(2), mount_setattr(2), fsmount(2).
AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000
OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
MOVE_MOUNT_F_SYMLINKS: Final = 0x01
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
MOUNT_ATTR_RDONLY: Final = 0x01
MOUNT_ATTR_NOSUID: Final = 0x02
MOUNT_ATTR_NODEV: Final = 0x04
MOUNT_ATTR_NOEXEC: Final = 0x08
MOUNT_ATTR_NOATIME: Final = 0x10
MOUNT_ATTR_IDMAP: Final = 0x00100000
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x00200000
FSOPEN_CLOEXEC: Final = 1
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_SET_FD: Final = 5
FSCONFIG_CMD_CREATE: Final = 6
FSMOUNT_CLOEXEC: Final = 1

# Values of openat2(2).
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

# Values of prctl(2).
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_SET_NAME: Final = 15
PR_CAPBSET_READ: Final = 23
PR_CAPBSET_DROP: Final = 24
PR_GET_SECUREBITS: Final = 27
PR_SET_SECUREBITS: Final = 28
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_NO_NEW_PRIVS: Final = 39
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

# Values of fanotify_init(2), fanotify_mark(2).
FAN_CLOEXEC: Final = 0x1
FAN_NONBLOCK: Final = 0x2
FAN_CLASS_CONTENT: Final = 0x4
FAN_UNLIMITED_QUEUE: Final = 0x10
FAN_UNLIMITED_MARKS: Final = 0x20
FAN_MARK_ADD: Final = 0x1
FAN_MARK_REMOVE: Final = 0x2
FAN_MARK_MOUNT: Final = 0x10
FAN_OPEN_PERM: Final = 0x10000
FAN_ACCESS_PERM: Final = 0x20000
FAN_OPEN_EXEC_PERM: Final = 0x40000
FAN_ONDIR: Final = 0x40000000
FAN_DENY: Final = 2

# Values of seccomp(2).
SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_SPEC_ALLOW: Final = 4
SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 8
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 32  # Linux 5.19
SECCOMP_USER_NOTIF_FLAG_CONTINUE: Final = 1

# Values of keyctl(2).
KEYCTL_JOIN_SESSION_KEYRING: Final = 1

# Values of close_range(2).
CLOSE_RANGE_CLOEXEC: Final = 4
FD_MAX: Final = 0xFFFFFFFF

# Values of landlock(7).
LANDLOCK_CREATE_RULESET_VERSION: Final = 1
LANDLOCK_RULE_PATH_BENEATH: Final = 1

_CAPABILITY_VERSION_3: Final = 0x20080522


# --- results -------------------------------------------------------------------------------------------------------


def raise_errno(call: str, what: object = "") -> NoReturn:
    """Raise `OSError` for the call that just failed; the text reads `call(object): cause`."""
    number = ctypes.get_errno()
    raise OSError(number, f"{call}({what}): {os.strerror(number)}")


def _syscall(name: str, what: object, *arguments: object) -> int:
    """Make the raw call; integers are passed as longs, the rest as ctypes made them."""
    converted = [c_long(a) if isinstance(a, int) else a for a in arguments]
    result = _libc.syscall(c_long(_NR[name]), *converted)
    if result < 0:
        raise_errno(name, what)
    return int(result)


_libc.syscall.restype = c_long
_libc_locked.syscall.restype = c_long
_libc.unshare.argtypes = [c_int]
_libc.setns.argtypes = [c_int, c_int]
_libc.mount.argtypes = [c_char_p, c_char_p, c_char_p, c_ulong, c_char_p]
_libc.umount2.argtypes = [c_char_p, c_int]
_libc.prctl.argtypes = [c_int, c_ulong, c_ulong, c_ulong, c_ulong]
_libc.fanotify_init.argtypes = [c_uint, c_uint]
_libc.fanotify_mark.argtypes = [c_int, c_uint, c_uint64, c_int, c_char_p]
_libc.sethostname.argtypes = [c_char_p, c_size_t]
_libc.setdomainname.argtypes = [c_char_p, c_size_t]
_libc_locked.clone.argtypes = [c_void_p, c_void_p, c_int, c_void_p, POINTER(c_int)]


# --- namespaces and processes --------------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    if _libc.unshare(flags) < 0:
        raise_errno("unshare", hex(flags))


def setns(fd: int, kinds: int) -> None:
    """Join the namespace behind `fd`, or with a pidfd those of the process that `kinds` names (setns(2), Linux 5.8)."""
    if _libc.setns(fd, kinds) < 0:
        raise_errno("setns", f"fd {fd}, {kinds:#x}")


class _CloneArgs(ctypes.Structure):
    _fields_ = (
        ("flags", c_uint64),
        ("pidfd", c_uint64),
        ("child_tid", c_uint64),
        ("parent_tid", c_uint64),
        ("exit_signal", c_uint64),
        ("stack", c_uint64),
        ("stack_size", c_uint64),
        ("tls", c_uint64),
        ("set_tid", c_uint64),
        ("set_tid_size", c_uint64),
        ("cgroup", c_uint64),
    )


def clone3(flags: int, *, cgroup: int | None = None, exit_signal: int = 17) -> tuple[int, int]:
    """Fork with the given namespaces; `(0, -1)` in the child, `(pid, pidfd)` in the parent.

    Only for a process with one thread: no at-fork handlers run, and glibc's cached thread id is stale in the child,
    which must therefore not `abort()` and should exec or stay simple. CLONE_PIDFD is always added. With `CLONE_PARENT`
    the signal must be 0 (the kernel takes the caller's own). Source: man page clone, section 2.
    """
    pidfd = c_int(-1)
    arguments = _CloneArgs()
    arguments.flags = flags | CLONE_PIDFD
    arguments.pidfd = ctypes.addressof(pidfd)
    arguments.exit_signal = 0 if flags & CLONE_PARENT else exit_signal
    if cgroup is not None:
        arguments.flags |= CLONE_INTO_CGROUP
        arguments.cgroup = cgroup
    result = int(
        _libc_locked.syscall(c_long(_NR["clone3"]), ctypes.byref(arguments), c_size_t(ctypes.sizeof(arguments)))
    )
    if result < 0:
        raise_errno("clone3", hex(flags))
    # The kernel opens the pidfd O_CLOEXEC.
    return result, (pidfd.value if result else -1)


_SLEEPER_STACK: Final = ctypes.create_string_buffer(1 << 15)  # for usleep(3) and the frame of a signal
_SLEEPER_STACK_TOP: Final = (ctypes.addressof(_SLEEPER_STACK) + len(_SLEEPER_STACK)) & ~0xF  # aligned as ABIs want it


def sleeper(flags: int, microseconds: int) -> int:
    """Start a process that shares this one's memory, sleeps, and ends; return its pidfd.

    It runs usleep(3) on a stack of its own, and no Python: nothing here is touched by two at once. One at a time, for
    there is one stack. Source: man pages clone, section 2, and usleep, section 3.
    """
    pidfd = c_int(-1)
    program = ctypes.cast(_libc.usleep, c_void_p)
    result = _libc_locked.clone(
        program, _SLEEPER_STACK_TOP, flags | CLONE_VM | CLONE_PIDFD, microseconds, ctypes.byref(pidfd)
    )
    if result < 0:
        raise_errno("clone", hex(flags))
    return pidfd.value


def pidfd_open(pid: int) -> int:
    return _syscall("pidfd_open", pid, pid, 0)


def pidfd_send_signal(pidfd: int, number: int) -> None:
    _syscall("pidfd_send_signal", f"pidfd {pidfd}, signal {number}", pidfd, number, None, 0)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    return _syscall("pidfd_getfd", f"pidfd {pidfd}, fd {fd}", pidfd, fd, 0)


def sethostname(name: str) -> None:
    raw = name.encode()
    if _libc.sethostname(raw, len(raw)) < 0:
        raise_errno("sethostname", name)


def setdomainname(name: str) -> None:
    raw = name.encode()
    if _libc.setdomainname(raw, len(raw)) < 0:
        raise_errno("setdomainname", name)


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    result = int(_libc.prctl(option, arg2, arg3, arg4, arg5))
    if result < 0:
        raise_errno("prctl", f"{option}, {arg2}")
    return result


def set_process_name(name: str) -> None:
    """Set what `comm` shows; at most 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


# --- mounts --------------------------------------------------------------------------------------------------------


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount; None stands for the null pointer. Source: man page mount, section 2."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    if _libc.mount(encoded[0], encoded[1], encoded[2], flags, encoded[3]) < 0:
        raise_errno("mount", f"{kind or source} at {target}")


def umount2(target: str, flags: int) -> None:
    if _libc.umount2(os.fsencode(target), flags) < 0:
        raise_errno("umount2", target)


def pivot_root(new_root: str, put_old: str) -> None:
    _syscall("pivot_root", new_root, c_char_p(os.fsencode(new_root)), c_char_p(os.fsencode(put_old)))


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """Open the mount at a path; with OPEN_TREE_CLONE a detached copy of it. O_CLOEXEC is always set."""
    return _syscall(
        "open_tree", path or f"fd {dirfd}", dirfd, c_char_p(os.fsencode(path)), c_uint(flags | OPEN_TREE_CLOEXEC)
    )


def move_mount(from_fd: int, from_path: str, to_fd: int, to_path: str, flags: int) -> None:
    _syscall(
        "move_mount",
        f"fd {from_fd} to {to_path or f'fd {to_fd}'}",
        from_fd,
        c_char_p(os.fsencode(from_path)),
        to_fd,
        c_char_p(os.fsencode(to_path)),
        c_uint(flags),
    )


class _MountAttr(ctypes.Structure):
    _fields_ = (("attr_set", c_uint64), ("attr_clr", c_uint64), ("propagation", c_uint64), ("userns_fd", c_uint64))


def mount_setattr(
    dirfd: int, path: str, flags: int, *, set_: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int = 0
) -> None:
    """Change the attributes of a mount; `flags` are AT_EMPTY_PATH and AT_RECURSIVE."""
    attributes = _MountAttr(set_, clear, propagation, userns_fd)
    _syscall(
        "mount_setattr",
        f"{path or f'fd {dirfd}'}, set {set_:#x}",
        dirfd,
        c_char_p(os.fsencode(path)),
        c_uint(flags),
        ctypes.byref(attributes),
        c_size_t(ctypes.sizeof(attributes)),
    )


def fsopen(kind: str) -> int:
    return _syscall("fsopen", kind, c_char_p(kind.encode()), c_uint(FSOPEN_CLOEXEC))


def fsconfig_string(fd: int, key: str, value: str) -> None:
    _syscall(
        "fsconfig",
        f"{key}={value}",
        fd,
        c_uint(FSCONFIG_SET_STRING),
        c_char_p(key.encode()),
        c_char_p(os.fsencode(value)),
        0,
    )


def fsconfig_flag(fd: int, key: str) -> None:
    _syscall("fsconfig", key, fd, c_uint(FSCONFIG_SET_FLAG), c_char_p(key.encode()), None, 0)


def fsconfig_create(fd: int) -> None:
    _syscall("fsconfig", "create", fd, c_uint(FSCONFIG_CMD_CREATE), None, None, 0)


def fsmount(fd: int, attributes: int) -> int:
    return _syscall("fsmount", f"fd {fd}", fd, c_uint(FSMOUNT_CLOEXEC), c_uint(attributes))


# --- files ---------------------------------------------------------------------------------------------------------


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", c_uint64), ("mode", c_uint64), ("resolve", c_uint64))


def openat2(dirfd: int, path: str, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """Open with rules for how the path may resolve; O_CLOEXEC is always set. Source: man page openat2, section 2."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    return _syscall(
        "openat2", path, dirfd, c_char_p(os.fsencode(path)), ctypes.byref(how), c_size_t(ctypes.sizeof(how))
    )


def syncfs(fd: int) -> None:
    """Have everything reach the disk of the file system that this is on. Source: man page syncfs, section 2."""
    if _libc.syncfs(c_int(fd)) < 0:
        raise_errno("syncfs", f"fd {fd}")


def close_range(first: int, last: int = FD_MAX, flags: int = 0) -> None:
    _syscall("close_range", f"{first}..{last}", c_uint(first), c_uint(last), c_uint(flags))


def memfd_create(name: str, content: bytes = b"") -> int:
    """Make an anonymous file with the content in it, positioned at its start."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def fanotify_init(flags: int, event_flags: int) -> int:
    """Return a group; events are read from it, and answers to permission events written to it (fanotify(7))."""
    result = int(_libc.fanotify_init(flags, event_flags))
    if result < 0:
        raise_errno("fanotify_init", hex(flags))
    return result


def fanotify_mark(group: int, flags: int, mask: int, dirfd: int, path: str) -> None:
    if _libc.fanotify_mark(group, flags, mask, dirfd, os.fsencode(path)) < 0:
        raise_errno("fanotify_mark", f"{path}, {mask:#x}")


MADV_POPULATE_WRITE: Final = 23  # Linux 5.14


def populate(address: int, length: int) -> None:
    """Make private pages of this process's own now, as if it had written to each of them. Source: madvise(2)."""
    if _libc.madvise(ctypes.c_void_p(address), c_size_t(length), MADV_POPULATE_WRITE) < 0:
        raise_errno("madvise", f"{address:#x}, {length}")


# --- block devices -------------------------------------------------------------------------------------------------

_LOOP_CONFIGURE: Final = 0x4C0A  # <linux/loop.h>, Linux 5.8
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_INFO: Final = struct.Struct("=5QIIII64s64s32s2Q")  # struct loop_info64
_LOOP_CONFIG: Final = struct.Struct(f"=II{_LOOP_INFO.size}s64x")  # struct loop_config
_LOOP_LABEL_BYTES_MAX: Final = 63
LO_FLAGS_READ_ONLY: Final = 1
LO_FLAGS_AUTOCLEAR: Final = 4
LO_FLAGS_DIRECT_IO: Final = 16
_FS_IOC_SHUTDOWN: Final = 0x8004587D  # EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_SHUTDOWN_WITHOUT_LOG: Final = 2


def loop_get_free(control: int) -> int:
    """Return the number of a loop device that was free a moment ago; one is made where none is. Source: loop(4)."""
    return int(fcntl.ioctl(control, _LOOP_CTL_GET_FREE))


def loop_configure(device: int, file: int, *, flags: int, label: str) -> None:
    """Put a file behind a loop device; EBUSY where somebody else was faster. Source: loop(4)."""
    name = label.encode()[:_LOOP_LABEL_BYTES_MAX]
    info = _LOOP_INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file, 0, info))


def loop_status(device: int) -> tuple[int, int, str]:
    """Return device and inode of the file behind a loop device, and its label; ENXIO where there is none."""
    raw = fcntl.ioctl(device, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
    device_number, inode, *_, label, _crypt, _key, _init0, _init1 = _LOOP_INFO.unpack(raw)
    return int(device_number), int(inode), bytes(label).rstrip(b"\0").decode("utf-8", "replace")


def shut_file_system_down(fd: int) -> None:
    """Let a file system that is given up write nothing more: what is dirty is dropped with it (ext4, xfs)."""
    fcntl.ioctl(fd, _FS_IOC_SHUTDOWN, struct.pack("I", _SHUTDOWN_WITHOUT_LOG))


# --- confinement ---------------------------------------------------------------------------------------------------


class _SockFilter(ctypes.Structure):
    _fields_ = (("code", c_uint16), ("jt", c_uint8), ("jf", c_uint8), ("k", c_uint32))


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", c_uint16), ("filter", POINTER(_SockFilter)))


BPF_INSTRUCTION_BYTES: Final = 8
BPF_INSTRUCTIONS_MAX: Final = 4096  # BPF_MAXINSNS


def seccomp_filter(program: bytes, flags: int = 0) -> None:
    """Install a BPF program (array of struct sock_filter) for this thread. Source: man page seccomp, section 2."""
    count, rest = divmod(len(program), BPF_INSTRUCTION_BYTES)
    if rest or not 0 < count <= BPF_INSTRUCTIONS_MAX:
        raise OSError(_errno.EINVAL, f"seccomp(filter of {len(program)} bytes): not a BPF program")
    array = (_SockFilter * count).from_buffer_copy(program)
    fprog = _SockFprog(count, array)
    _syscall("seccomp", "SET_MODE_FILTER", c_uint(SECCOMP_SET_MODE_FILTER), c_uint(flags), ctypes.byref(fprog))


def seccomp_listener(program: bytes) -> int:
    """Install a BPF program and return what its notifications are read from. Source: man page seccomp_unotify.

    A call that was read waits on through signals that do not kill, where the kernel can: a program with timers would
    otherwise ask again and again.
    """
    count, rest = divmod(len(program), BPF_INSTRUCTION_BYTES)
    if rest or not 0 < count <= BPF_INSTRUCTIONS_MAX:
        raise OSError(_errno.EINVAL, f"seccomp(filter of {len(program)} bytes): not a BPF program")
    fprog = _SockFprog(count, (_SockFilter * count).from_buffer_copy(program))
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    arguments = (c_uint(SECCOMP_SET_MODE_FILTER), ctypes.byref(fprog))
    try:
        return _syscall("seccomp", "NEW_LISTENER", arguments[0], c_uint(flags), arguments[1])
    except OSError as error:
        if error.errno != _errno.EINVAL:  # before Linux 5.19
            raise
        return _syscall("seccomp", "NEW_LISTENER", arguments[0], c_uint(SECCOMP_FILTER_FLAG_NEW_LISTENER), arguments[1])


class Notice(ctypes.Structure):
    """A call that waits: struct seccomp_notif with its struct seccomp_data. The pid is of the reader's namespace."""

    _fields_ = (
        ("cookie", c_uint64),
        ("pid", c_uint32),
        ("flags", c_uint32),
        ("number", c_int),
        ("arch", c_uint32),
        ("instruction", c_uint64),
        ("arguments", c_uint64 * 6),
    )


class Desk(ctypes.Structure):
    """Memory that the watcher shares with the launcher: the call that it has in hand, and how often it came round."""

    _fields_ = (("notice", Notice), ("turns", c_uint64))


DESK_BYTES: Final = ctypes.sizeof(Desk)
_NOTIF_ANSWER: Final = struct.Struct("=QqiI")  # struct seccomp_notif_resp
NOTIF_RECV: Final = 0xC0502100  # SECCOMP_IOCTL_NOTIF_RECV, _IOWR('!', 0, struct seccomp_notif)
NOTIF_SEND: Final = 0xC0182101
NOTIF_ID_VALID: Final = 0x40082102


def notice_receive(listener: int, notice: Notice) -> None:
    """Take a call that waits, or wait for one (poll(2) first); raises ENOENT where who called is dead already.

    The kernel writes it to where it is meant to be: whoever shares that memory knows of every call that was taken.
    """
    ctypes.memset(ctypes.byref(notice), 0, ctypes.sizeof(notice))
    _syscall("ioctl", "NOTIF_RECV", c_uint(listener), c_ulong(NOTIF_RECV), ctypes.byref(notice))


def notice_valid(listener: int, cookie: int) -> bool:
    """Return whether who called still waits, so that what was read by its pid was its own."""
    try:
        fcntl.ioctl(listener, NOTIF_ID_VALID, struct.pack("=Q", cookie))
    except OSError:
        return False
    return True


def notice_answer(listener: int, cookie: int, error: int) -> None:
    """Let the call go on (0), or fail with this errno; raises ENOENT where nobody waits any more."""
    flags = 0 if error else SECCOMP_USER_NOTIF_FLAG_CONTINUE
    fcntl.ioctl(listener, NOTIF_SEND, _NOTIF_ANSWER.pack(cookie, 0, -error, flags))


def keyctl_join_session_keyring() -> None:
    """Leave the session keyring of the parent for a new, empty and anonymous one."""
    _syscall("keyctl", "JOIN_SESSION_KEYRING", KEYCTL_JOIN_SESSION_KEYRING, None, 0, 0, 0)


class _Span(ctypes.Structure):
    _fields_ = (("base", c_uint64), ("length", c_size_t))


def read_memory(pid: int, address: int, most: int) -> bytes:
    """Return what a process has there, less where its memory ends. Source: man page process_vm_readv, section 2."""
    buffer = ctypes.create_string_buffer(most)
    ours, theirs = _Span(ctypes.addressof(buffer), most), _Span(address, most)
    count = c_ulong(1)
    got = _syscall("process_vm_readv", pid, pid, ctypes.byref(ours), count, ctypes.byref(theirs), count, c_ulong(0))
    return buffer.raw[:got]


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", c_uint32), ("pid", c_int))


class _CapData(ctypes.Structure):
    _fields_ = (("effective", c_uint32), ("permitted", c_uint32), ("inheritable", c_uint32))


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the three sets of this thread from 64-bit masks. Source: man page capset, section 2."""
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    low, high = 0xFFFFFFFF, 32
    data = (_CapData * 2)(
        _CapData(effective & low, permitted & low, inheritable & low),
        _CapData(effective >> high, permitted >> high, inheritable >> high),
    )
    _syscall("capset", f"{effective:#x}", ctypes.byref(header), ctypes.byref(data))


class _LandlockRulesetAttr(ctypes.Structure):
    _fields_ = (("handled_access_fs", c_uint64), ("handled_access_net", c_uint64), ("scoped", c_uint64))


class _LandlockPathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", c_uint64), ("parent_fd", c_int))


def landlock_abi() -> int:
    """Return the Landlock ABI version, 0 where the kernel has none or it is switched off."""
    result = int(
        _libc.syscall(
            c_long(_NR["landlock_create_ruleset"]), None, c_size_t(0), c_uint(LANDLOCK_CREATE_RULESET_VERSION)
        )
    )
    return max(result, 0)


def landlock_create_ruleset(access_fs: int, *, access_net: int = 0, scoped: int = 0, abi: int = 1) -> int:
    """Make a ruleset; the structure is cut to what the ABI knows, so fields it lacks must be 0."""
    attributes = _LandlockRulesetAttr(access_fs, access_net, scoped)
    net_abi, scope_abi = 4, 6
    size = 8 if abi < net_abi else 16 if abi < scope_abi else 24
    return _syscall("landlock_create_ruleset", hex(access_fs), ctypes.byref(attributes), c_size_t(size), c_uint(0))


def landlock_add_path(ruleset: int, access: int, parent_fd: int) -> None:
    rule = _LandlockPathBeneathAttr(access, parent_fd)
    _syscall(
        "landlock_add_rule",
        f"fd {parent_fd}",
        ruleset,
        c_uint(LANDLOCK_RULE_PATH_BENEATH),
        ctypes.byref(rule),
        c_uint(0),
    )


def landlock_restrict_self(ruleset: int) -> None:
    _syscall("landlock_restrict_self", f"fd {ruleset}", ruleset, c_uint(0))


# --- canaries ------------------------------------------------------------------------------------------------------


def attempt(number: int, *arguments: int) -> tuple[int, int]:
    """Make a call by its number; `(result, errno)`, the errno 0 where it succeeded. For sandbox/canaries.py alone.

    Holds the interpreter's lock, because the call may be a clone, which returns twice.
    """
    ctypes.set_errno(0)
    result = int(_libc_locked.syscall(c_long(number), *[c_long(argument) for argument in arguments]))
    return result, ctypes.get_errno() if result < 0 else 0
