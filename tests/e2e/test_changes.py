"""Overlay workspaces and kept homes, from the command line to the disk."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from stockade.client import AsyncStockade, Conflict, NotFound, Stockade, Workspace

from tests.support.instance import OWNER, Instance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

KEEPING = """
kind: Policy
name: keeping
home: persistent
limits: {disk: 32MiB, memory: 256MiB}
"""
SMALL = "kind: Policy\nname: small\nlimits: {disk: 16MiB}\n"
WORK = "echo more >> a; rm b; mkdir d; echo new > d/n; ln -s /etc/passwd l; touch c"


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start(policies={"keeping.yaml": KEEPING, "small.yaml": SMALL}) as instance:
        yield instance


def files(workspace: Path) -> dict[str, str]:
    return {
        str(path.relative_to(workspace)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in sorted(workspace.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def images(stockade: Instance, kind: str) -> list[str]:
    return sorted(path.name for path in (stockade.directory / "state" / "scratch" / kind).iterdir())


def made(stockade: Instance, name: str, script: str = WORK, *flags: str) -> Path:
    """A workspace over which an agent of this name has run."""
    workspace = stockade.workspace(a="one\n", b="two\n", c="three\n")
    done = stockade.run(script, "--name", name, "--workspace", f"{workspace}:overlay", *flags)
    assert done.code == 0, done.err
    return workspace


def test_nothing_is_real_before_it_is_applied_and_then_all_of_it_is(stockade: Instance) -> None:
    workspace = made(stockade, "whole")
    before = {"a": "one\n", "b": "two\n", "c": "three\n"}
    assert files(workspace) == before
    shown = stockade.json("inspect", "whole")
    assert (shown["changes_kept"], shown["workspace"]["mode"]) == (True, "overlay")
    found = stockade.json("diff", "whole")
    assert {change["path"]: f"{change['kind']} {change['type']}" for change in found["changes"]} == {
        "a": "modified file",
        "b": "deleted file",
        "d": "added directory",
        "d/n": "added file",
        "l": "added symlink",
    }
    assert files(workspace) == before, "looking changes nothing"
    done = stockade.json("apply", "whole", "--digest", found["digest"], "--reason", "reviewed")
    assert {change["outcome"] for change in done["changes"]} == {"applied"}
    assert files(workspace) == {"a": "one\nmore\n", "c": "three\n", "d/n": "new\n", "l": "/etc/passwd"}
    assert {path.lstat().st_uid for path in workspace.rglob("*")} == {OWNER}
    assert stockade.ctl("diff", "whole").code == 3, "nothing is left to decide"
    assert stockade.json("inspect", "whole")["changes_kept"] is False


def test_an_apply_and_a_discard_are_in_the_log_with_their_digests(stockade: Instance) -> None:
    made(stockade, "logged")
    digest = stockade.json("diff", "logged")["digest"]
    assert stockade.ctl("apply", "logged", "a").code == 0
    assert stockade.ctl("discard", "logged", "--reason", "enough").code == 0
    entries = [e for e in stockade.actions("logged") if e["verb"].startswith("changes.")]
    told = [(entry["verb"], entry["verdict"]) for entry in entries]
    assert told == [
        ("changes.apply", "allowed"), ("changes.apply", "done"), ("changes.discard", "allowed"),
        ("changes.discard", "done"),
    ]  # fmt: skip
    assert entries[1]["details"]["digest"] == digest
    assert [file["path"] for file in entries[1]["details"]["files"]] == ["a"]
    assert entries[3]["reason"] == "enough"
    assert stockade.json("log", "verify")["ok"] is True


def test_paths_apply_one_by_one_and_the_rest_can_be_thrown_away(stockade: Instance) -> None:
    workspace = made(stockade, "some")
    assert stockade.ctl("apply", "some", "d").code == 0
    assert files(workspace) == {"a": "one\n", "b": "two\n", "c": "three\n", "d/n": "new\n"}
    assert {change["path"] for change in stockade.json("diff", "some")["changes"]} == {"a", "b", "l"}
    assert stockade.ctl("apply", "some", "nothing/of/it").code == 3
    assert stockade.ctl("discard", "some").code == 0
    assert files(workspace) == {"a": "one\n", "b": "two\n", "c": "three\n", "d/n": "new\n"}
    assert [name for name in images(stockade, "layers") if stockade.json("inspect", "some")["agent_id"] in name] == []


def test_a_patch_is_what_patch_applies(stockade: Instance) -> None:
    workspace = made(stockade, "patched", "echo more >> a; rm b; echo new > n")
    text = stockade.ctl("diff", "-p", "patched").out
    copy = workspace.parent / "copy"
    shutil.copytree(workspace, copy)
    subprocess.run(["git", "apply", "-p1", "--unsafe-paths", "-"], input=text, text=True, cwd=copy, check=True)
    assert files(copy) == {"a": "one\nmore\n", "c": "three\n", "n": "new\n"}
    shutil.rmtree(copy)


def test_while_the_agent_runs_it_can_be_looked_at_and_not_applied(stockade: Instance) -> None:
    workspace = stockade.workspace(a="one\n")
    stockade.launch("--name", "busy", "--workspace", f"{workspace}:overlay", "--", "sh", "-c", "echo x > n; sleep 60")
    stockade.wait(lambda: stockade.json("diff", "busy")["changes"])
    assert [change["path"] for change in stockade.json("diff", "busy")["changes"]] == ["n"]
    for verb in ("apply", "discard"):
        done = stockade.ctl(verb, "busy")
        assert done.code == 5
        assert "may change more" in done.err
    assert stockade.json("kill", "busy")[0]["verified_empty"] is True
    assert stockade.ctl("apply", "busy").code == 0, "what a killed agent did is kept too"
    assert files(workspace) == {"a": "one\n", "n": "x\n"}


def test_what_somebody_else_changed_meanwhile_needs_force(stockade: Instance) -> None:
    workspace = made(stockade, "late", "echo agent > a; echo agent > n")
    (workspace / "a").write_text("somebody else")
    done = stockade.ctl("-o", "json", "apply", "late")
    assert done.code == 5
    outcomes = {change["path"]: change["outcome"] for change in done.json()["changes"]}
    assert outcomes == {"a": "conflict", "n": "applied"}
    assert files(workspace)["a"] == "somebody else"
    assert stockade.ctl("apply", "late", "--force").code == 0
    assert files(workspace)["a"] == "agent\n"


def test_other_changes_than_those_that_were_shown_are_refused(stockade: Instance) -> None:
    workspace = made(stockade, "swapped")
    done = stockade.ctl("apply", "swapped", "--digest", f"sha256:{'0' * 64}")
    assert (done.code, files(workspace)["a"]) == (5, "one\n")


def test_what_a_hostile_agent_leaves_is_shown_harmlessly_and_not_made(stockade: Instance) -> None:
    script = r"""
