"""A private launcher for tests, and a small synchronous client of its channel.

    with Launcher.start() as launcher:
        agent = launcher.run(["/bin/true"])          # launch, go, wait for the end
        assert agent.status == {"code": 0, "signal": None}

Everything is in a directory of its own, under an instance name of its own, and is gone at the end, however it comes.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sandbox import seccomp, sync, syscalls
from sandbox.cgroups import detect, reconcile
from sandbox.filters import pack_filters
from sandbox.plan import AGENT_ID_FIRST, IDS_PER_AGENT, IdRange, Limits, SandboxPlan, Scratch
from tests.support.gates import Gates, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "sandbox" / "launcher.py"
FILTER = "test-filter"
TELLING = "test-filter-telling"  # of plans with Record(execs=True, refusals=True)
ENV = (
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/home/agent"),
    ("LANG", "C.UTF-8"),
)
# Slots high up, so that tests stay clear of a daemon on the same host.
# In a circle, begun at random: a whole run launches more agents than there are ranges, and none lives for so long.
_slots = itertools.islice(itertools.cycle(range(2000, 4000)), secrets.randbelow(2000), None)


class LauncherError(Exception):
    """The launcher answered with an error; `.error` is what it said."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error.get("message", ""))
        self.error = error


@dataclass
class Agent:
    """A launched agent; the descriptors are closed by the launcher object."""

    agent_id: str
    plan: SandboxPlan
    pid: int
    pidfd: int
    listener: int
    posture: dict[str, Any]
    timings_us: dict[str, int]
    directory: Path
    cgroup: str = ""
    status: dict[str, Any] | None = None
    oom: bool = False

    @property
    def stdout(self) -> str:
        return self.read("stdout.log")

    @property
    def stderr(self) -> str:
        return self.read("stderr.log")

    def read(self, name: str) -> str:
        path = self.directory / name
        return path.read_bytes().decode("utf-8", "replace") if path.exists() else ""


