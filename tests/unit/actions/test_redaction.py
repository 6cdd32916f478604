"""An entry loses its content and keeps its place in the tree; verifiers take that from an order in the log alone."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pymerkle  # type: ignore[import-untyped]  # it has no types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisord.actions import merkle, segments
from supervisord.actions.checkpoint import Verifier, open_checkpoint
from supervisord.actions.log import ActionLog
from supervisord.actions.proofs import check_proof, inclusion_text
from supervisord.actions.types import JSON, Action, CannotRecord
from supervisord.actions.verify import verify
from supervisord.errors import Conflict, NotFound
from tests.unit.actions.conftest import act

if TYPE_CHECKING:
    from supervisord.actions.types import Report
    from tests.unit.actions.conftest import Open

ADMIN = "uid:0(root)"
REASON = "a customer's name"
SECRET = "alice@a.example"
SECRET_SEQ = 5
ENTRIES = 12


def secret() -> Action:
    return Action("ag_a", "agent:ag_a", "egress.request", f"GET http://a.example/{SECRET}", "allowed", "", {"n": 1})


async def fill(log: ActionLog, entries: int = ENTRIES, at: int = SECRET_SEQ) -> None:
    for number in range(1, entries + 1):
        await log.record(secret() if number == at else act(number))


def check(base: Path, kept: str | None = None) -> Report:
    return verify(base / "log", base / "key.pub", kept=kept)


def paths(base: Path) -> list[Path]:
    return sorted((base / "log" / "segments").iterdir())


def holding(base: Path, text: str = SECRET) -> list[str]:
    return [path.name for path in (base / "log").rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("segment_bytes", [1000, 1 << 20], ids=["sealed", "current"])
async def test_content_goes_and_every_root_proof_and_checkpoint_stays(
    open_log: Open, tmp_path: Path, segment_bytes: int
) -> None:
    log = open_log(segment_bytes=segment_bytes)
    await fill(log)
    early = await log.checkpoint()
    key = Verifier.parse(log.public_key)
    theirs = pymerkle.InmemoryTree(algorithm="sha256")
    for seq in range(1, ENTRIES + 1):
        theirs.append_entry((await log.proof(seq, ENTRIES)).entry)
    taken = {}
    for seq in (SECRET_SEQ, SECRET_SEQ + 1):
        proof = await log.proof(seq)
        taken[seq] = inclusion_text(seq - 1, proof.entry, proof.path, proof.checkpoint)
    (before,) = await log.query(after_seq=SECRET_SEQ - 1, limit=1)
    sizes = {path.name: path.stat() for path in paths(tmp_path)[:-1]}
    assert holding(tmp_path)
    ordered = await log.redact(SECRET_SEQ, actor=ADMIN, reason=REASON)

    assert holding(tmp_path) == []
    action = ordered.action
    assert (action.verb, action.actor, action.verdict, action.reason) == ("log.redact", ADMIN, "allowed", REASON)
    assert (action.details["seq"], action.details["leaf_hash"]) == (SECRET_SEQ, before.leaf_hash.hex())
    assert SECRET not in repr(action)
    # Nothing moved: neither bytes nor times, by which retention goes.
    for name, was in sizes.items():
        now = (tmp_path / "log/segments" / name).stat()
        assert (now.st_size, now.st_mtime_ns, now.st_mode) == (was.st_size, was.st_mtime_ns, was.st_mode)
    # What queries and sinks get.
    entries = await log.query()
    assert [entry.seq for entry in entries] == list(range(1, ENTRIES + 3))
    shown = entries[SECRET_SEQ - 1]
    assert (shown.action.verb, shown.action.verdict, shown.action.agent_id) == ("redacted", "redacted", "")
    assert (shown.action.actor, shown.action.reason) == (ADMIN, REASON)
    assert shown.action.details == {"redacted_by_seq": ordered.seq, "redacted_at_unix_nanos": ordered.time_ns}
    assert (shown.leaf_hash, shown.time_ns) == (before.leaf_hash, before.time_ns)
    assert entries[-1].action.verdict == "done"
    assert [entry.seq for entry in await log.query(verb="redacted")] == [SECRET_SEQ]
    assert SECRET_SEQ not in [entry.seq for entry in await log.query(agent_id="ag_a")]
    # Roots and proofs: those of an independent tree, and those that were taken before.
    assert await log.root(ENTRIES) == theirs.get_root()
    for seq, text in taken.items():
        assert check_proof(text, key).checkpoint.size == ENTRIES, seq
    other = await log.proof(SECRET_SEQ + 1)
    assert merkle.inclusion_holds(SECRET_SEQ, other.size, other.leaf_hash, other.path, other.root)
    with pytest.raises(Conflict, match="its content was redacted"):
        await log.proof(SECRET_SEQ)
    path = await log.consistency(ENTRIES)
    kept = open_checkpoint(early, key)
    assert merkle.consistency_holds(ENTRIES, log.size, kept.root, await log.root(log.size), path)
    live = await log.verify(kept=early)
    assert (live.ok, live.redacted) == (True, 1), live.problem
    await fill(log, 3, at=0)
    await log.close()
    report = check(tmp_path, early)
    assert (report.ok, report.size, report.redacted, report.problem) == (True, ENTRIES + 5, 1, "")


async def test_an_index_that_is_made_again_says_the_same(open_log: Open, tmp_path: Path) -> None:
    log = open_log()
    await fill(log)
    await log.redact(SECRET_SEQ, actor=ADMIN, reason=REASON)
    before = await log.query()
    await log.close()
    (tmp_path / "log" / "index.sqlite").unlink()
    again = open_log()
    assert await again.query() == before
    assert [entry.seq for entry in await again.query(verb="redacted")] == [SECRET_SEQ]
    assert await again.finish_redactions() == 0
    await again.close()
    assert check(tmp_path).ok


async def test_what_is_not_there_and_what_the_log_needs_is_not_redacted(open_log: Open) -> None:
    log = open_log()
    await fill(log, 6)
    ordered = await log.redact(SECRET_SEQ, actor=ADMIN, reason=REASON)
    size = log.size
    for seq, error, cause in (
        (0, NotFound, "not there"),
        (size + 1, NotFound, "not there"),
        (SECRET_SEQ, Conflict, f"redacted, as entry {ordered.seq} orders"),
        (ordered.seq, Conflict, "log's own"),
    ):
        with pytest.raises(error, match=cause):
            await log.redact(seq, actor=ADMIN, reason="")
    assert log.size == size
    await log.close()


async def test_retention_goes_on_over_redacted_entries(open_log: Open, tmp_path: Path) -> None:
    log = open_log(segment_bytes=1000)
    await fill(log, 40)
    await log.redact(SECRET_SEQ, actor=ADMIN, reason=REASON)
    await log.redact(30, actor=ADMIN, reason=REASON)
    await fill(log, 20, at=0)
    assert await log.retire(keep_seconds=0, keep_bytes=10_500)
    assert SECRET_SEQ < log.first_seq <= 30
    assert await log.finish_redactions() == 0
    await log.close()
    report = check(tmp_path)
    assert (report.ok, report.redacted) == (True, 1), report.problem


async def test_an_order_that_a_disk_refused_is_done_later(
    open_log: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log()
    await fill(log)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("supervisord.actions.redacting.redact_in_segment", full)
        with pytest.raises(CannotRecord, match="No space left"):
            await log.redact(SECRET_SEQ, actor=ADMIN, reason=REASON)
    assert holding(tmp_path)
    assert (await log.verify()).ok
    assert [e.action.verdict for e in await log.query(verb="log.redact")] == ["allowed", "failed"]
    await log.close()
    again = open_log()
    assert await again.finish_redactions() == 1
    assert holding(tmp_path) == []
    assert [e.action.verdict for e in await again.query(verb="log.redact")] == ["allowed", "failed", "done"]
    assert await again.finish_redactions() == 0
    await again.close()
    report = check(tmp_path)
    assert (report.ok, report.redacted) == (True, 1)


async def test_an_order_that_cannot_be_carried_out_keeps_no_other_from_it(open_log: Open, tmp_path: Path) -> None:
    log = open_log()
    await fill(log)
    wrong: dict[str, JSON] = {"seq": 3, "leaf_hash": "00" * 32, "time_seconds": 0}
    await log.record(Action("", ADMIN, "log.redact", "entry 3", "allowed", "", wrong))
    (entry,) = await log.query(after_seq=SECRET_SEQ - 1, limit=1)
    right = {**wrong, "seq": SECRET_SEQ, "leaf_hash": entry.leaf_hash.hex(), "time_seconds": entry.time_ns // 10**9}
    await log.record(Action("", ADMIN, "log.redact", f"entry {SECRET_SEQ}", "allowed", "", right))
    with pytest.raises(CannotRecord, match="cannot redact entry 3"):
        await log.finish_redactions()
    assert holding(tmp_path) == []
    assert (await log.query(after_seq=2, limit=1))[0].action.verb == "egress.request"
    await log.close()
    report = check(tmp_path)
    assert (report.ok, report.redacted) == (True, 1), report.problem


def test_a_kill_at_any_step_leaves_the_old_segment_or_the_new_one(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()

    async def write() -> None:
        log = ActionLog.open(base / "log", base / "key", now_ns=time.time_ns)
        await fill(log, 6)
        await log.close()

    asyncio.run(write())
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.log_redactor", str(base), str(SECRET_SEQ), SECRET],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *killed, last = map(json.loads, done.stdout.splitlines())
    assert len(killed) > 15
    assert (last["code"], last["redacted"], last["holds"]) == (0, 1, False)
    for step, found in enumerate([*killed, last], start=1):
        assert found["code"] in (-9, 0), step
        assert (found["problem"], found["problem_then"], found["finished"]) == ("", "", 0), step
        assert found["redacted"] + found["holds"] == 1, step  # one or the other, never neither
        # What was ordered is done by the next start; what was not is not.
        assert (found["redacted_then"], found["holds_then"]) == ((1, False) if found["ordered"] else (0, True)), step
    assert {(found["redacted"], found["ordered"]) for found in killed} == {(0, False), (0, True), (1, True)}


# --- tampering


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of several segments in which SECRET_SEQ is redacted."""
    base = tmp_path_factory.mktemp("sktest-redacted")

    async def write() -> None:
        log = ActionLog.open(base / "log", base / "key", now_ns=time.time_ns, segment_bytes=1500)
        await fill(log)
        await log.redact(SECRET_SEQ, actor=ADMIN, reason=REASON)
        await log.close()

    asyncio.run(write())
    return base


