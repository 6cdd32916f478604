"""A backup is taken while the daemon works, verifies by itself, and a daemon goes on from it."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance, bin_dir
from tests.support.people import by

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

DEFINITION = "kind: Agent\nname: known\nversion: 1\nowner: ops\npurpose: test\ncommand: [sleep, '1000']\n"


@pytest.fixture
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


def test_a_backup_is_whole_and_a_daemon_goes_on_from_it(stockade: Instance, tmp_path: Path) -> None:
    (tmp_path / "known.yaml").write_text(DEFINITION)
    stockade.json("registry", "add", "-f", str(tmp_path / "known.yaml"))
    hold = stockade.json("hold", "held", "--reason", "kept")
    ended = stockade.launch("--wait", "--", "sh", "-c", "exit 7")
    stockade.json("log", "rotate-key", "--reason", "so that there are two")
    stockade.launch("--name", "busy", "--", "sleep", "1000")
    made = stockade.json("backup", str(tmp_path / "copy"))
    copy = tmp_path / "copy"
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert files > {"state.db", "log/checkpoint", "log/rotations", "keys/log.key.pub", "keys/log.key.first.pub"}
    # What signs stays where it is.
    assert "keys/log.key" not in files
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in copy.rglob("*"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy", "known.yaml"]
    assert not (stockade.directory / "state" / ".backup-stage").exists()
    took = stockade.actions("--verb", "daemon.backup")
    assert [(entry["actor"], entry["verdict"]) for entry in took] == [("uid:0(root)", "allowed")]
    assert made["size"] >= took[0]["seq"]
    key = str(copy / "keys" / "log.key.first.pub")
    verified = stockade.json("log", "verify", str(copy), "--public-key", key)
    assert (verified["ok"], verified["size"], verified["root"]) == (True, made["size"], made["root"])

    stockade.ctl("kill", "--all")
    after = stockade.actions()[-1]["seq"]
    assert after > made["size"]
    stockade.down()
    state = stockade.directory / "state"
    shutil.copy(state / "keys" / "log.key", copy / "keys" / "log.key")
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    stockade.up()
    assert stockade.json("log", "verify")["ok"]
    assert stockade.json("status", ended["agent_id"])[0]["exit_code"] == 7
    assert [each["hold_id"] for each in stockade.json("holds")] == [hold["hold_id"]]
    assert stockade.ctl("launch", "--name", "held", "--", "true").code == 5
    assert [each["reference"] for each in stockade.json("registry", "list")] == ["known@1"]
    assert stockade.actions("--verb", "agent.launch")[0]["agent_id"] == ended["agent_id"]
    assert stockade.ctl("run", "--", "true").code == 0


def test_a_backup_is_not_for_everybody_and_overwrites_nothing(stockade: Instance, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "broken.partial").mkdir()
    for name, said in (("there", "there already"), ("broken", "broken.partial"), ("none/below", "No such file")):
        done = stockade.ctl("backup", str(tmp_path / name))
        assert (done.code, done.out) == (2, "")
        assert said in done.err
    assert list((tmp_path / "there").iterdir()) == []
    public = stockade.directory / "public"
    public.mkdir()
    public.chmod(0o777)
    assert by(stockade, pwd.getpwnam("nobody").pw_uid, "backup", str(public / "copy")).code == 4
    assert list(public.iterdir()) == []
    assert stockade.actions("--verb", "daemon.backup") == []
    full = subprocess.run(
        ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", bin_dir() / "stockadectl", "backup", tmp_path / "copy"],
        env=stockade.environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (full.returncode, "File too large" in full.stderr) == (1, True), full.stderr
    assert not any(path.name.startswith("copy") for path in tmp_path.iterdir())
    assert stockade.ctl("backup", str(tmp_path / "copy")).code == 0


def test_what_a_crash_left_of_one_goes(stockade: Instance, tmp_path: Path) -> None:
    stockade.down()
    (stockade.directory / "state" / ".backup-stage").mkdir()
    (stockade.directory / "state" / ".backup-stage" / "state.db").write_bytes(b"half")
    stockade.up()
    assert not (stockade.directory / "state" / ".backup-stage").exists()
    assert stockade.ctl("backup", str(tmp_path / "copy")).code == 0