@dataclass
class Launcher:
    run_dir: Path
    instance: str
    process: subprocess.Popen[bytes]
    sock: socket.socket
    events: list[dict[str, Any]] = field(default_factory=list)
    _fds: list[int] = field(default_factory=list)
    _number: int = 0
    _arguments: list[str] = field(default_factory=list)
    _wrapper: list[str] = field(default_factory=list)
    scratch_dir: Path | None = None
    gates: Gates | None = None

    @classmethod
    def start(
        cls,
        *,
        weakened: bool = False,
        arguments: Sequence[str] = (),
        filters: bool = True,
        wrapper: Sequence[str] = (),
        second_layer: bool = True,
    ) -> Launcher:
        """Start one; `wrapper` is a command that execs the launcher (say `unshare -m`).

        Without its `second_layer` a sandbox's frames come as far as its gate, and nobody looks.
        """
        instance = "t" + secrets.token_hex(3)
        run_dir = Path(tempfile.mkdtemp(prefix="sktest-", dir="/dev/shm"))  # memory, as /run is
        run_dir.chmod(0o711)
        # On disk, as state_dir is: on memory the images would count as that.
        scratch_dir = Path(tempfile.mkdtemp(prefix="sktest-", dir=os.environ.get("TMPDIR", "/var/tmp")))
        where = ["--scratch-dir", str(scratch_dir), "--scratch-reserve-bytes", "0"]
        args = [*where, *arguments, *(["--allow-weakened"] if weakened else [])]
        launcher = cls(
            run_dir,
            instance,
            _spawn(run_dir, instance, args, wrapper),
            _connect(run_dir),
            _arguments=args,
            _wrapper=list(wrapper),
            scratch_dir=scratch_dir,
        )
        if second_layer and not weakened:
            launcher.gates = watched(lambda: launcher.process.pid)
        try:
            launcher.request("hello")
            if filters:
                launcher.send_filter(FILTER, default_filter())
                launcher.send_filter(TELLING, default_filter(telling=True))
        except BaseException:
            launcher.close()
            raise
        return launcher

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restart(self, *, kill: bool = True) -> None:
        """Kill (or end in order) the launcher process and start another on the same directory."""
        (self.process.kill if kill else self.process.terminate)()
        self.process.wait(10)
        self.sock.close()
        _wait_for_silence(self.run_dir)
        self.process = _spawn(self.run_dir, self.instance, self._arguments, self._wrapper)
        self.sock = _connect(self.run_dir)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            for entry in (self.run_dir / "agents").iterdir():
                with contextlib.suppress(LauncherError):
                    self.request("kill", agent_id=entry.name)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.sock.close()
        sync.close_all(self._fds)
        self._sweep()
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if self.scratch_dir is not None:
            shutil.rmtree(self.scratch_dir, ignore_errors=True)
        if self.gates is not None:
            self.gates.close()

    def _sweep(self) -> None:
        """Remove what a launcher that was killed may have left: groups of this instance."""
        with contextlib.suppress(Exception):
            reconcile(self.instance, ())
        with contextlib.suppress(Exception):
            detect().tidy(self.instance)

    # --- channel ---

    def request(self, op: str, fds: Sequence[int] = (), *, timeout: float = 30.0, **fields: Any) -> dict[str, Any]:
        answer, received = self.request_fds(op, fds, timeout=timeout, **fields)
        sync.close_all(received)
        return answer

    def request_fds(
        self, op: str, fds: Sequence[int] = (), *, timeout: float = 30.0, **fields: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """Send one request and wait for its answer; events that come before it are kept. Raises `LauncherError`."""
        self._number += 1
        number = self._number
        sync.send(self.sock, {"op": op, "rq": number, **fields}, fds)
        deadline = time.monotonic() + timeout
        while True:
            message, received = self._receive(deadline)
            if message.get("rq") == number:
                if not message["ok"]:
                    sync.close_all(received)
                    raise LauncherError(message["error"])
                return message, received
            self._keep(message, received)

    def _receive(self, deadline: float) -> tuple[dict[str, Any], list[int]]:
        self.sock.settimeout(max(0.001, deadline - time.monotonic()))
        message, fds = sync.receive(self.sock)
        if message is None:
            raise ConnectionResetError("the launcher closed the channel")
        return message, fds

    def _keep(self, message: dict[str, Any], fds: list[int]) -> None:
        self._fds += fds
        self.events.append(message | {"fds": fds})

    def event(self, wanted: Callable[[dict[str, Any]], bool], *, timeout: float = 30.0) -> dict[str, Any]:
        """Wait for an event that fits, and take it."""
        deadline = time.monotonic() + timeout
        while True:
            for index, event in enumerate(self.events):
                if wanted(event):
                    return self.events.pop(index)
            self._keep(*self._receive(deadline))

    # --- agents ---

    def send_filter(self, digest: str, blob: bytes) -> None:
        fd = syscalls.memfd_create("filter", blob)
        try:
            self.request("filter", [fd], digest=digest)
        finally:
            os.close(fd)

    def plan(self, argv: Sequence[str], **changes: Any) -> SandboxPlan:
        """Return a plan as a policy would give it, with these fields changed."""
        agent_id = "ag_" + base64.b32encode(secrets.token_bytes(16)).decode().lower().rstrip("=")
        plan = SandboxPlan(
            agent_id=agent_id,
            instance=self.instance,
            hostname="sktest",
            argv=tuple(argv),
            env=ENV,
            ids=IdRange(AGENT_ID_FIRST + next(_slots) * IDS_PER_AGENT),
            filter_digest=FILTER,
            limits=Limits(memory_bytes=256 << 20),
            scratch=Scratch(
                disk="preferred", tmp_bytes=32 << 20, home_bytes=32 << 20, shm_bytes=16 << 20, workspace_bytes=32 << 20
            ),
        )
        return replace(plan, **changes)

    def build(self, plan: SandboxPlan, fds: Sequence[int] = (), **meta: Any) -> Agent:
        """Launch up to the point where the agent waits for `go`."""
        answer, received = self.request_fds("launch", fds, plan=plan.to_json(), meta=meta)
        self._fds += received
        directory = self.run_dir / "agents" / plan.agent_id
        pidfd, listener = received
        posture, timings = answer["posture"], answer["timings_us"]
        group = answer["cgroup"]
        return Agent(plan.agent_id, plan, answer["pid"], pidfd, listener, posture, timings, directory, group)

    def launch(self, argv: Sequence[str], fds: Sequence[int] = (), **changes: Any) -> Agent:
        """Launch and let go; returns when the agent's program runs."""
        return self.start_plan(self.plan(argv, **changes), fds)

    def start_plan(self, plan: SandboxPlan, fds: Sequence[int] = ()) -> Agent:
        agent = self.build(plan, fds)
        self.request("go", agent_id=agent.agent_id)
        return agent

    def run(self, argv: Sequence[str], fds: Sequence[int] = (), *, timeout: float = 30.0, **changes: Any) -> Agent:
        """Launch, and wait for the end."""
        return self.wait(self.launch(argv, fds, **changes), timeout=timeout)

    def sh(self, script: str, fds: Sequence[int] = (), **changes: Any) -> Agent:
        return self.run(["/bin/sh", "-c", script], fds, **changes)

    def wait(self, agent: Agent, *, timeout: float = 30.0) -> Agent:
        event = self.event(lambda e: e.get("ev") == "exited" and e["agent_id"] == agent.agent_id, timeout=timeout)
        agent.status, agent.oom = event["status"], event["oom"]
        return agent

    def groups(self, agent: Agent) -> list[Path]:
        """Its control groups that are there, that of the v2 tree first."""
        assert agent.cgroup
        return [group for top in detect().tops(self.instance) if (group := top / agent.cgroup).is_dir()]

    def kill(self, agent: Agent) -> dict[str, Any]:
        return self.request("kill", agent_id=agent.agent_id)

    def exec(self, agent: Agent, argv: Sequence[str], *, stream_id: str = "", **fields: Any) -> dict[str, Any]:
        """Start a process in a running agent and wait for its end; adds `stdout` and `stderr` to the event."""
        stream_id = stream_id or "st_" + secrets.token_hex(4)
        self.start_exec(agent, argv, stream_id=stream_id, **fields)
        event = self.event(lambda e: e.get("ev") == "exec_exited" and e["stream_id"] == stream_id)
        return event | {name: agent.read(f"exec-{stream_id}.{name[3:]}") for name in ("stdout", "stderr")}

    def start_exec(self, agent: Agent, argv: Sequence[str], *, stream_id: str, **fields: Any) -> dict[str, Any]:
        order: dict[str, Any] = {"env": ENV, "cwd": "/", "tty": None, "stdin": False} | fields
        return self.request("exec", agent_id=agent.agent_id, stream_id=stream_id, argv=list(argv), **order)


def _spawn(run_dir: Path, instance: str, arguments: Sequence[str], wrapper: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [
        *wrapper,
        sys.executable,
        "-I",
        "-S",
        "-E",
        str(LAUNCHER),
        "--run-dir",
        str(run_dir),
        "--instance",
        instance,
    ]
    with (run_dir / "launcher.err").open("ab") as log:
        return subprocess.Popen([*command, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _wait_for_silence(run_dir: Path) -> None:
    """Wait until nobody listens: what a launcher had forked has its socket until it has died too."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            if sock.connect_ex(str(run_dir / "launcher.sock")) in (errno.ECONNREFUSED, errno.ENOENT):
                return
        time.sleep(0.005)
    raise AssertionError("somebody listens for a launcher that is dead")


def _connect(run_dir: Path) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(str(run_dir / "launcher.sock"))
        except OSError:
            sock.close()
            if time.monotonic() > deadline:
                raise RuntimeError((run_dir / "launcher.err").read_text()) from None
            time.sleep(0.005)
        else:
            sync.enlarge(sock)
            return sock


_compiled: dict[bool, bytes] = {}


def default_filter(*, telling: bool = False) -> bytes:
    """Return the default profile, compiled once a test run; `telling` of execs and refused calls."""
    if telling not in _compiled:
        profile = seccomp.load(ROOT / "policies" / "seccomp" / "default.json")
        filters = seccomp.compile(profile, execs=telling, refusals=telling)
        _compiled[telling] = pack_filters((filters.init, *filters.programs))
    return _compiled[telling]