@pytest.fixture
def base(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def raw(frame: segments.Frame) -> bytes:
    return segments.frame(frame.kind, frame.payload, frame.leaf_hash)


def place(base: Path, seq: int) -> tuple[Path, segments.Frame]:
    """Where an entry is."""
    path = [each for each in paths(base) if (segments.first_seq_of(each.name) or 0) <= seq][-1]
    data = path.read_bytes()
    at = (segments.first_seq_of(path.name) or 0) - 1
    for frame in segments.frames(data, segments.parse_header(data).length):
        at += frame.kind is not segments.Kind.CHECKPOINT
        if at == seq and frame.kind is not segments.Kind.CHECKPOINT:
            return path, frame
    raise AssertionError(f"there is no entry {seq}")


def put(path: Path, offset: int, content: bytes) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:offset] + content + data[offset + len(content) :])


@settings(max_examples=40, deadline=None)
@given(seq=st.integers(1, ENTRIES).filter(lambda seq: seq != SECRET_SEQ), order=st.integers(0, ENTRIES + 4))
def test_content_that_nobody_ordered_away_is_named_as_tampered(written: Path, seq: int, order: int) -> None:
    """Whatever entry, and whatever order its mark names, also the real one, which is for another."""
    path, frame = place(written, seq)
    whole = path.read_bytes()
    try:
        put(path, frame.offset, segments.redacted_frame(frame, segments.Mark(order, 1_790_000_000)))
        report = check(written)
    finally:
        path.write_bytes(whole)
    assert not report.ok
    assert f"{path.name} at offset {frame.offset}: entry {seq} was tampered with: its content is gone" in report.problem
    assert check(written).ok


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_bit_in_a_redaction_frame_is_found(written: Path, data: st.DataObject) -> None:
    path, frame = place(written, SECRET_SEQ)
    at = data.draw(st.integers(frame.offset, frame.offset + segments.FRAME_HEADER_BYTES + len(frame.payload) - 1))
    whole = path.read_bytes()
    try:
        put(path, at, bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]))
        report = check(written)
    finally:
        path.write_bytes(whole)
    assert not report.ok
    assert f"{path.name} at offset {frame.offset}" in report.problem


