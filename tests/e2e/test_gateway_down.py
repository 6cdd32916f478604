"""A gateway that hangs, dies and comes back: agents get 503 at once, with a reason, and are unharmed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ASK = """
import json, sys, time, urllib.request, urllib.error
request = urllib.request.Request("http://gateway.internal:3128/v1/models")
began = time.monotonic()
try:
    with urllib.request.urlopen(request, timeout=20) as answer:
        said = {"status": answer.status}
except urllib.error.HTTPError as error:
    said = {"status": error.code, "media": error.headers["content-type"], "retry": error.headers["retry-after"],
            **json.loads(error.read())}
except OSError as error:
    said = {"status": 0, "error": str(error)}
print(json.dumps({**said, "seconds": time.monotonic() - began}))
"""
ANSWERS_AT_ONCE_SECONDS = 2.0


class Gateway:
    """An OpenAI-compatible server of its own process, always on one port."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        module = "gateway_client.gateways.embedded.scripted_server"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-m", module, "--listen", f"127.0.0.1:{self.port}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    running = Gateway(tmp_path)
    running.up()
    try:
        yield running
    finally:
        running.kill()


def asks(stockade: Instance, name: str) -> dict[str, Any]:
    done = stockade.ctl("exec", name, "--", "python3", "-c", ASK)
    assert done.code == 0, done.err
    said: dict[str, Any] = json.loads(done.out)
    return said


def part(stockade: Instance) -> dict[str, Any]:
    """Return what doctor says of the gateway."""
    parts = stockade.ctl("doctor", "-o", "json").json()["components"]
    return next(each for each in parts if each["name"] == "gateway")


def states(stockade: Instance) -> list[str]:
    return [each["details"]["state"] for each in stockade.actions("--verb", "gateway.state")]


def wait_until(condition: object, seconds: float) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.1)


def refused_at_once(said: dict[str, Any]) -> None:
    assert said["status"] == 503
    assert said["media"] == "application/problem+json"
    assert said["reason_code"] == "gateway_down"
    assert said["retry"] == "1"
    assert said["seconds"] < ANSWERS_AT_ONCE_SECONDS


def test_a_gateway_that_dies_or_hangs_is_told_and_comes_back(gateway: Gateway) -> None:
    toml = f'[gateway]\nkind = "openai"\nurl = "http://127.0.0.1:{gateway.port}"\nprobe_seconds = 0.3\n'
    with Instance.start(toml) as stockade:
        assert stockade.ctl("launch", "--name", "a", "--scope", "llm:*", "--", "sleep", "600").code == 0
        assert asks(stockade, "a")["status"] == 200
        assert part(stockade)["ready"] is True

        gateway.kill()
        said = asks(stockade, "a")
        assert said["status"] in (502, 503), "it may ask before three failures in a row"
        wait_until(lambda: not part(stockade)["ready"], 10)
        refused_at_once(asks(stockade, "a"))
        assert "breaker" in part(stockade)["detail"]
        wait_until(lambda: states(stockade) == ["open"], 5)
        assert stockade.ctl("status", "-o", "json").json()[0]["state"] == "RUNNING", "the agent is unharmed"

        gateway.up()
        wait_until(lambda: part(stockade)["ready"], 10)
        assert asks(stockade, "a")["status"] == 200
        wait_until(lambda: states(stockade) == ["open", "closed"], 5)

        assert gateway.process is not None
        os.kill(gateway.process.pid, signal.SIGSTOP)  # it still takes connections, and answers none
        wait_until(lambda: not part(stockade)["ready"], 20)
        refused_at_once(asks(stockade, "a"))
        os.kill(gateway.process.pid, signal.SIGCONT)
        wait_until(lambda: part(stockade)["ready"], 10)
        assert asks(stockade, "a")["status"] == 200
        wait_until(lambda: states(stockade) == ["open", "closed"] * 2, 5)


def test_calls_wait_for_an_embedded_gateway_that_is_started_anew_and_one_that_hangs_is_noticed() -> None:
    with Instance.start("[gateway]\nprobe_seconds = 0.3\n") as stockade:
        assert stockade.ctl("launch", "--name", "a", "--", "sleep", "600").code == 0
        pid = int(json.loads((stockade.run_dir / "processes" / "gateway.json").read_text())["pid"])
        os.kill(pid, signal.SIGKILL)
        said = asks(stockade, "a")
        assert said["status"] in (200, 502, 503)
        wait_until(lambda: asks(stockade, "a")["status"] == 200, 15)

        pid = int(json.loads((stockade.run_dir / "processes" / "gateway.json").read_text())["pid"])
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: not part(stockade)["ready"], 20)
        refused_at_once(asks(stockade, "a"))
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: asks(stockade, "a")["status"] == 200, 15)
