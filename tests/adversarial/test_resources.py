"""Floods: each stops at a limit that has a name, inside the agent that made it, and nothing of it is left.

An attempt takes as much of one thing as it can get and says how much that was and which error stopped it. Its twin is
the same program under a larger limit, where it comes further: the limit that is named is the one that held. What
floods do to *other* agents is in test_floods.py.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox.confine import QUEUED_SIGNALS_MAX
from sandbox.mounts import TERMINALS_MAX
from sandbox.plan import Limits, Tty

if TYPE_CHECKING:
    from tests.support.launcher import Agent, Launcher

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

MIB = 1 << 20
PRELUDE = """
import ctypes, errno, fcntl, json, mmap, os, resource, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    ctypes.set_errno(0)
    words = [a if isinstance(a, ctypes._Pointer) else ctypes.c_long(a) for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
held = []
def take(what, most=1 << 20):
    "Do it again and again; say how often it worked, and what stopped it."
    count, why = 0, ''
    try:
        while count < most:
            held.append(what()); count += 1
    except OSError as error: why = errno.errorcode.get(error.errno, str(error.errno))
    except (RuntimeError, MemoryError) as error: why = type(error).__name__
    os.write(1, (json.dumps([count, why]) + '\\n').encode())
    os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """How much it got, and what stopped it: an errno, or `killed` for out of memory."""

    count: int
    why: str


def take(launcher: Launcher, program: str, *, timeout: float = 60, **changes: Any) -> Taken:
    changes.setdefault("limits", SMALL)
    agent = launcher.run(["python3", "-I", "-c", PRELUDE + program], timeout=timeout, **changes)
    return judge(agent)


def judge(agent: Agent) -> Taken:
    if agent.oom:
        return Taken(-1, "killed")
    assert agent.status == {"code": 0, "signal": None}, (agent.status, agent.stderr)
    lines = [line for line in agent.stdout.splitlines() if line.startswith("[")]
    assert lines, (agent.status, agent.stdout, agent.stderr)
    return Taken(*json.loads(lines[-1]))


def limits(**changes: Any) -> Limits:
    return Limits(**{"memory_bytes": 128 * MIB, "pids": 64, "open_files": 256, "output_bytes": MIB} | changes)


SMALL = limits()
LARGE = limits(pids=128, open_files=512)

FORK = """
def fork():
    pid = os.fork()
    if pid == 0: time.sleep(100); os._exit(0)
    return pid
take(fork)
"""
ZOMBIES = """
def zombie():
    pid = os.fork()
    if pid == 0: os._exit(0)
    return pid
take(zombie)
"""
VFORK = """
def spawn(): return os.posix_spawn('/bin/sleep', ['sleep', '100'], {})
take(spawn)
"""
THREADS = """
threading.stack_size(1 << 16)
def thread():
    t = threading.Thread(target=time.sleep, args=(100,), daemon=True); t.start(); return t
take(thread)
"""


@pytest.mark.parametrize(
    ("program", "why"),
    [(FORK, "EAGAIN"), (ZOMBIES, "EAGAIN"), (VFORK, "EAGAIN"), (THREADS, "RuntimeError")],
    ids=["fork bomb", "zombies", "spawn", "threads"],
)
def test_processes_and_threads_stop_at_the_pids_limit(launcher: Launcher, program: str, why: str) -> None:
    for allowed in (SMALL, LARGE):
        taken = take(launcher, program, limits=allowed)
        assert taken.why == why
        assert allowed.pids - 6 <= taken.count < allowed.pids


DESCRIPTORS = {
    "files": "take(lambda: os.open('/', os.O_RDONLY))",
    "sockets": "take(lambda: socket.socket())",
    "unix sockets": "take(lambda: socket.socketpair())",
    "pipes": "take(lambda: os.pipe())",
    "epoll": "import select\ntake(lambda: select.epoll())",
    "eventfd": "take(lambda: os.eventfd(0))",
    "memfd": "take(lambda: os.memfd_create('x'))",
    "timerfd": "take(lambda: call(283, 1, 0))",
    "connections to the proxy": """
server = socket.create_server(('127.0.0.1', 0), backlog=4096)
take(lambda: socket.create_connection(server.getsockname()))
""",
    "duplicates": "take(lambda: os.dup(0))",
}


@pytest.mark.parametrize("what", DESCRIPTORS)
def test_descriptors_stop_at_the_open_files_limit(launcher: Launcher, what: str) -> None:
    for allowed in (SMALL, LARGE):
        taken = take(launcher, DESCRIPTORS[what], limits=allowed)
        each = 2 if what in ("unix sockets", "pipes") else 1
        assert taken.why == "EMFILE"
        assert allowed.open_files - 12 <= taken.count * each <= allowed.open_files


# What is kept in memory, by whichever way it comes there: the memory limit ends the agent.
MEMORY = {
    "heap": "take(lambda: bytearray(b'x') * (1 << 20))",
    "shared mapping": """
def page():
    m = mmap.mmap(-1, 1 << 20)
    for at in range(0, 1 << 20, 4096): m[at] = 1
    return m
take(page)
""",
    "memfd": "fd = os.memfd_create('x')\ntake(lambda: os.write(fd, b'x' * (1 << 20)))",
    "System V shared memory": """
libc.shmat.restype = ctypes.c_void_p
def segment():
    number = libc.shmget(0, 1 << 20, 0o1600)
    if number < 0: raise OSError(ctypes.get_errno(), '')
    ctypes.memset(libc.shmat(number, None, 0), 1, 1 << 20)
take(segment)
""",
    "many children": """
def child():
    pid = os.fork()
    if pid == 0:
        x = bytearray(b'x') * (8 << 20); time.sleep(100); os._exit(0)
    time.sleep(0.02)
take(child, 50)
""",
}


@pytest.mark.parametrize("what", MEMORY)
def test_memory_ends_the_agent_at_its_limit(launcher: Launcher, what: str) -> None:
    assert take(launcher, MEMORY[what]).why == "killed"
    # The twin: 128 MiB are more than this limit allows, and less than that one.
    bounded = MEMORY[what].replace("take(lambda: ", "take(lambda: ").replace("take(", "take_some(")
    program = "def take_some(what, most=150): take(what, min(most, 150))\n" + bounded
    taken = take(launcher, program, limits=limits(memory_bytes=1024 * MIB))
    assert (taken.why, taken.count) == ("", 50 if what == "many children" else 150)


# What the kernel keeps for a process counts as its memory too: buffers, queues, locks, timers, directory entries.
KERNEL_MEMORY = {
    "pipe buffers": """
def pipe():
    r, w = os.pipe(); os.set_blocking(w, False)
    try:
        while True: os.write(w, b'x' * 65536)
    except BlockingIOError: pass
    return r, w
take(pipe)
""",
    "unix socket buffers": """
def pair():
    a, b = socket.socketpair(); a.setblocking(False)
    try:
        while True: a.send(b'x' * 65536)
    except BlockingIOError: pass
    return a, b
take(pair)
""",
    "descriptors in flight": """
def pass_on():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.setblocking(False)
    try:
        for _ in range(1000): socket.send_fds(a, [b'x'], [a.fileno()] * 200)
    except BlockingIOError: pass
    return a, b
take(pass_on)
""",
    "file locks": """
take(lambda: fcntl.flock(os.open('/tmp/lock', os.O_RDWR | os.O_CREAT), fcntl.LOCK_SH))
""",
    "timers": """
def timer(): return call(222, 0, 0, ctypes.pointer(ctypes.c_int(0)))
take(timer)
""",
    "queued signals": """
signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 64))
info = (ctypes.c_int * 32)(40, 0, -1)
def queue():
    if libc.syscall(129, os.getpid(), 40, info) < 0: raise OSError(ctypes.get_errno(), '')
take(queue)
""",
    "message queues": """
def queue():
    number = libc.msgget(0, 0o1600)
    if number < 0: raise OSError(ctypes.get_errno(), '')
    message = ctypes.create_string_buffer(struct.pack('l', 1) + b'x' * 8000)
    while libc.msgsnd(number, message, 8000, 0o4000) == 0: pass
take(queue)
""",
    "POSIX message queues": """
count = iter(range(1 << 30))
take(lambda: call(240, ctypes.pointer(ctypes.create_string_buffer(b'q%d' % next(count))), 0o102, 0o600, 0))
""",
    "semaphores": """
def sets():
    number = libc.semget(0, 32000, 0o1600)
    if number < 0: raise OSError(ctypes.get_errno(), '')
take(sets)
""",
    "inotify instances": "take(lambda: libc.inotify_init() if len(held) < 1 << 20 else 0, 200)",
    "inotify watches": """
fd = call(253)
def watch():
    name = '/tmp/w%d' % len(held); os.mkdir(name)
    if libc.inotify_add_watch(fd, name.encode(), 0xfff) < 0: raise OSError(ctypes.get_errno(), '')
take(watch)
""",
    "chains of epoll": """
import select
def chain():
    e = select.epoll()
    if held: e.register(held[-1].fileno(), 1)
    return e
take(chain)
""",
    "locked memory": """
def lock():
    m = mmap.mmap(-1, 1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(m))
    if libc.mlock(ctypes.c_void_p(address), 1 << 20) < 0: raise OSError(ctypes.get_errno(), '')
    return m
take(lock)
""",
    "mappings": """
libc.mmap.restype = ctypes.c_void_p
def area():
    at = libc.mmap(None, 4096, 1 + 2 * (len(held) % 2), 0x22, -1, 0)
    if at in (None, 2 ** 64 - 1): raise OSError(ctypes.get_errno(), '')
take(area)
""",
    "terminals": "take(lambda: os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY), 1000)",
}
STOPPED_BY = {
    "pipe buffers": {"EMFILE", "killed"},
    "unix socket buffers": {"EMFILE", "killed"},
    "descriptors in flight": {"ETOOMANYREFS", "EMFILE", "killed"},
    "file locks": {"EMFILE"},
    "timers": {"EAGAIN", "killed"},
    "queued signals": {"EAGAIN", "killed"},
    "message queues": {"ENOSPC", "ENOMEM", "killed"},
    "POSIX message queues": {
        "EMFILE",
        "ENOSPC",
        "EACCES",
    },  # Landlock lets none be opened: their file system has no path
    "semaphores": {"ENOSPC", "ENOMEM", "killed"},
    "inotify instances": {""},  # glibc gives -1: counted below
    "inotify watches": {"ENOSPC", "EDQUOT", "killed"},
    "chains of epoll": {"EINVAL", "ELOOP"},
    "locked memory": {"ENOMEM", "EAGAIN", "EPERM"},
    "mappings": {"ENOMEM", "killed"},
    "terminals": {"ENOSPC", "EMFILE"},
}


@pytest.mark.parametrize("what", KERNEL_MEMORY)
def test_what_the_kernel_keeps_for_an_agent_is_bounded(launcher: Launcher, what: str) -> None:
    taken = take(launcher, KERNEL_MEMORY[what], limits=limits(memory_bytes=96 * MIB, open_files=1024))
    assert taken.why in STOPPED_BY[what], taken
    if what in ("timers", "queued signals"):
        assert taken.count <= QUEUED_SIGNALS_MAX
    if what == "terminals":
        assert taken.count <= TERMINALS_MAX


# --- what is written

SCRATCH = ("/tmp", "/home/agent", "/dev/shm", "/workspace")
FILL = """
fd = os.open(sys.argv[1] + '/large', os.O_RDWR | os.O_CREAT)
take(lambda: os.write(fd, b'x' * (1 << 20)) == 1 << 20 or (_ for _ in ()).throw(OSError(errno.ENOSPC, 'short')), 600)
"""
FILES = """
count = iter(range(1 << 30))
take(lambda: os.close(os.open(sys.argv[1] + '/%d' % next(count), os.O_CREAT)), 200_000)
"""
DEEP = """
os.chdir(sys.argv[1])
def deeper(): os.mkdir('d'); os.chdir('d')
take(deeper, 3000)
"""
SPARSE = """
fd = os.open(sys.argv[1] + '/sparse', os.O_RDWR | os.O_CREAT)
try: os.ftruncate(fd, 1 << 42)
except OSError: os.ftruncate(fd, 1 << 33)
at = iter(range(0, 1 << 33, 1 << 20))
take(lambda: os.pwrite(fd, b'x' * (1 << 20), next(at)), 600)
"""
FULL = {"ENOSPC", "EDQUOT", "killed", "EFBIG"}


@pytest.mark.parametrize("place", SCRATCH)
@pytest.mark.parametrize("program", [FILL, FILES, SPARSE], ids=["bytes", "inodes", "sparse file"])
def test_scratch_is_full_at_its_limit(launcher: Launcher, place: str, program: str) -> None:
    agent = launcher.run(
        ["python3", "-I", "-c", PRELUDE + program, place],
        timeout=120,
        limits=limits(memory_bytes=256 * MIB, disk_bytes=64 * MIB),
    )
    taken = judge(agent)
    assert taken.why in FULL, taken
    if program in (FILL, SPARSE):
        assert taken.count <= 260
    else:
        assert taken.count <= 70_000


def test_a_deep_tree_goes_with_its_agent(launcher: Launcher) -> None:
    agent = launcher.run(["python3", "-I", "-c", PRELUDE + DEEP, "/tmp"], limits=SMALL)
    assert judge(agent) == Taken(3000, "")


def test_what_was_freed_can_be_used_again(launcher: Launcher) -> None:
    """The twin of the fills: a full place is not a broken one."""
    program = """
fd = os.open('/tmp/large', os.O_RDWR | os.O_CREAT)
try:
    for _ in range(600): assert os.write(fd, b'x' * (1 << 20)) == 1 << 20
except (OSError, AssertionError): pass
os.ftruncate(fd, 0)
os.lseek(fd, 0, 0)
take(lambda: os.write(fd, b'x' * 65536), 16)
"""
    assert take(launcher, program, limits=limits(memory_bytes=512 * MIB, disk_bytes=64 * MIB)) == Taken(16, "")


# --- what is said

SHOUT = """
def shout():
    for _ in range(256): os.write(int(sys.argv[1]), b'x' * 65536)
for _ in range(4): shout()
take(lambda: 0, 1)
"""


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_kept_of_output_is_bounded(launcher: Launcher, number: int) -> None:
    agent = launcher.run(["python3", "-I", "-c", PRELUDE + SHOUT, str(number)], limits=SMALL)
    assert agent.status == {"code": 0, "signal": None}
    kept = sum(path.stat().st_size for path in Path(agent.directory).iterdir() if ".log" in path.name)
    assert SMALL.output_bytes / 4 <= kept <= SMALL.output_bytes


def test_what_is_kept_of_a_terminal_is_bounded(launcher: Launcher) -> None:
    program = "import os\nfor _ in range(4096): os.write(1, b'x' * 4000)"
    agent = launcher.run(["python3", "-I", "-c", program], limits=SMALL, tty=Tty(24, 80))
    kept = sum(path.stat().st_size for path in Path(agent.directory).iterdir() if ".log" in path.name)
    assert SMALL.output_bytes / 4 <= kept <= SMALL.output_bytes


# --- what is refused

REFUSED = {
    "mounts": ("take(lambda: call(165, 0, 0, 0, 0, 0))", {"EPERM", "ENOSYS"}),
    "keyrings": ("take(lambda: call(248, 0, 0, 0, 0, 0))", {"EPERM", "ENOSYS"}),
    "asynchronous I/O of the whole host": (
        "take(lambda: call(206, 1000, ctypes.pointer(ctypes.c_ulong(0))))",
        {"ENOSYS"},
    ),
    "real-time priority": (
        "take(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10)))",
        {"EPERM"},
    ),
    "a better nice value": ("take(lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))", {"EACCES", "EPERM"}),
    "real-time I/O priority": ("take(lambda: call(251, 1, 0, 1 << 13))", {"EPERM"}),
    "namespaces": ("take(lambda: call(272, 0x10000000))", {"EPERM", "ENOSYS"}),
    "higher rlimits": (
        "take(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20)) or 0)",
        {"EPERM"},
    ),
    "arguments": (
        "take(lambda: os.execv('/bin/true', ['true'] + ['x' * 100_000] * 100))",
        {"E2BIG"},
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_cost_the_whole_host_is_refused(launcher: Launcher, what: str) -> None:
    program, why = REFUSED[what]
    program = program.replace("resource.setrlimit(", "raising(")
    prelude = """
def raising(*a):
    try: return resource.setrlimit(*a)
    except ValueError: raise OSError(errno.EPERM, 'refused')
"""
    taken = take(launcher, prelude + program)
    assert (taken.count, taken.why in why) == (0, True), taken


def test_nothing_that_is_named_here_has_another_meaning() -> None:
    assert set(KERNEL_MEMORY) == set(STOPPED_BY)
    for causes in STOPPED_BY.values():
        assert all(hasattr(errno, cause) or cause in ("killed", "") for cause in causes)
