"""Segments: how entries and checkpoints lie in files, and how a cut tail is told from an edit (pure).

    segment = header frame*
    header  = magic[16] version:u16 hashes:u16 first_seq:u64 frontier[32 * hashes] sha256-of-all-before[32]
    frame   = kind:u8 length:u24 leaf_hash[32] crc32-of-these-36:u32 payload[length]

Numbers are big-endian. The frontier is the tree before the segment's first entry, so that one segment can be checked
and continued without reading those before it; its first frame is a checkpoint that signs that very tree. `leaf_hash`
is RFC 6962's over the payload. No byte is without a check: a flipped one is a header that does not fit its sum, a
payload that does not fit its hash, or a checkpoint whose signature is wrong.

A redacted entry's frame keeps length and leaf hash, so that nothing moves and every root stays; its payload is

    mark    = order:u64 time_seconds:u64 crc32-of-these-and-the-leaf-hash:u32 zero*

`order` is the seq of the entry that orders the redaction: by whom, when and why is written there, and only there.

A crash leaves a *prefix* of what was being written. So a frame that the end of the file interrupts is torn; a whole
frame that contradicts itself is an edit, or a disk that lost a page it had not yet promised to keep. The two are told
apart by checkpoints: those are only written after what they cover is durable, so damage before one is never a crash.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from supervisord.actions.merkle import HASH_BYTES, Frontier, leaf_hash
from supervisord.actions.types import ENTRY_BYTES_MAX

MAGIC: Final = b"stockade-actions"
VERSION: Final = 1
SUFFIX: Final = ".seg"
FRONTIER_HASHES_MAX: Final = 64
PAYLOAD_BYTES_MAX: Final = ENTRY_BYTES_MAX

_FIXED: Final = struct.Struct(">16sHHQ")
_FRAME: Final = struct.Struct(">I32s")
_CRC: Final = struct.Struct(">I")
FRAME_HEADER_BYTES: Final = _FRAME.size + _CRC.size
_MARK: Final = struct.Struct(">QQ")
MARK_BYTES: Final = _MARK.size + _CRC.size
_KIND_SHIFT: Final = 24
_LENGTH_MASK: Final = (1 << _KIND_SHIFT) - 1
_SEQ_DIGITS: Final = 20


class Kind(IntEnum):
    ENTRY = 1
    CHECKPOINT = 2
    REDACTED = 3


_KINDS: Final = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Header:
    first_seq: int
    frontier: tuple[bytes, ...]
    length: int

    def tree(self) -> Frontier:
        return Frontier(self.first_seq - 1, list(self.frontier))


@dataclass(frozen=True, slots=True)
class Frame:
    offset: int
    kind: Kind
    leaf_hash: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands where a redacted entry was."""

    order: int  # seq of the entry that orders it
    time_seconds: int  # when the entry was recorded


class Damaged(Exception):  # noqa: N818 - a finding, caught where it is judged
    """Bytes at `offset` that no writer wrote so. `torn`: they are a prefix of something, as a crash leaves it."""

    def __init__(self, offset: int, cause: str, *, torn: bool) -> None:
        super().__init__(cause)
        self.offset = offset
        self.cause = cause
        self.torn = torn


def file_name(first_seq: int) -> str:
    return f"{first_seq:0{_SEQ_DIGITS}d}{SUFFIX}"


def first_seq_of(name: str) -> int | None:
    """The first seq that a segment's file name says, None for other files."""
    stem = name.removesuffix(SUFFIX)
    if not name.endswith(SUFFIX) or len(stem) != _SEQ_DIGITS or not (stem.isascii() and stem.isdigit()):
        return None
    return int(stem)


def header(tree: Frontier) -> bytes:
    fixed = _FIXED.pack(MAGIC, VERSION, len(tree.hashes), tree.size + 1) + b"".join(tree.hashes)
    return fixed + hashlib.sha256(fixed).digest()


