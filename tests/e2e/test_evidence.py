"""Evidence and what remains: tampering is found and named, nothing is left on the host, a full disk stops no kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from stockade.client import Stockade

from tests.support.census import of_agent, settled
from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

LAUNCHES = 100


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


# --- tampering


def segments(stockade: Instance) -> list[Path]:
    return sorted((stockade.directory / "state" / "log").rglob("*.seg"))


def flip(path: Path, offset: int) -> None:
    """Flip one bit in place; the same again puts it back."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def test_a_flipped_bit_anywhere_is_found_and_its_entry_named(stockade: Instance) -> None:
    for code in (0, 1, 2):
        assert stockade.ctl("run", "--", "sh", "-c", f"exit {code}").code == code
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        good = client.verify_log()
        assert good.ok
        (segment,) = segments(stockade)
        size = segment.stat().st_size
        for part in range(40):
            offset = size * part // 40
            flip(segment, offset)
            found = client.verify_log()
            flip(segment, offset)
            assert not found.ok, f"a flipped bit at byte {offset} of {size} was not found"
            assert "entry" in found.problem or "header" in found.problem, found.problem
        assert client.verify_log() == good
    flip(segment, size // 2)
    try:
        done = stockade.ctl("log", "verify")
        assert done.code == 1
        assert "entry" in done.err
        assert segment.name in done.err or "entry" in done.err
        document = stockade.ctl("-o", "json", "log", "verify")
        assert (document.code, document.json()["ok"]) == (1, False)
        assert document.json()["problem"]
    finally:
        flip(segment, size // 2)
    assert stockade.ctl("log", "verify").code == 0


def test_what_was_cut_off_is_missed(stockade: Instance) -> None:
    """A daemon that comes back to a log without its last entries says so, and does nothing but kill."""
    assert stockade.ctl("run", "--", "true").code == 0
    stockade.down()
    (segment,) = segments(stockade)
    whole = segment.read_bytes()
    try:
        segment.write_bytes(whole[: len(whole) // 2])
        stockade.up()
        refused = stockade.ctl("launch", "--", "true")
        assert refused.code not in (0, 2)
        assert segment.name in refused.err
        assert "Traceback" not in refused.err + stockade.daemon_log()
        stockade.down()
    finally:
        segment.write_bytes(whole)
    stockade.up()
    assert stockade.ctl("log", "verify").code == 0


# --- nothing left


def test_a_hundred_launches_and_kills_leave_nothing(stockade: Instance) -> None:
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        assert client.launch(["sleep", "1000"]).kill().verified_empty
        before = settled(stockade)
        for number in range(LAUNCHES):
            command = ["sh", "-c", "trap '' TERM; setsid sleep 1000 & sleep 1000"] if number % 2 else ["sleep", "1000"]
            agent = client.launch(command)
            if number % 5 == 0:
                client.grant(agent.agent_id, "llm:x", ttl=600)
                agent.exec(["true"])
            receipt = agent.kill()
            assert receipt.verified_empty
            assert receipt.processes_killed >= 2
        assert settled(stockade) == before
        assert client.agents() == []
    assert stockade.json("log", "verify")["ok"] is True


def test_agents_that_end_by_themselves_leave_nothing_either(stockade: Instance) -> None:
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        client.launch(["true"]).wait(20)
        before = settled(stockade)
        agents = [client.launch(["sh", "-c", f"sleep 0.0{n % 10}; exit {n}"]) for n in range(30)]
        assert [agent.wait(30).exit_code for agent in agents] == list(range(30))
        assert settled(stockade) == before


# --- two instances


def test_two_instances_share_a_host_and_nothing_else(stockade: Instance) -> None:
    with Instance.start() as second:
        ours = stockade.launch("--name", "same", "--", "sleep", "1000")
        theirs = second.launch("--name", "same", "--", "sleep", "1000")
        ranges = {agent["posture"]["ids"]["start"] for agent in (ours, theirs)}
        assert len(ranges) == 2, "two agents have one range of ids"
        assert [entry["agent_id"] for entry in stockade.json("status", "--live")] == [ours["agent_id"]]
        assert [entry["agent_id"] for entry in second.json("status", "--live")] == [theirs["agent_id"]]
        for one, other in ((stockade, theirs), (second, ours)):
            assert one.ctl("kill", other["agent_id"]).code == 3
            models = "curl -sS -m 5 -o /dev/null -w '%{http_code}' $OPENAI_BASE_URL/models"
            assert one.ctl("exec", "same", "--", "sh", "-c", models).out == "200"
        # A daemon that starts anew clears away what is its own and leaves the other's alone.
        second.down(signal.SIGKILL)
        assert stockade.json("kill", "--all")[0]["agent_id"] == ours["agent_id"]
        assert of_agent(theirs)
        stockade.down(signal.SIGKILL)
        stockade.up()
        assert of_agent(theirs)
        second.up()
        assert second.json("status", "same")[0]["state"] == "RUNNING"
        assert second.json("kill", "--all")[0]["verified_empty"] is True
        assert of_agent(theirs) == []
    assert stockade.ctl("run", "--", "true").code == 0


# --- a full disk

FULL = """
import json, os, signal, subprocess
from pathlib import Path
from tests.support.instance import Instance, bin_dir
from tests.support.census import of_agent

found = {}
with Instance.start(state_dir=SMALL) as stockade:
    stockade.launch("--wait", "--", "true")
    agent = stockade.launch("--name", "doomed", "--", "sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000")
    brief = stockade.launch("--name", "brief", "--", "sleep", "1000")
    asker = stockade.launch("--name", "asker", "--", "sleep", "1000")
    models = "curl -sS -m 10 -o /dev/null -w '%{http_code}' $OPENAI_BASE_URL/models"
    found["before"] = stockade.ctl("exec", "asker", "--", "sh", "-c", models).out
    filler = Path(SMALL) / "filler"
    with filler.open("wb") as file:
        try:
            while True: file.write(b"x" * 65536); file.flush()
        except OSError as error: found["errno"] = error.errno
    launches = [stockade.ctl("launch", "--", "true") for _ in range(8)]
    found["launch"] = launches[-1].code
    found["said"] = launches[-1].err
    found["grant"] = stockade.ctl("grant", "asker", "llm:x").code
    found["exec"] = stockade.ctl("exec", "asker", "--", "true").code
    found["alive"] = len(of_agent(agent))
    killed = stockade.ctl("-o", "json", "kill", "doomed", "--reason", "full")
    found["kill"] = [killed.code, killed.json()]
    found["left"] = len(of_agent(agent))
    found["status"] = stockade.json("status", "doomed")[0]["state"]
    for pid in of_agent(brief):
        os.kill(pid, signal.SIGTERM)
    owed = Path(stockade.run_dir) / "private" / "owed"
    stockade.wait(lambda: owed.exists() and "agent.exit" in owed.read_text(), 3)
    stockade.json("kill", brief["agent_id"], "--reason", "to be sure")
    # And what is not recorded yet outlives the daemon.
    stockade.down(signal.SIGKILL)
    stockade.up()
    stockade.ctl("kill", "asker", "--reason", "full too")
    stockade.down(signal.SIGKILL)
    filler.unlink()
    # The next one dies when it has recorded all of that and is about to forget that it is owed.
    dying = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(owed), "-e", "trace=unlink,unlinkat"]
    dying += ["-e", "inject=unlink,unlinkat:signal=SIGKILL", bin_dir() / "stockaded", "--config", stockade.config]
    found["died"] = subprocess.run(dying, stderr=subprocess.DEVNULL, timeout=40).returncode
    found["owed"] = len(owed.read_text().splitlines())
    stockade.up()
    for _ in range(100):
        after = stockade.ctl("run", "--", "true")
        if after.code == 0: break
    found["after"] = after.code
    stockade.wait(lambda: not owed.exists())
    found["ends"] = [
        [e["verb"], e["agent_id"], e["verdict"], e["reason"], "happened_at" in e["details"]]
        for verb in ("agent.kill", "agent.exit")
        for e in stockade.actions("--verb", verb)
    ]
    found["states"] = {one["name"]: one["state"] for one in stockade.json("status")}
    found["ids"] = [one["agent_id"] for one in (agent, asker, brief)]
    found["verify"] = stockade.json("log", "verify")
    found["log"] = stockade.daemon_log()[-3000:]
print(json.dumps(found))
"""


@pytest.mark.timeout(300)
def test_a_full_disk_stops_everything_but_a_kill(tmp_path: Path) -> None:
    """The state directory is a small tmpfs in a mount namespace of this test's own."""
    small = tmp_path / "small"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=3m,mode=0755 sktest {small} && cd {Path(__file__).parents[2]} &&"
        f' exec {sys.executable} -c "$CODE"'
    )
    code = f"SMALL = {str(small)!r}\n{FULL}"
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
        env={**os.environ, "CODE": code}, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] == "200"
    assert found["errno"] == 28
    # Nothing that would have to be recorded is done …
    assert found["launch"] not in (0, 2), found
    assert "action log" in found["said"]
    assert "make space" in found["said"]
    assert found["grant"] not in (0, 2)
    assert found["exec"] not in (0, 2)
    # … and a kill is.
    assert found["alive"] >= 3
    code_of_kill, receipts = found["kill"]
    assert code_of_kill == 0
    assert receipts[0]["verified_empty"] is True
    assert (found["left"], found["status"]) == (0, "KILLED")
    # With room again, everything goes on, and the log is whole.
    assert found["after"] == 0, found["log"]
    assert found["verify"]["ok"] is True
    # What happened all the same is there too, though the daemon was killed meanwhile, and says when it was: unless the
    # database let go of a page just then, which the log took.
    doomed, asker, brief = found["ids"]
    ends = [entry for entry in found["ends"] if entry[1] in found["ids"]]
    assert [entry[:4] for entry in ends] == [
        ["agent.kill", doomed, "done", "full"],
        ["agent.kill", brief, "done", "to be sure"],
        ["agent.kill", asker, "done", "full too"],
        ["agent.exit", brief, "done", ""],
    ], found["log"]
    assert ends[2][4], "by a daemon that had no log"
    assert (found["died"], found["owed"] >= 1) == (-signal.SIGKILL, True)
    # Each once, and the state with it, which the database had no room for.
    assert [found["states"][name] for name in ("doomed", "asker", "brief")] == ["KILLED", "KILLED", "EXITED"]
    assert not any(small.iterdir()), "the mount was seen outside"
