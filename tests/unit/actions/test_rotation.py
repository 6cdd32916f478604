"""A log that goes on with another key: who has the first key verifies all, and a crash in the middle loses none."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from supervisord.actions import files, keys, segments
from supervisord.actions.checkpoint import Signer, Verifier
from supervisord.actions.sign import sign_receipt, verify_receipt
from supervisord.actions.types import BadNote, CannotOpenLog, CannotRecord
from supervisord.actions.verify import verify
from tests.unit.actions.conftest import act

if TYPE_CHECKING:
    from pathlib import Path

    from supervisord.actions.types import Report
    from tests.unit.actions.conftest import Open


def check(tmp_path: Path, key: Path | None = None, kept: str | None = None) -> Report:
    return verify(tmp_path / "log", key or files.first_public_path(tmp_path / "key"), kept=kept)


async def test_the_first_key_verifies_what_later_keys_signed(open_log: Open, tmp_path: Path) -> None:
    log = open_log()
    first = log.public_key
    kept = []
    for number in range(3):
        await log.record(act(number))
        kept.append(await log.checkpoint())
        entry = await log.rotate_key(actor="uid:0(root)", reason="yearly")
        assert (entry.action.verb, entry.action.actor, entry.action.reason) == (
            "log.rotate_key",
            "uid:0(root)",
            "yearly",
        )
    assert log.public_key != first
    assert (await log.verify()).ok
    await log.record(act(9))
    assert (await log.verify()).ok
    proof = await log.proof(2)
    assert keys.open_by_any(proof.checkpoint, [Verifier.parse(log.public_key)]).size == proof.size
    await log.close()
    assert files.first_public_path(tmp_path / "key").read_text().strip() == first
    report = check(tmp_path)
    assert (report.ok, report.size, report.sealed, report.problem) == (True, 7, 7, "")
    for note in kept:
        assert check(tmp_path, kept=note).ok
    # A later key alone does not vouch for what was before it.
    assert "is not this log's" in check(tmp_path, tmp_path / "key.pub").problem
    log = open_log()
    assert (await log.verify()).ok
    await log.close()
    assert check(tmp_path).ok


async def test_receipts_are_signed_by_the_key_in_use(open_log: Open) -> None:
    log = open_log()
    old = log.signer
    await log.rotate_key(actor="a", reason="")
    note = sign_receipt({"x": 1}, log.signer).note
    assert verify_receipt(note, Verifier.parse(log.public_key)).fields == {"x": 1}
    with pytest.raises(BadNote):
        verify_receipt(note, old.verifier)
    await log.close()


async def test_a_key_that_nobody_handed_over_to_is_refused(open_log: Open, tmp_path: Path) -> None:
    """Another key's segments behind a log, or a hand-over that the old key did not sign."""
    log = open_log()
    await log.record(act(1))
    await log.close()
    old = files.load_signer(tmp_path / "key", origin="x")
    new = files.make_next_key(tmp_path / "key", old.verifier.name)
    forged = keys.rotation_note(new.verifier, new)
    with pytest.raises(BadNote):
        keys.next_key(forged, old.verifier)
    assert keys.reachable(old.verifier, [forged]) == (old.verifier,)
    assert keys.reachable(old.verifier, [forged, keys.rotation_note(new.verifier, old)]) == (
        old.verifier,
        new.verifier,
    )
    other = Signer.of("another.log", new.private)
    with pytest.raises(BadNote, match="another log"):
        keys.next_key(keys.rotation_note(other.verifier, old), old.verifier)
    files.put_next_key_in_place(tmp_path / "key", new)
    with pytest.raises(CannotOpenLog):
        open_log()


async def test_a_missing_hand_over_is_found(open_log: Open, tmp_path: Path) -> None:
    log = open_log()
    await log.record(act(1))
    await log.rotate_key(actor="a", reason="")
    await log.record(act(2))
    await log.close()
    good = check(tmp_path)
    assert good.ok
    path = min((tmp_path / "log" / "segments").iterdir())
    data = path.read_bytes()
    end = segments.parse_header(data).length
    whole = [f for f in segments.frames(data, end) if b"log.rotate_key" not in f.payload]
    path.write_bytes(data[:end] + b"".join(segments.frame(f.kind, f.payload, f.leaf_hash) for f in whole))
    assert not check(tmp_path).ok
    path.write_bytes(data)
    # A thief of the retired key signs a shorter log: the checkpoint file has to be the key's in use.
    old = (tmp_path / "log" / "checkpoint").read_text()
    (tmp_path / "log" / "rotations").unlink()
    assert (tmp_path / "log" / "checkpoint").read_text() == old
    assert "the file checkpoint" in check(tmp_path).problem


@pytest.mark.parametrize("died", ["before the entry", "before the segment", "before the files"])
async def test_a_death_in_the_middle_leaves_one_key_and_a_log_that_verifies(
    open_log: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died: str
) -> None:
    log = open_log()
    await log.record(act(1))
    first = log.public_key
    with monkeypatch.context() as patch:

        def die(*_: object, **__: object) -> None:
            raise OSError(5, "died")

        if died == "before the files":
            patch.setattr(files, "put_next_key_in_place", die)
        elif died == "before the entry":
            patch.setattr(files, "add_rotation", die)
        else:
            patch.setattr("supervisord.actions.writer.SegmentFile.create", die)
        with pytest.raises(CannotRecord):
            await log.rotate_key(actor="a", reason="")
        await log.record(act(2))
        await log.close()
    assert files.next_path(tmp_path / "key").exists()
    log = open_log()
    assert not files.next_path(tmp_path / "key").exists()
    assert (log.public_key == first) == (died != "before the files")
    await log.record(act(3))
    assert (await log.verify()).ok
    # And it can be done again, in order.
    await log.rotate_key(actor="a", reason="")
    await log.record(act(4))
    await log.close()
    assert check(tmp_path).ok
    assert open_again(open_log, first)


def open_again(open_log: Open, first: str) -> bool:
    log = open_log()
    return log.public_key != first


async def test_a_death_before_the_checkpoint_file_was_rewritten_is_no_edit(open_log: Open, tmp_path: Path) -> None:
    log = open_log()
    await log.record(act(1))
    shutil.copy(tmp_path / "log" / "checkpoint", tmp_path / "older")
    await log.checkpoint()
    await log.rotate_key(actor="a", reason="")
    await log.close()
    before = max((tmp_path / "log" / "segments").iterdir())
    data = before.read_bytes()
    end = segments.parse_header(data).length
    only = next(segments.frames(data, end))
    before.write_bytes(data[:end] + segments.frame(only.kind, only.payload, only.leaf_hash))
    shutil.copy(tmp_path / "older", tmp_path / "log" / "checkpoint")
    assert check(tmp_path).ok
    log = open_log()
    await log.record(act(2))
    await log.close()
    assert check(tmp_path).ok
    # Once the new key has signed entries, what the old one signs beside them is refused.
    shutil.copy(tmp_path / "older", tmp_path / "log" / "checkpoint")
    assert "a key that the log has retired" in check(tmp_path).problem
    with pytest.raises(CannotOpenLog):
        open_log()
