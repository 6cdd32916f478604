"""What an agent of the whole, running Stockade cannot reach: its processes, the host, other agents; and what it can.

Every probe is run against something that it does reach as well, so that a probe which finds nothing shows.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.census import launcher_pid
from tests.support.instance import Instance
from tests.support.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

NAME = "status.example"
INSIDE = "/usr/bin/python3"

CONNECT = """
import socket, sys, time
def probe(family, address):
    s = socket.socket(family, socket.SOCK_STREAM); s.settimeout(2); began = time.monotonic()
    try: s.connect(address)
    except OSError as error: return f"refused {type(error).__name__} {error.errno}"
    finally: s.close()
    return "reached"
"""

POLICY = """
kind: Policy
name: as-root
version: 1
extends: default
user: root
widen: {user: the strongest agent is what is to be held}
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def stockade(site: Site) -> Iterator[Instance]:
    hosts = f'[gateway]\nkind = "embedded"\n[gateway.hosts]\n"{NAME}" = "127.0.0.1:{site.port}"\n'
    with Instance.start(hosts, policies={"as-root.yaml": POLICY}) as instance:
        yield instance


@pytest.fixture(scope="module", params=["default", "as-root"])
def agent(request: pytest.FixtureRequest, stockade: Instance) -> str:
    name = f"prober-{request.param}"
    stockade.launch("--name", name, "--policy", request.param, "--", "sleep", "1000")
    return name


def inside(stockade: Instance, name: str, code: str) -> str:
    done = stockade.ctl("exec", name, "--", INSIDE, "-c", CONNECT + code)
    assert done.code == 0, done.err
    return done.out.strip()


def fetch(stockade: Instance, name: str, arguments: str) -> str:
    """The status that curl gets inside."""
    script = f"curl -sS -m 5 -o /dev/null -w '%{{http_code}}' {arguments}"
    return stockade.ctl("exec", name, "--", "sh", "-c", script).out


def tcp(stockade: Instance, name: str, host: str, port: int) -> str:
    return inside(stockade, name, f"print(probe(socket.AF_INET, ({host!r}, {port})))")


@contextmanager
def service(path: str) -> Iterator[None]:
    """A unix socket that somebody serves; `path` may be abstract."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        yield


# --- Stockade's own sockets


def test_no_socket_of_stockade_has_a_path_inside(stockade: Instance, agent: str) -> None:
    sockets = [str(path) for path in stockade.run_dir.rglob("*") if path.is_socket()]
    assert len(sockets) >= 4, "control, launcher, api and gateway sockets are there on the host"
    assert stockade.ctl("status").code == 0
    for path in (*sockets, str(stockade.run_dir), str(stockade.directory), "/run/stockade", "/run/stockade-slots"):
        assert inside(stockade, agent, f"import os; print(os.path.lexists({path!r}))") == "False", path
        answer = inside(stockade, agent, f"print(probe(socket.AF_UNIX, {path!r}))")
        assert answer.startswith("refused"), (path, answer)


def test_a_path_is_reached_where_it_is_ones_own(stockade: Instance, agent: str) -> None:
    """The twin of the probes for paths: the same probe finds a socket that is inside."""
    own = "s = socket.socket(socket.AF_UNIX); s.bind('/tmp/own'); s.listen()\n"
    assert inside(stockade, agent, own + "print(probe(socket.AF_UNIX, '/tmp/own'))") == "reached"
    assert inside(stockade, agent, "import os; os.unlink('/tmp/own')") == ""


def test_no_abstract_socket_of_the_host(stockade: Instance, agent: str) -> None:
    name = f"\0sktest-{stockade.name}"
    with service(name):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)
        assert inside(stockade, agent, f"print(probe(socket.AF_UNIX, {name!r}))").startswith("refused")
    own = f"s = socket.socket(socket.AF_UNIX); s.bind({name!r}); s.listen()\n"
    assert inside(stockade, agent, own + f"print(probe(socket.AF_UNIX, {name!r}))") == "reached"


# --- the host's services


def test_no_loopback_service_of_the_host(stockade: Instance, agent: str, site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port)):
        pass
    for host in ("127.0.0.1", "127.1.2.3", "0.0.0.0", "localhost"):
        assert tcp(stockade, agent, host, site.port).startswith("refused"), host
    own = "s = socket.create_server(('127.0.0.1', 0))\n"
    assert inside(stockade, agent, own + "print(probe(socket.AF_INET, s.getsockname()))") == "reached"


def test_no_address_of_the_host(stockade: Instance, agent: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        addresses = [word.split("/")[0] for word in host_addresses()]
        assert addresses
        for address in (*addresses, "198.18.0.1"):
            assert tcp(stockade, agent, address, port).startswith("refused"), address
    assert tcp(stockade, agent, "198.18.0.1", 3128) == "reached"


def host_addresses() -> list[str]:
    import psutil  # noqa: PLC0415 - a dependency of the project

    return [a.address for each in psutil.net_if_addrs().values() for a in each if a.family == socket.AF_INET]


SCAN = """
import select
def scan(host, ports):
    # Connections that are neither made nor refused after a second do not count as reached.
    poll, waiting, found = select.poll(), {}, []
    for port in ports:
        s = socket.socket(); s.setblocking(False); s.connect_ex((host, port))
        waiting[s.fileno()] = (s, port); poll.register(s, select.POLLOUT)
    until = time.monotonic() + 1
    while waiting and time.monotonic() < until:
        for fd, _ in poll.poll(100):
            s, port = waiting.pop(fd); poll.unregister(fd)
            if s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0: found.append(port)
    return found
