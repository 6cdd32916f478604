"""What was taken back stays so, whatever an agent does and whoever dies: revocation, expiry, budgets, verdicts."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

ASKING = """
kind: Policy
name: asking
version: 1
risk: limited
user: agent
rootfs: host
limits: {memory: 256MiB, cpus: 1, pids: 64, disk: 64MiB, open_files: 1024, output: 1MiB}
budget: {}
scopes: []
egress: {on_deny: ask, transparent: false, worker: shared}
on_supervisor_loss: contain
"""
RESETS = """
import socket, struct, sys
linger = struct.pack("ii", 1, 0)
for _ in range(int(sys.argv[1]) // 50):
    many = [socket.create_connection(("gateway.internal", 3128)) for _ in range(50)]
    for one in many:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        one.sendall(b"CONNECT pin.example:9443 HTTP/1.1\\r\\nHost: pin.example:9443\\r\\n\\r\\n")
    for one in many:
        one.close()
print("done", flush=True)
"""
TUNNEL = """
import socket, ssl, time
s = socket.create_connection(("gateway.internal", 3128))
s.sendall(b"CONNECT pin.example:9443 HTTP/1.1\\r\\nHost: pin.example:9443\\r\\n\\r\\n")
print(s.recv(1000)[9:12].decode(), flush=True)
come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
hello = ssl.create_default_context().wrap_bio(come, go, server_hostname="pin.example")
try:
    hello.do_handshake()
except ssl.SSLWantReadError:
    pass
s.sendall(go.read())
try:
    while True:
        s.sendall(b"out" * 20)
        time.sleep(0.05)
except OSError:
    print("cut", flush=True)
time.sleep(1000)
"""
CALLS = """
import json, socket, sys, time
body = json.dumps({"model": sys.argv[1], "messages": [{"role": "user", "content": "@say hello"}]}).encode()
head = b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: gateway.internal:3128\\r\\nConnection: close\\r\\n"
last, allowed = "", 0
while True:
    try:
        s = socket.create_connection(("gateway.internal", 3128), timeout=400)
        s.sendall(head + b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
        answer = b""
        while piece := s.recv(4096):
            answer += piece
        status = answer[9:12].decode()
    except OSError:
        status = ""
    allowed += status == "200"
    if status != last:
        print(status, allowed, flush=True)
    last = status
    time.sleep(0.01)
"""


class Sink:
    """A host outside that takes everything and counts what is still connected."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.server.getsockname()[1]
        self.open = 0
        self.bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self._take, args=(sock,), daemon=True).start()

    def _take(self, sock: socket.socket) -> None:
        self.open += 1
        with sock:
            try:
                while data := sock.recv(65536):
                    self.bytes += len(data)
            except OSError:
                pass
        self.open -= 1


@pytest.fixture(scope="module")
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.server.close()


@pytest.fixture(scope="module")
def stockade(sink: Sink) -> Iterator[Instance]:
    extra = f'[gateway.hosts]\n"pin.example" = "127.0.0.1:{sink.port}"\n'
    with Instance.start(extra, policies={"asking.yaml": ASKING}) as instance:
        yield instance


@pytest.fixture(autouse=True)
def nobody_left(stockade: Instance) -> Iterator[None]:
    yield
    if stockade.process is None:
        stockade.up()
    stockade.ctl("kill", "--all")


def said(stockade: Instance, name: str) -> list[str]:
    return stockade.ctl("logs", name).out.split("\n")[:-1]


def worker_pid(stockade: Instance) -> int:
    return int(json.loads((stockade.run_dir / "processes" / "egress-w1.json").read_text())["pid"])


def test_an_agent_that_hangs_up_thousands_of_times_is_cut_like_any_other(stockade: Instance, sink: Sink) -> None:
    workspace = stockade.workspace(resets__py=RESETS, tunnel__py=TUNNEL)
    script = "python3 /workspace/resets.py 1500; python3 /workspace/tunnel.py"
    stockade.launch(
        "--name", "evil", "--scope", "tls:pin.example:9443", "--workspace", f"{workspace}:ro", "--", "sh", "-c", script
    )
    stockade.wait(lambda: sink.bytes > 1000, 60)
    assert said(stockade, "evil")[:2] == ["done", "200"]
    (grant,) = [grant for grant in stockade.json("grants", "evil") if grant["scope"].startswith("tls:")]
    revoked = stockade.json("revoke", grant["grant_id"])
    assert (revoked["state"], revoked["warning"]) == ("REVOKED", "")
    stockade.wait(lambda: "cut" in said(stockade, "evil"))
    assert said(stockade, "evil")[-1] == "cut"
    # Of all that was hung up, the tunnel alone was left to cut.
    (entry,) = stockade.actions("evil", "--verb", "grant.revoke")
    assert entry["details"]["relays_cut"] <= 2


def test_a_worker_that_does_not_answer_keeps_no_connection_open(stockade: Instance, sink: Sink) -> None:
    workspace = stockade.workspace(tunnel__py=TUNNEL)
    names = ("revoked", "stays", "timed")  # the one that has a time last
    stockade.wait(lambda: sink.open == 0)
    for name in names:
        script = "while [ ! -e /workspace/go ]; do sleep 0.05; done; exec python3 /workspace/tunnel.py"
        stockade.launch("--name", name, "--workspace", f"{workspace}:ro", "--", "sh", "-c", script)
        more = ("--ttl", "8s") if name == "timed" else ()
        grant = stockade.json("grant", name, "tls:pin.example:9443", *more)
        if name == "revoked":
            taken = grant["grant_id"]
    (workspace / "go").touch()
    stockade.wait(lambda: sink.open == len(names))
    assert sink.open == len(names)
    worker = worker_pid(stockade)
    os.kill(worker, signal.SIGSTOP)
    try:
        assert stockade.json("revoke", taken)["warning"] == ""
        stockade.wait(lambda: sink.open == 2, 2)
        assert sink.open == 2
        stockade.wait(lambda: sink.open == 1)
        assert sink.open == 1
        # The twin: what was not taken back is open still.
        time.sleep(0.3)
        assert sink.open == 1
    finally:
        os.kill(worker, signal.SIGCONT)
    before = sink.bytes
    stockade.wait(lambda: sink.bytes > before)
    assert sink.bytes > before
    assert said(stockade, "stays") == ["200"]


def test_a_restart_gives_nothing_back(stockade: Instance) -> None:
    workspace = stockade.workspace(calls__py=CALLS)
    scopes = ("--scope", "llm:scripted*", "--workspace", f"{workspace}:ro")
    calls = ("--", "python3", "/workspace/calls.py", "scripted")
    stockade.launch("--name", "revoked", *scopes, *calls)
    stockade.launch("--name", "poor", *scopes, "--budget", "requests=20", *calls)
    stockade.launch("--name", "kept", *scopes, *calls)
    for name in ("revoked", "kept"):
        stockade.wait(lambda name=name: said(stockade, name)[:1] == ["200 1"])  # type: ignore[misc]
    for grant in stockade.json("grants", "revoked"):
        stockade.json("revoke", grant["grant_id"])
    stockade.wait(lambda: said(stockade, "poor")[-1:] == ["429 20"])
    assert said(stockade, "poor") == ["200 1", "429 20"]
    stockade.wait(lambda: said(stockade, "revoked")[-1][:3] == "403")
    allowed = said(stockade, "revoked")[-1][4:]
    for number in (signal.SIGKILL, signal.SIGTERM):
        stockade.down(number)
        stockade.up()
        assert stockade.json("grants", "revoked") == []
        # Whoever may go on does, and nobody else has been let through by then.
        size = len(said(stockade, "kept"))
        stockade.wait(lambda size=size: len(said(stockade, "kept")) > size or said(stockade, "kept")[-1][:3] == "200")  # type: ignore[misc]
        stockade.wait(lambda: said(stockade, "kept")[-1][:3] == "200")
        assert said(stockade, "kept")[-1][:3] == "200"
        stockade.wait(lambda: said(stockade, "revoked")[-1][:3] == "403")
        assert said(stockade, "revoked")[-1] == f"403 {allowed}"
        stockade.wait(lambda: said(stockade, "poor")[-1][:3] == "429")
        assert said(stockade, "poor")[-1] == "429 20"


def test_a_verdict_for_a_worker_that_died_reaches_nobody(stockade: Instance) -> None:
    workspace = stockade.workspace(calls__py=CALLS)
    for name, pause in (("first", 0), ("second", 5)):
        script = f"sleep {pause}; exec python3 /workspace/calls.py model-{name}"
        stockade.launch(
            "--name", name, "--policy", "asking", "--workspace", f"{workspace}:ro", "--", "sh", "-c", script
        )
    stockade.wait(lambda: len(stockade.json("requests", "list")) == 1)
    (asked,) = stockade.json("requests", "list")
    os.kill(worker_pid(stockade), signal.SIGKILL)
    stockade.wait(lambda: len(stockade.json("requests", "list")) == 2)
    stockade.json("requests", "approve", asked["request_id"])
    # The approval is the first one's own: its next call passes, and the other waits as before.
    stockade.wait(lambda: any(line.startswith(("200", "404", "400")) for line in said(stockade, "first")))
    time.sleep(0.3)
    assert all(line[:3] in ("", " 0") for line in said(stockade, "second")), said(stockade, "second")
    assert stockade.json("grants", "second") == []
    (denied,) = [e for e in stockade.actions("second", "--verb", "egress.request") if e["verdict"] == "allowed"] or [0]
    assert denied == 0
