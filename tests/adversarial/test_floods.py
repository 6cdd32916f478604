"""What one agent's flood does to the others: a second agent's requests take at most 3x their quiet median.

The second agent asks the embedded gateway for its models, over and over, on a new connection each time: network,
worker, daemon, log, dialer and gateway are all on the way. Quiet and flooded are measured one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance, bin_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

RATIO_MAX = 3.0
QUIET_MS_MIN = 3.0  # below this, what is measured is the machine's noise
MEASURE_SECONDS = 0.5
ATTEMPTS = 3  # others use the machine too: a flood that hurts does so every time

POLITE = r"""
import http.client, os, sys, time, urllib.parse
url = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
def once():
    began = time.perf_counter()
    c = http.client.HTTPConnection(url.hostname, url.port, timeout=20)
    c.request("GET", "/v1/models", headers={"Authorization": "Bearer x"}); r = c.getresponse(); r.read(); c.close()
    assert r.status == 200, r.status
    return time.perf_counter() - began
for line in sys.stdin:
    end, took = time.monotonic() + float(line), []
    while time.monotonic() < end or len(took) < 5:
        took.append(once()); time.sleep(0.01)
    print(sorted(took)[len(took) // 2] * 1000, flush=True)
"""

MANY = """
import os, socket, time
for _ in range(8):
    if os.fork() == 0: break
def ask(data, reads=1):
    try:
        s = socket.create_connection(('198.18.0.1', 3128)); s.settimeout(20)
        for _ in range(reads):
            s.sendall(data)
            if not s.recv(65536): break
        s.close()
    except OSError: time.sleep(0.01)
"""
FLOODS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "processes that come and go": """
import os
while True:
    try:
        if os.fork() == 0: os._exit(0)
        os.waitpid(-1, os.WNOHANG)
    except OSError: pass
""",
    "busy processes": "import os\nfor _ in range(20):\n    if os.fork() == 0: break\nwhile True: pass",
    "memory": """
import os
while True:
    if os.fork() == 0:
        x = [bytearray(b'x') * (1 << 20) for _ in range(200)]; os._exit(0)
    os.wait()
""",
    "scratch": """
import os
while True:
    fd = os.open('/tmp/f', os.O_RDWR | os.O_CREAT)
    try:
        while os.write(fd, b'x' * (1 << 20)) == 1 << 20 and os.fstat(fd).st_size < 400 << 20: pass
    except OSError: pass
    os.close(fd); os.unlink('/tmp/f')
""",
    "sync": "import os\nwhile True:\n    open('/tmp/f', 'w').write('x' * 65536); os.sync()",
    "standard output": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "small pieces of output": "import os\nwhile True: os.write(2, b'x\\n')",
    "malformed requests": MANY + "while True: ask(b'\\0\\0\\r\\n\\r\\n')",
    "denied requests": MANY + "while True: ask(b'GET http://no.example/ HTTP/1.1\\r\\nHost: no.example\\r\\n\\r\\n')",
    "denied requests that are given up": MANY
    + "while True: ask(b'GET http://no.example/ HTTP/1.1\\r\\nHost: no.example\\r\\n\\r\\n', 0)",
    "allowed requests": MANY
    + "while True: ask(b'GET /v1/models HTTP/1.1\\r\\nHost: gateway.internal:3128\\r\\n\\r\\n', 1000)",
    "the self-service API": MANY
    + "while True: ask(b'GET /.stockade/v1/whoami HTTP/1.1\\r\\nHost: gateway.internal:3128\\r\\n\\r\\n', 1000)",
    "connections": MANY + "while True: ask(b'', 0)",
    "slow connections": """
import socket, time
held = []
while True:
    try:
        s = socket.create_connection(('198.18.0.1', 3128)); s.send(b'GET /v1/models HTT'); held.append(s)
    except OSError: time.sleep(0.01)
    for s in held[-300:]:
        try: s.send(b'P')
        except OSError: pass
""",
}


@dataclass
class Second:
    """The agent whose latency is measured."""

    process: subprocess.Popen[str]

    def median_ms(self, seconds: float = MEASURE_SECONDS) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "a request of the second agent failed"
        return float(line)


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


@pytest.fixture(scope="module")
def second(stockade: Instance) -> Iterator[Second]:
    stockade.launch("--name", "polite", "--", "sleep", "1000")
    command = [str(bin_dir() / "stockadectl"), "exec", "-i", "polite", "--", "python3", "-I", "-c", POLITE]
    with subprocess.Popen(
        command, env=stockade.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        second = Second(process)
        second.median_ms()
        yield second
        process.kill()


@pytest.mark.parametrize("what", FLOODS)
def test_a_second_agent_is_served_within_three_times_its_quiet_latency(
    stockade: Instance, second: Second, what: str
) -> None:
    seen = []
    for _ in range(ATTEMPTS):
        quiet = second.median_ms()
        stockade.launch("--name", "flood", "--", "python3", "-I", "-c", FLOODS[what])
        try:
            second.median_ms(0.2)
            flooded = second.median_ms()
            began = time.monotonic()
            assert stockade.ctl("status").code == 0
            answered = time.monotonic() - began
        finally:
            receipt = stockade.json("kill", "flood")[0]
        assert receipt["verified_empty"]
        assert receipt["dead_ms"] < 5000
        assert answered < 5, "the daemon answers whatever an agent does"
        seen.append(round(flooded / max(quiet, QUIET_MS_MIN), 2))
        if seen[-1] <= RATIO_MAX:
            return
    pytest.fail(f"{what}: {seen} times the quiet latency")


def test_denials_come_into_the_log_at_a_bounded_rate_and_each_that_was_judged_is_there(stockade: Instance) -> None:
    """The flood of log events: it is made to wait. Its twin is the burst, which is judged at once."""
    program = """
import json, socket, time
count, began, first = 0, time.monotonic(), 0
while count < 150 or time.monotonic() < began + 4:
    s = socket.create_connection(('198.18.0.1', 3128)); s.settimeout(30)
    s.sendall(b'GET http://no.example/ HTTP/1.1\\r\\nHost: no.example\\r\\n\\r\\n')
    assert b' 403 ' in s.recv(65536)
    s.close(); count += 1
    if count == 150: first = time.monotonic() - began
print(json.dumps([count, first, time.monotonic() - began]))
"""
    done = stockade.ctl("run", "--name", "denied", "--", "python3", "-I", "-c", program)
    assert done.code == 0, done.err
    count, first, seconds = json.loads(done.out)
    assert 0 < first < 7, "a burst of 150 does not wait: at 20 a second it takes 7.5 s"
    assert count <= 200 + seconds * 20 + 10
    entries = [e for e in stockade.actions("denied") if e["verb"] == "egress.request"]
    assert len(entries) == count


def test_requests_given_up_are_counted_and_hold_nothing(stockade: Instance) -> None:
    """An agent that sends and does not wait: what was not judged is counted, and it is served again after that."""
    program = """
import socket, struct, time
def ask(read):
    s = socket.create_connection(('198.18.0.1', 3128)); s.settimeout(30)
    s.sendall(b'GET http://no.example/ HTTP/1.1\\r\\nHost: no.example\\r\\n\\r\\n')
    if read: s.recv(65536)
    else: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))  # close with a reset
    s.close()
