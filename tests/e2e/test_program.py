"""A program run by Stockade is itself: stdio, terminal, signals, exit code; limits hold, output is bounded."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support.census import cgroups_of, of_agent
from tests.support.instance import Instance, bin_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

FLOOD_POLICY = """
kind: Policy
name: flood
version: 1
extends: default
limits: {output: 1MiB}
"""


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start(policies={"flood.yaml": FLOOD_POLICY}) as instance:
        yield instance


@pytest.fixture(scope="module")
def shell(stockade: Instance) -> Iterator[str]:
    """An agent to enter."""
    stockade.launch("--name", "shell", "--", "sleep", "1000")
    yield "shell"
    stockade.ctl("kill", "shell")


SIZE = (33, 77)  # rows, columns


class Terminal:
    """stockadectl on a terminal of its own, as a person has it."""

    def __init__(self, stockade: Instance, *arguments: str, size: tuple[int, int] = SIZE) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(  # noqa: S606 - no shell is wanted
                bin_dir() / "stockadectl", ["stockadectl", *arguments], stockade.environment
            )
        termios.tcsetwinsize(self.fd, size)
        self.seen = b""

    def expect(self, pattern: bytes, seconds: float = 20.0) -> re.Match[bytes]:
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.seen)
            if found is not None:
                self.seen = self.seen[found.end() :]
                return found
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come; {self.seen!r} did"
            try:
                self.seen += os.read(self.fd, 65536)
            except OSError as error:  # EIO: the other side is closed
                raise AssertionError(f"{pattern!r} did not come before the end; {self.seen!r} did") from error

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def end(self, seconds: float = 20.0) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.fd, 65536)
                except OSError:
                    continue
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"stockadectl did not end: {self.seen!r}")


# --- stdio


def test_input_of_any_size_and_bytes_passes_unchanged(stockade: Instance) -> None:
    data = bytes(range(256)) * 12_000
    done = subprocess.run(
        [bin_dir() / "stockadectl", "run", "-i", "--", "sha256sum"],
        env=stockade.environment, input=data, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    import hashlib  # noqa: PLC0415

    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_without_i_there_is_no_input(stockade: Instance) -> None:
    assert stockade.ctl("run", "--", "wc", "-c", stdin="not for it").out.strip() == "0"


def test_stdout_and_stderr_are_kept_apart_and_whole(stockade: Instance) -> None:
    done = stockade.run("seq 1 20000; echo problem >&2; seq 20001 40000")
    assert done.out == "".join(f"{i}\n" for i in range(1, 40001))
    assert done.err == "problem\n"


def test_run_ends_when_whoever_reads_it_has_gone(stockade: Instance) -> None:
    with subprocess.Popen(
        [bin_dir() / "stockadectl", "run", "--name", "yes", "--", "yes"],
        env=stockade.environment, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(1000)
        process.stdout.close()
        assert process.wait(30) == 141
    stockade.wait(lambda: stockade.json("status", "yes")[0]["state"] == "KILLED")
    assert stockade.json("status", "yes")[0]["state"] == "KILLED"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_run_is_the_programs(stockade: Instance, number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [
            bin_dir() / "stockadectl", "run", "--",
            "python3", "-c", "print('up', flush=True); import time; time.sleep(9)",
        ],
        env=stockade.environment, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(30) == code


# --- terminals


def test_run_t_gives_a_terminal_with_size_input_and_interrupt(stockade: Instance) -> None:
    terminal = Terminal(stockade, "run", "-i", "-t", "--", "bash", "--norc", "-i")
    terminal.type(b"tty; stty size; echo $((40+2))\n")
    terminal.expect(rb"/dev/pts/[0-9]+")
    terminal.expect(rb"33 77")
    terminal.expect(rb"[\r\n]42\r")
    terminal.type(b"sh -c 'echo on $((2+3)); exec sleep 100'\n")
    terminal.expect(rb"on 5")
    terminal.type(b"\x03")
    terminal.type(b"echo back $((1+1))\n")
    terminal.expect(rb"back 2")
    termios.tcsetwinsize(terminal.fd, (20, 50))
    os.kill(terminal.pid, signal.SIGWINCH)
    terminal.type(b"while ! stty size | grep '20 50'; do sleep 0.05; done\n")
    terminal.expect(rb"[\r\n]20 50\r")
    terminal.type(b"exit 6\n")
    assert terminal.end() == 6


def test_exec_t_gives_a_terminal_and_exec_alone_none(stockade: Instance, shell: str) -> None:
    terminal = Terminal(stockade, "exec", "-i", "-t", shell, "--", "sh", "-c", "tty; read line; echo got $line; exit 3")
    terminal.expect(rb"/dev/pts/[0-9]+")
    terminal.type(b"words\n")
    terminal.expect(rb"got words")
    assert terminal.end() == 3
    assert stockade.ctl("exec", shell, "--", "tty").out == "not a tty\n"


def test_a_terminal_of_no_size_is_of_the_usual_one(stockade: Instance) -> None:
    terminal = Terminal(stockade, "run", "-t", "--", "stty", "size", size=(0, 0))
    terminal.expect(rb"24 80")
    assert terminal.end() == 0


def test_a_terminal_of_the_agents_is_its_own(stockade: Instance, shell: str) -> None:
    """The name of the terminal inside says nothing of the host's, and no host terminal is there."""
    terminal = Terminal(stockade, "exec", "-t", shell, "--", "sh", "-c", "ls /dev/pts; readlink /proc/self/fd/0")
    inside = terminal.expect(rb"(?s)(.*)/dev/pts/([0-9]+)\r+\n")
    assert terminal.end() == 0
    listed = set(inside[1].split()) - {b"ptmx"}
    assert listed == {inside[2]}


