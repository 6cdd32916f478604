"""`stockadectl log verify DIR` and `log check-proof`: files alone, without a daemon, a socket or root."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pymerkle  # type: ignore[import-untyped]  # it has no types
import pytest

from supervisord.actions import encoding, merkle, segments
from supervisord.actions.checkpoint import size_of
from supervisord.actions.log import ActionLog
from supervisord.actions.proofs import consistency_text, inclusion_text
from supervisord.actions.types import Action
from supervisord.ctl.command import run

if TYPE_CHECKING:
    from collections.abc import Callable

ENTRIES = 24
REPOSITORY = Path(__file__).resolve().parents[3]
Captured = pytest.CaptureFixture[str]
Frames = list[segments.Frame]


@pytest.fixture(autouse=True)
def no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKADE_SOCKET", "/nonexistent/control.sock")


def act(number: int) -> Action:
    return Action("ag_a", "agent:ag_a", "egress.request", f"http://a.example/{number}", "allowed", "", {"n": number})


def write(base: Path) -> Path:
    """A log of several segments, the checkpoints of a witness (kept half-way and at the end), and proofs."""

    async def record() -> None:
        log = ActionLog.open(
            base / "log", base / "key", now_ns=time.time_ns, segment_bytes=2500, checkpoint_every_entries=4
        )
        (base / "witness").mkdir()
        with (base / "witness" / "default.checkpoints").open("w") as witness:
            for number in range(ENTRIES):
                await log.record(act(number))
                if number in (10, ENTRIES - 1):
                    witness.write(f"{await log.checkpoint()}\n")
        proof = await log.proof(5)
        (base / "5.tlog-proof").write_text(inclusion_text(4, proof.entry, proof.path, proof.checkpoint))
        note = await log.checkpoint()
        path = await log.consistency(11, size_of(note))
        (base / "growth").write_text(consistency_text(11, path, note))
        await log.close()

    asyncio.run(record())
    return base


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sktest-files"))


@pytest.fixture
def base(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def ask(capsys: Captured, *argv: object, code: int = 0) -> Any:
    assert run(["log", "-o", "json", *map(str, argv)]) == code
    return json.loads(capsys.readouterr().out)


def verify(capsys: Captured, base: Path, *more: object, code: int = 0) -> Any:
    return ask(capsys, "verify", base / "log", "--public-key", base / "key.pub", *more, code=code)


def segment_files(base: Path) -> list[Path]:
    return sorted((base / "log" / "segments").iterdir())


def payloads(base: Path) -> list[bytes]:
    found = []
    for path in segment_files(base):
        data = path.read_bytes()
        frames = segments.frames(data, segments.parse_header(data).length)
        found += [frame.payload for frame in frames if frame.kind is segments.Kind.ENTRY]
    return found


def rewrite(path: Path, change: Callable[[Frames], Frames]) -> None:
    data = path.read_bytes()
    length = segments.parse_header(data).length
    kept = change(list(segments.frames(data, length)))
    path.write_bytes(data[:length] + b"".join(segments.frame(f.kind, f.payload, f.leaf_hash) for f in kept))


def recomputed(frame: segments.Frame) -> segments.Frame:
    payload = frame.payload.replace(b"allowed", b"altered")
    return segments.Frame(frame.offset, frame.kind, merkle.leaf_hash(payload), payload)


def flip(base: Path) -> None:
    path = segment_files(base)[1]
    data = bytearray(path.read_bytes())
    at = data.index(b"http://")
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut(base: Path) -> None:
    rewrite(segment_files(base)[-1], lambda found: found[:1])


def swap(base: Path) -> None:
    rewrite(segment_files(base)[0], lambda found: [found[0], found[2], found[1], *found[3:]])


def drop(base: Path) -> None:
    rewrite(segment_files(base)[0], lambda found: [*found[:2], *found[3:]])


def insert(base: Path) -> None:
    rewrite(segment_files(base)[0], lambda found: [*found[:3], found[2], *found[3:]])


def recompute(base: Path) -> None:
    rewrite(segment_files(base)[0], lambda found: [*found[:2], recomputed(found[2]), *found[3:]])


TAMPERINGS = {
    # what was done: (how, what the problem says of the place)
    "bit flip": (flip, (".seg at offset", "is altered", "entry")),
    "truncation": (cut, (".seg at offset", f"to {ENTRIES} are gone")),
    "swap": (swap, (".seg at offset", "entry 1 is missing or moved: entry 2 is in its place")),
    "drop": (drop, (".seg at offset", "entry 2 is missing")),
    "insertion": (insert, (".seg at offset", "entry 3 is missing or moved: entry 2 is in its place")),
    "recomputed hashes": (recompute, (".seg at offset", "altered and its hash recomputed")),
}


@pytest.mark.parametrize("name", list(TAMPERINGS))
def test_each_tampering_is_found_and_located_and_the_same_log_untouched_is_good(
    base: Path, capsys: Captured, name: str
) -> None:
    good = verify(capsys, base)
    assert (good["ok"], good["size"], good["problem"], good["first_seq"]) == (True, ENTRIES, "", 1)
    tamper, said = TAMPERINGS[name]
    tamper(base)
    found = verify(capsys, base, code=1)
    assert {"ok", "size", "root", "problem"} <= found.keys()
    assert found["ok"] is False
    for part in said:
        assert part in found["problem"]


@pytest.mark.parametrize("kept", ["witness/default.checkpoints", "witness"])
def test_a_rollback_is_found_against_what_a_witness_kept(base: Path, capsys: Captured, kept: str) -> None:
    older = base / "older"
    shutil.copytree(base / "log", older)

    async def go_on() -> None:
        log = ActionLog.open(base / "log", base / "key", now_ns=time.time_ns)
        await log.record(act(99))
        with (base / "witness" / "default.checkpoints").open("a") as witness:
            witness.write(f"{await log.checkpoint()}\n")
        await log.close()

    asyncio.run(go_on())
    assert verify(capsys, base, "--since", base / kept)["ok"]
    shutil.rmtree(base / "log")
    older.rename(base / "log")
    assert verify(capsys, base)["ok"]  # the limit of what files alone can show
    found = verify(capsys, base, "--since", base / kept, code=1)
    assert f"entries {ENTRIES + 1} to {ENTRIES + 1} are gone: the kept checkpoint covers them" in found["problem"]


AS_NOBODY = """
import os, sys
import stockade.client.sync, supervisord.actions.verify, supervisord.ctl.log
from supervisord.ctl.command import run
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(run(["log", "verify", "log", "--public-key", "key.pub"]))
"""


def test_verifying_needs_neither_daemon_nor_root(base: Path) -> None:
    """As another user, in a process of its own, with nothing but the files."""
    for path in (base, *base.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    # It imports and stands in its directory as root: neither may be reachable for others on the host of a test.
    words = [sys.executable, "-c", AS_NOBODY]
    environment = {"STOCKADE_SOCKET": "/nonexistent", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/proto"}
    done = subprocess.run(words, cwd=base, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith(f"good: {ENTRIES} entries")


def test_an_independent_tree_has_the_same_roots_and_the_same_proofs(base: Path, capsys: Captured) -> None:
    theirs = pymerkle.InmemoryTree(algorithm="sha256")
    entries = payloads(base)
    for payload in entries:
        theirs.append_entry(payload)
    found = verify(capsys, base)
    assert found["root"] == encoded(theirs.get_root())
    lines = (base / "5.tlog-proof").read_text().partition("\n\n")[0].split("\n")
    path = theirs.prove_inclusion(5).serialize()["path"][1:]
    assert lines == ["c2sp.org/tlog-proof@v1", f"extra {encoded(entries[4])}", "index 4", *map(hexed, path)]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def hexed(text: str) -> str:
    return encoded(bytes.fromhex(text))


def test_a_proof_of_an_entry_is_checked_and_read_without_the_log(base: Path, capsys: Captured) -> None:
    check = ("check-proof", base / "5.tlog-proof", "--public-key", base / "key.pub")
    shutil.rmtree(base / "log")
    found = ask(capsys, *check)
    assert (found["ok"], found["seq"], found["object"], found["size"]) == (True, 5, "http://a.example/4", ENTRIES)
    text = (base / "5.tlog-proof").read_text()
    entry = text.split("\n")[1].removeprefix("extra ")
    other = encoding.encode(5, 1, act(4))[0]
    for altered in (
        text.replace("index 4", "index 5"),
        text.replace(entry, base64.b64encode(other).decode()),
        text.replace(f"extra {entry}\n", ""),
        text.replace(f"\n{ENTRIES}\n", f"\n{ENTRIES + 1}\n"),
        "",
    ):
        (base / "5.tlog-proof").write_text(altered)
        assert ask(capsys, *check, code=1)["problem"].startswith("cannot ")


def test_growth_is_checked_from_a_kept_checkpoint(base: Path, capsys: Captured) -> None:
    check = ("check-proof", base / "growth", "--public-key", base / "key.pub")
    kept = ("--since", base / "witness")
    found = ask(capsys, *check, *kept)
    assert (found["ok"], found["old_size"], found["size"]) == (True, 11, ENTRIES)
    assert "you kept" in run_error(capsys, check)
    lines = (base / "growth").read_text().split("\n")
    lines[1], lines[2] = lines[2], lines[1]
    (base / "growth").write_text("\n".join(lines))
    assert "does not continue" in ask(capsys, *check, *kept, code=1)["problem"]


def test_growth_over_a_new_key_is_checked_with_both(base: Path, capsys: Captured, tmp_path: Path) -> None:
    async def rotate() -> None:
        log = ActionLog.open(base / "log", base / "key", now_ns=time.time_ns)
        shutil.copy(base / "key.pub", tmp_path / "first.pub")
        (tmp_path / "kept").write_text(await log.checkpoint())
        old = log.size
        await log.rotate_key(actor="a", reason="")
        note = await log.checkpoint()
        path = await log.consistency(old, size_of(note))
        (tmp_path / "growth").write_text(consistency_text(old, path, note))
        proof = await log.proof(5)
        (tmp_path / "five").write_text(inclusion_text(4, proof.entry, proof.path, proof.checkpoint))
        await log.close()

    asyncio.run(rotate())
    first, last = ("--public-key", tmp_path / "first.pub"), ("--public-key", base / "key.pub")
    growth = ("check-proof", tmp_path / "growth", "--since", tmp_path / "kept")
    assert ask(capsys, *growth, *first, *last)["ok"]
    assert ask(capsys, *growth, *last, *first)["ok"]
    assert "has no signature" in ask(capsys, *growth, *first, code=1)["problem"]
    assert not ask(capsys, *growth, *last, code=1)["ok"]  # who signed the checkpoint that was kept is not known
    assert ask(capsys, "check-proof", tmp_path / "five", *last)["seq"] == 5
    assert run(["log", "check-proof", str(tmp_path / "five"), "--public-key", str(tmp_path / "first.pub")]) == 1
    assert "keys of before and after" in capsys.readouterr().err
    assert run(["log", "verify", str(base / "log"), *map(str, (*first, *last))]) == 2


def test_a_whole_state_directory_is_verified_too(base: Path, capsys: Captured) -> None:
    assert ask(capsys, "verify", base, "--public-key", base / "key.pub")["size"] == ENTRIES
    (base / "log").rename(base / "elsewhere")
    assert not ask(capsys, "verify", base, "--public-key", base / "key.pub", code=1)["ok"]


def run_error(capsys: Captured, argv: tuple[object, ...]) -> str:
    assert run(["log", *map(str, argv), "-o", "json"]) == 1
    said = capsys.readouterr()
    return said.out + said.err


@pytest.mark.parametrize(
    "argv",
    [
        ["verify", "LOG"],
        ["verify", "LOG", "--public-key", "/nonexistent"],
        ["verify", "LOG", "--public-key", "KEY", "--since", "/nonexistent"],
        ["check-proof", "/nonexistent", "--public-key", "KEY"],
    ],
)
def test_wrong_words_are_a_usage_error(base: Path, argv: list[str]) -> None:
    named = {"LOG": str(base / "log"), "KEY": str(base / "key.pub")}
    assert run(["log", *(named.get(word, word) for word in argv)]) == 2
