"""Ids, capabilities, namespaces, limits, scheduling, signals, IPC."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from functools import partial
from typing import Final

from tests.adversarial.probes.inside import (
    BAD,
    NICE,
    RESOURCE,
    Reached,
    call,
    facts,
    judge,
    judged,
    refused,
    text,
)
from tests.adversarial.probes.inside import add as _add
from tests.adversarial.probes.inside import probe as _probe

# Where they succeed, the process is another one after them.
add = partial(_add, apart="open")
probe = partial(_probe, apart="open")

# --- ids ---


def _become(number: int, *ids: int) -> str:
    return judge(call(number, *ids), by=("EPERM", "EINVAL"))


add("become pid 1's user", partial(_become, 117, 65533, 65533, 65533))
add("become pid 1's group", partial(_become, 119, 65533, 65533, 65533))
add("become another user of the range, saved id only", partial(_become, 117, -1, -1, 1234))
add("become another user by setreuid", partial(_become, 113, 1234, 1234))
add("become a user by setuid", partial(_become, 105, 1234))
add("become a group by setgid", partial(_become, 106, 1234))


@probe("become a user of the host that is not mapped")
def unmapped() -> str:
    return judge(call(117, 1 << 20, 1 << 20, 1 << 20), by=("EPERM", "EINVAL"))


@probe("become a user of files (setfsuid)")
def fsuid() -> str:
    call(122, 1234)
    now, _ = call(122, -1)
    if now == 1234:
        raise Reached(now)
    return "ignored"


for _name, _groups in {"none": (), "root's": (0,), "the terminal's": (5,), "many": tuple(range(32))}.items():

    def _setgroups(groups: tuple[int, ...] = _groups) -> str:
        listed = (ctypes.c_uint32 * max(len(groups), 1))(*groups)
        return judge(call(116, len(groups), ctypes.addressof(listed)))

    add(f"take groups: {_name}", _setgroups)

# --- capabilities ---


def _capset(index: int) -> str:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    data[index] = 1 << 21
    data[1] |= data[index]  # effective needs permitted
    if facts["open"]:
        call(125, ctypes.addressof(header), ctypes.addressof(data))
    return judge(call(126, ctypes.addressof(header), ctypes.addressof(data)))


add("raise an effective capability", partial(_capset, 0))
add("raise a permitted capability", partial(_capset, 1))
add("raise an inheritable capability", partial(_capset, 2))

PRCTL: Final[dict[str, tuple[int, ...]]] = {
    "raise an ambient capability": (47, 2, 21, 0, 0),
    "unlock securebits": (28, 0, 0, 0, 0),
    "keep capabilities": (8, 1, 0, 0, 0),
    "drop from the bounding set, which takes CAP_SETPCAP": (24, 0, 0, 0, 0),
    "PR_SET_MM: start of the code": (35, 1, 0x10000, 0, 0),
    "PR_SET_MM: the program": (35, 13, 0, 0, 0),
    "PR_SET_MM: the auxiliary vector": (35, 12, BAD, 8, 0),
    "PR_SET_IO_FLUSHER": (57, 1, 0, 0, 0),
    "PR_SET_PTRACER is of no use: trace a child": (0,),
}


def _prctl(*arguments: int) -> str:
    if arguments == (0,):
        call(157, 0x59616D61, -1, 0, 0, 0)
        pid = os.fork()
        if pid == 0:
            signal.pause()
        answer = call(101, 16, pid, 0, 0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return judge(answer)
    if facts["open"] and arguments[0] == 47:
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        call(125, ctypes.addressof(header), ctypes.addressof(data))
        data[2] = data[1]
        call(126, ctypes.addressof(header), ctypes.addressof(data))
    return judge(call(157, *arguments), by=("EPERM",))


for _name, _arguments in PRCTL.items():
    _needed = RESOURCE if _arguments[0] in (35, 57) else -1
    add(
        f"prctl {_name}" if not _name.startswith("PR_") else _name,
        partial(_prctl, *_arguments),
        absent=("EINVAL",),
        capability=_needed,
    )

for _set in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):

    def _held(which: str = _set) -> str:
        with open("/proc/self/status") as file:
            value = next(line.split()[1] for line in file if line.startswith(which))
        if int(value, 16):
            raise Reached(value)
        return value

    add(f"{_set} holds something", _held, absent=("0000000000000000",) if _set in ("CapInh", "CapAmb") else ())


@probe("no_new_privs is not set")
def no_new_privs() -> str:
    if call(157, 39, 0, 0, 0, 0)[0] != 1:
        raise Reached("not set")
    return "set"


@probe("no_new_privs can be taken back", untwinned="the kernel itself refuses it")
def take_back() -> str:
    return judge(call(157, 38, 0, 0, 0, 0), by=("EINVAL",))


@probe("a capability after executing a program", absent=("0000000000000000",))
def capability_after_exec() -> str:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.execve("/bin/grep", ["grep", "^CapEff:", "/proc/self/status"], {})
    os.waitpid(pid, 0)
    value = os.read(read, 100).split()[1].decode()
    if int(value, 16):
        raise Reached(value)
    return value


# --- namespaces ---

for _kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):

    def _namespace(kind: str = _kind) -> str:
        mine = os.readlink(f"/proc/self/ns/{kind}")
        if mine == facts["namespaces"][kind]:
            raise Reached(mine)
        return mine

    _why = "no weakened plan leaves it out" if _kind in ("mnt", "cgroup") else ""
    add(f"the {_kind} namespace is the host's", _namespace, twin="shared", untwinned=_why)

for _kind, _relation in {
    "owner of the network": ("net", 0xB701),
    "parent of the user": ("user", 0xB702),
    "parent of the pid": ("pid", 0xB702),
}.items():

    def _related(kind: str = _relation[0], request: int = _relation[1]) -> str:
        fd = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
        return judge(call(16, fd, request), by=("EPERM", "EINVAL"))

    add(f"the {_kind} namespace by ioctl", _related, absent=("EPERM", "EINVAL"))

for _kind, _request in {"mount": 0xFF03, "network": 0xFF04, "user": 0xFF08, "pid": 0xFF05}.items():

    def _by_pidfd(request: int = _request) -> str:
        return judge(call(16, os.pidfd_open(1), request), by=("EPERM", "EACCES", "ENOTTY", "EINVAL", "ENOTSUP"))

    add(f"the {_kind} namespace of pid 1 by its descriptor", _by_pidfd, absent=("ENOTTY", "EINVAL", "ENOTSUP"))


@probe("the next mount namespace", twin="shared", absent=("ENOTTY", "EINVAL", "ENOENT"))
def next_namespace() -> str:
    fd = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    return judge(call(16, fd, 0x8010B70B, BAD), by=("EPERM", "ENOTTY", "EINVAL"))


@probe("the host name")
def host_name() -> str:
    return judge(call(170, text("sktest"), 6))


@probe("the host's name is shown", twin="shared")
def host_name_shown() -> str:
    if os.uname().nodename == facts["hostname"]:
        raise Reached(facts["hostname"])
    return os.uname().nodename


# --- limits and scheduling ---

for _name in ("NOFILE", "MEMLOCK", "RTPRIO", "SIGPENDING", "CORE", "NICE", "MSGQUEUE", "NPROC"):

    def _raise(which: int = getattr(resource, f"RLIMIT_{_name}")) -> str:
        _, hard = resource.getrlimit(which)
        if hard == resource.RLIM_INFINITY:
            return "not limited"

        def act() -> None:
            try:
                resource.setrlimit(which, (hard + 1, hard + 1))
            except ValueError as error:
                raise PermissionError(1, str(error)) from None

        return refused(act)

    add(f"raise RLIMIT_{_name}", _raise, absent=("not limited",), capability=RESOURCE)


def _schedule(policy: int) -> str:
    return refused(lambda: os.sched_setscheduler(0, policy, os.sched_param(1)))


for _name, _policy in {"FIFO": 1, "RR": 2}.items():
    add(
        f"real-time scheduling, {_name}",
        partial(_schedule, _policy),
        capability=NICE,
        absent=("EPERM",),  # a group without real-time share
    )


@probe("deadline scheduling", absent=("EPERM", "EBUSY", "EINVAL"))
def deadline() -> str:
    attributes = struct.pack("=IIQiIQQQ", 48, 6, 0, 0, 0, 10000000, 30000000, 30000000)
    return judge(call(314, 0, text(attributes), 0), by=("EPERM", "EBUSY"))


@probe("a better priority")
def nice() -> str:
    return refused(lambda: os.setpriority(os.PRIO_PROCESS, 0, -1))


@probe("real-time input and output")
def ioprio() -> str:
    return judge(call(251, 1, 0, 1 << 13), by=("EPERM",))


@probe("be spared when memory is short", capability=RESOURCE)
def oom() -> str:
    def act() -> None:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")

    return refused(act)


def _timer(clock: int) -> str:
    return judge(call(222, clock, 0, text(bytes(8))), by=("EPERM", "ENOTSUP"))


for _name, _clock in {"real time": 8, "time since boot": 9}.items():
    add(
        f"wake the machine by {_name}, timerfd",
        partial(judged, ("EPERM", "ENOTSUP"), 283, _clock, 0),
        absent=("ENOTSUP", "EINVAL"),
    )
    add(
        f"wake the machine by {_name}, timer",
        partial(_timer, _clock),
        absent=("ENOTSUP",),
    )

# --- pid 1 ---

PID_1: Final[dict[str, tuple[int, ...]]] = {
    "kill": (62, 1, 0),
    "tkill": (200, 1, 0),
    "tgkill": (234, 1, 1, 0),
    "kill its group": (62, -1 & 0xFFFFFFFF, 0),
    "setpriority": (141, 0, 1, 0),
    "ioprio_set": (251, 1, 1, 2 << 13),
    "prlimit64": (302, 1, 7, 0, BAD),
    "get_robust_list": (274, 1, BAD, BAD),
    "setpgid": (109, 1, 0),
}


def _pid_1(*arguments: int) -> str:
    return judge(call(*arguments), by=("EPERM", "ESRCH", "EACCES"))


for _name, _arguments in PID_1.items():
    if _name not in ("kill its group", "setpgid"):
        add(f"pid 1: {_name}", partial(_pid_1, *_arguments), capability=RESOURCE if _name == "prlimit64" else -1)


@probe("pid 1: sched_setscheduler")
def schedule_pid_1() -> str:
    return refused(lambda: os.sched_setscheduler(1, 0, os.sched_param(0)), by=("EPERM", "ESRCH"))


@probe("pid 1: a forged signal")
def forged_signal() -> str:
    info = (ctypes.c_int32 * 32)(0, 0, -1)
    return judge(call(129, 1, 0, ctypes.addressof(info)), by=("EPERM",))


@probe("pid 1: a signal by descriptor")
def signal_by_descriptor() -> str:
    return judge(call(424, os.pidfd_open(1), 0, 0, 0), by=("EPERM",))


@probe("pid 1: join its group of processes", absent=("EPERM",))
def join_group() -> str:
    return refused(lambda: os.setpgid(0, 1))


@probe("a process of the host by its number", twin="shared")
def host_process() -> str:
    return refused(lambda: os.kill(int(facts["pid"]), 0), by=("ESRCH",))


@probe("leave the group of all processes: signal everybody", untwinned="a twin would end the host's")
def signal_everybody() -> str:
    """kill(-1, 0) asks only; pid 1 does not count."""
    result, error = call(62, -1, 0)
    if result >= 0 and os.getpid() == 1:
        raise Reached("all")
    return error or "one's own"


# --- IPC of the host ---


def _by_key(number: int) -> str:
    return judge(call(number, int(facts["key"]), 0, 0), by=("ENOENT",))


for _name, _number in {"shared memory": 29, "message queue": 68}.items():
    add(
        f"System V {_name} of the host",
        partial(_by_key, _number),
        twin="shared",
    )


@probe("System V semaphores of the host", twin="shared")
def semaphores() -> str:
    return judge(call(64, int(facts["key"]), 0, 0), by=("ENOENT",))


@probe("a POSIX queue of the host", twin="shared")
def posix_queue() -> str:
    return judge(call(240, text(str(facts["queue"])), os.O_RDONLY, 0, 0), by=("ENOENT",))


@probe("System V objects that are listed", twin="shared")
def listed() -> str:
    for name in ("shm", "msg", "sem"):
        with open(f"/proc/sysvipc/{name}") as file:
            if len(lines := file.read().splitlines()) > 1:
                raise Reached(lines[1])
    return "none"
