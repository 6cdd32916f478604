"""What agents execute and are refused is told, by a watcher that nothing an agent does can get around or slow down."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox import notices, watcher
from sandbox.plan import Bind, Record
from tests.support.census import text
from tests.support.launcher import ROOT, TELLING, Launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.launcher import Agent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

TOLD: dict[str, Any] = {"filter_digest": TELLING, "record": Record(execs=True, refusals=True, arguments=4)}
UNSHARE = 272 if os.uname().machine == "x86_64" else 97
PYTHON = "/usr/bin/python3"
SECONDS_MAX = 20.0


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with Launcher.start() as started:
        yield started


def called(launcher: Launcher, agent: Agent, until: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """Everything told of an agent, as soon as it is what is waited for; each with its stream."""
    deadline = time.monotonic() + SECONDS_MAX
    found: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        launcher.request("stats", agent_ids=[])  # reads what came before the answer
        for event in [e for e in launcher.events if e.get("ev") == "called" and e["agent_id"] == agent.agent_id]:
            launcher.events.remove(event)
            found += [one | {"stream": event["stream_id"]} for one in event["events"]]
        if until(found):
            return found
        time.sleep(0.005)
    raise AssertionError(f"not told in {SECONDS_MAX:g} s: {found}")


def executed(events: list[dict[str, Any]]) -> list[str]:
    return [event["path"] for event in events if event["kind"] == "exec"]


def counted(events: list[dict[str, Any]]) -> bool:
    """Whether they are told as a number, and why: one of the calls was in hand when a watcher ended."""
    unread = any(event["kind"] == "interrupted" and event["unread"] for event in events)
    return unread and any(event["kind"] == "execs" for event in events)


def refused(events: list[dict[str, Any]]) -> dict[int, int]:
    times: dict[int, int] = {}
    for event in events:
        if event["kind"] == "refused":
            times[event["call"]] = times.get(event["call"], 0) + event["times"]
    return times


def watchers(launcher: Launcher) -> list[int]:
    """Those that are ready to watch."""
    pid, found = launcher.process.pid, []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            status = Path(f"/proc/{child}/status").read_text()
        except OSError:
            continue
        if "Name:\tstockade-watch\n" in status and "Seccomp:\t2\n" in status:
            found.append(int(child))
    return found


def watcher_pid(launcher: Launcher, *, besides: int = 0) -> int:
    deadline = time.monotonic() + SECONDS_MAX
    while not (found := [pid for pid in watchers(launcher) if pid != besides]):
        assert time.monotonic() < deadline, "no watcher"
        time.sleep(0.005)
    return found[0]


def test_who_ran_what_is_told_and_without_it_nothing(launcher: Launcher) -> None:
    script = "/bin/echo $$ a b c d; exec /bin/true"
    agent = launcher.sh(script, **TOLD)
    events = called(launcher, agent, lambda found: len(executed(found)) == 3)
    first, second, third = events
    assert [first["path"], second["path"], third["path"]] == ["/bin/sh", "/bin/echo", "/bin/true"]
    inside = int(agent.stdout.split()[0])
    assert (first["pid"], first["ppid"], second["ppid"], third["pid"]) == (inside, 1, inside, inside)
    assert second["args"] == ["/bin/echo", str(inside), "a", "b"], "as many as the plan says"
    assert (second["argc"], second["digest"][:7]) == (6, "sha256:")
    assert first["stream"] == agent.agent_id
    assert agent.posture["record"] == {"execs": True, "refusals": True}

    plain = launcher.sh(script)
    assert plain.status == agent.status
    other = launcher.sh("true", **TOLD)
    called(launcher, other, lambda found: len(executed(found)) >= 1)
    assert not [e for e in launcher.events if e.get("ev") == "called" and e["agent_id"] == plain.agent_id]


HIDDEN = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
fd = os.memfd_create("hidden")
os.write(fd, open("/bin/true", "rb").read())
if os.fork() == 0:
    os.execve(fd, ["x"], {})
print(os.wait()[1])
for path, argv in ((b"/no/such", None), (ctypes.c_void_p(1), None), (b"\\xff\\n", ctypes.c_void_p(8))):
    print(libc.execve(path, argv, None), ctypes.get_errno())
"""


