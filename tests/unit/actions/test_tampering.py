"""Every way to alter a log: each found and located by the offline verifier, and an unaltered log passes."""

from __future__ import annotations

import asyncio
import base64
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from supervisord.actions import encoding, merkle, segments
from supervisord.actions.log import ActionLog
from supervisord.actions.types import CannotOpenLog
from supervisord.actions.verify import verify
from tests.unit.actions.conftest import act

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from supervisord.actions.types import Report

ENTRIES = 24


def write(base: Path, entries: int, segment_bytes: int) -> Path:
    """A log of two segments or more, with checkpoints between the entries, closed in order."""

    async def record() -> None:
        log = ActionLog.open(
            base / "log", base / "key", now_ns=time.time_ns, segment_bytes=segment_bytes, checkpoint_every_entries=4
        )
        for number in range(entries):
            await log.record(act(number))
        await log.close()

    asyncio.run(record())
    return base


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sktest-log"), ENTRIES, 2500)


@pytest.fixture
def base(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def paths(base: Path) -> list[Path]:
    return sorted((base / "log" / "segments").iterdir())


def check(base: Path, kept: str | None = None) -> Report:
    return verify(base / "log", base / "key.pub", kept=kept)


def frames(path: Path) -> tuple[bytes, list[segments.Frame]]:
    data = path.read_bytes()
    length = segments.parse_header(data).length
    return data[:length], list(segments.frames(data, length))


def raw(frame: segments.Frame) -> bytes:
    return segments.frame(frame.kind, frame.payload, frame.leaf_hash)


def rewrite(path: Path, head: bytes, kept: list[segments.Frame]) -> None:
    path.write_bytes(head + b"".join(map(raw, kept)))


def put(path: Path, at: int, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([byte]))


def changed(frame: segments.Frame, change: Callable[[bytes], bytes]) -> segments.Frame:
    payload = change(frame.payload)
    return segments.Frame(frame.offset, frame.kind, merkle.leaf_hash(payload), payload)


def test_the_unaltered_log_passes(base: Path) -> None:
    assert len(paths(base)) >= 2
    report = check(base)
    assert (report.ok, report.size, report.sealed, report.problem) == (True, ENTRIES, ENTRIES, "")


def test_a_flipped_bit_in_any_byte_of_any_file_is_found(tmp_path: Path) -> None:
    """Header, length, hash, sum, payload, checkpoint; sealed segment or current; and the checkpoint file."""
    base = write(tmp_path, 6, 700)
    assert len(paths(base)) >= 2
    for path in [*paths(base), base / "log" / "checkpoint"]:
        data = path.read_bytes()
        for at in range(len(data)):
            put(path, at, data[at] ^ 1 << at % 8)
            report = check(base)
            put(path, at, data[at])
            assert not report.ok, f"byte {at} of {path.name}"
            assert path.name in report.problem
    assert check(base).ok


def test_a_flipped_bit_is_located(base: Path) -> None:
    path = paths(base)[1]
    data, (_, _, third, *_) = path.read_bytes(), frames(path)[1]
    first = segments.parse_header(data).first_seq
    at = third.offset + segments.FRAME_HEADER_BYTES + len(third.payload) - 3
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    report = check(base)
    assert report.size == first
    assert f"{path.name} at offset {third.offset}: entry {first + 1} is altered" in report.problem


def test_a_cut_at_any_byte_is_found(base: Path) -> None:
    path = paths(base)[-1]
    data = path.read_bytes()
    last_checkpoint = frames(path)[1][-1].offset
    for length in [*range(0, len(data), 23), *(frame.offset for frame in frames(path)[1])]:
        path.write_bytes(data[:length])
        report = check(base)
        # The last frame is the checkpoint that the file beside repeats: without it every entry is still there.
        assert report.ok == (length == last_checkpoint), length
        assert report.ok or path.name in report.problem


def test_a_cut_between_entries_names_what_is_gone(base: Path) -> None:
    path = paths(base)[-1]
    head, found = frames(path)
    kept = found[:3]
    size = segments.parse_header(head).first_seq - 1 + sum(frame.kind is segments.Kind.ENTRY for frame in kept)
    rewrite(path, head, kept)
    assert f"entries {size + 1} to {ENTRIES} are gone" in check(base).problem


def test_a_missing_segment_is_found(base: Path) -> None:
    first, second, *_ = paths(base)
    second_data = second.read_bytes()
    second.unlink()
    assert not check(base).ok
    second.write_bytes(second_data)
    first.unlink()
    assert "entries 1 to" in check(base).problem


def test_swapped_entries_are_found(base: Path) -> None:
    path = paths(base)[0]
    head, found = frames(path)
    found[1], found[2] = found[2], found[1]
    rewrite(path, head, found)
    assert "entry 1 is missing or moved: entry 2 is in its place" in check(base).problem


def test_a_dropped_entry_is_found(base: Path) -> None:
    path = paths(base)[0]
    head, found = frames(path)
    del found[3]
    rewrite(path, head, found)
    report = check(base)
    assert report.size == 2
    assert "entry 3 is missing" in report.problem


def test_an_inserted_entry_is_found(base: Path) -> None:
    path = paths(base)[0]
    head, found = frames(path)
    found.insert(3, found[2])
    rewrite(path, head, found)
    assert "entry 3 is missing or moved: entry 2 is in its place" in check(base).problem


def test_recomputed_hashes_are_found_and_located_between_checkpoints(base: Path) -> None:
    path = paths(base)[0]
    head, found = frames(path)
    found[2] = changed(found[2], lambda payload: payload.replace(b"allowed", b"denied!"))
    rewrite(path, head, found)
    report = check(base)
    assert "was altered and its hash recomputed" in report.problem
    assert report.sealed < 2


def test_renumbered_entries_behind_a_drop_are_found(base: Path) -> None:
    """Drop one, renumber all that follow with right hashes, leave their checkpoints out: the file's signs more."""
    path = paths(base)[-1]
    head, found = frames(path)
    first = segments.parse_header(head).first_seq
    entries = [frame for frame in found[1:] if frame.kind is segments.Kind.ENTRY][1:]
    renumbered = [
        changed(frame, lambda payload, seq=seq: encoding.encode(seq, *encoding.decode(payload)[1:])[0])  # type: ignore[misc]
        for seq, frame in enumerate(entries, start=first)
    ]
    rewrite(path, head, [found[0], *renumbered])
    assert f"to {ENTRIES} are gone" in check(base).problem


def test_dropped_checkpoints_are_found(base: Path) -> None:
    path = paths(base)[-1]
    head, found = frames(path)
    rewrite(path, head, found[1:])
    assert "first checkpoint is missing" in check(base).problem
    rewrite(path, head, found)
    (base / "log" / "checkpoint").unlink()
    assert "checkpoint is missing" in check(base).problem


def test_a_restored_older_segment_is_found(base: Path) -> None:
    """The file as it was some entries ago is valid in itself; the checkpoint beside it knows of more."""
    path = paths(base)[-1]
    head, found = frames(path)
    checkpoints = [at for at, frame in enumerate(found) if frame.kind is segments.Kind.CHECKPOINT]
    rewrite(path, head, found[: checkpoints[-2] + 1])
    assert "are gone" in check(base).problem


async def test_a_rollback_of_everything_is_found_by_who_kept_a_checkpoint(base: Path) -> None:
    shutil.copytree(base / "log", base / "older")
    log = ActionLog.open(base / "log", base / "key", now_ns=time.time_ns)
    await log.record(act(99))
    kept = await log.checkpoint()
    await log.close()
    assert check(base, kept).ok
    shutil.rmtree(base / "log")
    (base / "older").rename(base / "log")
    assert check(base).ok  # the limit of what files alone can show
    assert "entries 25 to 25 are gone: the kept checkpoint covers them" in check(base, kept).problem


async def test_another_history_is_found_by_who_kept_a_checkpoint(base: Path) -> None:
    """Whoever holds the key can rewrite the log, but not what others have of it."""
    kept = (base / "log" / "checkpoint").read_text()
    shutil.rmtree(base / "log")
    log = ActionLog.open(base / "log", base / "key", now_ns=time.time_ns)
    await log.append_all([act(number) for number in range(ENTRIES + 5)])
    await log.close()
    assert check(base).ok
    assert "was altered" in check(base, kept).problem
    assert not check(base, "nonsense").ok


def open_it(base: Path) -> ActionLog:
    return ActionLog.open(base / "log", base / "key", now_ns=time.time_ns, checkpoint_every_entries=10**6)


@pytest.mark.parametrize("cut", [1, 39, 41, 100])
async def test_a_torn_tail_is_cut_off_kept_and_told(base: Path, cut: int) -> None:
    log = open_it(base)
    await log.close()
    path = paths(base)[-1]
    whole = path.read_bytes()
    payload, _ = encoding.encode(ENTRIES + 1, 1, act(1))
    torn = segments.entry_frame(payload, merkle.leaf_hash(payload))[:cut]
    path.write_bytes(whole + torn)
    assert f"entry {ENTRIES + 1} is cut off or torn" in check(base).problem
    log = open_it(base)
    (told,) = await log.query(after_seq=ENTRIES)
    assert (told.action.verb, told.action.details["offset"], told.action.details["bytes"]) == (
        "log.recover",
        len(whole),
        cut,
    )
    assert (base / "log" / str(told.action.details["saved"])).read_bytes() == torn
    await log.close()
    assert check(base).ok


async def test_an_edit_is_not_taken_for_a_crash(base: Path) -> None:
    """Damage before a checkpoint, entries that are gone: opening refuses, and touches nothing."""
    path = paths(base)[-1]
    head, found = frames(path)
    data = path.read_bytes()
    at = found[1].offset
    for altered in (
        data[: at + 50] + b"\xff" + data[at + 51 :],
        data[: at + 3] + b"\xff" + data[at + 4 :],
        data[: found[2].offset],
        head,
        b"\x00" * len(data),
    ):
        path.write_bytes(altered)
        with pytest.raises(CannotOpenLog) as raised:
            open_it(base)
        assert "evidence" in raised.value.remedy
        assert path.read_bytes() == altered
    path.write_bytes(data)
    (base / "log" / "checkpoint").rename(base / "log" / "away")
    with pytest.raises(CannotOpenLog, match="checkpoint file is missing"):
        open_it(base)
    (base / "log" / "away").rename(base / "log" / "checkpoint")
    shutil.rmtree(base / "log" / "segments")
    with pytest.raises(CannotOpenLog, match="segments are gone"):
        open_it(base)


def test_the_root_of_a_report_is_the_trees(base: Path) -> None:
    leaves = [frame.leaf_hash for path in paths(base) for frame in frames(path)[1] if frame.kind is segments.Kind.ENTRY]
    assert check(base).root == base64.b64encode(merkle.root_of(leaves)).decode()