"""


def test_the_gate_listens_on_one_port(stockade: Instance, agent: str) -> None:
    ports = "[*range(1, 1500), 2375, 3000, *range(3100, 3160), 4000, 5432, 6379, 8000, 8080, 9090, 50051]"
    assert inside(stockade, agent, SCAN + f"print(scan('198.18.0.1', {ports}))") == "[3128]"
    own = "s = socket.create_server(('127.0.0.1', 0)); port = s.getsockname()[1]\n"
    assert inside(stockade, agent, SCAN + own + "print(scan('127.0.0.1', [port]) == [port])") == "True"


def test_there_is_no_second_family_of_addresses(stockade: Instance, agent: str) -> None:
    code = "try: socket.socket(socket.{})\nexcept OSError as e: print(e.errno)\nelse: print('made')"
    assert inside(stockade, agent, code.format("AF_INET6")) == str(errno.EAFNOSUPPORT)
    assert inside(stockade, agent, code.format("AF_INET")) == "made"


@pytest.mark.parametrize(
    "address", ["192.0.2.1", "169.254.169.254", "10.0.0.1", "224.0.0.1", "255.255.255.255", "100.64.0.1"]
)
def test_no_address_has_a_route(stockade: Instance, agent: str, address: str) -> None:
    assert tcp(stockade, agent, address, 80).startswith("refused")
    datagram = (
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"try: s.sendto(b'x', ({address!r}, 53)); print('sent')\nexcept OSError as e: print('refused', e.errno)"
    )
    assert inside(stockade, agent, datagram).startswith("refused")


def test_the_proxy_is_no_way_to_what_is_not_granted(stockade: Instance, agent: str, site: Site) -> None:
    """The gateway's machine is the host here: its loopback, the daemon's sockets and every spelling of them."""
    site.seen.clear()
    targets = [
        f"http://127.0.0.1:{site.port}/", f"http://localhost:{site.port}/", f"http://2130706433:{site.port}/",
        f"http://0x7f.1:{site.port}/", f"http://[::1]:{site.port}/", f"http://[::ffff:127.0.0.1]:{site.port}/",
        "http://169.254.169.254/latest/meta-data/", f"http://{NAME}/",
    ]  # fmt: skip
    script = "; ".join(
        f"curl -g -sS -m 5 -o /dev/null -w '%{{http_code}} ' --noproxy '' -x $HTTP_PROXY '{target}'"
        for target in targets
    )
    codes = stockade.ctl("exec", agent, "--", "sh", "-c", script).out.split()
    assert len(codes) == len(targets)
    assert set(codes) <= {"403", "400"}, codes
    # Granted by a name that leads to loopback without the operator's pin, the gateway itself refuses.
    grants = [stockade.json("grant", agent, "http:GET:http://localhost/**")["grant_id"]]
    assert fetch(stockade, agent, "--noproxy '' http://localhost/") == "502"
    assert site.seen == []
    grants.append(stockade.json("grant", agent, f"http:GET:http://{NAME}/**")["grant_id"])
    assert fetch(stockade, agent, f"http://{NAME}/granted") == "200"
    assert site.seen == ["GET /granted"]
    for grant in grants:
        stockade.json("revoke", grant)


# --- other agents


def test_one_agent_cannot_reach_another(stockade: Instance, agent: str) -> None:
    stockade.launch("--name", "neighbour", "--", INSIDE, "-m", "http.server", "8080")
    try:
        stockade.wait(lambda: tcp(stockade, "neighbour", "127.0.0.1", 8080) == "reached")
        assert tcp(stockade, "neighbour", "198.18.0.2", 8080) == "reached"
        for host in ("198.18.0.2", "127.0.0.1", "198.18.0.3", "198.18.0.1"):
            assert tcp(stockade, agent, host, 8080).startswith("refused"), host
        # Its processes are not there either, nor its files.
        listed = stockade.ctl("exec", agent, "--", "ps", "axww", "-o", "args").out
        assert "http.server" not in listed
        assert "http.server" in stockade.ctl("exec", "neighbour", "--", "ps", "axww", "-o", "args").out
        stockade.ctl("exec", "neighbour", "--", "sh", "-c", "echo secret > /tmp/mine; echo secret > /dev/shm/mine")
        assert stockade.ctl("exec", "neighbour", "--", "cat", "/tmp/mine", "/dev/shm/mine").out == "secret\nsecret\n"
        assert stockade.ctl("exec", agent, "--", "cat", "/tmp/mine").code == 1
        assert stockade.ctl("exec", agent, "--", "cat", "/dev/shm/mine").code == 1
    finally:
        stockade.ctl("kill", "neighbour")


def test_the_listener_says_who_an_agent_is_and_nothing_it_sends(stockade: Instance, agent: str) -> None:
    """Whatever an agent calls itself, the request is its own."""
    other = stockade.launch("--name", "other", "--", "sleep", "1000")
    try:
        own = "$STOCKADE_GATEWAY_URL/.stockade/v1"
        forged = f"-H 'X-Stockade-Agent-Id: {other['agent_id']}' -H 'Authorization: Bearer {other['agent_id']}'"
        script = f"curl -sS {forged} -H 'X-Forwarded-For: 198.18.0.9' {own}/whoami"
        me = json.loads(stockade.ctl("exec", agent, "--", "sh", "-c", script).out)
        assert me["agent_id"] == stockade.json("status", agent)[0]["agent_id"]
        # What one asks for, another cannot see.
        ask = f"curl -sS -H 'Content-Type: application/json' -d '{{\"scope\": \"llm:wanted\"}}' {own}/requests"
        request = json.loads(stockade.ctl("exec", agent, "--", "sh", "-c", ask).out)
        mine = f"{own}/requests/{request['request_id']}"
        assert fetch(stockade, agent, mine) == "200"
        assert fetch(stockade, "other", mine) == "404"
        # An agent can ask and cannot answer.
        for attempt in (f"-X POST -d '{{}}' {mine}/approve", f"-X PUT -d '{{}}' {mine}", f"-X DELETE {mine}"):
            assert fetch(stockade, agent, attempt) in ("404", "405"), attempt
        assert stockade.json("requests", "list")[0]["state"] == "PENDING"
        assert "llm:wanted" not in {grant["scope"] for grant in stockade.json("grants", agent)}
        stockade.json("requests", "deny", request["request_id"])
    finally:
        stockade.ctl("kill", "other")


# --- processes


def test_no_process_of_the_host_can_be_seen_or_signalled(stockade: Instance, agent: str) -> None:
    wanted = [stockade.process.pid if stockade.process else 0, launcher_pid(stockade), os.getpid()]
    code = f"""
