"""A strict reader of tar: bytes in, members out; no files, so that it can be tested with bytes alone.

Two readers of one archive must not see two different things, so whatever programs differ on is refused: sizes on
entries without content, negative or odd numbers, two names for one entry, sparse files. Sources: pax(1), tar(5).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from sandbox.images.limits import PAX_BYTES_MAX, BadImage, printable

BLOCK: Final = 512
CHUNK_BYTES: Final = 256 << 10
SIZE_MAX: Final = (1 << 63) - 1
_DIGITS_MAX: Final = 20
_POSIX: Final = b"ustar\x0000"
_GNU: Final = b"ustar  \x00"
_NO_CONTENT: Final = b"123456"
_XATTRS: Final = (b"SCHILY.xattr.", b"LIBARCHIVE.xattr.")


class Kind(Enum):
    FILE = "regular file"
    HARDLINK = "hard link"
    SYMLINK = "symbolic link"
    DIRECTORY = "directory"
    DEVICE = "device"
    FIFO = "fifo"


_KINDS: Final = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.DEVICE,
    b"4": Kind.DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


@dataclass(frozen=True, slots=True)
class Member:
    name: bytes
    kind: Kind
    size: int
    mode: int
    uid: int
    mtime: int
    link: bytes
    xattrs: int
    """How many extended attributes it brings; none is ever set."""


@dataclass(slots=True)
class _Extra:
    """What headers before the member's own say of it."""

    pax: dict[bytes, bytes] = field(default_factory=dict)
    name: bytes | None = None
    link: bytes | None = None


class Reader:
    """Yields the members of an archive in order.

    `read(n)` gives n bytes, fewer only at the end; `skip(n)` passes over n. `position` is how many were taken so far.
    """

    def __init__(self, read: Callable[[int], bytes], skip: Callable[[int], None] | None = None) -> None:
        self._read = read
        self._skip = skip
        self._content = 0
        self._padding = 0
        self.position = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def content(self) -> Iterator[bytes]:
        """Yield the content of the member that came last."""
        while self._content:
            data = self._take(min(self._content, CHUNK_BYTES))
            self._content -= len(data)
            yield data

    def _take(self, count: int) -> bytes:
        data = self._read(count)
        self.position += len(data)
        if len(data) != count:
            raise BadImage("tar archive: it ends in the middle of an entry")
        return data

    def _pass(self) -> None:
        """Pass over what is left of the last member."""
        left = self._content + self._padding
        self._content = self._padding = 0
        if self._skip is not None and left:
            self._skip(left)
            self.position += left
            return
        while left:
            left -= len(self._take(min(left, CHUNK_BYTES)))

    def _next(self) -> Member | None:
        extra = _Extra()
        found = False
        while True:
            self._pass()
            block = self._read(BLOCK)
            self.position += len(block)
            if not block or (len(block) == BLOCK and not any(block)):
                if found:
                    raise BadImage("tar archive: it ends after a header that belongs to an entry")
                return None
            header = _header(block)
            kind = header.kind
            if kind in b"xgLK":
                found = found or kind != b"g"
                self._extend(header, extra)
                continue
            return self._member(header, extra)

    def _extend(self, header: "_Header", extra: _Extra) -> None:
        """Take a header that is about the next member (pax, GNU long names)."""
        if header.size > PAX_BYTES_MAX:
            raise BadImage(f"tar archive: an extended header of more than {PAX_BYTES_MAX} bytes")
        data = self._take(header.size)
        self._padding = -header.size % BLOCK
        if header.kind == b"x":
            if extra.pax:
                raise BadImage("tar archive: two extended headers for one entry")
            extra.pax = _pax(data)
        elif header.kind == b"g":
            if set(_pax(data)) & {b"path", b"linkpath", b"size", b"uid"}:
                raise BadImage("tar archive: a global header names or sizes entries")
        elif header.kind == b"L":
            extra.name = _once(extra.name, data)
        else:
            extra.link = _once(extra.link, data)

    def _member(self, header: "_Header", extra: _Extra) -> Member:
        pax = extra.pax
        name = _chosen(pax.get(b"path"), extra.name, header.name)
        shown = printable(name)
        kind = _KINDS.get(header.kind)
        if kind is None:
            what = "a sparse file" if header.kind == b"S" else f"of unknown type {printable(header.kind)}"
            raise BadImage(f"entry {shown}: it is {what}", remedy="build the image anew without it")
        if any(key.startswith(b"GNU.sparse.") for key in pax):
            raise BadImage(f"entry {shown}: it is a sparse file", remedy="build the image anew without it")
        size = _decimal(pax[b"size"], f"entry {shown}: its size") if b"size" in pax else header.size
        if header.kind in _NO_CONTENT and size:
            raise BadImage(f"entry {shown}: a {kind.value} with content")
        uid = _decimal(pax[b"uid"], f"entry {shown}: its uid") if b"uid" in pax else header.uid
        self._content, self._padding = size, -size % BLOCK
        return Member(
            name=name,
            kind=kind,
            size=size,
            mode=header.mode,
            uid=uid,
            mtime=header.mtime,
            link=_chosen(pax.get(b"linkpath"), extra.link, header.link),
            xattrs=sum(key.startswith(_XATTRS) for key in pax),
        )


