"""A daemon that cannot record: it starts all the same, kills, refuses all else and says why, and goes on by itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from supervisord.actions import segments
from tests.support.census import of_agent
from tests.support.instance import Instance, bin_dir

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

FULL = """
import json, signal
from pathlib import Path
from tests.support.instance import Instance
from tests.support.census import of_agent

found = {}
with Instance.start(state_dir=SMALL) as stockade:
    doomed = stockade.launch("--name", "doomed", "--", "sleep", "1000")
    spared = stockade.launch("--name", "spared", "--", "sleep", "1000")
    models = "curl -sS -m 10 -o /dev/null -w '%{http_code}' $OPENAI_BASE_URL/models"
    def reaches(): return stockade.ctl("exec", "spared", "--", "sh", "-c", models).out
    found["reaches"] = reaches()
    (grant,) = stockade.json("grants", "spared")
    filler = Path(SMALL) / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 64):
            try:
                while True: file.write(b"x" * size)
            except OSError as error: found["errno"] = error.errno
    # In force at once, and said: nothing of it is on the disk.
    found["revoked"] = stockade.json("revoke", grant["grant_id"])
    found["grants"] = stockade.json("grants", "spared")
    stockade.down(signal.SIGKILL)
    stockade.up()
    found["status"] = {agent["name"]: agent["state"] for agent in stockade.json("status")}
    found["alive"] = len(of_agent(doomed))
    killed = stockade.ctl("-o", "json", "kill", "doomed", "--reason", "full")
    found["kill"] = [killed.code, killed.json()]
    found["left"] = len(of_agent(doomed))
    found["refused"] = {
        name: [done.code, done.err]
        for name, done in {
            "launch": stockade.ctl("launch", "--", "true"),
            "grant": stockade.ctl("grant", "spared", "llm:x"),
            "exec": stockade.ctl("exec", "spared", "--", "true"),
            "actions": stockade.ctl("actions"),
            "freeze": stockade.ctl("freeze", "spared"),
        }.items()
    }
    filler.unlink()
    stockade.wait(lambda: stockade.ctl("run", "--", "true").code == 0, 20)
    found["after"] = stockade.ctl("run", "--", "true").code
    found["grants_after"] = stockade.json("grants", "spared")
    found["reaches_after"] = reaches()
    stockade.wait(lambda: stockade.actions("--verb", "grant.revoke"))
    found["entries"] = [[e["verb"], e["agent_id"]] for e in stockade.actions("--verb", "agent.kill")]
    found["entries"] += [[e["verb"], e["agent_id"]] for e in stockade.actions("--verb", "grant.revoke")]
    found["verify"] = stockade.json("log", "verify")["ok"]
    found["ids"] = [doomed["agent_id"], spared["agent_id"]]
    stockade.down(signal.SIGKILL)
    stockade.up()
    found["grants_at_last"] = stockade.json("grants", "spared")
    found["spared"] = len(of_agent(spared))
    found["log"] = stockade.daemon_log()[-3000:]
print(json.dumps(found))
"""


def test_a_daemon_that_starts_on_a_full_disk_kills_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """The state directory is a small tmpfs in a mount namespace of this test's own."""
    small = tmp_path / "small"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=3m,mode=0755 sktest {small} && cd {Path(__file__).parents[2]} &&"
        f' exec {sys.executable} -c "$CODE"'
    )
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
        env={**os.environ, "CODE": f"SMALL = {str(small)!r}\n{FULL}"},
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["reaches"], found["errno"]) == ("200", 28)
    assert found["revoked"]["state"] == "REVOKED"
    assert "state database and action log" in found["revoked"]["warning"]
    assert found["grants"] == []
    # Killed, as ever.
    assert found["status"] == {"doomed": "RUNNING", "spared": "RUNNING"}
    code, (receipt,) = found["kill"]
    assert (found["alive"] >= 1, code, receipt["verified_empty"], found["left"]) == (True, 0, True, 0)
    # Refused, and why.
    for name, (code, said) in found["refused"].items():
        assert code != 0, name
        assert "can only kill now" in said, name
        assert "make room" in said, name
    # And then as if nothing had been: recorded is what was done, and what was taken back stays so.
    assert found["after"] == 0, found["log"]
    doomed, spared = found["ids"]
    assert found["entries"] == [["agent.kill", doomed], ["grant.revoke", spared]], found["log"]
    assert (found["grants_after"], found["grants_at_last"], found["reaches_after"]) == ([], [], "403")
    assert found["verify"] is True
    assert found["spared"] >= 1
    assert not any(small.iterdir()), "the mount was seen outside"