# --- exec, logs, wait


def test_exec_is_in_the_same_sandbox_and_as_confined(stockade: Instance, shell: str) -> None:
    assert stockade.ctl("exec", shell, "--", "sh", "-c", "exit 9").code == 9
    assert stockade.ctl("exec", shell, "--", "sh", "-c", "kill -9 $$").code == 137
    assert stockade.ctl("exec", shell, "--", "no-such-program").code == 127
    assert stockade.ctl("exec", shell, "--", "/etc/passwd").code == 126
    assert stockade.ctl("exec", "-i", shell, "--", "cat", stdin="through\n").out == "through\n"
    astray = stockade.ctl("exec", "--cwd", "/nowhere", shell, "--", "true")
    assert astray.code == 1
    assert "cannot enter working directory /nowhere" in astray.err
    assert "name a directory" in astray.err
    assert stockade.ctl("exec", "--env", "A=b c", "--cwd", "/tmp", shell, "--", "sh", "-c", "echo $A; pwd").out == (
        "b c\n/tmp\n"
    )
    # The agent's own process is there to be seen, and its environment is what exec'd programs have.
    assert "sleep 1000" in stockade.ctl("exec", shell, "--", "ps", "ax").out
    facts = stockade.ctl(
        "exec", shell, "--", "sh", "-c",
        "id -u; echo $HOME $OPENAI_BASE_URL; grep -E 'NoNewPrivs|Seccomp:|CapEff' /proc/self/status;"
        " unshare -U true || echo refused",
    ).out.split()  # fmt: skip
    assert facts[:3] == ["1000", "/home/agent", "http://gateway.internal:3128/v1"]
    assert facts[3:] == ["CapEff:", "0000000000000000", "NoNewPrivs:", "1", "Seccomp:", "2", "refused"]


