"""Grants of files to agents that run, by command line: they appear, vanish, expire, and outlive no crash unnoticed."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from stockade.client import Stockade

from tests.support.census import launcher_pid, link, of_agent, settled, text
from tests.support.instance import OWNER, Instance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

BLINK_SECONDS = 0.050
ROUNDS = 20
CEILING = """kind: Policy
name: walled
extends: default
grants: {ceiling: ["llm:*", "fs:ro:/srv/none"]}
"""
# It enters what it was granted, stays there, and tells what it can see from there and by its path.
WATCHER = (
    "import os, sys, time\n"
    "path, held = sys.argv[1], None\n"
    "def tries(act):\n"
    "    try: return act()\n"
    "    except OSError as e: return type(e).__name__\n"
    "while True:\n"
    "    by_path = tries(lambda: open(path + '/note').read())\n"
    "    if held is None and by_path == 'one': held = os.open(path, os.O_PATH); os.chdir(path)\n"
    "    by_held = None if held is None else tries(lambda: os.open('note', os.O_RDONLY, dir_fd=held) and 'opened')\n"
    "    by_cwd = None if held is None else tries(lambda: os.mkdir('made') or 'made')\n"
    "    print(by_path, by_held, by_cwd, flush=True)\n"
    "    time.sleep(0.02)\n"
)


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start(policies={"walled.yaml": CEILING}) as instance:
        yield instance


@pytest.fixture(autouse=True)
def nobody_left(stockade: Instance) -> Iterator[None]:
    yield
    if stockade.process is None:
        stockade.up()
    stockade.ctl("kill", "--all")


@pytest.fixture
def data() -> Iterator[Path]:
    """A directory of somebody who is not root, where the sandbox has nothing of its own."""
    with tempfile.TemporaryDirectory(prefix="sktest-", dir="/srv") as name:
        path = Path(name)
        (path / "note").write_text("one")
        for each in (path, path / "note"):
            os.chown(each, OWNER, OWNER)
        path.chmod(0o750)
        yield path


def read(stockade: Instance, agent: str, path: Path | str) -> str:
    return stockade.ctl("exec", agent, "--", "cat", str(path)).out


def entries(stockade: Instance, agent: str, verb: str) -> list[Any]:
    return [entry for entry in stockade.actions(agent) if entry["verb"] == verb]


def watcher(stockade: Instance, path: Path) -> dict[str, Any]:
    return stockade.launch("--name", "watcher", "--", "python3", "-c", WATCHER, str(path))


def last_line(stockade: Instance, agent: dict[str, Any]) -> str:
    text = (stockade.run_dir / "agents" / agent["agent_id"] / "stdout.log").read_text()
    return text.splitlines()[-1] if "\n" in text else ""


def tidy(data: Path) -> None:
    """Remove what the watcher made while it could, so that making it again would work if it might."""
    (data / "made").rmdir()


def test_it_appears_in_a_running_agent_and_vanishes(stockade: Instance, data: Path) -> None:
    stockade.launch("--name", "reader", "--", "sleep", "1000")
    assert read(stockade, "reader", data / "note") == ""
    grant = stockade.json("grant", "reader", f"fs:ro:{data}", "--reason", "to look")
    assert grant["scope"] == f"fs:ro:{data}"
    assert read(stockade, "reader", data / "note") == "one"
    assert stockade.ctl("exec", "reader", "--", "touch", str(data / "note")).code != 0
    assert grant["grant_id"] in {entry["grant_id"] for entry in stockade.json("grants", "reader")}
    (shown,) = stockade.json("inspect", "reader")["posture"]["live_files"]
    assert (shown["source"], shown["target"], shown["mode"]) == (str(data), str(data), "ro")
    assert (shown["owner_uid"], shown["grant_id"]) == (OWNER, grant["grant_id"])

    revoked = stockade.json("revoke", grant["grant_id"])
    assert revoked["state"] == "REVOKED"
    assert stockade.ctl("exec", "reader", "--", "ls", "-d", str(data)).code != 0
    assert "live_files" not in stockade.json("inspect", "reader")["posture"]
    assert stockade.json("revoke", grant["grant_id"])["state"] == "REVOKED", "again is the same answer"
    (created,) = [e for e in entries(stockade, "reader", "grant.create") if e["verdict"] == "done"]
    details = created["details"]
    assert (details["source"], details["target"], details["mode"]) == (str(data), str(data), "ro")
    assert (details["owner_uid"], details["owner_gid"]) == (OWNER, OWNER)
    assert entries(stockade, "reader", "grant.revoke")[0]["details"]["target"] == str(data)


def test_a_writable_grant_and_a_place_of_choice(stockade: Instance, data: Path) -> None:
    agent = stockade.launch("--name", "writer", "--", "sh", "-c", f"while sleep 0.02; do date >> {data}/log; done")
    stockade.json("grant", "writer", f"fs:rw:{data}")
    stockade.wait((data / "log").exists)
    assert (data / "log").stat().st_uid == OWNER
    grant = stockade.json("grant", "writer", f"fs:ro:{data / 'note'}=/in/agent")
    assert read(stockade, "writer", "/in/agent") == "one"
    stockade.json("revoke", grant["grant_id"])
    assert read(stockade, "writer", "/in/agent") == ""
    assert read(stockade, "writer", data / "note") == "one", "the other one stays"
    assert of_agent(agent)


@pytest.mark.parametrize(
    ("host", "inside"), [("/etc/hostname", "/grants/etc/hostname"), ("/usr/share/doc", "/grants/usr/share/doc")]
)
def test_what_would_cover_the_sandbox_goes_below_grants(stockade: Instance, host: str, inside: str) -> None:
    stockade.launch("--name", "covered", "--", "sleep", "1000")
    assert stockade.json("grant", "covered", f"fs:ro:{host}")["scope"] == f"fs:ro:{host}={inside}"
    assert stockade.ctl("exec", "covered", "--", "test", "-e", inside).code == 0


def test_it_expires_unasked_also_for_who_stands_in_it(stockade: Instance, data: Path) -> None:
    agent = watcher(stockade, data)
    stockade.json("grant", "watcher", f"fs:rw:{data}", "--ttl", "3s")
    stockade.wait(lambda: "one opened" in last_line(stockade, agent))
    assert "one opened" in last_line(stockade, agent)
    stockade.wait(lambda: last_line(stockade, agent).startswith("FileNotFoundError"))
    tidy(data)
    gone = "FileNotFoundError PermissionError OSError"
    stockade.wait(lambda: last_line(stockade, agent) == gone)
    assert last_line(stockade, agent) == gone
    assert not (data / "made").exists()
    assert stockade.json("status", "watcher")[0]["state"] == "RUNNING"
    stockade.wait(lambda: entries(stockade, "watcher", "grant.expire"))
    (expired,) = entries(stockade, "watcher", "grant.expire")
    assert (expired["verdict"], expired["details"]["target"]) == ("done", str(data))


def test_a_daemon_that_starts_again_keeps_what_holds_and_takes_what_expired(stockade: Instance, data: Path) -> None:
    agent = watcher(stockade, data)
    stockade.launch("--name", "other", "--", "sleep", "1000")
    kept = stockade.json("grant", "other", f"fs:ro:{data}")
    stockade.json("grant", "watcher", f"fs:ro:{data}", "--ttl", "5s")
    stockade.wait(lambda: "one opened" in last_line(stockade, agent))
    stockade.down(signal.SIGKILL)
    time.sleep(5)
    assert "one opened" in last_line(stockade, agent), "nobody was there to take it"
    stockade.up()
    gone = "FileNotFoundError PermissionError"
    stockade.wait(lambda: last_line(stockade, agent).startswith(gone))
    assert last_line(stockade, agent).startswith(gone)
    assert stockade.json("grants", "watcher") == [
        g for g in stockade.json("grants", "watcher") if "fs:" not in g["scope"]
    ]
    assert read(stockade, "other", data / "note") == "one"
    assert len(stockade.json("inspect", "other")["posture"]["live_files"]) == 1
    stockade.json("revoke", kept["grant_id"])
    assert read(stockade, "other", data / "note") == ""


def test_a_launcher_that_dies_forgets_nothing(stockade: Instance, data: Path) -> None:
    agent = watcher(stockade, data)
    stockade.launch("--name", "past", "--", "sh", "-c", f"while [ ! -e {data}/note ]; do sleep 0.02; done; cd {data}; "
                    "while sleep 0.05; do cat note; done")  # fmt: skip
    past = stockade.json("grant", "past", f"fs:ro:{data}")
    out = stockade.run_dir / "agents" / stockade.json("inspect", "past")["agent_id"]
    stockade.wait(lambda: "one" in (out / "stdout.log").read_text())
    stockade.json("revoke", past["grant_id"])
    grant = stockade.json("grant", "watcher", f"fs:rw:{data}")
    stockade.wait(lambda: "one opened" in last_line(stockade, agent))
    first = launcher_pid(stockade)
    os.kill(first, signal.SIGKILL)
    for pid in stockade.processes():
        if "denier.py" in text(Path(f"/proc/{pid}/cmdline")):
            os.kill(pid, signal.SIGKILL)  # the guard as well: the daemon keeps what it served
    stockade.wait(lambda: launcher_pid(stockade) not in (0, first))
    assert stockade.json("revoke", grant["grant_id"])["state"] == "REVOKED"
    gone = "FileNotFoundError PermissionError"
    stockade.wait(lambda: last_line(stockade, agent).startswith(gone))
    assert last_line(stockade, agent).startswith(gone)
    for _ in range(2):  # what it had printed before has come when the first of these has
        length = len((out / "stdout.log").read_text())
        denied = (out / "stderr.log").read_text().count("not permitted")
        stockade.wait(lambda denied=denied: (out / "stderr.log").read_text().count("not permitted") > denied + 3)  # type: ignore[misc]
    assert len((out / "stdout.log").read_text()) == length, "what was taken before the crash stays denied"


def test_whoever_cannot_be_parted_from_it_is_frozen(stockade: Instance, data: Path) -> None:
    """A descriptor that writes, in flight in the agent's own socket: the grant is not called revoked."""
    hide = (
        "import os, socket, sys, time\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "a, b = socket.socketpair(); f = os.open(sys.argv[1] + '/log', os.O_CREAT | os.O_WRONLY)\n"
        "socket.send_fds(a, [b'.'], [f]); os.close(f); print('hidden', flush=True); time.sleep(1000)\n"
    )
    agent = stockade.launch("--name", "hider", "--", "python3", "-c", hide, str(data))
    grant = stockade.json("grant", "hider", f"fs:rw:{data}")
    stockade.wait(lambda: last_line(stockade, agent) == "hidden")
    assert last_line(stockade, agent) == "hidden"
    done = stockade.ctl("revoke", grant["grant_id"])
    assert done.code == 1
    assert "stays open for writing" in done.err
    assert "hider is FROZEN" in done.err
    assert stockade.json("status", "hider")[0]["state"] == "FROZEN"
    assert grant["grant_id"] in {entry["grant_id"] for entry in stockade.json("grants", "hider")}
    assert entries(stockade, "hider", "grant.revoke")[0]["verdict"] == "failed"
    assert stockade.ctl("thaw", "hider").code == 5
    assert stockade.json("kill", "hider")[0]["verified_empty"] is True


