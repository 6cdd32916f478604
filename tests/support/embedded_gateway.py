"""Starts the real embedded gateway process and lets ordinary HTTP clients reach its unix socket.

The gateway listens on a unix socket and wants a preface on every connection. `Shim` is the dialer's stand-in: a TCP
port on loopback that writes the preface and passes bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gateway_client.gateways.preface import Preface, encode, parse_allow

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[2]
AGENTS_PYTHON = REPOSITORY / ".venv-agents" / "bin" / "python"
READY_SECONDS_MAX = 20


class EmbeddedGateway:
    """One gateway process; everything of it is gone at the end of the `with`."""

    def __init__(self, **config: Any) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sktest-gateway-"))
        self.directory.chmod(0o711)
        self.socket_path = self.directory / "gateway.sock"
        self.config = {
            "socket_path": str(self.socket_path),
            "allowed_uid": os.getuid(),
            "user": "nobody",
            "models": [],
            **config,
        }
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.life_line, theirs = socket.socketpair()
        # The child's end becomes descriptor 3 whatever number it has here.
        self.process = subprocess.Popen(
            [
                "/bin/bash",
                "-c",
                f'exec "$0" -I -m gateway_client.gateways.embedded 3<&{theirs.fileno()}',
                sys.executable,
            ],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.life_line.settimeout(READY_SECONDS_MAX)
        try:
            self.life_line.sendall(json.dumps(self.config).encode() + b"\n")
            line = self.life_line.makefile("rb").readline()
        except OSError:
            line = b""
        self.ready = json.loads(line) if line else {"ready": False, "error": "no answer"}
        return self

    def __exit__(self, *_: object) -> None:
        self.life_line.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stderr is not None
        self.stderr = self.process.stderr.read().decode()
        self.process.stderr.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def connect(self, allow: str = "api", *, preface: bytes | None = None) -> socket.socket:
        """Return a connection with its preface already sent."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(15)
        connection.connect(str(self.socket_path))
        connection.sendall(preface_bytes(allow) if preface is None else preface)
        return connection


def preface_bytes(allow: str = "api") -> bytes:
    return encode(Preface("ag_" + "a" * 26, "sktest", secrets.randbelow(2**31), parse_allow(allow), {"team": "tests"}))


class Shim:
    """A TCP port on loopback whose connections reach the gateway with a preface."""

    def __init__(self, gateway: EmbeddedGateway, allow: str = "api") -> None:
        self._gateway = gateway
        self._allow = allow
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(near,), daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), self._gateway.connect(self._allow) as far:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.settimeout(None)
            with selectors.DefaultSelector() as selector:
                selector.register(near, selectors.EVENT_READ, far)
                selector.register(far, selectors.EVENT_READ, near)
                while True:
                    for key, _ in selector.select():
                        source = key.fileobj
                        assert isinstance(source, socket.socket)
                        data = source.recv(65536)
                        if not data:
                            return
                        key.data.sendall(data)


def run_conformance(url: str, model: str, *cases: str, key: str = "sk-test") -> dict[str, dict[str, Any]]:
    """Run cases of conformance_client.py with the official SDKs; return what they understood, by case."""
    script = Path(__file__).with_name("conformance_client.py")
    if not AGENTS_PYTHON.exists():
        raise FileNotFoundError(f"{AGENTS_PYTHON} is missing: run ./bootstrap test (tests/e2e/requirements-agents.txt)")
    done = subprocess.run(
        [AGENTS_PYTHON, "-I", script, url, model, key, *cases], check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("case"): line for line in lines}


@contextlib.contextmanager
def scripted_upstream(*arguments: str) -> Iterator[str]:
    """Run the scripted model over TCP; yields its URL."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "gateway_client.gateways.embedded.scripted_server", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
