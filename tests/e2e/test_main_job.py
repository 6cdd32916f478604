"""The main job on the real thing: launch, deny, grant, allow, expire, revoke, freeze, thaw, kill, verify."""

from __future__ import annotations

import http.server
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from stockade.client import Stockade

from tests.support.census import text
from tests.support.instance import OWNER, Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "status.example"
SCOPE = f"http:GET:http://{NAME}/**"
FETCH = f"curl -sS -m 10 -o /dev/null -w '%{{http_code}}' http://{NAME}/x"


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def page() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def stockade(page: int) -> Iterator[Instance]:
    if os.geteuid() != 0:
        pytest.skip("needs root: starts sandboxes")
    with Instance.start(f'[gateway]\nkind = "embedded"\n[gateway.hosts]\n"{NAME}" = "127.0.0.1:{page}"\n') as instance:
        yield instance


def inside(stockade: Instance, name: str, script: str) -> str:
    return stockade.ctl("exec", name, "--", "sh", "-c", script).out


def sleeper(stockade: Instance, name: str, *flags: str) -> str:
    return str(stockade.launch("--name", name, *flags, "--", "sleep", "1000")["agent_id"])


def test_one_route_a_model_list_and_an_immediate_failure(stockade: Instance) -> None:
    done = stockade.run(
        'ip route; curl -sS $OPENAI_BASE_URL/models; echo; curl -sS --noproxy "*" --max-time 3 http://192.0.2.1/'
    )
    lines = done.out.splitlines()
    assert len([line for line in lines if " dev " in line]) == 1
    assert json.loads(lines[1])["data"]
    assert done.code == 7, "refused at once: 28 is what curl says when its time is over"


def test_a_denied_call_names_the_scope_that_a_grant_then_gives(stockade: Instance) -> None:
    sleeper(stockade, "asker")
    denial = json.loads(inside(stockade, "asker", f"curl -sS http://{NAME}/x"))
    assert denial["status"] == 403
    assert denial["scope"] == f"http:GET:http://{NAME}/x"
    grant = stockade.json("grant", "asker", denial["scope"], "--reason", "test")
    assert grant["uses_left"] is None
    assert inside(stockade, "asker", FETCH) == "200"
    stockade.json("revoke", grant["grant_id"])
    assert inside(stockade, "asker", FETCH) == "403"
    verbs = [(entry["verb"], entry["verdict"], entry["actor"]) for entry in stockade.actions("asker")]
    assert ("grant.create", "done", "uid:0(root)") in verbs
    assert ("grant.revoke", "done", "uid:0(root)") in verbs
    assert [verdict for verb, verdict, _ in verbs if verb == "egress.request"] == ["denied", "allowed", "denied"]
    stockade.ctl("kill", "asker")


def test_grants_expire_unasked_and_uses_are_counted(stockade: Instance) -> None:
    sleeper(stockade, "counter")
    stockade.json("grant", "counter", SCOPE, "--max-uses", "2")
    assert [inside(stockade, "counter", FETCH) for _ in range(3)] == ["200", "200", "403"]
    grant = stockade.json("grant", "counter", SCOPE, "--ttl", "1s")
    stockade.wait(lambda: any(e["verb"] == "grant.expire" for e in stockade.actions("counter")))
    assert any(e["verb"] == "grant.expire" for e in stockade.actions("counter"))
    assert grant["grant_id"] not in {g["grant_id"] for g in stockade.json("grants", "counter")}
    assert inside(stockade, "counter", FETCH) == "403"
    stockade.ctl("kill", "counter")


def test_a_frozen_agent_makes_no_progress_until_it_is_thawed(stockade: Instance) -> None:
    stockade.launch("--name", "ticker", "--", "sh", "-c", "while :; do echo tick; sleep 0.05; done")

    def ticks() -> int:
        return stockade.ctl("logs", "ticker").out.count("tick")

    stockade.wait(lambda: ticks() > 2)
    assert stockade.ctl("freeze", "ticker").code == 0
    before = ticks()
    time.sleep(0.5)
    assert ticks() - before <= 1
    assert stockade.json("status", "ticker")[0]["state"] == "FROZEN"
    assert stockade.ctl("thaw", "ticker").code == 0
    stockade.wait(lambda: ticks() > before + 2)
    assert ticks() > before + 2
    stockade.ctl("kill", "ticker")