def parse_header(data: bytes) -> Header:
    if len(data) < _FIXED.size:
        raise Damaged(0, "the file ends within its header", torn=True)
    magic, version, count, first_seq = _FIXED.unpack_from(data)
    end = _FIXED.size + count * HASH_BYTES
    if magic != MAGIC or version != VERSION or count > FRONTIER_HASHES_MAX or first_seq < 1:
        raise Damaged(0, "the header is not one of a segment", torn=False)
    if len(data) < end + HASH_BYTES:
        raise Damaged(0, "the file ends within its header", torn=True)
    hashes = tuple(data[at : at + HASH_BYTES] for at in range(_FIXED.size, end, HASH_BYTES))
    parsed = Header(first_seq, hashes, end + HASH_BYTES)
    if hashlib.sha256(data[:end]).digest() != data[end : end + HASH_BYTES] or not parsed.tree().fits():
        raise Damaged(0, "the header does not fit its checksum", torn=False)
    return parsed


def frame(kind: Kind, payload: bytes, digest: bytes) -> bytes:
    head = _FRAME.pack(kind << _KIND_SHIFT | len(payload), digest)
    return head + _CRC.pack(zlib.crc32(head)) + payload


def entry_frame(payload: bytes, digest: bytes) -> bytes:
    return frame(Kind.ENTRY, payload, digest)


def redacted_frame(entry: Frame, mark: Mark) -> bytes:
    """What takes the place of an entry's frame, as long as that; ValueError where a mark is longer."""
    if len(entry.payload) < MARK_BYTES:
        raise ValueError(f"an entry of {len(entry.payload)} bytes has no room for a mark of {MARK_BYTES}")
    packed = _MARK.pack(mark.order, mark.time_seconds)
    payload = packed + _CRC.pack(zlib.crc32(packed + entry.leaf_hash))
    return frame(Kind.REDACTED, payload.ljust(len(entry.payload), b"\0"), entry.leaf_hash)


def mark_of(redacted: Frame) -> Mark:
    """The mark in a whole frame of kind REDACTED."""
    return Mark(*_MARK.unpack_from(redacted.payload))


def checkpoint_frame(note: str) -> bytes:
    payload = note.encode()
    return frame(Kind.CHECKPOINT, payload, leaf_hash(payload))


def frames(data: bytes, start: int) -> Iterator[Frame]:
    """The frames from `start`, each checked against its sum and hash; raises Damaged at the first that is not whole."""
    at, end = start, len(data)
    while at < end:
        found = frame_at(data, at)
        yield found
        at += FRAME_HEADER_BYTES + len(found.payload)


def frame_at(data: bytes, at: int, *, base: int = 0) -> Frame:
    """The frame at `at`; offsets in what is raised and returned count from `base` bytes earlier."""
    body = at + FRAME_HEADER_BYTES
    if body > len(data):
        raise Damaged(base + at, "the file ends within a frame's header", torn=True)
    word, digest = _FRAME.unpack_from(data, at)
    length, kind = word & _LENGTH_MASK, _KINDS.get(word >> _KIND_SHIFT)
    if zlib.crc32(data[at : at + _FRAME.size]) != _CRC.unpack_from(data, at + _FRAME.size)[0]:
        raise Damaged(base + at, "a frame's header does not fit its checksum", torn=False)
    if kind is None or length > PAYLOAD_BYTES_MAX:
        raise Damaged(base + at, "a frame has an unknown kind or an impossible length", torn=False)
    payload = data[body : body + length]
    if len(payload) < length:
        raise Damaged(base + at, "the file ends within a frame", torn=True)
    if kind is Kind.REDACTED:
        _check_mark(base + at, payload, digest)
    elif leaf_hash(payload) != digest:
        raise Damaged(base + at, "a frame's content does not fit its hash", torn=False)
    return Frame(base + at, kind, digest, payload)


def _check_mark(offset: int, payload: bytes, digest: bytes) -> None:
    packed, rest = payload[: _MARK.size], payload[_MARK.size :]
    if rest[: _CRC.size] != _CRC.pack(zlib.crc32(packed + digest)) or any(rest[_CRC.size :]):
        raise Damaged(offset, "the mark of a redacted entry does not fit its checksum", torn=False)


def intact_frames_after(data: bytes, start: int) -> Iterator[Frame]:
    """Whole frames anywhere behind a damaged place, found by trying every offset."""
    at = start
    while at + FRAME_HEADER_BYTES <= len(data):
        if data[at] in _KINDS:
            try:
                found = frame_at(data, at)
            except Damaged:
                pass
            else:
                yield found
                at += FRAME_HEADER_BYTES + len(found.payload)
                continue
        at += 1