def test_a_frozen_agent_gets_and_loses_files(stockade: Instance, data: Path) -> None:
    agent = watcher(stockade, data)
    stockade.json("freeze", "watcher")
    grant = stockade.json("grant", "watcher", f"fs:ro:{data}")
    stockade.json("thaw", "watcher")
    stockade.wait(lambda: "one opened" in last_line(stockade, agent))
    stockade.json("freeze", "watcher")
    stockade.json("revoke", grant["grant_id"])
    assert stockade.json("status", "watcher")[0]["state"] == "FROZEN"
    stockade.json("thaw", "watcher")
    stockade.wait(lambda: last_line(stockade, agent).startswith("FileNotFoundError PermissionError"))
    assert last_line(stockade, agent).startswith("FileNotFoundError PermissionError")


def test_a_scope_of_the_launch_can_be_taken_back_too(stockade: Instance, data: Path) -> None:
    agent = stockade.launch("--name", "w2", "--scope", f"fs:rw:{data}", "--", "python3", "-c", WATCHER, str(data))
    stockade.wait(lambda: "one opened" in last_line(stockade, agent))
    (grant,) = [g for g in stockade.json("grants", "w2") if g["scope"].startswith("fs:")]
    stockade.json("revoke", grant["grant_id"])
    tidy(data)
    stockade.wait(lambda: last_line(stockade, agent) == "FileNotFoundError PermissionError OSError")
    assert last_line(stockade, agent) == "FileNotFoundError PermissionError OSError"