def test_files_without_a_name_failing_execs_and_wild_pointers_are_told(launcher: Launcher) -> None:
    agent = launcher.run([PYTHON, "-c", HIDDEN], **TOLD)
    assert agent.stdout.split() == ["0", "-1", "2", "-1", "14", "-1", "2"], agent.stderr
    events = called(launcher, agent, lambda found: len(executed(found)) == 5)
    assert executed(events)[1].startswith("fd:")
    assert executed(events)[2:] == ["/no/such", "", r"\xff\x0a"], "printable, whatever it was"
    assert [event["argc"] for event in events[2:]] == [0, -1, -1]


def test_a_message_of_the_worst_paths_and_arguments_still_fits(launcher: Launcher) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None)
argv = (ctypes.c_char_p * 17)(*[b"\\x01" * 255] * 16)
for name in [b"\\\\" * 4000] * 100 + [b"last"]:
    libc.execve(b"/no/" + name, argv, None)
"""
    sixteen = TOLD | {"record": Record(execs=True, arguments=16)}
    agent = launcher.run([PYTHON, "-c", code], **sixteen)
    events = called(launcher, agent, lambda found: len(executed(found)) == 102)
    assert events[1]["path"].startswith("/no/")
    assert all(len(event["path"]) <= watcher.PATH_CHARACTERS_MAX for event in events)
    assert [len(argument) for argument in events[1]["args"]] == [len(events[1]["args"][0])] * 16
    assert len(events[1]["args"][0]) <= watcher.ARGUMENT_CHARACTERS_MAX
    assert executed(events)[-1] == "/no/last"


def test_long_arguments_are_cut_and_many_are_not_read(launcher: Launcher) -> None:
    code = "import os; os.execv('/bin/true', ['x' * 100000] + ['y'] * 5000)"
    agent = launcher.run([PYTHON, "-c", code], **TOLD)
    event = called(launcher, agent, lambda found: len(executed(found)) == 2)[1]
    assert event["args"] == ["x" * watcher.ARGUMENT_BYTES_MAX, "y", "y", "y"]
    assert event["argc"] == watcher.ARGUMENTS_READ_MAX + 1, "one more than are read: or more"


def test_refused_calls_are_told_with_their_number_of_times_and_answered_alike(launcher: Launcher) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for call in [lambda: libc.unshare(0x10000000)] * 7 + [lambda: libc.ptrace(0, 0, 0, 0), lambda: libc.unshare(0x400)]:
    print(call(), ctypes.get_errno())
    ctypes.set_errno(0)
"""
    agent = launcher.run([PYTHON, "-c", code], **TOLD)
    plain = launcher.run([PYTHON, "-c", code])
    assert agent.stdout == plain.stdout == "-1 1\n" * 8 + "0 0\n", "what is allowed still is"
    times = refused(called(launcher, agent, lambda found: refused(found).get(UNSHARE) == 7))
    assert times[UNSHARE] == 7
    made_up = launcher.run([PYTHON, "-c", "import ctypes; ctypes.CDLL(None).syscall(400)"], **TOLD)
    assert refused(called(launcher, made_up, lambda found: refused(found) != {})) == {400: 1}
    ptrace = 101 if os.uname().machine == "x86_64" else 117
    assert times[ptrace] == 1


def test_canaries_are_no_acts_of_the_agent(launcher: Launcher) -> None:
    agent = launcher.run(["/bin/true"], canary=True, **TOLD)
    events = called(launcher, agent, lambda found: bool(executed(found)))
    assert refused(events) == {}
    assert agent.posture["canary"]["attempts"] >= 50


