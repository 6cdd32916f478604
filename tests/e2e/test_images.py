"""Agents on root file systems of their own, through stockadectl: a directory, an OCI layout, archives."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.image import Built, entry, layer, programs
from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

FORMS = {"layout": "oci-layout", "oci": "oci-archive", "docker": "docker-archive"}
MANY = 8_000  # empty files: removing others is slow on disks that discard


def policy(name: str, rootfs: object, more: str = "") -> dict[str, str]:
    return {f"{name}.yaml": f'kind: Policy\nname: {name}\nrootfs: "{rootfs}"\n{more}'}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that only root can read: the unpacker gets at them by descriptor alone."""
    path = tmp_path_factory.mktemp("images")
    path.chmod(0o700)
    return path


@pytest.fixture(scope="module")
def built(place: Path) -> Built:
    base = layer(programs(), entry(b"usr/bin/", b"5", mode=0o755))
    own = layer(entry(b"etc/marker", b"0", b"from the image\n"), entry(b"etc/passwd", b"2", link=b"/etc/shadow"))
    built = Built([base, own], env=["PATH=/bin:/opt/image", "SECRET=of-the-image"])
    built.layout(place / "layout")
    built.oci_archive(place / "oci.tar")
    built.docker_archive(place / "docker.tar")
    return built


@pytest.fixture(scope="module")
def stockade(place: Path, built: Built) -> Iterator[Instance]:
    plain = place / "plain"
    (plain / "bin").mkdir(parents=True)
    plain.chmod(0o755)
    (plain / "bin" / "sh").write_bytes(Path("/bin/busybox").read_bytes())
    (plain / "bin" / "sh").chmod(0o755)
    policies = {
        **policy("layout", place / "layout"),
        **policy("oci", place / "oci.tar"),
        **policy("docker", f"{place}/docker.tar#latest"),
        **policy("pinned", f"{place}/layout@{built.digest}"),
        **policy("plain", plain),
        **policy("env", place / "layout", "env: {PATH: /policy:/bin}\n"),
        **policy("slow", place / "slow.tar"),
        **policy("slower", place / "slower.tar"),
        **policy("bad", place / "bad.tar"),
        **policy("gone", place / "gone.tar"),
        **policy("everything", "/"),
    }
    with Instance.start(policies=policies) as instance:
        yield instance


def shown(stockade: Instance, name: str) -> dict[str, Any]:
    posture: dict[str, Any] = stockade.json("inspect", name)["posture"]
    return posture


@pytest.mark.parametrize("form", FORMS)
def test_an_agent_runs_on_an_image_and_its_digest_is_on_record(stockade: Instance, built: Built, form: str) -> None:
    done = stockade.run("cat /etc/marker; ls /usr; id -u; touch /bin/x; echo $PATH $SECRET", "--policy", form)
    assert done.out == "from the image\nbin\n1000\n/bin:/opt/image\n", done.err
    assert "Read-only file system" in done.err
    launched = stockade.launch("--name", form, "--policy", form, "--", "sleep", "100")
    posture = shown(stockade, form)
    assert posture["rootfs"] == FORMS[form]
    assert posture["rootfs_digest"].startswith("sha256:")
    if form != "docker":
        assert posture["rootfs_digest"] == built.digest
    (entry,) = stockade.actions(launched["agent_id"], "--verb", "agent.launch")
    assert {key: entry["details"][key] for key in ("rootfs", "rootfs_source", "rootfs_digest")} == {
        key: posture[key] for key in ("rootfs", "rootfs_source", "rootfs_digest")
    }
    stockade.ctl("kill", form)
    unpacked = [a for a in stockade.actions("--verb", "image.unpack") if a["object"] == posture["rootfs_source"]]
    assert [action["verdict"] for action in unpacked] == ["allowed", "done"]
    assert unpacked[1]["details"]["entries"] > 10


def test_a_plain_directory_has_no_digest_and_says_so(stockade: Instance, place: Path) -> None:
    assert stockade.ctl("run", "--policy", "plain", "--", "sh", "-c", "echo hello").out == "hello\n"
    stockade.launch("--name", "plain", "--policy", "plain", "--", "sh", "-c", "while :; do busybox sleep 1; done")
    posture = shown(stockade, "plain")
    assert (posture["rootfs"], posture["rootfs_digest"], posture["rootfs_source"]) == (
        "directory",
        "",
        str(place / "plain"),
    )
    stockade.ctl("kill", "plain")
    stockade.launch("--name", "host", "--", "sleep", "100")
    assert (shown(stockade, "host")["rootfs"], shown(stockade, "host")["rootfs_digest"]) == ("host", "")
    stockade.ctl("kill", "host")


def test_the_policys_path_goes_before_the_images(stockade: Instance) -> None:
    assert stockade.run("echo $PATH", "--policy", "env").out == "/policy:/bin\n"


