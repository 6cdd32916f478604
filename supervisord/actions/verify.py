"""Verification of a log directory with nothing but a public key: no daemon, no private key, no index."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisord.actions import encoding, keys, redaction, segments
from supervisord.actions.check import Altered, Checker
from supervisord.actions.checkpoint import Checkpoint, Verifier
from supervisord.actions.files import CHECKPOINT, read_checkpoint, read_public, read_rotations, segment_paths
from supervisord.actions.merkle import Frontier
from supervisord.actions.types import BadNote, Report

PAUSE_ENTRIES: Final = 512


@dataclass(frozen=True, slots=True)
class Until:
    """Where to stop in a log that is being written: this segment, this many bytes of it."""

    first_seq: int
    end: int
    note: str | None  # its newest checkpoint then


def verify(
    directory: Path,
    public_key: Verifier | Path | str,
    *,
    kept: str | Sequence[str] | None = None,
    until: Until | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Report:
    """Check every byte of the log in `directory`.

    `public_key` is a Verifier, the path of a .pub file or its text: the log's first key, from which later ones are
    followed. `kept` are checkpoints that the caller kept from earlier: with them a rollback of the whole directory is
    found, too. `pause` is called now and then.
    """
    verifier = public_key
    if isinstance(verifier, Path):
        verifier = read_public(verifier)
    elif isinstance(verifier, str):
        verifier = Verifier.parse(verifier)
    checker = Checker(verifier)
    notes = [kept] if isinstance(kept, str) else list(kept or ())
    problem = ""
    first_seq = 1
    try:
        first_seq = _check(directory, checker, notes, until=until, pause=pause)
    except _Found as found:
        problem = str(found)
    tree = checker.final_tree()
    return Report(
        ok=not problem,
        size=tree.size,
        root=base64.b64encode(tree.root()).decode(),
        problem=problem,
        sealed=checker.sealed,
        origin=verifier.name,
        first_seq=first_seq,
        redacted=len(checker.redacted),
    )


class _Found(Exception):  # noqa: N818 - a finding; its text is the report's problem
    pass


def _vouched(
    checker: Checker, verifiers: Sequence[Verifier], kept: Sequence[str], newest: str | None
) -> list[tuple[str, Checkpoint]]:
    """The checkpoints outside the segments, handed to the checker."""
    found = []
    named = [("the kept checkpoint", note) for note in kept]
    if newest is not None:
        named.append((f"the file {CHECKPOINT}", newest))
    for what, note in named:
        try:
            checkpoint = keys.open_by_any(note, verifiers)
        except BadNote as error:
            raise _Found(f"{what}: {error}") from error
        if checker.kept.setdefault(checkpoint.size, checkpoint.root) != checkpoint.root:
            raise _Found(f"{what}: signs another root over {checkpoint.size} entries than an earlier one did")
        found.append((what, checkpoint))
    return found


def _segments(
    paths: Sequence[tuple[int, Path]], checker: Checker, until: Until | None, pause: Callable[[], None]
) -> tuple[str, int]:
    """Check every segment; the name and length of the last."""
    name, length = "", 0
    for first_seq, path in paths:
        if until is not None and first_seq > until.first_seq:
            break
        data = path.read_bytes()
        if until is not None and first_seq == until.first_seq:
            data = data[: until.end]
        try:
            _segment(path, data, checker, pause)
        except segments.Damaged as error:
            raise _Found(_damage(path, data, error, checker)) from error
        except Altered as error:
            _name_tampered(paths, checker, error)
            raise _Found(f"{path.name} at offset {error.offset}: {error.cause}") from error
        name, length = path.name, len(data)
    return name, length


def _check(
    directory: Path, checker: Checker, kept: Sequence[str], *, until: Until | None, pause: Callable[[], None]
) -> int:
    """The first entry that is there."""
    newest = read_checkpoint(directory) if until is None else until.note
    verifiers = keys.reachable(checker.verifier, read_rotations(directory))
    vouched = _vouched(checker, verifiers, kept, newest)
    paths = segment_paths(directory)
    if not paths:
        raise _Found(f"there are no segments in {directory}")
    first_seq, first = paths[0]
    if first_seq > 1:
        _begin_behind_retired(first, checker, verifiers, [checkpoint for _, checkpoint in vouched[: len(kept)]])
    name, length = _segments(paths, checker, until, pause)
    for what, checkpoint in vouched:
        if checkpoint.size > checker.size:
            gone = f"entries {checker.size + 1} to {checkpoint.size} are gone: {what} covers them"
            raise _Found(f"{name} at offset {length}: {gone}")
    if newest is None:
        raise _Found(f"the file {CHECKPOINT} is missing: whether entries were cut off cannot be told")
    if name != segments.file_name(checker.size + 1) and not _is_by(newest, checker.verifier):
        raise _Found(f"the file {CHECKPOINT} is signed by a key that the log has retired")
    if checker.retired < first_seq - 1:
        raise _Found(
            f"{first.name} at offset 0: entries {checker.retired + 1} to {first_seq - 1} are missing, and no entry "
            f"says that they were retired"
        )
    unordered = checker.unordered()
    if unordered is not None:
        raise _Found(_tampered(paths, *unordered))
    return first_seq


def _tampered(paths: Sequence[tuple[int, Path]], found: redaction.Redacted, wrong: str) -> str:
    name = next(path.name for first, path in reversed(paths) if first <= found.seq)
    return f"{name} at offset {found.offset}: entry {found.seq} was tampered with: its content is gone, and {wrong}"


def _name_tampered(paths: Sequence[tuple[int, Path]], checker: Checker, altered: Altered) -> None:
    """Name the one among the entries in question whose redaction has another hash than its order says.

    Orders stand behind what they order, where the check has not come yet; they are taken unproven, to locate only.
    """
    suspects = {each.mark.order: each for seq, each in checker.redacted.items() if altered.first <= seq <= altered.last}
    for first, path in paths if suspects else ():
        data = path.read_bytes()
        seq = first - 1
        try:
            for frame in segments.frames(data, segments.parse_header(data).length):
                seq += frame.kind is not segments.Kind.CHECKPOINT
                if frame.kind is segments.Kind.ENTRY and seq in suspects:
                    order = redaction.order_of(seq, encoding.decode(frame.payload)[2])
                    if order is not None and order.leaf_hash != suspects[seq].leaf_hash.hex():
                        wrong = f"its frame has another hash than entry {seq} says that orders it"
                        raise _Found(_tampered(paths, suspects[seq], wrong)) from altered
        except (segments.Damaged, encoding.NotCanonical):
            continue


def _is_by(note: str, verifier: Verifier) -> bool:
    try:
        keys.open_by_any(note, (verifier,))
    except BadNote:
        return False
    return True


def _begin_behind_retired(
    path: Path, checker: Checker, verifiers: Sequence[Verifier], kept: Sequence[Checkpoint]
) -> None:
    """Begin with the tree that the first segment left begins with; its first frame has to sign it, as of all segments.

    Whether the entries before were taken away by the log itself is judged at the end: a later entry says so.
    """
    data = path.read_bytes()
    try:
        header = segments.parse_header(data)
        first = segments.frame_at(data, header.length)
    except segments.Damaged as error:
        raise _Found(_damage(path, data, error, checker)) from error
    for verifier in verifiers:
        try:
            keys.open_by_any(first.payload.decode("utf-8", "replace"), (verifier,))
        except BadNote:
            continue
        checker.verifier = verifier
    checker.tree = header.tree()
    size = checker.tree.size
    if checker.kept.get(size, checker.tree.root()) != checker.tree.root():
        raise _Found(f"{path.name} at offset 0: its tree of {size} entries is not the one that was signed before")
    if kept and max(checkpoint.size for checkpoint in kept) < size:
        raise _Found(
            f"{path.name} at offset 0: entries up to {size} are not there, and no kept checkpoint is newer: "
            f"nothing can be compared"
        )


def _segment(path: Path, data: bytes, checker: Checker, pause: Callable[[], None]) -> None:
    header = segments.parse_header(data)
    named = segments.first_seq_of(path.name)
    if header.first_seq != named:
        raise segments.Damaged(0, f"the header belongs to the segment of entry {header.first_seq}", torn=False)
    if header.first_seq != checker.size + 1:
        gone = f"entries {checker.size + 1} to {header.first_seq - 1} are missing"
        again = f"it begins with entry {header.first_seq} although the segment before ends with entry {checker.size}"
        cause = gone if header.first_seq > checker.size + 1 else again
        raise Altered(cause, offset=0, first=checker.size + 1, last=header.first_seq)
    count = 0
    signed = False
    for count, frame in enumerate(segments.frames(data, header.length)):
        if count == 0:
            checker.begin_segment(frame)
        checker.take(frame)
        if count == 0:
            signed = frame.kind is segments.Kind.CHECKPOINT and checker.tree.size == header.first_seq - 1
            _begins_as_signed(header, checker.tree, signed=signed)
        if count % PAUSE_ENTRIES == 0:
            pause()
    if not signed:
        raise segments.Damaged(header.length, "the file ends before its first checkpoint", torn=True)


def _begins_as_signed(header: segments.Header, tree: Frontier, *, signed: bool) -> None:
    first = header.first_seq
    if not signed:
        raise Altered("the segment's first checkpoint is missing", offset=header.length, first=first, last=first)
    if tree.hashes != list(header.frontier):
        raise Altered("the header holds another tree than the entries give", offset=0, first=first, last=first)


def _damage(path: Path, data: bytes, error: segments.Damaged, checker: Checker) -> str:
    seq = checker.size + 1
    claimed = encoding.seq_of(data[error.offset + segments.FRAME_HEADER_BYTES :][:16])
    name = f"entry {seq}" if claimed in {seq, 0} else f"entry {seq} (its bytes say {claimed})"
    kind = "cut off or torn" if error.torn else "altered"
    return f"{path.name} at offset {error.offset}: {name} is {kind}: {error.cause}"
