"""The action log of a running daemon, from the command line: status, sinks, proofs, a new key, retired segments."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.support.instance import Instance

if TYPE_CHECKING:
    from pathlib import Path


def lines(path: Path) -> list[int]:
    return [json.loads(line)["seq"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_log_is_shown_proven_handed_over_and_copied(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    extra = (
        f'[[log.sinks]]\nname = "file"\nkind = "jsonl"\npath = "{out}"\n'
        f'[[log.sinks]]\nname = "gone"\nkind = "syslog"\naddress = "unix:{tmp_path}/nobody"\n'
    )
    with Instance.start(extra) as stockade:
        state = stockade.directory / "state"
        first = (state / "keys" / "log.key.pub").read_text()
        assert stockade.ctl("run", "--", "true").code == 0
        kept = tmp_path / "kept"
        kept.write_text(stockade.ctl("log", "checkpoint").out)
        status = stockade.json("log", "status")
        assert (status["first_seq"], status["public_key"]) == (1, first.strip())
        stockade.wait(lambda: len(lines(out)) >= stockade.json("log", "status")["size"] - 1, 20)
        gone = {sink["name"]: sink for sink in stockade.json("log", "status")["sinks"]}["gone"]
        assert gone["delivered_seq"] == 0
        stockade.wait(lambda: stockade.actions("--verb", "log.sink") != [], 30)
        doctor = json.loads(stockade.ctl("-o", "json", "doctor").out)["findings"]
        sinks = {item["control"]: item for item in doctor if item["control"].startswith("log sink")}
        assert (sinks["log sink file"]["present"], sinks["log sink gone"]["present"]) == (True, False)
        # A new key: the old one signs it, and who has the first verifies on.
        rotated = stockade.json("log", "rotate-key", "--reason", "yearly")
        assert rotated["public_key"] not in first
        assert stockade.json("log", "verify")["ok"] is True
        assert stockade.ctl("run", "--", "true").code == 0
        proof = tmp_path / "proof"
        proof.write_text(stockade.ctl("log", "prove", "1").out)
        size = kept.read_text().split("\n")[1]
        growth = tmp_path / "growth"
        growth.write_text(stockade.ctl("log", "prove", "--from", size).out)
        second = state / "keys" / "log.key.pub"
        checked = stockade.json("log", "check-proof", str(proof), "--public-key", str(second))
        assert (checked["ok"], checked["seq"], checked["verb"]) == (True, 1, "daemon.start")
        assert stockade.ctl("log", "prove", "--from", "999999").code == 3
        before = len(lines(out))
        stockade.down()
        offline = ("log", "verify", str(state / "log"), "--public-key", str(state / "keys" / "log.key.first.pub"))
        found = stockade.json(*offline, "--since", str(kept))
        assert (found["ok"], found["problem"]) == (True, "")
        # Nothing is lost over the restart, and little is sent twice.
        stockade.up()
        stockade.wait(lambda: stockade.json("log", "status")["sinks"][0]["behind"] == 0, 20)
        assert sorted(set(lines(out))) == list(range(1, max(lines(out)) + 1))
        assert max(lines(out)) > before


def test_an_entry_is_redacted_and_everything_else_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Instance.start(f'[[log.sinks]]\nname = "file"\nkind = "jsonl"\npath = "{out}"\n') as stockade:
        log, secret = stockade.directory / "state" / "log", "alice-of-accounting"
        kept = tmp_path / "kept"
        assert stockade.ctl("run", "--", "echo", secret).code == 0
        stockade.launch("--name", "lives", "--", "sleep", "1000")
        kept.write_text(stockade.ctl("log", "checkpoint").out)
        stockade.wait(lambda: stockade.json("log", "status")["sinks"][0]["behind"] == 0, 20)
        holding = [entry["seq"] for entry in stockade.actions() if secret in json.dumps(entry)]
        assert holding
        assert stockade.ctl("log", "redact", str(holding[0])).code == 2
        for seq in holding:
            done = stockade.json("log", "redact", str(seq), "--reason", "a name")
            (order,) = [entry for entry in stockade.actions() if entry["seq"] == done["ordered_by_seq"]]
            assert (order["verb"], order["details"]["seq"]) == ("log.redact", seq)
            assert order["details"]["leaf_hash"] == done["leaf_hash"]
        assert not [entry for entry in stockade.actions() if secret in json.dumps(entry)]
        assert not [path for path in (log / "segments").iterdir() if secret.encode() in path.read_bytes()]
        shown = stockade.actions("--verdict", "redacted")
        assert [(entry["seq"], entry["verb"], entry["reason"]) for entry in shown] == [
            (seq, "redacted", "a name") for seq in holding
        ]
        # Not the launch of one that runs, nor what the log is verified by.
        (launched,) = [e["seq"] for e in stockade.actions("lives", "--verb", "agent.launch") if e["verdict"] != "done"][
            :1
        ]
        refused = stockade.ctl("log", "redact", str(launched), "--reason", "r")
        assert (refused.code, "runs" in refused.err) == (5, True), refused.err
        assert stockade.ctl("log", "redact", str(order["seq"]), "--reason", "r").code == 5
        assert stockade.ctl("log", "redact", "999999", "--reason", "r").code == 3
        assert stockade.ctl("run", "--", "true").code == 0
        verified = stockade.json("log", "verify")
        assert (verified["ok"], verified["redacted"]) == (True, len(holding)), verified
        stockade.wait(lambda: stockade.json("log", "status")["sinks"][0]["behind"] == 0, 20)
        taken = lines(out)
        assert taken == list(range(1, max(taken) + 1))  # each once: the cursor is where it was
        stockade.down()
        offline = (
            "log",
            "verify",
            str(log),
            "--public-key",
            str(log.parent / "keys" / "log.key.pub"),
            "--since",
            str(kept),
        )
        found = stockade.json(*offline)
        assert (found["ok"], found["redacted"]) == (True, len(holding)), found
        assert f"{len(holding)} redacted" in stockade.ctl(*offline).out
        stockade.up()
        assert len(stockade.actions("--verdict", "redacted")) == len(holding)
