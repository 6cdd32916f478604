"""System calls that must not reach the kernel, each with arguments that do nothing where they do.

The twin is root of the host with every capability and no filter: there, each call is judged by its arguments.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import pytest

from tests.support.attempt import ROOT, attempt

if TYPE_CHECKING:
    from tests.support.launcher import Launcher

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86_64: the numbers are of this machine")

# name: number, arguments. -1 is no descriptor, BAD faults.
CALLS = {
    "mount": (165, "BAD, BAD, BAD, 0, BAD"),
    "umount2": (166, "BAD, 0"),
    "chroot": (161, "BAD"),
    "pivot_root": (155, "BAD, BAD"),
    "open_tree": (428, "-1, BAD, 0"),
    "move_mount": (429, "-1, BAD, -1, BAD, 0"),
    "fsopen": (430, "BAD, 0"),
    "fsconfig": (431, "-1, 0, 0, 0, 0"),
    "fsmount": (432, "-1, 0, 0"),
    "fspick": (433, "-1, BAD, 0"),
    "mount_setattr": (442, "-1, BAD, 0, BAD, 32"),
    "open_by_handle_at": (304, "-1, BAD, 0"),
    "setns": (308, "-1, 0"),
    "unshare user": (272, "0x10000000"),
    "unshare mount": (272, "0x00020000"),
    "unshare net": (272, "0x40000000"),
    "clone3": (435, "0, 0"),
    "bpf": (321, "9999, BAD, 0"),
    "perf_event_open": (298, "BAD, 0, -1, -1, 0"),
    "keyctl": (250, "9999, 0, 0, 0, 0"),
    "add_key": (248, "BAD, BAD, BAD, 0, 0"),
    "request_key": (249, "BAD, BAD, BAD, 0"),
    "ptrace": (101, "9999, 999999, 0, 0"),
    "process_vm_readv": (310, "999999, 0, 0, 0, 0, 0"),
    "process_vm_writev": (311, "999999, 0, 0, 0, 0, 0"),
    "io_uring_setup": (425, "0, BAD"),
    "io_uring_enter": (426, "-1, 0, 0, 0, 0, 0"),
    "io_uring_register": (427, "-1, 0, 0, 0"),
    "userfaultfd": (323, "0xffff"),
    "init_module": (175, "BAD, 0, BAD"),
    "finit_module": (313, "-1, BAD, 0"),
    "delete_module": (176, "BAD, 0"),
    "kexec_load": (246, "0, 99999, 0, 0"),
    "kexec_file_load": (320, "-1, -1, 0, 0, 0"),
    "fanotify_init": (300, "0xffffffff, 0"),
    "swapon": (167, "BAD, 0"),
    "swapoff": (168, "BAD"),
    "reboot": (169, "0, 0, 0, 0"),
    "acct": (163, "BAD"),
    "syslog": (103, "99, 0, 0"),
    "settimeofday": (164, "BAD, 0"),
    "clock_settime": (227, "0, BAD"),
    "sethostname": (170, "BAD, 8"),
    "setdomainname": (171, "BAD, 8"),
    "iopl": (172, "99"),
    "quotactl": (179, "0x80000700, BAD, 0, BAD"),
    "pidfd_getfd": (438, "-1, -1, 0"),
    "kcmp": (312, "999999, 999999, 0, 0, 0"),
    "move_pages": (279, "999999, 0, 0, 0, 0, 0"),
    "migrate_pages": (256, "999999, 0, 0, 0"),
    "personality": (135, "0x0040000"),
    "vhangup under another name: statmount": (457, "BAD, BAD, 0, 0"),
    "listmount": (458, "BAD, BAD, 0, 0"),
    "fchmodat2 with a set-id bit": (452, "-100, BAD, 0o4755, 0"),
    "openat2": (437, "-1, BAD, BAD, 24"),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_is_refused(launcher: Launcher, weak_launcher: Launcher, name: str) -> None:
    number, arguments = CALLS[name]
    probe = f"judge(*call({number}, {arguments}))"
    inside = attempt(launcher, probe)
    assert not inside.reached, inside
    twin = attempt(weak_launcher, probe, **ROOT)
    # A kernel built without modules or kexec has no such call; the filter's own answer is another one then.
    assert twin.reached or (twin.detail == "ENOSYS" and inside.detail == "EPERM"), (inside, twin)


CLONE = """
import signal
for flag in (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000):
    pid, error = call(56, flag | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0: os._exit(0)
    if pid > 0:
        os.waitpid(pid, 0); reached(hex(flag))
refused(error)
"""


def test_no_namespace_by_raw_clone(launcher: Launcher, weak_launcher: Launcher) -> None:
    assert not attempt(launcher, CLONE).reached
    assert attempt(weak_launcher, CLONE, **ROOT).reached


def test_clone3_answers_as_if_it_did_not_exist(launcher: Launcher) -> None:
    """Its flags are behind a pointer, so they cannot be judged; with ENOSYS libc falls back to clone."""
    assert attempt(launcher, "judge(*call(435, 0, 0), by=('ENOSYS',))").detail == "ENOSYS"


MACHINE_CODE = """
import mmap
# mov eax, 20 (getpid of the 32-bit table); int 0x80; ret
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')
function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
result = function()
(reached if result == os.getpid() else refused)(result)
"""


def test_32_bit_calls_are_refused(launcher: Launcher, weak_launcher: Launcher) -> None:
    assert not attempt(launcher, MACHINE_CODE).reached
    twin = attempt(weak_launcher, MACHINE_CODE, weaken=("seccomp",))
    # A kernel without IA32 emulation stops it too; then there is nothing for the filter to stop.
    assert twin.reached or twin.detail.startswith("signal 11"), twin


THREAD = """
import threading
found = []
def look(): found.append(call(272, 0x10000000))
thread = threading.Thread(target=look); thread.start(); thread.join()
judge(*found[0])
"""


def test_the_filter_is_on_every_thread(launcher: Launcher, weak_launcher: Launcher) -> None:
    assert not attempt(launcher, THREAD).reached
    probe = THREAD.replace("0x10000000", "0x00020000")
    assert not attempt(launcher, probe).reached
    assert attempt(weak_launcher, probe, **ROOT).reached


LISTENER = """
libc.prctl(38, 1, 0, 0, 0)
class F(ctypes.Structure):
    _fields_ = [('code', ctypes.c_uint16), ('jt', ctypes.c_uint8), ('jf', ctypes.c_uint8), ('k', ctypes.c_uint32)]
class P(ctypes.Structure): _fields_ = [('len', ctypes.c_uint16), ('filter', ctypes.POINTER(F))]
allow = (F * 1)(F(6, 0, 0, 0x7fff0000)); program = P(1, allow)
result, error = call(317, 1, FLAGS, ctypes.addressof(program))
(reached if result >= 0 else refused)(error)
"""


def test_no_listener_can_be_stacked_but_a_filter_can(launcher: Launcher, weak_launcher: Launcher) -> None:
    probe = LISTENER.replace("FLAGS", "8")
    assert not attempt(launcher, probe).reached
    assert attempt(weak_launcher, probe, weaken=("seccomp",)).reached
    assert attempt(launcher, LISTENER.replace("FLAGS", "0")).reached


@pytest.mark.parametrize("request_number", ["0x5412", "0x5412 | 1 << 32", "0x541C", "0x541C | 0xdead << 32"])
def test_terminal_input_cannot_be_forged(launcher: Launcher, weak_launcher: Launcher, request_number: str) -> None:
    """TIOCSTI and TIOCLINUX; the kernel looks at the low 32 bits alone (CVE-2019-10063)."""
    from sandbox.plan import Tty  # noqa: PLC0415 - beside its use

    probe = f"result = call(16, 0, {request_number}, BAD)\njudge(*result, by=('EPERM',))"
    assert not attempt(launcher, probe, tty=Tty(24, 80)).reached
    # Without the filter the pointer faults, or the request is unknown to a pseudo-terminal, or switched off by sysctl.
    twin = attempt(weak_launcher, probe, tty=Tty(24, 80), **ROOT)
    assert twin.reached, twin
    assert twin.detail in {"EFAULT", "EINVAL", "ENOTTY", "EIO"}
