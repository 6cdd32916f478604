"""Bytes of egress as a budget: whatever form they leave or come in, no byte more passes, over restarts too."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.instance import Instance
from tests.support.site import Site
from tests.support.site_authority import SiteAuthority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

PLAIN, SECURE = "plain.example.com", "api.example.com"
BIG = 8 << 20
"""Bytes of the site's `/big`."""
MIB = 1 << 20
MIDDLE = 40 * MIB
"""More than 16 connections have on their way through sockets and buffers, and a loan and blocks of 200 MiB."""
POLICY = f"""
kind: Policy
name: {{name}}
version: 1
risk: limited
user: agent
rootfs: host
limits: {{{{memory: 256MiB, cpus: 1, pids: 128, disk: 64MiB, open_files: 1024, output: 4MiB}}}}
budget: {{budget}}
scopes: ["llm:scripted*", "http:GET,POST:http://{PLAIN}/**", "{{secure}}"]
on_supervisor_loss: contain
"""
HTTPS, TLS = f"http:GET:https://{SECURE}/**", f"tls:{SECURE}:443"
POLICIES = {
    "denies": ("{egress_bytes: 20MiB}", HTTPS),
    "tunnels": ("{egress_bytes: 20MiB}", TLS),
    "large": ("{egress_bytes: 200MiB}", HTTPS),
    "small": ("{egress_bytes: 256KiB}", HTTPS),
    "freezes": ("{egress_bytes: 1MiB, on_exhausted: freeze}", HTTPS),
    "kills": ("{egress_bytes: 1MiB, on_exhausted: kill}", HTTPS),
    "calls": ("{requests: 3}", TLS),
    "team": ("{}", HTTPS),
}
LABEL = """
[[budgets]]
label = "team=payments"
egress_bytes = "20MiB"
"""
# Fetches URLs, each by a thread of its own, and prints what it has received of their bodies as it comes.
FETCH = r"""
import os, ssl, socket, sys, threading, time, urllib.request, urllib.error
total, lock = 0, threading.Lock()
def fetch(url):
    global total
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            rest = answer.length
            while data := answer.read1(65536):
                with lock:
                    total += len(data)
        return "short" if rest and answer.length else str(answer.status)
    except urllib.error.HTTPError as error:
        return f"{error.code}:{error.read().decode()}"
    except OSError as error:
        return type(error).__name__
def one(url):
    print("ended", fetch(url), flush=True)
for round in sys.argv[2:]:
    width, url = round.split("*")
    threads = [threading.Thread(target=one, args=(url,)) for _ in range(int(width))]
    for thread in threads: thread.start()
    while any(thread.is_alive() for thread in threads):
        print("bytes", total, flush=True)
        time.sleep(0.02)
    print("bytes", total, flush=True)
print("done", flush=True)
time.sleep(1000 if sys.argv[1] == "stay" else 0)
"""
SOCKET = r"""
import base64, os, socket, time
line = socket.create_connection(("gateway.internal", 3128))
line.sendall(b"GET http://%HOST%/echo HTTP/1.1\r\nHost: %HOST%\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
             b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + base64.b64encode(os.urandom(16)) + b"\r\n\r\n")
head = b""
while b"\r\n\r\n" not in head:
    head += line.recv(1)
print(head.split()[1].decode(), flush=True)
passed = 0
try:
    while True:
        line.sendall(b"x" * 4096)
        got = 0
        while got < 4096:
            data = line.recv(4096)
            if not data: raise OSError
            got += len(data)
        passed += 2 * got
except OSError:
    print("bytes", passed, flush=True)
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Instance, Site]]:
    sites = SiteAuthority.make(tmp_path_factory.mktemp("site"))
    policies = {
        f"{name}.yaml": POLICY.format(name=name, budget=budget, secure=secure)
        for name, (budget, secure) in POLICIES.items()
    }
    with Site() as plain, Site(sites.context(SECURE)) as secure:
        pins = f'"{PLAIN}" = "127.0.0.1:{plain.port}"\n"{SECURE}" = "127.0.0.1:{secure.port}"\n'
        extra = f'{LABEL}\n[gateway]\nca_file = "{sites.ca}"\n[gateway.hosts]\n{pins}'
        with Instance.start(extra, policies=policies) as stockade:
            stockade.authority = sites.ca  # type: ignore[attr-defined]
            yield stockade, plain


@pytest.fixture
def stockade(stage: tuple[Instance, Site]) -> Iterator[Instance]:
    yield stage[0]
    stage[0].ctl("kill", "--all")


@pytest.fixture(scope="module")
def workspace(stage: tuple[Instance, Site]) -> Path:
    ca = stage[0].authority.read_text()  # type: ignore[attr-defined]
    return stage[0].workspace(fetch__py=FETCH, ws__py=SOCKET.replace("%HOST%", PLAIN), ca__pem=ca)


def launch(stockade: Instance, workspace: Path, name: str, *command: str, flags: tuple[str, ...] = ()) -> None:
    where = ("--name", name, "--workspace", f"{workspace}:ro")
    stockade.launch(*where, *flags, "--", *command)


def fetches(
    stockade: Instance, workspace: Path, name: str, *rounds: str, policy: str = "denies", flags: tuple[str, ...] = ()
) -> None:
    command = ("python3", "/workspace/fetch.py", "stay", *rounds)
    launch(stockade, workspace, name, *command, flags=("--policy", policy, *flags))


def said(stockade: Instance, name: str) -> list[str]:
    return stockade.ctl("logs", name).out.split("\n")[:-1]


def finished(stockade: Instance, name: str, seconds: float = 30) -> list[str]:
    """What it printed, once it has printed that it is done."""
    stockade.wait(lambda: said(stockade, name)[-1:] == ["done"], seconds)
    lines = said(stockade, name)
    assert lines[-1:] == ["done"], lines[-5:]
    return lines


def received(lines: list[str]) -> int:
    return max((int(line.split()[1]) for line in lines if line.startswith("bytes ")), default=0)


def ends(lines: list[str]) -> list[str]:
    return [line.removeprefix("ended ") for line in lines if line.startswith("ended ")]


def use_of(stockade: Instance, name: str) -> Any:
    (use,) = [each for each in stockade.json("inspect", name)["budget"] if each["bound"] == "egress_bytes"]
    return use


def outcomes(stockade: Instance, name: str) -> list[Any]:
    return stockade.actions(name, "--verb", "egress.outcome")


def test_sixteen_downloads_at_once_pass_no_byte_more_and_are_cut(stockade: Instance, workspace: Path) -> None:
    fetches(stockade, workspace, "many", f"16*http://{PLAIN}/big", f"1*http://{PLAIN}/after")
    lines = finished(stockade, "many")
    # Bodies alone: what passed with heads is in the budget's own count, to the last byte.
    assert 18 * MIB < received(lines) < 20 * MIB
    *first, last = ends(lines)
    assert first.count("200") <= 2, "there is room for two whole ones, if they are quicker than all others"
    assert last.startswith("429:")
    assert "the agent's budget of egress_bytes is used up" in last
    use = use_of(stockade, "many")
    assert (use["spent"], use["limit"], use["reserved"]) == (20 * MIB, 20 * MIB, 0)
    passed = [(each["details"]["bytes_up"] + each["details"]["bytes_down"]) for each in outcomes(stockade, "many")]
    assert received(lines) < sum(passed) <= 20 * MIB
    reasons = {each["reason"] for each in outcomes(stockade, "many") if each["verdict"] == "failed"}
    assert reasons == {"the agent's budget of egress_bytes is used up"}
    (notice,) = stockade.actions("many", "--verb", "agent.budget", "--verdict", "notice")
    assert notice["object"] == "egress_bytes"
    assert 0.8 * 20 * MIB <= notice["details"]["spent"] <= 20 * MIB
    assert stockade.json("inspect", "many")["state"] == "RUNNING"


def test_its_twin_that_stays_below_gets_everything_and_is_not_slowed_to_a_halt(
    stockade: Instance, workspace: Path
) -> None:
    fetches(stockade, workspace, "few", f"2*http://{PLAIN}/big", f"20*http://{PLAIN}/x")
    lines = finished(stockade, "few")
    assert received(lines) == 2 * BIG + 20 * 2
    assert set(ends(lines)) == {"200"}
    stockade.wait(lambda: not use_of(stockade, "few")["reserved"])
    use = use_of(stockade, "few")
    assert use["reserved"] == 0
    # Every byte once: the bodies, and heads both ways.
    assert 2 * BIG < use["spent"] < 2 * BIG + 22 * 2000


@pytest.mark.parametrize("policy", ["denies", "tunnels"])
def test_bytes_inside_tls_count_whether_it_ends_in_the_worker_or_not(
    stockade: Instance, workspace: Path, policy: str
) -> None:
    trust = () if policy == "denies" else ("--env", "SSL_CERT_FILE=/workspace/ca.pem")
    url = f"https://{SECURE}/big"
    fetches(stockade, workspace, policy, f"2*{url}", f"4*{url}", f"1*{url}", policy=policy, flags=trust)
    lines = finished(stockade, policy)
    assert ends(lines)[:2] == ["200", "200"], ends(lines)
    assert "200" not in ends(lines)[2:]
    assert 2 * BIG < received(lines) < 20 * MIB
    assert use_of(stockade, policy)["spent"] == 20 * MIB
    denied = stockade.actions(policy, "--verb", "egress.request", "--verdict", "denied")
    assert "budget of egress_bytes" in denied[-1]["reason"]


def test_a_websocket_is_cut_when_they_are_used_up(stockade: Instance, workspace: Path) -> None:
    launch(stockade, workspace, "ws", "python3", "/workspace/ws.py", flags=("--policy", "small"))
    stockade.wait(lambda: any(line.startswith("bytes ") for line in said(stockade, "ws")), 20)
    status, passed = said(stockade, "ws")
    assert status == "101"
    assert 200 * 1024 < int(passed.split()[1]) <= 256 * 1024
    outcome = outcomes(stockade, "ws")[-1]
    assert (outcome["verdict"], outcome["reason"]) == ("failed", "the agent's budget of egress_bytes is used up")


def test_what_is_open_and_idle_is_cut_too(stockade: Instance, workspace: Path, stage: tuple[Instance, Site]) -> None:
    site = stage[1]
    site.cut.clear()
    fetches(stockade, workspace, "idle", f"1*http://{PLAIN}/slow", policy="small")
    stockade.wait(lambda: use_of(stockade, "idle")["reserved"])
    stockade.ctl("exec", "idle", "--", "curl", "-sS", "-o", "/dev/null", f"http://{PLAIN}/big")
    lines = finished(stockade, "idle")
    assert "200" not in ends(lines)
    assert site.cut.wait(5)
    assert use_of(stockade, "idle")["spent"] == 256 * 1024


def test_model_calls_and_uploads_count(stockade: Instance) -> None:
    stockade.launch("--name", "calls", "--policy", "small", "--", "sleep", "1000")
    call = (
        'head -c 100000 /dev/zero | tr \'\\0\' x > /tmp/x; printf \'{"model":"scripted","max_tokens":5,"messages":'
        '[{"role":"user","content":"@say hi %s"}]}\' "$(cat /tmp/x)" > /tmp/body; '
        "curl -sS -o /tmp/out -w '%{http_code} ' -H 'Content-Type: application/json' -d @/tmp/body "
        "$STOCKADE_GATEWAY_URL/v1/chat/completions; cat /tmp/out"
    )
    first = stockade.ctl("exec", "calls", "--", "sh", "-c", call).out
    assert first.startswith("200 "), first
    assert 100_000 < use_of(stockade, "calls")["spent"] < 210_000
    upload = f"curl -sS -o /tmp/out -w '%{{http_code}}' -T - -X POST http://{PLAIN}/take < /dev/zero; cat /tmp/out"
    second = stockade.ctl("exec", "calls", "--", "timeout", "20", "sh", "-c", upload).out
    assert "200" not in second
    assert use_of(stockade, "calls")["spent"] == 256 * 1024
    third = stockade.ctl("exec", "calls", "--", "sh", "-c", call).out
    assert third.startswith("429 "), third
    assert "egress_bytes" in third


def test_the_agent_can_ask_what_is_left_and_people_see_it(stockade: Instance, workspace: Path) -> None:
    fetches(stockade, workspace, "shown", f"1*http://{PLAIN}/big")
    finished(stockade, "shown")
    ask = "curl -sS $STOCKADE_GATEWAY_URL/.stockade/v1/budget"
    stockade.wait(lambda: not use_of(stockade, "shown")["reserved"])
    left = stockade.ctl("exec", "shown", "--", "sh", "-c", ask).json()["egress_bytes_left"]
    assert left == 20 * MIB - use_of(stockade, "shown")["spent"]
    assert left < 12 * MIB
    for verb in (("status", "--wide"), ("top",)):
        row = next(row for row in stockade.ctl(*verb).out.splitlines() if row.startswith("shown "))
        assert row.endswith("40% egress_bytes")


def test_a_launch_may_narrow_it_and_not_widen_it(stockade: Instance) -> None:
    for name, flag, limit in (("less", "egress_bytes=64KiB", 65536), ("more", "egress_bytes=1GiB", 20 * MIB)):
        stockade.launch("--name", name, "--policy", "denies", "--budget", flag, "--", "sleep", "1000")
        assert use_of(stockade, name)["limit"] == limit
    refused = stockade.ctl("launch", "--budget", "egress_bytes=much", "--", "true")
    assert refused.code != 0
    assert "egress_bytes" in refused.err


@pytest.mark.parametrize(("policy", "state"), [("freezes", "FROZEN"), ("kills", "KILLED")])
def test_at_the_end_the_policy_says_what_happens(stockade: Instance, workspace: Path, policy: str, state: str) -> None:
    fetches(stockade, workspace, policy, f"4*http://{PLAIN}/big", policy=policy)
    stockade.wait(lambda: stockade.json("inspect", policy)["state"] == state)
    assert stockade.json("inspect", policy)["state"] == state
    verb = "agent.freeze" if policy == "freezes" else "agent.kill"

    def done() -> list[dict[str, Any]]:
        return [each for each in stockade.actions(policy, "--verb", verb) if each["verdict"] == "done"]

    stockade.wait(done)
    assert done()[-1]["reason"] == f"budget egress_bytes: {MIB} of {MIB} spent"


def test_agents_of_a_label_share_them_over_workers(stockade: Instance, workspace: Path) -> None:
    names = ("one", "two", "three")
    label = ("--label", "team=payments")
    for name in names:
        fetches(stockade, workspace, name, f"4*http://{PLAIN}/big", policy="team", flags=label)
    total = sum(received(finished(stockade, name)) for name in names)
    (shared,) = stockade.json("budgets")
    assert (shared["bound"], shared["limit"], shared["reserved"]) == ("egress_bytes", 20 * MIB, 0)
    assert total < shared["spent"] <= 20 * MIB
    assert total > 18 * MIB
    row = next(row for row in stockade.ctl("budgets").out.splitlines() if row.startswith("team=payments"))
    assert row.count("20.0MiB") == 2


def test_a_daemon_that_is_killed_in_the_middle_gives_none_of_it_anew(stockade: Instance, workspace: Path) -> None:
    again = f"16*http://{PLAIN}/big"
    fetches(stockade, workspace, "killed", again, again, again, policy="large")
    written = stockade.run_dir / "agents" / stockade.json("inspect", "killed")["agent_id"] / "stdout.log"
    stockade.wait(lambda: received(written.read_text().split("\n")[:-1]) > 20 * MIB)  # no command is quick enough
    stockade.down(signal.SIGKILL)
    stockade.up()
    before = received(finished(stockade, "killed", 60))
    use = use_of(stockade, "killed")
    assert 20 * MIB < before <= use["spent"] < 200 * MIB, "it was killed in the middle"
    assert use["spent"] < before + MIDDLE, "and most of what was left is left"
    command = ("python3", "/workspace/fetch.py", "go", again, again)
    after = received(stockade.ctl("exec", "killed", "--", *command).out.splitlines())
    assert use_of(stockade, "killed")["spent"] == 200 * MIB
    # No byte more; less by what was lent and written ahead as the daemon died, which counts as spent.
    assert 200 * MIB - MIDDLE < before + after <= 200 * MIB


def test_forwarded_requests_and_tunnels_draw_on_requests_and_look_ups_on_nothing(
    stockade: Instance, workspace: Path
) -> None:
    stockade.launch("--name", "calls", "--policy", "calls", "--workspace", f"{workspace}:ro", "--", "sleep", "1000")
    fetch = "curl -sS --cacert /workspace/ca.pem -o /dev/null -w '%{http_code} ' "
    script = f"{fetch} http://{PLAIN}/1; {fetch} https://{SECURE}/2; {fetch} http://{PLAIN}/3; {fetch} http://{PLAIN}/4"
    assert stockade.ctl("exec", "calls", "--", "sh", "-c", script).out.split() == ["200", "200", "200", "429"]
    denied = stockade.actions("calls", "--verb", "egress.request", "--verdict", "denied")
    assert "the agent's budget of requests is used up" in denied[-1]["reason"]
