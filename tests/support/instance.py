"""A private instance of the whole of Stockade for tests: the real stockaded, stockadectl, launcher, worker and gateway.

    with Instance.start() as stockade:
        done = stockade.ctl("run", "--", "true")

It has directories, sockets and names of its own, and at the end nothing of it is left, however the test went.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockade.client import Stockade, StockadeError

from sandbox.cgroups import reconcile
from tests.support.census import launcher_pid
from tests.support.gates import Gates, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READY_SECONDS = 30.0
END_SECONDS = 20.0
# In memory, as /run is wherever systemd runs.
RUN = Path("/run") if Path("/run").is_mount() else Path("/dev/shm")
SLOTS = Path("/run/stockade-slots")  # where instances claim ranges of uids
OWNER = 1000  # somebody who is not root: workspaces belong to people


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines() if line]


@dataclass
class Instance:
    name: str
    directory: Path
    run_dir: Path
    config: Path
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    gates: Gates | None = None

    @classmethod
    @contextmanager
    def start(
        cls,
        extra: str = "",
        *,
        policies: dict[str, str] | None = None,
        state_dir: str | None = None,
        capture: bool = True,
    ) -> Iterator[Instance]:
        """Start with `extra` appended to the configuration and `policies` as {file name: text}.

        A `capture` of packets is no part of a measurement.
        """
        name = f"t{secrets.token_hex(3)}"
        directory = Path(tempfile.mkdtemp(prefix="sktest-", dir="/var/tmp"))
        directory.chmod(0o755)
        run_dir = RUN / f"sktest-{name}"
        (directory / "policies").mkdir()
        for file, text in (policies or {}).items():
            (directory / "policies" / file).write_text(text)
        config = directory / "stockade.toml"
        config.write_text(
            f'instance = "{name}"\nstate_dir = "{state_dir or directory}/state"\nrun_dir = "{run_dir}"\n'
            f'policy_dirs = ["{directory}/policies"]\n{extra}\n'
        )
        environment = {**os.environ, "STOCKADE_SOCKET": str(run_dir / "control.sock")}
        instance = cls(name, directory, run_dir, config, environment=environment)
        instance.gates = gates = watched(lambda: launcher_pid(instance)) if capture else None
        try:
            instance.up()
            yield instance
        finally:
            instance.clean()
            if gates is not None:
                gates.close()

    # --- the daemon

    def up(self) -> None:
        """Start the daemon and wait until it answers."""
        with (self.directory / "stockaded.log").open("ab") as log:
            self.process = subprocess.Popen(
                [bin_dir() / "stockaded", "--config", self.config, "--verbose"],
                stderr=log,
                stdout=log,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"stockaded is not ready:\n{self.daemon_log()[-4000:]}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(self.run_dir / "control.sock"))
            with Stockade(f"unix:{self.run_dir}/control.sock") as client:
                client.agents()
        except (OSError, StockadeError):
            return False
        return True

    def down(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the daemon by this signal; agents live on."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(END_SECONDS)
        self.process = None

    def daemon_log(self) -> str:
        return (self.directory / "stockaded.log").read_text(errors="replace")

    def clean(self) -> None:
        """End and remove everything; safe to call in any state."""
        if self.process is not None and self.process.poll() is None:
            self.ctl("kill", "--all", "--reason", "the test is over", seconds=30)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reconcile(self.name, set())
        shutil.rmtree(self.run_dir, ignore_errors=True)
        for path in (SLOTS / f".{self.name}", *SLOTS.glob("[0-9]*")):
            try:
                if path.read_text() == self.name or path.name == f".{self.name}":
                    path.unlink()
            except FileNotFoundError:
                continue
        shutil.rmtree(self.directory, ignore_errors=True)

    def processes(self) -> list[int]:
        """Pids of launcher and egress processes of this instance, by what they were started with."""
        found = [int(json.loads(path.read_text())["pid"]) for path in (self.run_dir / "processes").glob("*.json")]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if str(self.run_dir).encode() in words:
                    found.append(int(entry.name))
        return found

    # --- commands

    def ctl(self, *arguments: str, seconds: float = 60, stdin: str | None = None, **options: Any) -> Done:
        """Run stockadectl; the exit code is the caller's to judge."""
        done = subprocess.run(
            [str(bin_dir() / "stockadectl"), *arguments],
            env=self.environment,
            capture_output=True,
            timeout=seconds,
            check=False,
            **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin.encode()}),
            **options,
        )
        return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def json(self, *arguments: str, **options: Any) -> Any:
        """The JSON document that a command prints; it has to succeed."""
        done = self.ctl("-o", "json", *arguments, **options)
        assert done.code == 0, f"{arguments}: {done.code}\n{done.out}\n{done.err}"
        return done.json()

    def launch(self, *arguments: str) -> dict[str, Any]:
        value: dict[str, Any] = self.json("launch", *arguments)
        return value

    def run(self, script: str, *flags: str, **options: Any) -> Done:
        """Run a shell script in a sandbox to its end."""
        return self.ctl("run", *flags, "--", "sh", "-c", script, **options)

    def actions(self, *arguments: str) -> list[Any]:
        done = self.ctl("-o", "json", "actions", *arguments)
        assert done.code == 0, done.err
        return done.lines()

    def workspace(self, **files: str) -> Path:
        """A directory with these files that belongs to somebody who is not root."""
        path = Path(tempfile.mkdtemp(prefix="workspace-", dir=self.directory))
        for name, text in files.items():
            (path / name.replace("__", ".")).write_text(text)
        for each in (path, *path.iterdir()):
            os.chown(each, OWNER, OWNER)
        return path

    @staticmethod
    def wait(condition: Callable[[], object], seconds: float = 30.0) -> None:
        """Poll until the condition holds or the time is up (the caller asserts what it needs)."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)


def bin_dir() -> Path:
    return Path(sys.executable).parent
