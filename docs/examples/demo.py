"""./bootstrap demo: one agent, one job, governed from start to end, with every command shown as it is run.

Starts a private instance (its own run and state directory, the embedded gateway, a scripted model that stands in for a
provider), and leaves nothing behind. Every line of output that begins with `$` is a command that you could have typed.
"""

import contextlib
import http.server
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BIN = ROOT / ".venv" / "bin"
AGENT_PYTHON = ROOT / ".venv-agents"
OWNER_UID = int(os.environ.get("SUDO_UID") or 1000)
READY_SECONDS = 30
JOB_SECONDS = 60
DESCENDANTS = 50
STATUS_SCOPE = "http:GET:http://status.payments.example/**"


def say(text: str) -> None:
    """Print what happens next, in a line."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


class StatusPage(http.server.BaseHTTPRequestHandler):
    """The payment provider's status page: a real server, on loopback."""

    def do_GET(self) -> None:
        """Answer with the state of the components."""
        body = b'{"components": [{"name": "card payments", "status": "major_outage", "since": "09:39 UTC"}]}\n'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet: the action log says what was fetched."""


class Demo:
    """One private instance and what is done with it."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="stockade-demo-", dir="/run"))
        self.directory = directory
        self.workspace = directory / "checkout-logs"
        self.environment = os.environ | {"STOCKADE_SOCKET": str(self.run_dir / "control.sock")}
        self.daemon: subprocess.Popen[bytes] | None = None

    def start(self, status_port: int) -> None:
        """Lay out workspace and configuration, and start the daemon."""
        shutil.copytree(HERE / "checkout-logs", self.workspace)
        for path in (self.workspace, *self.workspace.iterdir()):
            os.chown(path, OWNER_UID, OWNER_UID)
        (self.directory / "stockade.toml").write_text(
            f"""instance = "demo{os.getpid()}"
state_dir = "{self.directory}/state"
run_dir = "{self.run_dir}"
policy_dirs = []

[gateway]
kind = "embedded"

[[gateway.models]]
name = "triage-model"
kind = "scripted"
script = "{HERE}/triage-model.json"

[gateway.hosts]
"status.payments.example" = "127.0.0.1:{status_port}"
"""
        )
        log = (self.directory / "stockaded.log").open("wb")
        self.daemon = subprocess.Popen(  # the daemon's own messages go to a file
            [BIN / "stockaded", "--config", self.directory / "stockade.toml"], stderr=log, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + READY_SECONDS
        while self.daemon.poll() is None and time.monotonic() < deadline:
            if self.quietly("status").returncode == 0:
                return
            time.sleep(0.1)
        sys.stderr.write((self.directory / "stockaded.log").read_text())
        raise SystemExit("demo: the daemon did not get ready; its messages are above")

    def quietly(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run stockadectl and keep its output."""
        return subprocess.run(
            [str(BIN / "stockadectl"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def show(self, *arguments: str, fails: bool = False, lines: int = 40) -> str:
        """Run stockadectl as a person would, and print command and output."""
        print(f"$ stockadectl {shlex.join(arguments)}", flush=True)
        done = self.quietly(*arguments)
        text = (done.stdout + done.stderr).rstrip().splitlines()
        for line in text[:lines]:
            print(f"  {line}")
        if len(text) > lines:
            print(f"  … {len(text) - lines} lines more")
        if (done.returncode != 0) is not fails:
            raise SystemExit(f"demo: `stockadectl {shlex.join(arguments)}` ended with {done.returncode}")
        return done.stdout

    def until(self, what: str, condition: str, *arguments: str) -> None:
        """Wait until a command's output has `condition` in it."""
        deadline = time.monotonic() + JOB_SECONDS
        while time.monotonic() < deadline:
            if condition in self.quietly(*arguments).stdout:
                return
            time.sleep(0.2)
        print(self.quietly("logs", "log-triage").stdout)
        raise SystemExit(f"demo: {what} did not happen within {JOB_SECONDS} s; the agent's output is above")

    def stop(self) -> None:
        """End everything this instance has."""
        with contextlib.suppress(OSError):
            self.quietly("kill", "--all", "--reason", "the demo is over")
        if self.daemon is not None:
            self.daemon.send_signal(signal.SIGTERM)
            try:
                self.daemon.wait(20)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
        deadline = time.monotonic() + 15
        while (self.run_dir / "launcher.sock").exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # the launcher ends by itself when there is nothing left to hold
        shutil.rmtree(self.run_dir, ignore_errors=True)


def act(demo: Demo) -> None:
    """Go through the story; any step that does not go as told ends the demo."""
    say("1. What a sandbox looks like from inside: one route, a model list, and no way anywhere else.")
    inside = 'ip route; curl -sS $OPENAI_BASE_URL/models; echo; curl -sS --noproxy "*" -m 3 http://192.0.2.1/ || true'
    demo.show("run", "--", "sh", "-c", inside)

    say("2. A real agent (OpenAI Agents SDK) gets a directory of logs, the model API, and nothing else.")
    demo.show(
        "launch", "--name", "log-triage", "--policy", "python-agent", "--workspace", f"{demo.workspace}:rw",
        "--scope", f"fs:ro:{AGENT_PYTHON}=/opt/agent", "--scope", f"fs:ro:{HERE / 'log_triage_agent.py'}=/opt/job.py",
        "--label", "team=payments", "--", "/opt/agent/bin/python", "/opt/job.py",
    )  # fmt: skip

    say("3. It reads the logs, asks the model, and tries the payment provider's status page, which nobody granted.")
    demo.until("a denial", "status.payments.example", "actions", "--verdict", "denied")
    demo.show("actions", "--verdict", "denied", lines=3)

    say("4. You decide: this one site, reading only, for ten minutes. The same call now goes through.")
    demo.show("grant", "log-triage", STATUS_SCOPE, "--ttl", "10m", "--reason", "provider status for triage")
    demo.until("the report", "REPORT.md", "logs", "log-triage")
    demo.show("logs", "log-triage")
    report = demo.workspace / "REPORT.md"
    print(f"$ cat {report}    # owned by uid {report.stat().st_uid}, as your own files are")
    print("\n".join(f"  {line}" for line in report.read_text().splitlines()))

    say(f"5. It goes wild: {DESCENDANTS} processes that ignore every signal. One order ends all, and proves it.")
    wild = f"for i in $(seq {DESCENDANTS}); do setsid sh -c 'trap \"\" TERM INT HUP; sleep 1000' & done; sleep 0.3"
    demo.show("exec", "log-triage", "--", "sh", "-c", wild)
    demo.show("status")
    demo.show("kill", "log-triage", "--reason", "runaway processes")
    last = demo.quietly("-o", "json", "actions", "log-triage", "--verb", "agent.kill").stdout.splitlines()[-1]
    receipt = json.loads(last)["details"]
    if not receipt["verified_empty"] or receipt["processes_killed"] < DESCENDANTS:
        raise SystemExit("demo: the receipt does not say what it should")

    say("6. What happened, in a log that cannot be altered unnoticed.")
    demo.show("actions", "log-triage", lines=30)
    demo.show("log", "verify")
    segment = next((demo.directory / "state" / "log").rglob("*.seg"))
    with segment.open("r+b") as file:
        file.seek(segment.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    print(f"  (one bit of {segment.name} flipped, as somebody with root might)")
    demo.show("log", "verify", fails=True)


def main() -> int:
    """Run the demo; 0 when every step went as told."""
    if os.geteuid() != 0:
        raise SystemExit("demo: it makes namespaces and cgroups, so it needs root: sudo ./bootstrap demo")
    began = time.monotonic()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StatusPage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    directory = Path(tempfile.mkdtemp(prefix="stockade-demo-"))
    directory.chmod(0o755)
    demo = Demo(directory)
    try:
        say("A private instance of Stockade starts (embedded gateway, a scripted model in a provider's place).")
        demo.start(server.server_port)
        act(demo)
    finally:
        demo.stop()
        server.shutdown()
        shutil.rmtree(directory, ignore_errors=True)
    say(f"Done in {time.monotonic() - began:.0f} s; nothing of it is left on this host. Next:")
    for line in (
        f"{BIN}/stockaded --config FILE        # your own instance; supervisord/stockade.example.toml has every key",
        f"{BIN}/stockadectl run -- bash        # with -i -t: a shell in a sandbox",
        f"{BIN}/stockadectl doctor             # what this host offers, and what it lacks",
        "./bootstrap test                     # every claim, tried",
        "less README.md docs/POLICY.md docs/THREAT_MODEL.md",
    ):
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