def test_what_an_operator_starts_is_told_as_that_and_also_what_outlives_it(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"], **TOLD)
    script = "(/bin/sleep 0.3; /bin/echo late) > /dev/null 2>&1 & exec /bin/true"
    done = launcher.exec(agent, ["/bin/sh", "-c", script], stream_id="op1")
    assert done["status"]["code"] == 0
    events = called(launcher, agent, lambda found: "/bin/echo" in executed(found))
    streams = {event["path"]: event["stream"] for event in events if event["kind"] == "exec"}
    assert (streams["/bin/echo"], streams["/bin/sh"]) == ("op1", "op1")
    assert all(event["ppid"] in (0, 1) for event in events if event["path"] == "/bin/sh")


def test_the_agent_can_have_no_listener_of_its_own(launcher: Launcher) -> None:
    number = 317 if os.uname().machine == "x86_64" else 277
    code = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
program = (ctypes.c_uint64 * 1)(0x7fff000000000006)  # return ALLOW
fprog = (ctypes.c_uint64 * 2)(1, ctypes.addressof(program))
for flags in (8, 0):
    print(libc.syscall({number}, 1, flags, fprog), ctypes.get_errno())
    ctypes.set_errno(0)
"""
    agent = launcher.run([PYTHON, "-c", code], **TOLD)
    assert agent.stdout.splitlines() == ["-1 1", "0 0"], "a filter of its own it can have"


def test_no_listener_can_be_had_inside(launcher: Launcher) -> None:
    """Whoever has one lets its own refused calls go on: pid 1 keeps the agent's, and shows nobody."""
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
pidfd = libc.syscall(434, 1, 0)
for number in range(3, 16):
    got = libc.syscall(438, pidfd, number, 0)
    assert got < 0 and ctypes.get_errno() in (1, 9), (number, got, ctypes.get_errno())
for act in (lambda: os.listdir("/proc/1/fd"), lambda: os.open("/proc/1/fd/8", os.O_RDONLY)):
    try:
        print(act())
    except OSError as error:
        print(type(error).__name__)
print([os.readlink(f"/proc/self/fd/{n}") for n in range(3, 16) if n != pidfd and os.path.lexists(f"/proc/self/fd/{n}")])
"""
    agent = launcher.run([PYTHON, "-c", code], **TOLD)
    first, second, own = agent.stdout.splitlines()
    assert first in ("PermissionError", "FileNotFoundError"), agent.stderr
    assert second in ("PermissionError", "FileNotFoundError")
    assert own == "[]"


LOOP = "while :; do /bin/echo x; done"


def test_execs_wait_for_a_watcher_that_was_killed_and_for_a_launcher(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sh", "-c", LOOP], **TOLD)
    size = grown(agent, 0)
    killed = watcher_pid(launcher)
    os.kill(killed, signal.SIGKILL)
    size = grown(agent, size)

    stopped = watcher_pid(launcher, besides=killed)
    os.kill(stopped, signal.SIGSTOP)
    still = settled(agent)
    size = grown(agent, still)
    assert watcher_pid(launcher, besides=stopped), "one that does not come round is replaced"

    launcher.events.clear()
    launcher.restart()
    launcher.request("hello")
    grown(agent, size)
    called(launcher, agent, lambda found: "/bin/echo" in executed(found) or counted(found))
    assert launcher.kill(agent)["verified_empty"]


@pytest.mark.parametrize("how", ["killed", "hung", "with its launcher"])
def test_a_call_that_a_watcher_had_in_hand_when_it_ended_is_answered(launcher: Launcher, how: str) -> None:
    """And it is not read again what that agent executes, which may be what ended the watcher: it is counted."""
    agent = launcher.launch(["/bin/sh", "-c", LOOP], **TOLD)
    other = launcher.launch(["/bin/sh", "-c", "while :; do /bin/echo y; sleep 0.01; done"], **TOLD)
    grown(agent, 0)
    pid = watcher_pid(launcher)
    stop_with_call_in_hand(launcher, pid, agent)
    still = settled(agent) if how != "hung" else len(agent.stdout)
    if how == "with its launcher":
        os.kill(launcher.process.pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        launcher.restart()
        launcher.request("hello")
    elif how == "killed":
        os.kill(pid, signal.SIGKILL)
    grown(agent, still)
    others = called(launcher, other, lambda found: "interrupted" in [event["kind"] for event in found])
    assert [event["unread"] for event in others if event["kind"] == "interrupted"] == [False]
    called(launcher, other, lambda found: "/bin/echo" in executed(found))
    launcher.restart()
    launcher.request("hello")
    grown(agent, len(agent.stdout))
    launcher.kill(agent)
    launcher.kill(other)

    def both(found: list[dict[str, Any]]) -> bool:
        kinds = [event["kind"] for event in found]
        return "interrupted" in kinds and "execs" in kinds[kinds.index("interrupted") :]

    events = called(launcher, agent, both)  # numbers at the latest when it has ended
    at = [event["kind"] for event in events].index("interrupted")
    assert all(event["unread"] for event in events if event["kind"] == "interrupted"), "the next launcher knows it too"
    assert executed(events[at:]) == []


HANGS = """
import ctypes, mmap
with open("/workspace/hangs", "rb") as file:
    page = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print("now", flush=True)
ctypes.CDLL(None).execve(ctypes.c_void_p(address), None, None)
"""


@contextlib.contextmanager
def beside_hanging_files(place: Path) -> Iterator[Launcher]:
    server = ROOT / "tests" / "support" / "hanging_files.py"
    private = ["unshare", "-m", "--propagation", "private"]
    with Launcher.start(wrapper=[*private, sys.executable, str(server), str(place)]) as launcher:
        yield launcher


def hang(launcher: Launcher, place: Path) -> Agent:
    """An agent that executes a path in a file that hangs: whoever reads it waits where no signal may reach it."""
    workspace = os.open(f"/proc/{launcher.process.pid}/root{place}", os.O_PATH | os.O_DIRECTORY)
    bind = Bind(0, "/workspace", writable=False, owner_uid=0, owner_gid=0, without_idmap="read-only")
    agent = launcher.launch([PYTHON, "-c", HANGS], [workspace], binds=(bind,), degraded_ok=("idmap",), **TOLD)
    os.close(workspace)
    deadline = time.monotonic() + SECONDS_MAX
    while not agent.stdout:
        assert time.monotonic() < deadline, agent.stderr
        time.sleep(0.01)
    return agent


HOLDS = """
import ctypes, threading, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
size = ctypes.c_size_t(200 << 20)
place = ctypes.c_void_p(libc.mmap(None, size, 3, 0x22, -1, ctypes.c_size_t(0)))
libc.madvise(place, size, 15)  # small pages
libc.memset(place, 1, size)
end = time.monotonic() + 3
def hold():
    while time.monotonic() < end:
        libc.mprotect(place, size, 1)
        libc.mprotect(place, size, 3)
for _ in range(3):
    threading.Thread(target=hold).start()
argv = (ctypes.c_char_p * 17)(*[b"a" * 200] * 16)
while time.monotonic() < end:
    libc.execve(b"/no/such", argv, None)
"""


def test_memory_that_is_slow_to_read_is_not_read_all_the_time(launcher: Launcher) -> None:
    """Each of some twenty reads waits for a lock that threads of the agent hold most of the time."""
    holds = launcher.run([PYTHON, "-c", HOLDS], **TOLD | {"record": Record(execs=True, arguments=16)})
    events = called(launcher, holds, lambda found: "execs" in [event["kind"] for event in found])
    assert len(executed(events)) < notices.TOLD_AT_ONCE_MAX, "the others are counted, so that nobody waits for them"
    assert sum(event["times"] for event in events if event["kind"] == "execs") > len(executed(events))


def test_a_launcher_ends_also_while_its_watcher_cannot(tmp_path: Path) -> None:
    with beside_hanging_files(tmp_path) as launcher:
        hang(launcher, tmp_path)
        pid = watcher_pid(launcher)
        deadline = time.monotonic() + SECONDS_MAX
        while "process_vm_rw" not in Path(f"/proc/{pid}/stack").read_text():
            assert time.monotonic() < deadline, "it reads what never comes"
            time.sleep(0.01)
        launcher.process.terminate()
        assert launcher.process.wait(5) == 0


def test_memory_that_never_comes_holds_up_its_own_agent_alone(tmp_path: Path) -> None:
    with beside_hanging_files(tmp_path) as launcher:
        other = launcher.launch(["/bin/sh", "-c", LOOP], **TOLD)
        hangs = hang(launcher, tmp_path)
        first = watcher_pid(launcher)
        still = settled(other)
        grown(other, still)
        assert set(watchers(launcher)) > {first}, "that one cannot even die yet"
        events = called(launcher, hangs, lambda found: "interrupted" in [event["kind"] for event in found])
        assert [event["unread"] for event in events if event["kind"] == "interrupted"] == [True]
        assert launcher.kill(other)["verified_empty"]


def test_a_watcher_that_outlives_its_launcher_shares_no_memory_with_the_next(launcher: Launcher) -> None:
    """One that hung then would come back, and forget what the next one has in hand."""
    launcher.sh("true", **TOLD)
    with (launcher.run_dir / "watched").open("rb") as old:
        launcher.restart()
        launcher.request("hello")
        assert (launcher.run_dir / "watched").stat().st_ino != os.fstat(old.fileno()).st_ino
    again = launcher.sh("/bin/true", **TOLD)
    called(launcher, again, lambda found: "/bin/true" in executed(found))


def stop_with_call_in_hand(launcher: Launcher, pid: int, agent: Agent) -> None:
    """Stop the watcher while it has a call of this agent in hand, by the memory that it shares."""
    deadline = time.monotonic() + SECONDS_MAX
    for turn in itertools.count():
        assert time.monotonic() < deadline, "the watcher was never seen with a call in hand"
        os.kill(pid, signal.SIGSTOP)
        while "State:\tT" not in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.0005)
        cookie, caller = struct.unpack_from("=QI", (launcher.run_dir / "watched").read_bytes())
        if cookie and waits(caller, agent):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.002 + turn % 17 * 0.0003)  # long enough to come round, and not in step with it


def waits(pid: int, agent: Agent) -> bool:
    """Whether this child of the agent's shell has not become another program, now and a little later."""
    for _ in range(2):
        try:
            group, name = (Path(f"/proc/{pid}/{file}").read_text() for file in ("cgroup", "comm"))
        except OSError:
            return False
        if agent.cgroup.rsplit("/", 1)[-1] not in group or name != "sh\n":
            return False
        time.sleep(0.01)
    return True


def grown(agent: Agent, size: int) -> int:
    deadline = time.monotonic() + SECONDS_MAX
    while time.monotonic() < deadline:
        if len(agent.stdout) > size + 20:
            return len(agent.stdout)
        time.sleep(0.005)
    raise AssertionError(f"the agent executes nothing any more: {size} bytes")


def settled(agent: Agent) -> int:
    """How much there is once nothing comes any more."""
    deadline = time.monotonic() + SECONDS_MAX
    size = -1
    while time.monotonic() < deadline:
        if len(agent.stdout) == size:
            return size
        size = len(agent.stdout)
        time.sleep(0.2)
    raise AssertionError("execs go on without a watcher")


def test_without_anybody_who_could_answer_an_exec_fails() -> None:
    """The filter alone, with its listener closed: what is told of is not done instead."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from sandbox import syscalls
from sandbox.filters import agent_filters
from tests.support.launcher import default_filter
programs = agent_filters(default_filter(telling=True))
syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
listener = syscalls.seccomp_listener(programs[0])
os.close(listener)
try:
    os.execv("/bin/true", ["true"])
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )
    assert done.stdout == "38\n", done.stderr  # ENOSYS


def test_agents_freeze_thaw_and_die_with_calls_that_wait_for_an_answer(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sh", "-c", LOOP], **TOLD)
    for _ in range(10):
        size = grown(agent, 0)
        assert launcher.request("freeze", agent_id=agent.agent_id)["frozen"]
        launcher.request("thaw", agent_id=agent.agent_id)
        grown(agent, size)
    pid = watcher_pid(launcher)
    os.kill(pid, signal.SIGSTOP)
    settled(agent)
    assert launcher.request("freeze", agent_id=agent.agent_id)["frozen"], "nobody answers meanwhile"
    launcher.request("thaw", agent_id=agent.agent_id)
    assert launcher.kill(agent)["verified_empty"]
    assert watcher_pid(launcher) == pid, "not for want of a watcher"


STORM = """
import os, ctypes
libc = ctypes.CDLL(None)
children = 4
for _ in range(children):
    if os.fork() == 0:
        for _ in range(%d): libc.execve(b"/no/such", None, None)
        for _ in range(50): libc.unshare(0x10000000)
        os._exit(0)
for _ in range(children): os.wait()
"""


def test_a_storm_is_counted_whole_told_in_part_and_delays_nobody(launcher: Launcher) -> None:
    each = (notices.ASKED_AT_ONCE_MAX + 1000) // 4
    storm = launcher.launch([PYTHON, "-c", STORM % each], **TOLD)
    began = time.monotonic()
    other = launcher.sh("/bin/true; /bin/true; /bin/true", **TOLD)
    beside = time.monotonic() - began
    assert other.status == {"code": 0, "signal": None}
    launcher.wait(storm)
    seconds = time.monotonic() - began
    assert beside < seconds, "it did not wait for the storm"

    def total(found: list[dict[str, Any]]) -> int:
        return len(executed(found)) + sum(int(event["times"]) for event in found if event["kind"] == "execs")

    events = called(launcher, storm, lambda found: total(found) == 4 * each + 1 and refused(found).get(UNSHARE) == 200)
    assert len(executed(events)) <= notices.TOLD_AT_ONCE_MAX + notices.TOLD_PER_SECOND * (seconds + 1)
    assert len(events) <= len(executed(events)) + 10


def test_without_anything_told_there_is_no_watcher(launcher: Launcher) -> None:
    launcher.sh("true")
    children = Path(f"/proc/{launcher.process.pid}/task/{launcher.process.pid}/children").read_text().split()
    assert not [pid for pid in children if "watcher.py" in text(Path(f"/proc/{pid}/cmdline"))]
    launcher.sh("true", **TOLD)
    children = Path(f"/proc/{launcher.process.pid}/task/{launcher.process.pid}/children").read_text().split()
    assert len([pid for pid in children if "watcher.py" in text(Path(f"/proc/{pid}/cmdline"))]) == 1


def test_the_watcher_has_one_capability_and_opens_nothing_for_writing(launcher: Launcher) -> None:
    launcher.sh("true", **TOLD)
    status = Path(f"/proc/{watcher_pid(launcher)}/status").read_text()
    for line in ("CapEff:\t0000000000080000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        assert line in status, status
    assert f"Uid:\t{watcher.OWN_ID}\t{watcher.OWN_ID}" in status
    code = f"""
import os, socket, sys
sys.path.insert(0, {str(ROOT)!r})
import fcntl, termios
from sandbox import watcher
control, _ = socket.socketpair()
def tried():
    for act in (
        lambda: os.close(os.open("/proc/self/status", os.O_RDONLY)),
        lambda: os.open("/dev/null", os.O_RDWR),
        lambda: os.open("/dev/null", os.O_WRONLY),
        lambda: socket.socket(),
        lambda: os.kill(os.getppid(), 0),
        lambda: os.pidfd_open(1),
        lambda: fcntl.ioctl(control, termios.FIONREAD, b"0000"),
    ):
        try:
            act()
            yield "done"
        except PermissionError:
            yield "refused"
print(*tried())
watcher.confine()
print(*tried())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )
    assert done.stdout.split() == ["done"] * 7 + ["done"] + ["refused"] * 6, done.stderr