@settings(max_examples=60, deadline=None)
@given(payload=st.binary(min_size=0, max_size=200), order=st.integers(0, 2**64 - 1), seconds=st.integers(0, 2**64 - 1))
def test_a_mark_is_as_long_as_the_entry_and_reads_back(payload: bytes, order: int, seconds: int) -> None:
    entry = segments.Frame(0, segments.Kind.ENTRY, merkle.leaf_hash(payload), payload)
    mark = segments.Mark(order, seconds)
    if len(payload) < segments.MARK_BYTES:
        with pytest.raises(ValueError, match="no room"):
            segments.redacted_frame(entry, mark)
        return
    made = segments.redacted_frame(entry, mark)
    assert len(made) == len(raw(entry))
    found = segments.frame_at(made, 0)
    assert (found.kind, found.leaf_hash, segments.mark_of(found)) == (segments.Kind.REDACTED, entry.leaf_hash, mark)


def test_an_order_that_is_missing_or_says_something_else_is_found(base: Path) -> None:
    path, frame = place(base, ENTRIES + 1)
    assert b"log.redact" in frame.payload
    altered = frame.payload.replace(f"entry {SECRET_SEQ}".encode(), b"entry 6")
    put(path, frame.offset, segments.entry_frame(altered, merkle.leaf_hash(altered)))
    assert f"to {ENTRIES + 1} was altered and its hash recomputed" in check(base).problem
    # Redacted itself, it orders nothing any more.
    put(path, frame.offset, segments.redacted_frame(frame, segments.Mark(ENTRIES + 2, 0)))
    problem = check(base).problem
    assert f"entry {SECRET_SEQ} was tampered with" in problem
    assert f"entry {ENTRIES + 1}, which its mark names, does not order that" in problem