import os, signal
own = [int(p) for p in os.listdir('/proc') if p.isdigit()]
print(len(own) < 12, max(own) < 5000 or len(own))
for pid in {wanted!r}:
    if pid in own: continue
    try: os.kill(pid, 0); print('reached', pid)
    except OSError as error: print('refused', error.errno)
child = os.fork()
if child == 0: signal.pause()
os.kill(child, 9); print('own', os.waitpid(child, 0)[1])
"""
    lines = inside(stockade, agent, code).splitlines()
    assert lines[0].startswith("True")
    assert set(lines[1:-1]) == {"refused 3"}
    assert lines[-1] == "own 9"


def test_descriptors_of_nobody_else_are_open(stockade: Instance, agent: str) -> None:
    """In the agent's own process and in one that was exec'd: standard streams, and nothing behind them but pipes."""
    code = (
        "import os; print(sorted(os.listdir('/proc/self/fd'), key=int),"
        " [os.readlink(f'/proc/self/fd/{n}').split(':')[0] for n in (0, 1, 2)])"
    )
    for done in (
        stockade.ctl("exec", agent, "--", INSIDE, "-c", code),
        stockade.ctl("run", "--", INSIDE, "-c", code),
    ):
        descriptors, _, kinds = done.out.strip().partition("] ")
        assert descriptors == "['0', '1', '2', '3'", done.out
        assert set(json.loads(kinds.replace("'", '"'))) <= {"/dev/null", "pipe"}


# --- Stockade's workers


def test_the_worker_has_no_other_way_out(stockade: Instance) -> None:
    """The process that parses agents' bytes: no route, no capability, no id of root, no path to host sockets."""
    record = json.loads((stockade.run_dir / "processes" / "egress-w1.json").read_text())
    pid = int(record["pid"])
    status = Path(f"/proc/{pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert "Uid:\t0" not in status
    routes = Path(f"/proc/{pid}/net/route").read_text().splitlines()
    assert len(routes) <= 1, "a header and no route"
    assert Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    interfaces = Path(f"/proc/{pid}/net/dev").read_text()
    assert "lo:" in interfaces
    assert "eth0:" not in interfaces


def test_an_agent_that_hammers_the_proxy_slows_no_other(stockade: Instance, agent: str) -> None:
    """Connections that say nothing, and as many as it can have: another agent is served meanwhile."""
    stockade.launch("--name", "polite", "--", "sleep", "1000")
    hold = """
held = []
try:
    while len(held) < 3000:
        s = socket.socket(); s.settimeout(1); s.connect(("198.18.0.1", 3128))
        s.send(b"GET http://x/ HTTP/1.1\\r\\n"); held.append(s)
except OSError as error: print("stopped", len(held), error, flush=True)
else: print("all", len(held), flush=True)
time.sleep(1000)
"""
    hammer = threading.Thread(
        target=lambda: stockade.ctl("exec", agent, "--", "timeout", "4", INSIDE, "-c", CONNECT + hold), daemon=True
    )
    hammer.start()
    try:
        for _ in range(5):
            script = "curl -sS -m 5 -o /dev/null -w '%{http_code} %{time_total}' $OPENAI_BASE_URL/models"
            code, seconds = stockade.ctl("exec", "polite", "--", "sh", "-c", script).out.split()
            assert code == "200"
            assert float(seconds) < 3
    finally:
        hammer.join(30)
        stockade.ctl("kill", "polite")
    assert fetch(stockade, agent, "$OPENAI_BASE_URL/models") == "200"


# --- what a model call can carry


def test_a_model_call_is_json_without_sources_elsewhere(stockade: Instance, agent: str) -> None:
    call = '{"model": "scripted", "messages": [{"role": "user", "content": %s}]}'
    part = '[{"type": "image_url", "image_url": {"url": "%s"}}]'
    own = "http://gateway.internal:3128/v1/chat/completions"

    def status(kind: str, body: str) -> str:
        return fetch(stockade, agent, f"-H 'content-type: {kind}' --data-binary '{body}' {own}")

    assert status("application/json", call % '"@say hello"') == "200"  # the twin
    assert status("application/x-www-form-urlencoded", call % '"&model=other&y="') == "415"
    assert status("application/json", call % (part % "https://192.0.2.1/?secret")) == "403"
    dots = "http://gateway.internal:3128/v1/..%253B/v1/models"
    assert fetch(stockade, agent, f"--path-as-is {dots}") == "400"
    assert fetch(stockade, agent, "http://gateway.internal:3128/v1/models") == "200"