mkfifo p; printf x > "$(printf 'new\nline\033[2J')"; ln -s ../../../etc up; mkdir -p h/o
python3 -c '
import os
for name in ("user.overlay.opaque", "user.overlay.whiteout", "user.overlay.redirect", "trusted.overlay.opaque"):
    for path in (".", "s", "s/b"):
        try:
            os.setxattr(path, name, b"y")
            print(name)
        except OSError:
            pass
try:
    os.mknod("s/b", 0o20000, 0)
    print("mknod")
except OSError:
    pass
'
"""
    workspace = stockade.workspace(a="one\n", b="two\n")
    (workspace / "s").mkdir()
    (workspace / "b").rename(workspace / "s" / "b")
    os.chown(workspace / "s", OWNER, OWNER)
    done = stockade.run(script, "--name", "hostile", "--workspace", f"{workspace}:overlay")
    assert done.code == 0, done.err
    # Linux 6.7 and later lets it set marks in the user's name, but stores them under other names.
    assert "trusted" not in done.out
    assert "mknod" not in done.out
    table = stockade.ctl("diff", "hostile")
    assert "\x1b" not in table.out
    assert "new\\x0aline\\x1b" in table.out
    found = stockade.json("diff", "hostile")
    assert not [change for change in found["changes"] if change["kind"] == "deleted"], "no mark of the agent's counts"
    applied = stockade.ctl("-o", "json", "apply", "hostile")
    assert applied.code == 1
    outcomes = {change["path"]: change["outcome"] for change in applied.json()["changes"]}
    assert outcomes["p"] == "refused"
    assert set(outcomes.values()) == {"refused", "applied"}
    assert (workspace / "up").is_symlink()
    assert not (workspace / "p").exists()


def test_a_layer_stops_at_the_disk_limit(stockade: Instance) -> None:
    script = "cat /dev/zero > big 2>/dev/null; stat -c %s big; rm big; echo ok > fine"
    workspace = stockade.workspace(a="one\n")
    flags = ("--policy", "small", "--name", "full", "--workspace", f"{workspace}:overlay")
    assert 15 << 20 < int(stockade.run(script, *flags).out) < 18 << 20
    assert [change["path"] for change in stockade.json("diff", "full")["changes"]] == ["fine"]


def test_only_a_directory_that_is_still_the_same_takes_changes(stockade: Instance) -> None:
    workspace = made(stockade, "moved")
    workspace.rename(workspace.with_name("aside"))
    workspace.mkdir()
    assert stockade.ctl("apply", "moved").code == 5
    workspace.rmdir()
    workspace.symlink_to(workspace.with_name("aside"))
    assert stockade.ctl("apply", "moved").code == 2
    assert list(files(workspace.with_name("aside"))) == ["a", "b", "c"]


def test_somebody_else_may_neither_look_nor_apply(stockade: Instance) -> None:
    made(stockade, "private")
    (stockade.run_dir / "control.sock").chmod(0o666)
    stockade_group = subprocess.run(["getent", "group", "stockade"], capture_output=True, text=True, check=True).stdout
    gid = int(stockade_group.split(":")[2])

    def become(uid: int) -> None:
        os.setgroups([gid])
        os.setgid(gid)
        os.setuid(uid)

    for uid, code in ((OWNER + 1, 4), (OWNER, 0)):
        done = stockade.ctl("diff", "private", preexec_fn=lambda uid=uid: become(uid))
        assert done.code == code, done.err


def test_layers_outlive_daemon_and_launcher(stockade: Instance) -> None:
    workspace = made(stockade, "older")
    other = stockade.workspace(a="one\n")
    script = "echo x > n; sleep 2"
    stockade.launch("--name", "younger", "--workspace", f"{other}:overlay", "--", "sh", "-c", script)
    stockade.down(signal.SIGKILL)
    stockade.up()
    assert stockade.ctl("apply", "older").code == 0
    assert files(workspace)["a"] == "one\nmore\n"
    assert stockade.ctl("wait", "younger").code == 0
    assert stockade.ctl("apply", "younger").code == 0
    assert files(other) == {"a": "one\n", "n": "x\n"}


def test_old_layers_and_what_no_agent_belongs_to_are_let_go_of() -> None:
    with Instance.start('[scratch]\nkeep_layers = "1s"') as stockade:
        made(stockade, "forgotten")
        agent_id = stockade.json("inspect", "forgotten")["agent_id"]
        layers = stockade.directory / "state" / "scratch" / "layers"
        os.utime(layers / f"{agent_id}.img", (0, 0))
        (layers / "ag_never.img").write_bytes(b"")
        (layers / "ag_gone.json").write_text("{}")
        stockade.down()
        stockade.up()
        stockade.wait(lambda: not list(layers.iterdir()))
        assert list(layers.iterdir()) == []
        entries = [e for e in stockade.actions() if e["verb"] == "changes.discard"]
        assert {(entry["actor"], entry["agent_id"]) for entry in entries} == {("daemon", agent_id)}


def test_a_failed_launch_leaves_no_layer(stockade: Instance) -> None:
    before = images(stockade, "layers")
    workspace = stockade.workspace(a="one\n")
    assert stockade.ctl("run", "--workspace", f"{workspace}:overlay", "--", "no-such-program").code == 127
    assert images(stockade, "layers") == before


def test_a_file_has_no_layer(stockade: Instance) -> None:
    workspace = stockade.workspace(a="one\n")
    done = stockade.ctl("run", "--workspace", f"{workspace}/a:overlay", "--", "true")
    assert (done.code, "name the directory" in done.err) == (125, True)


def test_a_workspace_of_root_stays_as_it_is_and_needs_no_word(stockade: Instance) -> None:
    workspace = stockade.workspace(a="one\n")
    for path in (workspace, workspace / "a"):
        os.chown(path, 0, 0)
    done = stockade.run("echo x >> a && cat a", "--name", "roots", "--workspace", f"{workspace}:overlay")
    assert done.out == "one\nx\n", done.err
    assert (workspace / "a").read_text() == "one\n"
    assert stockade.ctl("run", "--workspace", f"{workspace}:rw", "--", "true").code == 125  # the twin


def test_orchestrators_have_the_same_words(stockade: Instance) -> None:
    workspace = stockade.workspace(a="one\n")
    target = f"unix:{stockade.run_dir}/control.sock"
    with Stockade(target) as client:
        agent = client.launch(["sh", "-c", "echo x > n; rm a"], workspace=Workspace(str(workspace), "overlay")).wait()
        found = agent.diff()
        assert [(change.path, change.kind) for change in found.changes] == [("a", "deleted"), ("n", "added")]
        assert [change.outcome for change in agent.apply(["n"], digest=found.digest).changes] == ["applied"]
        with pytest.raises(Conflict):
            agent.apply(digest=found.digest)

    async def rest() -> None:
        async with AsyncStockade(target) as again:
            found = await again.diff(agent.agent_id, patch=True)
            assert [change.patch[:8] for change in found.changes] == [b"--- a/a\n"]
            await again.discard(agent.agent_id, "seen")
            with pytest.raises(NotFound):
                await again.diff(agent.agent_id)

    asyncio.run(rest())
    assert files(workspace) == {"a": "one\n", "n": "x\n"}


def test_a_file_of_kind_agent_may_ask_for_it(stockade: Instance, tmp_path: Path) -> None:
    workspace = stockade.workspace(a="one\n")
    definition = tmp_path / "agent.yaml"
    definition.write_text(
        f"kind: Agent\nname: declared\ncommand: [sh, -c, 'echo x > n']\nworkspace: {{path: {workspace}, mode: overlay}}"
    )
    assert stockade.ctl("launch", "--wait", "-f", str(definition)).code == 0
    assert [change["path"] for change in stockade.json("diff", "declared")["changes"]] == ["n"]


# --- kept homes


def test_a_home_is_kept_for_its_name_and_nobody_else(stockade: Instance) -> None:
    keep = ("--policy", "keeping")
    assert stockade.run("echo kept > ~/f; mkdir ~/d; chmod 700 ~/d", "--name", "homely", *keep).code == 0
    done = stockade.run("cat ~/f; stat -c %U%a ~ ~/d; echo more >> ~/f", "--name", "homely", *keep)
    assert done.out.split() == ["kept", "agent750", "agent700"], done.err
    assert stockade.run("cat ~/f", "--name", "homely", *keep).out == "kept\nmore\n"
    assert stockade.run("ls -A ~", "--name", "stranger", *keep).out == ""
    assert stockade.run("ls -A ~", "--name", "homely").out == "", "without the policy it is not shown"


def test_a_kept_home_has_a_limit_and_what_was_deleted_is_free_again(stockade: Instance) -> None:
    fill = "cat /dev/zero > ~/big 2>/dev/null; stat -c %s ~/big; rm ~/big"
    for _ in range(2):
        assert 31 << 20 < int(stockade.run(fill, "--name", "filler", "--policy", "keeping").out) < 35 << 20


def test_one_agent_at_a_time_has_the_home(stockade: Instance) -> None:
    stockade.launch("--name", "single", "--policy", "keeping", "--", "sleep", "60")
    done = stockade.ctl("launch", "--name", "single", "--policy", "keeping", "--", "true")
    assert (done.code, "of this name is RUNNING" in done.err) == (5, True)
    stockade.ctl("kill", "single")
    assert stockade.run("true", "--name", "single", "--policy", "keeping").code == 0


def test_a_kept_home_needs_a_name(stockade: Instance) -> None:
    done = stockade.ctl("run", "--policy", "keeping", "--", "true")
    assert (done.code, "give the agent a name" in done.err) == (125, True)


def test_a_home_is_there_again_after_a_kill_of_agent_daemon_and_launcher(stockade: Instance) -> None:
    script = "echo one > ~/f; sync; sleep 60"
    stockade.launch("--name", "tough", "--policy", "keeping", "--", "sh", "-c", script)
    stockade.wait(lambda: stockade.ctl("exec", "tough", "--", "cat", "/home/agent/f").out == "one\n")
    stockade.down(signal.SIGKILL)
    stockade.up()
    assert stockade.json("kill", "tough")[0]["verified_empty"] is True
    assert stockade.run("cat ~/f", "--name", "tough", "--policy", "keeping").out == "one\n"


def test_somebody_elses_home_is_not_given(stockade: Instance) -> None:
    homes = stockade.directory / "state" / "scratch" / "homes"
    (homes / "theirs.json").write_text(json.dumps({"owner": "uid:4711(eve)"}))
    # Root may, as it may read every file of the host.
    assert stockade.run("true", "--name", "theirs", "--policy", "keeping").code == 0
    (homes / "theirs.json").write_text("not JSON")
    assert stockade.ctl("run", "--name", "theirs", "--policy", "keeping", "--", "true").code == 125