def test_a_kill_leaves_nothing_and_answers_the_same_again(stockade: Instance) -> None:
    agent_id = stockade.launch(
        "--name",
        "wild",
        "--",
        "sh",
        "-c",
        "trap '' TERM INT HUP; for i in $(seq 50); do setsid sleep 1000 & done; wait",
    )["agent_id"]
    stockade.wait(lambda: int(stockade.json("status", "wild")[0]["pids"] or 0) > 50)
    start = stockade.json("inspect", "wild")["posture"]["ids"]["start"]
    assert uids(int(start))
    receipts = stockade.json("kill", "wild", "--reason", "test")
    assert receipts[0]["verified_empty"] is True
    assert receipts[0]["processes_killed"] > 50
    assert {"receipt_id", "agent_id", "egress_cut_ms", "dead_ms"} <= receipts[0].keys()
    assert not uids(int(start))
    again = stockade.json("kill", agent_id)
    assert again[0]["receipt_id"] == receipts[0]["receipt_id"]
    assert stockade.json("status", agent_id)[0]["state"] == "KILLED"


def uids(start: int) -> list[str]:
    """Processes of the host whose uid is in an agent's range."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and start <= entry.stat().st_uid < start + 65536:
                found.append(entry.name)
        except FileNotFoundError:
            continue
    return found


@pytest.mark.parametrize(
    ("command", "code"),
    [(("true",), 0), (("sh", "-c", "exit 7"), 7), (("/nonexistent",), 127), (("/etc/passwd",), 126)],
)
def test_run_ends_with_the_agents_own_code(stockade: Instance, command: tuple[str, ...], code: int) -> None:
    assert stockade.ctl("run", "--", *command).code == code


def test_exit_codes_of_stockadectl(stockade: Instance) -> None:
    assert stockade.ctl("inspect", "nobody").code == 3
    assert stockade.ctl("kill", "nobody").code == 3
    assert stockade.ctl("no-such-verb").code == 2
    sleeper(stockade, "twice")
    assert stockade.ctl("launch", "--name", "twice", "--", "true").code == 5
    assert stockade.ctl("run", "--policy", "nosuch", "--", "true").code == 125
    stockade.ctl("kill", "twice")
    assert stockade.ctl("--socket", str(stockade.directory / "none.sock"), "status").code == 69


def test_a_workspace_is_written_as_its_owner_and_a_read_only_one_is_not(stockade: Instance) -> None:
    workspace = stockade.workspace(given__txt="seen\n")
    done = stockade.run("cat given.txt; echo made > made.txt; id -u", "--workspace", f"{workspace}:rw")
    assert done.out.split() == ["seen", "1000"]
    assert (workspace / "made.txt").stat().st_uid == OWNER
    denied = stockade.run("echo no > no.txt", "--workspace", f"{workspace}:ro")
    assert denied.code != 0
    assert not (workspace / "no.txt").exists()


def test_a_writable_workspace_of_roots_is_refused_and_nothing_is_left(stockade: Instance, tmp_path: Path) -> None:
    before = sorted(path.name for path in (stockade.run_dir / "agents").iterdir())
    done = stockade.run("true", "--workspace", f"{tmp_path}:rw")
    assert done.code == 125
    assert "owned by root" in done.err
    assert sorted(path.name for path in (stockade.run_dir / "agents").iterdir()) == before


def test_stdin_reaches_the_agent_and_a_terminal_is_one(stockade: Instance) -> None:
    assert stockade.ctl("run", "-i", "--", "cat", stdin="hello\n").out == "hello\n"
    assert "not a tty" in stockade.run("tty; true").out


def test_limits_hold(stockade: Instance) -> None:
    many = stockade.run("for i in $(seq 100); do sleep 5 & done 2>&1 | tail -1; true", "--pids", "30")
    assert many.code != 0 or "fork" in (many.out + many.err).lower()
    hog = stockade.ctl("run", "--memory", "64MiB", "--", "python3", "-c", "x = bytearray(500 << 20); print(len(x))")
    assert hog.code == 137
    assert stockade.ctl("run", "--", "python3", "-c", "x = bytearray(500 << 20); print(len(x))").code == 0


def test_the_client_library_does_the_same(stockade: Instance) -> None:
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        agent = client.launch(command=["sleep", "1000"], name="library", labels={"team": "x"})
        assert agent.state == "RUNNING"
        grant = agent.grant(SCOPE, ttl=600)
        assert inside(stockade, "library", FETCH) == "200"
        client.revoke(grant.grant_id)
        assert inside(stockade, "library", FETCH) == "403"
        agent.freeze()
        agent.thaw()
        receipt = agent.kill(reason="done")
        assert receipt.verified_empty
        assert agent.wait(10).state == "KILLED"


def test_agents_outlive_a_killed_daemon_confined_and_known(stockade: Instance) -> None:
    sleeper(stockade, "survivor")
    stockade.launch("--name", "ender", "--", "sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.1; done; exit 9")
    kept = stockade.json("grant", "survivor", SCOPE, "--ttl", "10m")["grant_id"]
    watcher = "while :; do curl -sS -m 5 -o /dev/null -w '%{http_code}\\n' $OPENAI_BASE_URL/models; sleep 0.2; done"
    stockade.launch("--name", "watcher", "--", "sh", "-c", watcher)
    stockade.wait(lambda: "200" in stockade.ctl("logs", "watcher").out)
    log = stockade.run_dir / "agents" / str(stockade.json("status", "watcher")[0]["agent_id"]) / "stdout.log"
    stockade.down(signal.SIGKILL)
    stockade.wait(lambda: "503" in log.read_text())
    assert "503" in log.read_text()
    stockade.up()
    states = {entry["name"]: entry["state"] for entry in stockade.json("status")}
    assert states["survivor"] == "RUNNING"
    assert kept in {grant["grant_id"] for grant in stockade.json("grants", "survivor")}
    assert inside(stockade, "survivor", FETCH) == "200"
    assert inside(stockade, "ender", "touch /tmp/go") == ""
    stockade.ctl("wait", "ender")
    assert stockade.json("status", "ender")[0]["exit_code"] == 9
    for name in ("survivor", "watcher"):
        assert stockade.json("kill", name)[0]["verified_empty"] is True
    assert stockade.json("log", "verify")["ok"] is True
    assert any(entry["verb"] == "daemon.recover" for entry in stockade.actions())


def test_z_a_hundred_launches_and_kills_leave_nothing(stockade: Instance) -> None:
    slots = Path("/run/stockade-slots")

    def census() -> dict[str, int]:
        fds = 0 if stockade.process is None else len(list(Path(f"/proc/{stockade.process.pid}/fd").iterdir()))
        agents = range(1879048192, 2147352575 + 1)
        ours = f"/stockade-{stockade.name}/"
        processes = [e for e in Path("/proc").iterdir() if e.name.isdigit() and uid_of(e) in agents]
        claims = sum(1 for claim in slots.glob("[0-9]*") if text(claim) == stockade.name)
        return {"slots": claims, "fds": fds, "processes": sum(ours in text(e / "cgroup") for e in processes)}

    # A process that holds the next id range for its first moments has ids of it; starters have those of the host.
    stockade.wait(lambda: census()["processes"] == 0)
    before = census()
    held = stockade.launch("--", "sleep", "100")["agent_id"]
    assert census()["slots"] == before["slots"] + 1, "the twin: a claim is seen"
    assert stockade.json("kill", str(held))[0]["verified_empty"] is True
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        for _ in range(100):
            assert client.launch(command=["sleep", "100"]).kill().verified_empty
    stockade.wait(lambda: census()["fds"] <= before["fds"] + 4 and census()["processes"] <= before["processes"])
    after = census()
    assert after["slots"] <= before["slots"]
    assert after["fds"] <= before["fds"] + 4  # the client's connection, a database page
    assert after["processes"] <= before["processes"]


def uid_of(entry: Path) -> int:
    try:
        return entry.stat().st_uid
    except FileNotFoundError:
        return 0


def test_zz_a_flipped_bit_is_found_and_named(stockade: Instance) -> None:
    assert stockade.ctl("log", "verify").code == 0
    segment = min((stockade.directory / "state" / "log").rglob("*.seg"))
    with segment.open("r+b") as file:
        file.seek(segment.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    done = stockade.ctl("log", "verify")
    assert done.code == 1
    assert "entry" in done.out + done.err


@pytest.mark.parametrize(
    ("text", "named"),
    [('instanse = "x"\n', "instance"), ("run_dir = 5\n", "run_dir"), ('[gateway]\nkind = "nosuch"\n', "kind")],
)
def test_a_wrong_configuration_is_named_by_line_and_key(tmp_path: Path, text: str, named: str) -> None:
    import subprocess  # noqa: PLC0415 - here alone

    from tests.support.instance import bin_dir  # noqa: PLC0415

    config = tmp_path / "stockade.toml"
    config.write_text(text)
    done = subprocess.run(
        [bin_dir() / "stockaded", "--config", config], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 2
    assert named in done.stderr
    assert "stockade.toml" in done.stderr