@dataclass(frozen=True, slots=True)
class _Header:
    name: bytes
    mode: int
    uid: int
    size: int
    mtime: int
    kind: bytes
    link: bytes


def _header(block: bytes) -> _Header:
    if len(block) != BLOCK:
        raise BadImage("tar archive: it ends in the middle of a header")
    # The sum counts its own field as blanks.
    if _number(block[148:156], "checksum") != sum(block) - sum(block[148:156]) + 8 * 32:
        raise BadImage("tar archive: the checksum of a header is wrong")
    if block[257:265] not in (_POSIX, _GNU):
        raise BadImage("tar archive: a header is neither POSIX nor GNU")
    name = _text(block[0:100])
    prefix = _text(block[345:500]) if block[257:265] == _POSIX else b""
    return _Header(
        name=prefix + b"/" + name if prefix else name,
        mode=_number(block[100:108], "mode"),
        uid=_number(block[108:116], "uid"),
        size=_number(block[124:136], "size"),
        mtime=_number(block[136:148], "mtime", signed=True),
        kind=block[156:157],
        link=_text(block[157:257]),
    )


def _text(raw: bytes) -> bytes:
    return raw.split(b"\0", 1)[0]


def _number(raw: bytes, what: str, *, signed: bool = False) -> int:
    """Read a number field: octal digits, or base 256 where the first bit says so (GNU)."""
    if raw[0] & 0x80:
        value = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
        if raw[0] & 0x40:
            if not signed:
                raise BadImage(f"tar archive: a negative {what}")
            value -= 1 << (8 * len(raw) - 1)
    else:
        digits = raw.strip(b" \0")
        if digits.strip(b"01234567"):
            raise BadImage(f"tar archive: {what} {printable(digits)} is not octal")
        value = int(digits or b"0", 8)
    if value > SIZE_MAX:
        raise BadImage(f"tar archive: a {what} beyond {SIZE_MAX}")
    return value


def _decimal(raw: bytes, what: str) -> int:
    if not raw or len(raw) > _DIGITS_MAX or raw.strip(b"0123456789") or int(raw) > SIZE_MAX:
        raise BadImage(f"{what} {printable(raw)} is not a whole number up to {SIZE_MAX}")
    return int(raw)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Read records: a length that counts all of the record, a blank, KEY=VALUE, a line feed."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        blank = data.find(b" ", at, at + _DIGITS_MAX)
        digits = data[at:blank] if blank > at else b""
        if not digits or digits.strip(b"0123456789"):
            raise BadImage("tar archive: an extended header without a length")
        end = at + int(digits)
        record = data[blank + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end > len(data) or end <= blank + 1 or not record.endswith(b"\n") or not equals or not key or key in records:
            raise BadImage("tar archive: an extended header that is cut, doubled or without a key")
        records[key] = value
        at = end
    return records


def _once(before: bytes | None, data: bytes) -> bytes:
    if before is not None:
        raise BadImage("tar archive: two long names for one entry")
    if not data.endswith(b"\0") or b"\0" in data[:-1]:
        raise BadImage("tar archive: a long name with a NUL byte in it, or without one at its end")
    return data[:-1]


def _chosen(pax: bytes | None, gnu: bytes | None, own: bytes) -> bytes:
    if pax is not None and gnu is not None:
        raise BadImage("tar archive: two long names for one entry")
    return pax if pax is not None else gnu if gnu is not None else own