asked, began = 0, time.monotonic()
while asked < 195 + 20 * (time.monotonic() - began):  # until the allowance is used up
    ask(True)
    asked += 1
for _ in range(60): ask(False)
time.sleep(4)
url = b'GET /v1/models HTTP/1.1\\r\\nHost: gateway.internal:3128\\r\\nConnection: close\\r\\n\\r\\n'
s = socket.create_connection(('198.18.0.1', 3128)); s.settimeout(30); s.sendall(url)
print(s.recv(65536).split()[1].decode(), asked)
"""
    done = stockade.ctl("run", "--name", "hasty", "--", "python3", "-I", "-c", program)
    assert done.out.startswith("200 "), done.err
    asked = int(done.out.split()[1])
    entries = stockade.actions("hasty")
    denied = [e for e in entries if e["verb"] == "egress.request" and e["verdict"] == "denied"]
    told = sum(e["details"]["times"] for e in entries if e["verb"] == "agent.flood")
    assert told > 0
    # One that was being judged when it was given up may be in neither.
    assert asked + 60 - 10 <= len(denied) + told <= asked + 60


def test_what_an_agent_meets_is_in_the_log_and_in_inspect(stockade: Instance) -> None:
    stockade.launch("--name", "quiet", "--", "sleep", "1000")
    program = """
import os, time
for _ in range(100):
    try:
        if os.fork() == 0: break
    except OSError: pass
while True: pass
"""
    stockade.launch("--name", "bomb", "--pids", "20", "--cpus", "0.1", "--", "python3", "-I", "-c", program)
    wanted = {"agent.pids_limit", "agent.throttled"}

    def verbs(name: str) -> list[str]:
        return [entry["verb"] for entry in stockade.actions(name)]

    stockade.wait(lambda: wanted <= set(verbs("bomb")), 20)
    met = [entry for entry in stockade.actions("bomb") if entry["verb"] in wanted]
    assert len(met) == 2, "one of a kind in a minute, however long it lasts"
    by_verb = {entry["verb"]: entry for entry in met}
    assert by_verb["agent.pids_limit"]["details"]["limit"] == 20
    assert by_verb["agent.throttled"]["details"]["throttled_ms"] > 0
    counters = stockade.json("inspect", "bomb")["counters"]
    assert counters["pids_limit_hits"] > 0
    assert counters["cpu_throttled_usec"] > 0
    assert not any(verb.startswith("agent.p") or verb == "agent.throttled" for verb in verbs("quiet"))
    assert "counters" not in stockade.json("status", "bomb")[0]
    stockade.json("kill", "bomb", "quiet")


def test_out_of_memory_is_an_action(stockade: Instance) -> None:
    program = "x = [bytearray(b'x') * (1 << 20) for _ in range(500)]"
    done = stockade.ctl("run", "--name", "greedy", "--memory", "128MiB", "--", "python3", "-I", "-c", program)
    assert done.code == 137
    stockade.wait(lambda: any(e["verb"] == "agent.exit" for e in stockade.actions("greedy")))
    entries = {entry["verb"]: entry for entry in stockade.actions("greedy")}
    assert entries["agent.oom"]["details"] == {"limit": 128 << 20}
    assert entries["agent.exit"]["details"]["out_of_memory"] is True
    assert entries["agent.oom"]["seq"] < entries["agent.exit"]["seq"]
    done = stockade.ctl(
        "run", "--name", "modest", "--memory", "128MiB", "--", "python3", "-I", "-c", "x = bytearray(9)"
    )
    assert done.code == 0
    assert "agent.oom" not in {entry["verb"] for entry in stockade.actions("modest")}
