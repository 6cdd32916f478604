"""`kill -9` of launcher and daemon at the steps of a launch: nothing is left behind, and nothing runs unrecorded.

The steps are the system calls that the process makes during a launch, read off by strace once; strace then kills it on
entering one of them. A run takes some of them, spread over the launch; `./bootstrap test-full` takes every one.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import TYPE_CHECKING, Final

import pytest
from stockade.client import Stockade, StockadeError

from tests.support.census import GONE, cgroups_of, launcher_pid, of_uids, processes, settled, started, text
from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOME: Final = 5
NOTHING_TO_KILL: Final = 5
PENDING: Final = ("SigPnd", "ShdPnd")  # proc_pid_status(5)
PF_EXITING: Final = 0x4  # <linux/sched.h>, shown in field 9 of proc_pid_stat(5)
CALL: Final = re.compile(r"^(\w+)\(")
# strace cannot stop a process on entering these, or they are what it waits in between two launches.
NO_STEP: Final = frozenset({"epoll_wait", "epoll_pwait", "rt_sigreturn", "restart_syscall"})


@dataclass(frozen=True, slots=True)
class Step:
    """The n-th call of this name since strace looks on."""

    name: str
    number: int


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


@contextlib.contextmanager
def traced(pid: int, output: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have strace look on; it lets go of the process at the end."""
    tracer = subprocess.Popen(["strace", "-qq", "-o", output, *options, "-p", str(pid)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while f"TracerPid:\t{tracer.pid}" not in status(pid) and tracer.poll() is None:
            assert time.monotonic() < deadline, "strace did not attach"
            time.sleep(0.005)
        yield tracer
    finally:
        tracer.terminate()
        tracer.wait(10)


def status(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/status") as file:  # noqa: PTH123 - a short read of /proc
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def launch(stockade: Instance) -> str:
    """The id of an agent that was answered as launched; nothing where the launch failed."""
    with contextlib.suppress(StockadeError), Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        return client.launch(["sleep", "1000"]).agent_id
    return ""


def steps_of(stockade: Instance, pid: int, output: Path) -> list[Step]:
    """Every call of one launch, and of the making ready of the next, in order."""
    with traced(pid, output):
        assert launch(stockade)
        time.sleep(0.2)  # what is made ahead of need is made now
    seen: Counter[str] = Counter()
    steps = []
    for line in output.read_text(errors="replace").splitlines():
        if (found := CALL.match(line)) and found[1] not in NO_STEP:
            seen[found[1]] += 1
            steps.append(Step(found[1], seen[found[1]]))
    return steps


def die_at(stockade: Instance, pid: int, step: Step, output: Path) -> tuple[str, bool]:
    """Launch while strace waits for the step; gives what was answered, and whether the process came that far."""
    inject = f"inject={step.name}:signal=SIGKILL:when={step.number}"
    with traced(pid, output, "-e", f"trace={step.name}", "-e", inject):
        answered = launch(stockade)
        stockade.wait(lambda: started(pid) == GONE, 0.3)
    # A process that was killed at the last moment, or is slow to end, is not to die under what looks at it next.
    if dying(pid):
        stockade.wait(lambda: started(pid) == GONE, 20)
    return answered, started(pid) == GONE


def dying(pid: int) -> bool:
    """Whether SIGKILL waits for any thread of a process that has no tracer any more, or has begun to end it."""
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        fields = dict(line.split(":\t") for line in text(thread / "status").splitlines() if line.startswith(PENDING))
        if any(int(mask, 16) & 1 << SIGKILL - 1 for mask in fields.values()):
            return True
        stat = text(thread / "stat").rpartition(")")[2].split()
        if stat and int(stat[6]) & PF_EXITING:
            return True
    return False


def sweep(
    stockade: Instance,
    output: Path,
    *,
    victim: Callable[[], int],
    back: Callable[[], None],
    some: int | None,
) -> None:
    """Kill the victim at each step, and judge what is left once it is `back`."""
    stockade.ctl("kill", "--all")
    reference = lasting(stockade)
    steps = steps_of(stockade, victim(), output)
    stockade.ctl("kill", "--all")
    assert len(steps) > SOME
    chosen = steps if some is None else steps[:: max(len(steps) // some, 1)]
    came = 0
    for step in chosen:
        answered, died = die_at(stockade, victim(), step, output)
        came += died
        back()
        judge(stockade, answered, step)
        ended = stockade.ctl("kill", "--all")
        assert ended.code in (0, NOTHING_TO_KILL), (step, died, ended.err, stockade.daemon_log()[-2000:])
        stockade.wait(lambda: lasting(stockade) == reference)
        assert lasting(stockade) == reference, (step, ended.out, stockade.ctl("status").out, left_of(stockade))
    assert came >= len(chosen) // 2, f"only {came} of {len(chosen)} steps were come to"
    assert stockade.json("log", "verify")["ok"] is True


def judge(stockade: Instance, answered: str, step: Step) -> None:
    running = {each["agent_id"] for each in stockade.json("status") if each["state"] == "RUNNING"}
    recorded = {entry["agent_id"] for entry in stockade.actions("--verb", "agent.launch")}
    if answered:
        states = {each["agent_id"]: each["state"] for each in stockade.json("status")}
        assert states[answered] == "RUNNING", step
    assert running <= recorded, step
    for agent_id in running:
        inside = stockade.json("inspect", agent_id)
        pids = of_uids(inside["posture"]["ids"]["start"])
        assert pids, step
        assert all(any(agent_id in str(path) or "/s" in str(path) for path in cgroups_of(pid)) for pid in pids), step
    assert stockade.ctl("run", "--", "true").code == 0, step


def lasting(stockade: Instance) -> tuple[int, ...]:
    seen = settled(stockade)
    return seen.processes, seen.cgroups, seen.networks, seen.slots


def left_of(stockade: Instance) -> list[str]:
    """What a finding is told by: each process in a group of the instance, with its group and its command line."""
    groups = ((process, text(process / "cgroup")) for process in processes())
    inside = [(process, group) for process, group in groups if f"/stockade-{stockade.name}/" in group]
    return [f"{process.name} {group.splitlines()[-1]} {text(process / 'cmdline')!r}" for process, group in inside]


def launcher_is_back(stockade: Instance) -> None:
    stockade.wait(lambda: launcher_pid(stockade) != 0 and stockade.ctl("run", "--", "true").code == 0, 20)


def daemon_is_back(stockade: Instance) -> None:
    if stockade.process is not None:
        try:
            stockade.process.wait(0.5)
        except subprocess.TimeoutExpired:
            return  # it never came to the step
        stockade.process = None
        stockade.up()


def daemon_pid(stockade: Instance) -> int:
    assert stockade.process is not None
    return stockade.process.pid


@pytest.mark.timeout(300)
def test_the_launcher_dies_at_steps_of_a_launch(stockade: Instance, tmp_path: Path) -> None:
    sweep(
        stockade, tmp_path / "calls", some=SOME,
        victim=lambda: launcher_pid(stockade), back=lambda: launcher_is_back(stockade),
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_the_daemon_dies_at_steps_of_a_launch(stockade: Instance, tmp_path: Path) -> None:
    sweep(
        stockade, tmp_path / "calls", some=SOME,
        victim=lambda: daemon_pid(stockade), back=lambda: daemon_is_back(stockade),
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_the_launcher_dies_at_every_step_of_a_launch(stockade: Instance, tmp_path: Path) -> None:
    sweep(
        stockade, tmp_path / "calls", some=None,
        victim=lambda: launcher_pid(stockade), back=lambda: launcher_is_back(stockade),
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_the_daemon_dies_at_every_step_of_a_launch(stockade: Instance, tmp_path: Path) -> None:
    sweep(
        stockade, tmp_path / "calls", some=None,
        victim=lambda: daemon_pid(stockade), back=lambda: daemon_is_back(stockade),
    )  # fmt: skip