def test_a_redaction_with_another_hash_or_time_is_named(base: Path) -> None:
    path, frame = place(base, SECRET_SEQ)
    mark = segments.mark_of(frame)
    other = segments.Frame(frame.offset, segments.Kind.ENTRY, merkle.leaf_hash(b"x"), frame.payload)
    put(path, frame.offset, segments.redacted_frame(other, mark))
    problem = check(base).problem
    assert f"{path.name} at offset {frame.offset}: entry {SECRET_SEQ} was tampered with" in problem
    assert "another hash" in problem
    late = segments.Mark(mark.order, mark.time_seconds + 1)
    put(path, frame.offset, segments.redacted_frame(frame, late))
    assert "another time" in check(base).problem
    put(path, frame.offset, raw(frame))
    assert check(base).ok


def test_an_order_that_no_signature_covers_is_none(base: Path) -> None:
    """Whoever can write files, and has no key, can append an order behind the last checkpoint."""

    async def append() -> None:
        log = ActionLog.open(base / "log", base / "key", now_ns=time.time_ns, checkpoint_seconds=60.0)
        (entry,) = await log.query(after_seq=6, limit=1)
        assert entry.seq == 7
        details: dict[str, JSON] = {
            "seq": 7,
            "leaf_hash": entry.leaf_hash.hex(),
            "time_seconds": entry.time_ns // 10**9,
        }
        ordered = await log.append(Action("", ADMIN, "log.redact", "entry 7", "allowed", "", details))
        path, frame = place(base, 7)
        put(path, frame.offset, segments.redacted_frame(frame, segments.Mark(ordered.seq, entry.time_ns // 10**9)))
        problem = check(base).problem
        assert "entry 7 was tampered with" in problem
        assert "not under any signature" in problem
        # The twin: the log's own key signs it.
        await log.close()

    asyncio.run(append())
    assert check(base).ok