def test_a_program_that_was_execd_dies_with_the_agent(stockade: Instance) -> None:
    agent = stockade.launch("--", "sleep", "1000")
    with subprocess.Popen(
        [bin_dir() / "stockadectl", "exec", agent["agent_id"], "--", "sh", "-c", "echo up; sleep 1000"],
        env=stockade.environment, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        stockade.wait(lambda: len(of_agent(agent)) == 4)
        assert len(of_agent(agent)) == 4, "pid 1, a sleep, a shell and its sleep"
        stockade.json("kill", agent["agent_id"])
        assert of_agent(agent) == []
        assert process.wait(20) == 137


def test_logs_follow_until_the_end_and_wait_knows_how_it_ended(stockade: Instance) -> None:
    stockade.launch(
        "--name", "talker", "--", "sh", "-c", "echo one; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo two; exit 5"
    )
    with subprocess.Popen(
        [bin_dir() / "stockadectl", "logs", "-f", "talker"], env=stockade.environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"one\n"
        assert stockade.ctl("wait", "talker", "--timeout", "100ms").code == 1
        assert stockade.ctl("exec", "talker", "--", "touch", "/tmp/go").code == 0
        assert process.stdout.read() == b"two\n"
        assert process.wait(20) == 0
    assert stockade.ctl("wait", "talker").out == "5\n"
    assert stockade.json("wait", "talker")["exit_code"] == 5
    assert stockade.ctl("logs", "talker").out == "one\ntwo\n"


def test_launch_waits_where_told_to(stockade: Instance) -> None:
    ended = stockade.launch("--wait", "--", "sh", "-c", "sleep 0.3; exit 4")
    assert (ended["state"], ended["exit_code"]) == ("EXITED", 4)


# --- limits


def test_memory_holds_and_says_so(stockade: Instance) -> None:
    hog = "x = bytearray(300 << 20); print(len(x))"
    assert stockade.ctl("run", "--memory", "600MiB", "--", "python3", "-c", hog).out == f"{300 << 20}\n"
    assert stockade.ctl("run", "--memory", "100MiB", "--name", "hog", "--", "python3", "-c", hog).code == 137
    assert stockade.json("inspect", "hog")["out_of_memory"] is True
    exits = [entry for entry in stockade.actions("hog") if entry["verb"] == "agent.exit"]
    assert [(entry["reason"], entry["details"]["out_of_memory"]) for entry in exits] == [("out of memory", True)]


def test_files_in_scratch_are_on_disk_and_those_in_shm_count_as_memory(stockade: Instance) -> None:
    fill = "dd if=/dev/zero of=%s/big bs=1M count=200 2>/dev/null; stat -c %%s %s/big"
    assert int(stockade.run(fill % ("/tmp", "/tmp"), "--memory", "100MiB").out) == 200 << 20
    assert int(stockade.run(fill % ("/dev/shm", "/dev/shm"), "--memory", "100MiB").out) <= 100 << 20


def test_disk_and_inodes_stop_at_the_policys_limit(stockade: Instance) -> None:
    fill = "stat -f -c %c /tmp; cat /dev/zero > ~/big 2>/dev/null; df --output=avail /tmp | tail -1"
    inodes, free_kib = map(int, stockade.run(fill).out.split())
    assert 60_000 < inodes < 70_000
    assert free_kib < 1024


def test_pids_hold_and_the_host_can_still_fork(stockade: Instance) -> None:
    # Threads count too, and the twin below the limit shows that the script can have as many as it wants.
    script = (
        "import os, time\nn = 0\ntry:\n  while n < 60:\n    if os.fork() == 0: time.sleep(30)\n    n += 1\n"
        "except OSError: pass\nprint(n, flush=True); os.kill(-1, 9)"
    )
    few = int(stockade.ctl("run", "--pids", "30", "--", "python3", "-c", script).out)
    many = int(stockade.ctl("run", "--pids", "100", "--", "python3", "-c", script).out)
    assert few < 30
    assert many == 60


def test_cpu_holds(stockade: Instance) -> None:
    """A tenth of a processor takes ten times as long at least, whatever else runs; the bound is half of that."""
    spin = "import time\nb = time.monotonic()\nwhile time.process_time() < 0.3: pass\nprint(time.monotonic() - b)"
    held = float(stockade.ctl("run", "--cpus", "0.1", "--", "python3", "-c", spin).out)
    assert held > 1.5
    free = (float(stockade.ctl("run", "--cpus", "1", "--", "python3", "-c", spin).out) for _ in range(3))
    assert any(seconds < held for seconds in free)


def test_no_launch_goes_beyond_its_policy(stockade: Instance) -> None:
    for flag, value in (("--memory", "2GiB"), ("--cpus", "8"), ("--pids", "10000")):
        done = stockade.ctl("launch", flag, value, "--", "true")
        assert done.code == 4
        assert "policy default gives" in done.err


def test_limits_are_in_force_from_the_first_instruction(stockade: Instance) -> None:
    agent = stockade.launch("--memory", "64MiB", "--pids", "20", "--cpus", "0.5", "--", "sleep", "1000")
    groups = {path for pid in of_agent(agent) for path in cgroups_of(pid)}
    read = {file.name: file.read_text().strip() for group in groups for file in group.iterdir() if file.name in WANTED}
    assert any(read.get(name) == str(64 << 20) for name in ("memory.limit_in_bytes", "memory.max"))
    assert read["pids.max"] == "20"
    assert read.get("cpu.max", "").startswith("50000") or read.get("cpu.cfs_quota_us") == "50000"
    stockade.ctl("kill", agent["agent_id"])


WANTED = {"memory.limit_in_bytes", "memory.max", "pids.max", "cpu.max", "cpu.cfs_quota_us"}


def test_process_limits(stockade: Instance) -> None:
    done = stockade.ctl(
        "run", "--", "python3", "-c",
        "import resource as r\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE), r.getrlimit(r.RLIMIT_AS)[0] == -1)\n"
        "fds = []\ntry:\n  while True: fds.append(open('/dev/null'))\n"
        "except OSError as e: print(len(fds) < 4096, e.errno)\n"
        "try: r.setrlimit(r.RLIMIT_NOFILE, (9000, 9000))\nexcept (ValueError, OSError): print('no more')",
    )  # fmt: skip
    assert done.out.splitlines() == ["(4096, 4096) (1, 1) True", "True 24", "no more"]


def test_a_flood_of_output_is_bounded_and_the_end_is_kept(stockade: Instance) -> None:
    flood = "import sys\nfor i in range(800000): sys.stdout.write(f'line {i:08}\\n')\nprint('last words')"
    agent = stockade.launch("--wait", "--policy", "flood", "--", "python3", "-c", flood)
    assert agent["exit_code"] == 0
    directory = stockade.run_dir / "agents" / agent["agent_id"]
    assert sum(path.stat().st_size for path in directory.iterdir()) < (1 << 20) + (128 << 10)
    kept = stockade.ctl("logs", agent["agent_id"]).out
    assert kept.endswith("last words\n")
    assert 100_000 < len(kept) <= 1 << 20
    assert stockade.ctl("run", "--", "true").code == 0


# --- short lives


def test_a_program_may_end_before_its_start_is_told(stockade: Instance) -> None:
    """The word that it runs and the word that it ended come together: each run has a code, and its entries in order."""
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda _: stockade.ctl("run", "--name", f"short-{_}", "--", "true").code, range(40)))
    assert codes == [0] * 40
    verbs: dict[str, list[str]] = {}
    for entry in stockade.actions():
        verbs.setdefault(entry["details"].get("name") or entry["object"], []).append(entry["verb"])
    for number in range(40):
        assert verbs[f"short-{number}"] == ["agent.launch", "agent.exec", "agent.exit"], verbs
