"""What processes inside do is in the action log: who ran what, what was refused, and who started it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.census import launcher_pid
from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

TELLS = "kind: Policy\nname: tells\nextends: default\nrecord: {execs: true, refusals: true}\n"
LOUD = "kind: Policy\nname: loud\nextends: tells\nrecord: {arguments: 16}\n"


SCRIPT = "/bin/echo a-secret; unshare -U true; true"


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start(policies={"tells.yaml": TELLS, "loud.yaml": LOUD}) as instance:
        yield instance


def told(stockade: Instance, name: str, verb: str) -> list[dict[str, Any]]:
    return list(stockade.ctl("-o", "json", "actions", name, "--verb", verb).lines())


def test_who_ran_what_is_in_the_log_without_words_that_may_be_secret(stockade: Instance) -> None:
    done = stockade.ctl("run", "--name", "ran", "--policy", "tells", "--", "/bin/sh", "-c", SCRIPT)
    assert done.code == 0
    stockade.wait(lambda: len(told(stockade, "ran", "process.exec")) == 3)
    first, second, _ = told(stockade, "ran", "process.exec")
    assert (first["object"], second["object"]) == ("/bin/sh", "/bin/echo")
    assert (second["details"]["args"], second["details"]["argc"]) == (["/bin/echo"], 2)
    assert second["details"]["ppid"] == first["details"]["pid"]
    assert second["details"]["by"] == "agent"
    assert second["verdict"] == "allowed"
    assert not any("a-secret" in str(entry["details"]) for entry in told(stockade, "ran", "process.exec"))
    stockade.wait(lambda: told(stockade, "ran", "process.refused") != [])
    (refused,) = told(stockade, "ran", "process.refused")
    assert (refused["object"], refused["verdict"], refused["details"]["times"]) == ("unshare", "denied", 1)


def test_a_policy_says_how_much_is_told(stockade: Instance) -> None:
    loud = stockade.ctl("run", "--name", "loud", "--policy", "loud", "--", "/bin/echo", "a-word")
    quiet = stockade.ctl("run", "--name", "quiet", "--", "/bin/sh", "-c", "unshare -U true")
    assert (loud.code, quiet.code) == (0, 1)
    stockade.wait(lambda: told(stockade, "loud", "process.exec") != [])
    assert told(stockade, "loud", "process.exec")[0]["details"]["args"] == ["/bin/echo", "a-word"]
    assert told(stockade, "quiet", "process.exec") == []
    assert told(stockade, "quiet", "process.refused") == []
    postures = [stockade.json("inspect", name)["posture"] for name in ("quiet", "loud")]
    assert [posture["record"] for posture in postures] == [
        {"execs": False, "refusals": False},
        {"execs": True, "refusals": True},
    ]


def test_what_an_operator_starts_is_not_taken_for_the_agents(stockade: Instance) -> None:
    stockade.launch("--name", "entered", "--policy", "tells", "--", "sleep", "1000")
    assert stockade.ctl("exec", "entered", "--", "/bin/ls", "/").code == 0
    stockade.wait(lambda: len(told(stockade, "entered", "process.exec")) == 2)
    _, entered = told(stockade, "entered", "process.exec")
    assert (entered["object"], entered["details"]["by"]) == ("/bin/ls", "exec")
    (start,) = told(stockade, "entered", "exec.start")
    assert entered["details"]["stream_id"] == start["details"]["stream_id"]


WORK = """
set -e
cd /tmp
printf 'int main(void){return 0;}' > a.c && gcc a.c -o a && ./a
python3 -c 'import subprocess; subprocess.run(["/bin/true"], check=True)'
git init -q r && cd r && git config user.email a@b && git config user.name a
git commit -q --allow-empty -m m && git log | grep -q m
if command -v node; then node -e 'require("child_process").execFileSync("/bin/true")'; fi
echo fine
"""


@pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("git") is None, reason="needs gcc and git on the host")
def test_ordinary_programs_lose_nothing(stockade: Instance) -> None:
    plain = stockade.ctl("run", "--", "/bin/sh", "-c", WORK)
    done = stockade.ctl("run", "--name", "works", "--policy", "tells", "--", "/bin/sh", "-c", WORK)
    assert (done.code, done.out, done.err) == (plain.code, plain.out, plain.err)
    assert done.out.endswith("fine\n")


def watcher_of(stockade: Instance) -> int:
    launcher = launcher_pid(stockade)
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (watcher,) = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "stockade-watch\n"]
    return watcher


def test_a_watcher_that_was_killed_is_replaced_and_that_is_in_the_log(stockade: Instance) -> None:
    stockade.launch(
        "--name", "goes-on", "--policy", "tells", "--", "sh", "-c", "while :; do /bin/true; sleep 0.05; done"
    )
    stockade.wait(lambda: told(stockade, "goes-on", "process.exec") != [])
    os.kill(watcher_of(stockade), signal.SIGKILL)
    stockade.wait(lambda: told(stockade, "goes-on", "process.watch") != [])
    (entry,) = told(stockade, "goes-on", "process.watch")
    assert (entry["actor"], entry["verdict"]) == ("daemon", "failed")
    stockade.wait(lambda: told(stockade, "goes-on", "process.exec")[-1]["seq"] > entry["seq"])
