"""Proofs as files: C2SP tlog-proof@v1 for one entry, tlog-witness's add-checkpoint form for growth (pure).

    c2sp.org/tlog-proof@v1          old SIZE
    extra BASE64(entry)             BASE64(hash), a line each
    index INDEX
    BASE64(hash), a line each       a checkpoint

    a checkpoint

The entry itself is the proof's `extra` data: its hash is the leaf, so the file says what it proves and stands alone.
https://github.com/C2SP/C2SP/blob/main/tlog-proof.md and tlog-witness.md
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from supervisord.actions import encoding, merkle
from supervisord.actions.checkpoint import Checkpoint, Verifier, open_checkpoint
from supervisord.actions.types import Action, BadNote

HEADER: Final = "c2sp.org/tlog-proof@v1"
PROOF_BYTES_MAX: Final = 128 * 1024
HASHES_MAX: Final = 63  # of a tree that nobody lives to see
_DIGITS_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Included:
    """An entry that is in the tree of a checkpoint."""

    seq: int
    time_ns: int
    action: Action
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class Continued:
    """A checkpoint whose tree begins with all that of an older one."""

    old: Checkpoint
    checkpoint: Checkpoint


def inclusion_text(index: int, entry: bytes, path: Sequence[bytes], note: str) -> str:
    lines = [HEADER, f"extra {_base64(entry)}", f"index {index}", *map(_base64, path)]
    return "\n".join(lines) + f"\n\n{note}"


def consistency_text(old: int, path: Sequence[bytes], note: str) -> str:
    return "\n".join([f"old {old}", *map(_base64, path)]) + f"\n\n{note}"


def check_proof(text: str, verifier: Verifier, kept: Checkpoint | None = None) -> Included | Continued:
    """What the proof proves under the log's key; a proof of growth is from `kept`. Raises BadNote."""
    if len(text) > PROOF_BYTES_MAX:
        raise BadNote(f"cannot read the proof: it is longer than {PROOF_BYTES_MAX} characters")
    head, found, note = text.partition("\n\n")
    lines = head.split("\n")
    if not found or len(lines) > HASHES_MAX + 3:
        raise BadNote("cannot read the proof: it is not its lines, an empty line and a checkpoint")
    checkpoint = open_checkpoint(note, verifier)
    if lines[0] == HEADER:
        return _included(lines[1:], checkpoint)
    return _continued(lines, checkpoint, kept)


def _included(lines: list[str], checkpoint: Checkpoint) -> Included:
    if len(lines) < 2 or not lines[0].startswith("extra "):  # noqa: PLR2004 - extra and index
        raise BadNote("cannot check the proof: it lacks the entry", remedy="take one from `stockadectl log prove SEQ`")
    entry = _unbase64(lines[0].removeprefix("extra "))
    index = _number(lines[1], "index ")
    path = _hashes(lines[2:])
    leaf = merkle.leaf_hash(entry)
    if not merkle.inclusion_holds(index, checkpoint.size, leaf, path, checkpoint.root):
        raise BadNote(f"cannot trust the proof: its entry is not entry {index + 1} of the tree that was signed")
    try:
        seq, time_ns, action = encoding.decode(entry)
    except encoding.NotCanonical as error:
        raise BadNote(f"cannot read the proof: its entry is malformed: {error}") from error
    if seq != index + 1:
        raise BadNote(f"cannot trust the proof: its entry says that it is {seq}, and stands at {index + 1}")
    return Included(seq, time_ns, action, checkpoint)


def _continued(lines: list[str], checkpoint: Checkpoint, kept: Checkpoint | None) -> Continued:
    size = _number(lines[0], "old ")
    if kept is None:
        raise BadNote(
            f"cannot check the proof: it is from a tree of {size} entries",
            remedy="give the checkpoint of that tree that you kept, with --since",
        )
    if kept.size != size:
        raise BadNote(f"cannot check the proof: it is from {size} entries, the kept checkpoint has {kept.size}")
    if not merkle.consistency_holds(size, checkpoint.size, kept.root, checkpoint.root, _hashes(lines[1:])):
        raise BadNote(
            f"cannot trust the proof: the tree of {checkpoint.size} entries does not continue that of {size}",
            remedy="one of the two was made from an altered log: keep both as evidence",
        )
    return Continued(kept, checkpoint)


def _hashes(lines: list[str]) -> list[bytes]:
    hashes = [_unbase64(line) for line in lines]
    if len(hashes) > HASHES_MAX or any(len(each) != merkle.HASH_BYTES for each in hashes):
        raise BadNote("cannot read the proof: a line of it is not a hash")
    return hashes


def _number(line: str, prefix: str) -> int:
    digits = line.removeprefix(prefix)
    decimal = digits.isascii() and digits.isdigit() and (digits == "0" or digits[0] != "0")
    if not line.startswith(prefix) or not decimal or len(digits) > _DIGITS_MAX:
        raise BadNote(f"cannot read the proof: it has no line `{prefix.strip()} NUMBER`")
    return int(digits)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadNote("cannot read the proof: a line of it is not base64") from error