def test_what_is_refused_leaves_no_grant(stockade: Instance, data: Path) -> None:
    stockade.launch("--name", "strict", "--", "sleep", "1000")
    stockade.launch("--name", "walled", "--policy", "walled", "--", "sleep", "1000")
    (data / "link").symlink_to("/etc")
    os.mkfifo(data / "fifo")
    (data / "root").mkdir()
    before = stockade.json("grants")
    for agent, scope, code, word in (
        ("strict", f"fs:ro:{data}/link", 2, "is a symbolic link"),
        ("strict", f"fs:ro:{data}/link/passwd", 2, "is a symbolic link"),
        ("strict", f"fs:ro:{data}/fifo", 2, "neither a directory nor a regular file"),
        ("strict", "fs:ro:/dev/null", 2, "neither a directory nor a regular file"),
        ("strict", f"fs:ro:{data}/none", 3, "No such file"),
        ("strict", f"fs:rw:{data}/root", 4, "owned by root"),
        ("strict", f"fs:ro:{data}=/etc/x", 2, "would cover a part of the sandbox"),
        ("strict", f"fs:ro:{data}=/workspace/x", 2, "belongs to the agent"),
        ("strict", f"fs:ro:{data}=/home", 2, "would cover a part of the sandbox"),
        ("walled", f"fs:ro:{data}", 4, "ceiling"),
    ):
        done = stockade.ctl("grant", agent, scope)
        assert (done.code, word in done.err) == (code, True), (scope, done)
    done = stockade.ctl("grant", "strict", f"fs:ro:{data}", "--max-uses", "3")
    assert (done.code, "is not counted" in done.err) == (2, True)
    assert stockade.json("grants") == before
    assert stockade.json("log", "verify")["ok"] is True


