"""System calls that must not reach the kernel; all numbers are of x86_64."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
from functools import partial
from typing import Final

from tests.adversarial.probes.inside import BAD, FILTERED, Reached, call, fresh, judge, text
from tests.adversarial.probes.inside import add as _add
from tests.adversarial.probes.inside import probe as _probe

# Where they succeed, the process is another one after them.
add = partial(_add, apart="open")
probe = partial(_probe, apart="open")

# name: number, arguments; those of test_syscalls.py are not repeated.
CALLS: Final[dict[str, tuple[int, ...]]] = {
    "adjtimex": (159, BAD),
    "clock_adjtime": (305, 0, BAD),
    "ioperm": (173, 70000, 1, 1),
    "modify_ldt": (154, 0, BAD, 0),
    "vhangup": (153,),
    "lookup_dcookie": (212, 0, BAD, 0),
    "uselib": (134, BAD),
    "sysfs": (139, 3),
    "ustat": (136, 0, BAD),
    "name_to_handle_at": (303, -1, BAD, BAD, BAD, 0),
    "fanotify_mark": (301, -1, 0, 0, -1, 0),
    "process_madvise": (440, -1, BAD, 1, 0, 0),
    "process_mrelease": (448, -1, 0),
    "quotactl_fd": (443, -1, 0, 0, BAD),
    "memfd_secret": (447, 0xFF),
    "set_mempolicy": (238, 9999, BAD, 0),
    "mbind": (237, 1, 1, 9999, BAD, 0, 0),
    "get_mempolicy": (239, BAD, BAD, 0, 0, 0xFFFF),
    "set_mempolicy_home_node": (450, 1, 1, 0, 1),
    "vmsplice": (278, -1, BAD, 1, 0),
    "cachestat": (451, -1, BAD, BAD, 0),
    "map_shadow_stack": (453, 1, 1, 0xFF),
    "futex_wake": (454, BAD, 0, 0, 0xFFFF),
    "futex_wait": (455, BAD, 0, 0, 0xFFFF, 0, 0),
    "futex_requeue": (456, BAD, 0xFFFF, 0, 0),
    "lsm_get_self_attr": (459, 0, BAD, BAD, 0),
    "lsm_set_self_attr": (460, 0, BAD, 0, 0xFF),
    "lsm_list_modules": (461, BAD, BAD, 0xFF),
    "mseal": (462, 1, 1, 1),
    "setxattrat": (463, -1, BAD, 0, BAD, BAD, 16),
    "getxattrat": (464, -1, BAD, 0, BAD, BAD, 16),
    "listxattrat": (465, -1, BAD, 0, BAD, 0),
    "removexattrat": (466, -1, BAD, 0, BAD),
    "open_tree_attr": (467, -1, BAD, 0, BAD, 0),
    "file_getattr": (468, -1, BAD, BAD, 24, 0),
    "file_setattr": (469, -1, BAD, BAD, 24, 0),
    "io_setup": (206, 0, BAD),
    "io_submit": (209, 0, 1, BAD),
    "io_getevents": (208, 0, 1, 1, BAD, BAD),
    "clone3 with a faulting pointer": (435, BAD, 88),
    "ptrace TRACEME": (101, 0, 0, 0, 0),
    "ptrace SEIZE of pid 1": (101, 0x4206, 1, 0, 0),
    "ptrace ATTACH of nobody": (101, 16, 999999, 0, 0),
    "process_vm_readv of pid 1": (310, 1, BAD, 1, BAD, 1, 0),
    "process_vm_writev of pid 1": (311, 1, BAD, 1, BAD, 1, 0),
    "kcmp with pid 1": (312, 1, 1, 0, 0, 0),
    "bpf PROG_LOAD": (321, 5, BAD, 48),
    "bpf MAP_CREATE": (321, 0, BAD, 48),
    "bpf PROG_GET_NEXT_ID": (321, 11, BAD, 8),
    "perf_event_open of a processor": (298, BAD, -1, 0, -1, 0),
    "keyctl: id of the session keyring": (250, 0, -3, 0),
    "keyctl: id of the user keyring": (250, 0, -4, 1),
    "keyctl: read a keyring": (250, 11, 0x7FFFFFF0, 0, 0),
    "keyctl: persistent keyring": (250, 22, -1, 0x7FFFFFF0),
    "keyctl: join the parent's session": (250, 18),
    "personality ADDR_NO_RANDOMIZE": (135, 0x0040000),
    "personality READ_IMPLIES_EXEC": (135, 0x0400000),
    "personality, asked only": (135, 0xFFFFFFFF),
    "syslog: read all": (103, 3, BAD, 16),
    "syslog: size of the buffer": (103, 10, 0, 0),
    "unshare cgroup": (272, 0x02000000),
    "unshare uts": (272, 0x04000000),
    "unshare ipc": (272, 0x08000000),
    "unshare pid": (272, 0x20000000),
    "unshare time": (272, 0x00000080),
    "unshare user and mount": (272, 0x10020000),
    "unshare user with high bits": (272, 1 << 32 | 0x10000000),
    "userfaultfd for user mode only": (323, 1 << 20),
    "io_uring_setup with parameters": (425, 8, BAD),
    "fanotify_init for content": (300, 0xFFFF, 0xFFFFFFFF),
    "reboot: switch ctrl-alt-del": (169, 0xFEE1DEAD, 672274793, 0xBAD, 0),
    "kexec_load without segments": (246, 0, 99999, 0, 0xFFFF0000),
    "swapon with flags": (167, BAD, 0xFFFFFF),
    "iopl 4": (172, 4),
    "settimeofday of the zone": (164, 0, BAD),
    "clock_settime of TAI": (227, 11, BAD),
    "pidfd_getfd of pid 1": (438, -2, 7, 0),
    "setns to pid 1": (308, -2, 0x20000),
    "setns to the network of pid 1": (308, -2, 0x40000000),
}


def _call(number: int, *arguments: int) -> str:
    """Make the call; -2 stands for a descriptor of pid 1."""
    words = list(arguments)
    if -2 in words:
        words[words.index(-2)] = os.pidfd_open(1)
    return judge(call(number, *words))


for _name, (_number, *_arguments) in CALLS.items():
    add(f"call {_name}", partial(_call, _number, *_arguments), absent=("ENOSYS",))


@probe("call clone3 says that it does not exist, so that libc falls back", absent=("ENOSYS",))
def clone3() -> str:
    return judge(call(435, BAD, 88), by=("ENOSYS",))


# --- namespaces by clone itself ---

NEW: Final = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "user and mount": 0x10020000,
    "user, with high bits": 1 << 32 | 0x10000000,
}


def _clone(flags: int) -> str:
    pid, error = call(56, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    if pid > 0:
        os.waitpid(pid, 0)
    return judge((pid, error))


for _name, _flags in NEW.items():
    add(f"clone into a new {_name} namespace", partial(_clone, _flags))


# --- numbers that no kernel has, or that only another ABI has ---


@probe("numbers from 470 to 1023", untwinned="the kernel does not have them either")
def unknown_numbers() -> str:
    for number in range(470, 1024):
        if (answer := call(number, BAD, BAD, BAD, BAD, BAD, BAD))[1] not in FILTERED:
            raise Reached(f"{number}: {answer}")
    return "ENOSYS"


@probe("numbers that were given up", untwinned="no kernel of today has them")
def old_numbers() -> str:
    for number in (156, 174, 177, 178, 180, 181, 182, 183, 184, 185, 205, 211, 214, 215, 236):
        if number not in (214, 215) and (answer := call(number, BAD, BAD, BAD))[1] not in FILTERED:
            raise Reached(f"{number}: {answer}")
    return "EPERM"


@probe("numbers far away", untwinned="the kernel does not have them either")
def far_numbers() -> str:
    for number in (1024, 4095, 65535, 1 << 20, (1 << 30) - 1, 0x7FFFFFFF, -1, -2, -4096):
        if (answer := call(number, BAD, BAD, BAD))[1] not in FILTERED:
            raise Reached(f"{number}: {answer}")
    return "ENOSYS"


@probe("every number of x32", absent=("ENOSYS",))
def x32() -> str:
    error = "ENOSYS"
    for number in (*range(470), *range(512, 548)):
        if number in (15, 513, 60, 231, 34):  # sigreturn, exit, pause: the probe would not come back
            continue
        error = judge(call(0x40000000 | number, BAD, -1, BAD, -1, BAD, BAD))
    return error


def _int80(number: int, first: int = BAD, second: int = BAD, third: int = BAD) -> int:
    """Make a call of the 32-bit table."""
    code = b"\x53" + b"".join(
        opcode + (value % 2**32).to_bytes(4, "little")
        for opcode, value in ((b"\xb8", number), (b"\xbb", first), (b"\xb9", second), (b"\xba", third))
    )
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code + b"\xcd\x80\x5b\xc3")  # int 0x80; pop rbx; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


INT80: Final[dict[str, tuple[int, ...]]] = {
    "mount": (21, BAD, BAD, BAD),
    "umount": (22, BAD),
    "ptrace": (26, 9999, 999999, 0),
    "chroot": (61, BAD),
    "socketcall": (102, 1, BAD),
    "unshare": (310, 0x00020000),
    "setns": (346, -1, 0),
    "bpf": (357, 9999, BAD, 0),
    "keyctl": (288, 9999),
    "clone": (120, 0x10000011, 0, 0),
    "init_module": (128, BAD, 0, BAD),
    "perf_event_open": (336, BAD, 0, -1),
    "clone3": (435, BAD, 88),
    "chmod": (15, BAD, 0o4755),
    "ioctl TIOCSTI": (54, 0, 0x5412, BAD),
    "old mmap": (90, BAD),
    "vm86": (166, 9999, BAD),
    "modify_ldt": (123, 0, BAD, 0),
    "iopl": (110, 99),
    "io_uring_setup": (425, 8, BAD),
}


def _compat(*arguments: int) -> str:
    result = _int80(*arguments)
    if result == 0 and arguments[0] == 120:
        os._exit(0)
    return (
        judge((-1, os.strerror(-result)), by=(os.strerror(1), os.strerror(38))) if result < 0 else judge((result, ""))
    )


for _name, _arguments80 in INT80.items():
    add(
        f"int 0x80: {_name}",
        partial(_compat, *_arguments80),
        absent=("signal 11", "signal 4", os.strerror(38)),
        needs="compat",
    )


@probe("sysenter from 64-bit code", absent=("no effect",))
def sysenter() -> str:
    """Make a directory by the 32-bit table; comes back in 32-bit mode or not at all, so judged by the effect."""
    low = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, prot=7)  # MAP_32BIT
    place = fresh("by-sysenter")
    address = ctypes.addressof(ctypes.c_char.from_buffer(low))
    low[4096 : 4096 + len(place) + 1] = place.encode() + b"\0"
    four = [value.to_bytes(4, "little") for value in (39, address + 4096, 0o700, address + 6000)]
    # mov eax, 39 (mkdir); mov ebx, path; mov ecx, mode; mov ebp, stack; sysenter
    low[0:22] = b"\xb8" + four[0] + b"\xbb" + four[1] + b"\xb9" + four[2] + b"\xbd" + four[3] + b"\x0f\x34"
    pid = os.fork()
    if pid == 0:
        signal.alarm(2)
        ctypes.CFUNCTYPE(ctypes.c_int)(address)()
        os._exit(0)
    os.waitpid(pid, 0)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(place)
        raise Reached(place)
    return "no effect"


# --- seccomp itself ---


def _listener(flags: int) -> str:
    allow = (ctypes.c_uint64 * 1)(0x7FFF0000 << 32 | 6)
    program = (ctypes.c_uint64 * 2)(1, ctypes.addressof(allow))
    call(157, 38, 1, 0, 0, 0)
    return judge(call(317, 1, flags, ctypes.addressof(program)), by=("EPERM",))


for _name, _flags in {
    "a listener": 8,
    "a listener, threads too": 8 | 1 | 16,
    "a listener that waits killably": 8 | 32,
    "a listener that logs": 8 | 2,
    "a listener, with high bits": 1 << 32 | 8,
}.items():
    add(f"seccomp: {_name}", partial(_listener, _flags), absent=("EINVAL",))


@probe("an allowing filter on top allows nothing")
def allow_on_top() -> str:
    allow = (ctypes.c_uint64 * 1)(0x7FFF0000 << 32 | 6)
    program = (ctypes.c_uint64 * 2)(1, ctypes.addressof(allow))
    call(157, 38, 1, 0, 0, 0)
    if call(317, 1, 0, ctypes.addressof(program))[0] != 0:
        raise OSError("no filter can be stacked")
    return judge(call(165, BAD, BAD, BAD, 0, BAD))


@_probe("redirected system calls are filtered all the same", apart="always")
def dispatched() -> str:
    """Under PR_SET_SYSCALL_USER_DISPATCH, with a selector that lets everything through."""
    selector = ctypes.create_string_buffer(1)
    call(157, 59, 1, 0, 0, ctypes.addressof(selector))
    return judge(call(165, BAD, BAD, BAD, 0, BAD))


@probe("the filter can be turned off")
def filter_off() -> str:
    result, error = call(157, 22, 0, 0, 0, 0)  # PR_SET_SECCOMP, mode 0
    if result >= 0:
        raise Reached("mode 0")
    with open("/proc/self/status") as file:
        mode = next(line.split()[1] for line in file if line.startswith("Seccomp:"))
    if mode != "2":
        raise Reached(f"mode {mode}")
    return error


@probe("no filter in a program that was executed")
def after_exec() -> str:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.execve("/bin/grep", ["grep", "^Seccomp:", "/proc/self/status"], {})
    os.waitpid(pid, 0)
    mode = os.read(read, 100).split()[1].decode()
    if mode != "2":
        raise Reached(f"mode {mode}")
    return "mode 2"


# --- the mount family, with arguments that would work ---

MOUNTS: Final[dict[str, tuple[str, str, int, str]]] = {
    "tmpfs": ("none", "tmpfs", 0, ""),
    "proc": ("none", "proc", 0, ""),
    "sysfs": ("none", "sysfs", 0, ""),
    "devpts of another instance": ("none", "devpts", 0, "newinstance"),
    "cgroup v2": ("none", "cgroup2", 0, ""),
    "cgroup of a named hierarchy (release_agent)": ("none", "cgroup", 0, "none,name=sktest"),
    "binfmt_misc": ("none", "binfmt_misc", 0, ""),
    "debugfs": ("none", "debugfs", 0, ""),
    "tracefs": ("none", "tracefs", 0, ""),
    "securityfs": ("none", "securityfs", 0, ""),
    "mqueue": ("none", "mqueue", 0, ""),
    "bpf": ("none", "bpf", 0, ""),
    "overlay of the root": ("none", "overlay", 0, "lowerdir=/usr:/etc"),
    "devtmpfs": ("none", "devtmpfs", 0, ""),
    "ramfs": ("none", "ramfs", 0, ""),
    "hugetlbfs": ("none", "hugetlbfs", 0, ""),
    "a bind of /": ("/", "", 4096, ""),
    "a recursive bind of /proc": ("/proc", "", 4096 | 16384, ""),
}


def _mount(source: str, kind: str, flags: int, options: str) -> str:
    target = fresh("mount")
    os.mkdir(target)
    answer = call(165, text(source), text(target), text(kind), flags, text(options))
    call(166, text(target), 2)
    os.rmdir(target)
    return judge(answer, by=("EPERM",))


for _name, _mounting in MOUNTS.items():
    add(f"mount {_name}", partial(_mount, *_mounting), absent=("ENODEV", "EINVAL", "ENOENT", "EPERM", "EBUSY"))


@probe("remount / writable")
def remount() -> str:
    return judge(call(165, 0, text("/"), 0, 32 | 4096, 0))


@probe("make / shared")
def share() -> str:
    return judge(call(165, 0, text("/"), 0, 1 << 20 | 16384, 0))


@probe("move /tmp")
def move() -> str:
    os.mkdir(target := fresh("mount"))
    answer = call(165, text("/dev/pts"), text(target), 0, 8192, 0)
    return judge(answer)


def _umount(path: str) -> str:
    return judge(call(166, text(path), 2))


for _name in ("/proc", "/dev/null", "/usr", "/tmp"):
    add(f"umount {_name}", partial(_umount, _name))


@probe("chroot to /tmp")
def chroot() -> str:
    return judge(call(161, text("/tmp")))


@probe("pivot_root")
def pivot() -> str:
    return judge(call(155, text("."), text(".")))


@probe("clone the tree of /")
def open_tree() -> str:
    return judge(call(428, -100, text("/"), 1 | 0x8000))


@probe("fsopen tmpfs")
def fsopen() -> str:
    return judge(call(430, text("tmpfs"), 0))


@probe("fsconfig with a long string (CVE-2022-0185)")
def fsconfig() -> str:
    fd, _ = call(430, text("tmpfs"), 0)
    return judge(call(431, fd, 1, text("size"), text("1m"), 0))


@probe("mount_setattr clears read-only")
def mount_setattr() -> str:
    attributes = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
    return judge(call(442, -100, text("/usr"), 0, ctypes.addressof(attributes), 32))


@probe("open_by_handle_at of the host's root (shocker)", absent=("ENOTSUP", "ESTALE", "EBADF", "EINVAL"))
def shocker() -> str:
    """Handle of inode 2, the root of every ext file system, by a file of the same one."""
    here = os.open("/usr/bin/env", os.O_RDONLY)
    handle = (ctypes.c_uint32 * 4)(8, 1, 2, 0)
    return judge(call(304, here, ctypes.addressof(handle), os.O_RDONLY | os.O_DIRECTORY))


@probe("name_to_handle_at of /")
def handle_of_root() -> str:
    handle = (ctypes.c_uint32 * 34)(128)
    number = ctypes.c_int()
    return judge(call(303, -100, text("/usr"), ctypes.addressof(handle), ctypes.addressof(number), 0))