def test_a_log_whose_tail_was_cut_off_is_found_and_an_agent_without_a_launch_is_said() -> None:
    with Instance.start() as stockade:
        agent = stockade.launch("--name", "unseen", "--", "sleep", "1000")
        stockade.json("grant", "unseen", "llm:x")
        stockade.down(signal.SIGKILL)
        log = Path(stockade.directory) / "state" / "log"
        (segment,) = (log / "segments").iterdir()
        data = segment.read_bytes()
        header = segments.parse_header(data).length
        first = next(segments.frames(data, header))  # the checkpoint that every segment begins with
        segment.write_bytes(data[: header + segments.FRAME_HEADER_BYTES + len(first.payload)])
        stockade.up()
        refused = stockade.ctl("launch", "--", "true")
        assert refused.code != 0
        assert f"{segment.name} at offset" in refused.err
        assert "are gone: a signed checkpoint covers them" in refused.err
        assert "move it away to begin a new log" in refused.err
        # The operator keeps it as evidence and begins a new log: the daemon says whom it found.
        shutil.move(log, log.with_name("evidence"))
        stockade.wait(lambda: stockade.ctl("actions").code == 0, 20)
        (entry,) = stockade.actions("--verb", "agent.adopt")
        assert entry["agent_id"] == agent["agent_id"]
        assert "not in the action log" in entry["reason"]
        assert of_agent(agent)
        # The twin: whose launch is in the log is taken up without a word.
        other = stockade.launch("--name", "seen", "--", "sleep", "1000")
        stockade.down(signal.SIGKILL)
        stockade.up()
        found = [each["agent_id"] for each in stockade.actions("--verb", "agent.adopt")]
        assert other["agent_id"] not in found
        assert stockade.json("log", "verify")["ok"] is True


def test_a_daemon_whose_log_is_damaged_kills_and_says_where(tmp_path: Path) -> None:
    with Instance.start() as stockade:
        doomed = stockade.launch("--name", "doomed", "--", "sleep", "1000")
        spared = stockade.launch("--name", "spared", "--", "sleep", "1000")
        stockade.json("log", "checkpoint")
        stockade.down(signal.SIGKILL)
        log = Path(stockade.directory) / "state" / "log"
        (segment,) = (log / "segments").iterdir()
        data = segment.read_bytes()
        entries = (
            f for f in segments.frames(data, segments.parse_header(data).length) if f.kind is segments.Kind.ENTRY
        )
        seq, frame = next(each for each in enumerate(entries, start=1) if b"agent.launch" in each[1].payload)
        at = frame.offset + segments.FRAME_HEADER_BYTES + 20
        segment.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        stockade.up()
        # Listed and killed, as ever; all else is refused with the place.
        assert {agent["name"]: agent["state"] for agent in stockade.json("status")} == {
            "doomed": "RUNNING", "spared": "RUNNING",
        }  # fmt: skip
        for deed in (
            ("launch", "--", "true"),
            ("grant", "spared", "llm:x"),
            ("exec", "spared", "--", "true"),
            ("actions",),
        ):
            refused = stockade.ctl(*deed)
            assert refused.code != 0, deed
            assert f"{segment.name} at offset {frame.offset}: entry {seq} is damaged" in refused.err, deed
            assert "keep the directory as evidence" in refused.err, deed
        (receipt,) = stockade.json("kill", "doomed")
        assert (receipt["verified_empty"], of_agent(doomed)) == (True, [])
        assert of_agent(spared)
        damaged = segment.read_bytes()
        public = log.parent / "keys" / "log.key.pub"
        found = stockade.ctl("-o", "json", "log", "verify", str(log), "--public-key", str(public))
        assert (found.code, f"entry {seq}" in found.json()["problem"]) == (1, True)
        shutil.move(log, tmp_path / "evidence")
        stockade.wait(lambda: stockade.ctl("actions").code == 0, 20)
        assert [e["agent_id"] for e in stockade.actions("--verb", "agent.kill")] == [doomed["agent_id"]]
        assert [e["agent_id"] for e in stockade.actions("--verb", "agent.adopt")] == [spared["agent_id"]]
        assert stockade.ctl("run", "--", "true").code == 0
        assert stockade.json("log", "verify")["ok"] is True
        assert (tmp_path / "evidence" / "segments" / segment.name).read_bytes() == damaged
        # A second daemon is no reason to kill only: the first one has the log.
        second = subprocess.run(
            [bin_dir() / "stockaded", "--config", stockade.config],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert second.returncode == 1
        assert "another stockaded works in it" in second.stderr


def test_a_daemon_in_kill_only_mode_ends_in_order() -> None:
    with Instance.start() as stockade:
        agent = stockade.launch("--name", "left", "--", "sleep", "1000")
        stockade.down(signal.SIGKILL)
        database = Path(stockade.directory) / "state" / "state.db"
        database.rename(database.with_name("kept.db"))
        database.mkdir()
        stockade.up()
        refused = stockade.ctl("actions")
        assert refused.code != 0
        assert "can only kill now, since cannot open the state database" in refused.err
        stockade.down(signal.SIGTERM)
        assert of_agent(agent)
        database.rmdir()
        database.with_name("kept.db").rename(database)
        stockade.up()
        assert stockade.actions("left", "--verb", "agent.launch")
        assert stockade.json("kill", "left")[0]["verified_empty"] is True