def test_a_retry_finds_the_grant_that_is_there(stockade: Instance, data: Path) -> None:
    stockade.launch("--name", "again", "--", "sleep", "1000")
    wish = "gr_" + "a" * 26
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        first = client.grant("again", f"fs:ro:{data}", grant_id=wish)
        second = client.grant("again", f"fs:ro:{data}", grant_id=wish)
        assert first.grant_id == second.grant_id == wish
        with pytest.raises(Exception, match="is bound already"):
            client.grant("again", f"fs:ro:{data}")
        client.revoke(wish, "")
    assert read(stockade, "again", data / "note") == ""


def test_it_is_there_and_gone_within_a_blink(stockade: Instance, data: Path) -> None:
    """From the order until the agent has it, or has it no more, as its own root shows."""
    agent = stockade.launch("--name", "quick", "--", "sleep", "1000")
    ours = link(Path("/proc/self/ns/mnt"))
    # Not the process that holds its user namespace: that one is in the host's mount namespace.
    inside = next(pid for pid in of_agent(agent) if link(Path(f"/proc/{pid}/ns/mnt")) != ours)
    seen = Path(f"/proc/{inside}/root{data}/note")
    appeared, vanished = [], []
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client, ThreadPoolExecutor(1) as eyes:
        for _ in range(ROUNDS):
            began, there = time.monotonic(), eyes.submit(when, seen.exists)
            grant = client.grant("quick", f"fs:ro:{data}")
            appeared.append(there.result() - began)
            began, gone = time.monotonic(), eyes.submit(when, lambda: not seen.exists())
            client.revoke(grant.grant_id, "")
            vanished.append(gone.result() - began)
    # The best counts: what else the machine does is not what is measured.
    assert min(appeared) < BLINK_SECONDS
    assert min(vanished) < BLINK_SECONDS


def when(condition: Callable[[], bool]) -> float:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.0005)
    return time.monotonic()


def test_nothing_is_left_when_agents_with_files_end(stockade: Instance, data: Path) -> None:
    stockade.launch("--name", "first", "--", "sleep", "1000")
    stockade.json("revoke", stockade.json("grant", "first", f"fs:ro:{data}")["grant_id"])
    stockade.ctl("kill", "--all")
    before = settled(stockade)  # the guard is there from now on
    for _ in range(3):
        stockade.launch("--name", "ends", "--", "sleep", "1000")
        stockade.json("grant", "ends", f"fs:rw:{data}")
        stockade.json("grant", "ends", f"fs:ro:{data}=/in/agent")
        stockade.json("kill", "ends")
    after = settled(stockade)
    for each in ("processes", "cgroups", "launcher_fds", "daemon_fds"):
        assert getattr(after, each) == getattr(before, each), each
    assert str(data) not in Path("/proc/self/mountinfo").read_text()
    assert stockade.json("grants") == []