def test_check_and_dry_run_say_what_is_there(stockade: Instance, built: Built, place: Path) -> None:
    assert stockade.run("true", "--policy", "pinned").code == 0
    files = stockade.directory / "policies"
    done = stockade.ctl("policy", "check", str(files / "pinned.yaml"))
    assert f"rootfs: {place}/layout@{built.digest} is there (oci-layout, {built.digest})" in done.out
    assert "plain is there (directory)" in stockade.ctl("policy", "check", str(files / "plain.yaml")).out
    for name, says in (("gone", "No such file"), ("everything", "of this daemon is in it")):
        done = stockade.ctl("policy", "check", str(files / f"{name}.yaml"))
        assert (done.code, says in done.err) == (1, True), done
        assert stockade.run("true", "--policy", name).code != 0
    plan = stockade.ctl("launch", "--dry-run", "--policy", "oci", "--", "sh").out
    assert "oci.tar" in plan


def test_a_bad_image_is_an_error_that_names_file_and_entry(stockade: Instance, place: Path) -> None:
    Built([layer(entry(b"etc/\x1b[2Jx", b"0", b"x"), entry(b"../../x", b"0", b"x"))]).oci_archive(place / "bad.tar")
    done = stockade.run("true", "--policy", "bad")
    assert done.code == 125
    assert f"cannot use rootfs {place}/bad.tar: entry ../../x: its name leads out of the image (..)" in done.err
    assert stockade.run("true").code == 0
    failed = [a for a in stockade.actions("--verb", "image.unpack") if a["object"].endswith("bad.tar")]
    assert [action["verdict"] for action in failed] == ["allowed", "failed"]


def unpacker(stockade: Instance) -> int | None:
    """The unpacker that has given everything up, stopped where it is."""
    for path in (stockade.run_dir / "processes").glob("unpacker-*.json"):
        try:
            pid = int(json.loads(path.read_text())["pid"])
            if "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text():
                os.kill(pid, signal.SIGSTOP)
                return pid
        except (OSError, ValueError):
            continue
    return None


def stopped(stockade: Instance, work: threading.Thread) -> int:
    work.start()
    found: list[int] = []

    def look() -> bool:
        pid = unpacker(stockade)
        found.extend([] if pid is None else [pid])
        return bool(found)

    for _ in range(4000):
        if look():
            break
        work.join(0.002)
    assert found, "no unpacker was seen at work"
    return found[0]


def many(path: Path) -> Path:
    names = b"".join(entry(b"many/%d" % number) for number in range(MANY))
    return Built([layer(programs(), names)], compress=False).oci_archive(path)


def test_unpacking_holds_up_nobody_else_and_happens_once(stockade: Instance, place: Path) -> None:
    many(place / "slow.tar")
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(stockade.run("test -e /many/1", "--policy", "slow").code))
        for _ in range(3)
    ]
    pid = stopped(stockade, threads[0])
    try:
        for thread in threads[1:]:
            thread.start()
        assert stockade.run("true", seconds=20).code == 0
        status = Path(f"/proc/{pid}/status").read_text()
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert "0" not in facts["Uid"].split() + facts["Gid"].split()
        assert {facts[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
        assert (facts["NoNewPrivs"], facts["Seccomp"], facts["Groups"].strip()) == ("1", "2", "")
        for kind in ("net", "mnt", "ipc", "uts"):
            assert Path(f"/proc/{pid}/ns/{kind}").stat().st_ino != Path(f"/proc/self/ns/{kind}").stat().st_ino
        # Its root directory is what it unpacks into, and its only mount.
        assert {path.name for path in Path(f"/proc/{pid}/root").iterdir()} <= {"bin", "many"}
        mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        assert [line.split()[4] for line in mounts] == ["/"]
        assert {"nosuid", "nodev", "noexec", "nosymfollow"} <= set(mounts[0].split()[5].split(","))
        inside = [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
        regular = [str(path) for path in inside if str(path).startswith("/") and path.is_file()]
        assert regular == [str(place / "slow.tar")]
    finally:
        os.kill(pid, signal.SIGCONT)
        for thread in threads:
            thread.join()
    assert codes == [0, 0, 0]
    unpacked = [a["verdict"] for a in stockade.actions("--verb", "image.unpack") if a["object"].endswith("/slow.tar")]
    assert unpacked == ["allowed", "done"]


def test_a_daemon_killed_while_unpacking_leaves_nothing_that_is_used(stockade: Instance, place: Path) -> None:
    many(place / "slower.tar")
    images = stockade.directory / "state" / "images"
    work = threading.Thread(target=lambda: stockade.run("true", "--policy", "slower"))
    pid = stopped(stockade, work)
    before = {path.name for path in (images / "1").iterdir()}
    stockade.down(signal.SIGKILL)
    work.join()
    stockade.wait(lambda: not Path(f"/proc/{pid}").exists())
    assert not Path(f"/proc/{pid}").exists(), "the unpacker outlived its daemon"
    assert {path.name for path in (images / "1").iterdir()} == before
    assert list(images.glob(".unpack-*"))
    stockade.up()
    assert not list(images.glob(".unpack-*"))
    assert stockade.run(f"test -e /many/{MANY - 1}", "--policy", "slower").code == 0


def test_what_is_kept_is_for_root_alone_and_outlives_the_daemon(stockade: Instance) -> None:
    images = stockade.directory / "state" / "images"
    assert stockade.run("true", "--policy", "layout").code == 0
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in (images, images / "1", *(images / "1").iterdir()))
    stockade.down()
    stockade.up()
    count = len(stockade.actions("--verb", "image.unpack"))
    assert stockade.run("true", "--policy", "layout").code == 0
    assert len(stockade.actions("--verb", "image.unpack")) == count
