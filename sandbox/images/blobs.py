"""Where an image's bytes come from: a layout whose files somebody else opens, or an archive; digests held on the way.

What is read is read once, from a descriptor: nothing can be another thing between the check and the use.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from sandbox.images.archive import CHUNK_BYTES, Kind, Member, Reader
from sandbox.images.documents import Layer
from sandbox.images.entries import path_parts
from sandbox.images.limits import (
    ARCHIVE_MEMBERS_MAX,
    DOCUMENT_BYTES_MAX,
    RATIO_FROM_BYTES,
    BadImage,
    ImageLimits,
    printable,
)

_GZIP_MAGIC: Final = b"\x1f\x8b"
_GZIP_WBITS: Final = 31  # zlib.h, inflateInit2: a gzip header and its checksum
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a file that is open."""

    fd: int
    offset: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self.fd, min(count, max(self.size - offset, 0)), self.offset + offset)

    def chunks(self) -> Iterator[bytes]:
        at = 0
        while data := self.read(at, CHUNK_BYTES):
            at += len(data)
            yield data
        if at != self.size:
            raise BadImage("the image: a file of it became shorter while it was read", remedy="try again")


class Source(Protocol):
    def find(self, name: str) -> Extent | None:
        """Return the file of that name; None where there is none."""


class Layout:
    """An OCI layout in a directory; `ask` has its files opened by somebody who may."""

    def __init__(self, ask: Callable[[str], int | None]) -> None:
        self._ask = ask
        self._last: int | None = None

    def find(self, name: str) -> Extent | None:
        if self._last is not None:
            os.close(self._last)
        self._last = self._ask(name)
        return None if self._last is None else Extent(self._last, 0, os.fstat(self._last).st_size)


class _Cursor:
    """Reads an extent from its start on."""

    def __init__(self, extent: Extent) -> None:
        self._extent = extent
        self._at = 0

    def read(self, count: int) -> bytes:
        data = self._extent.read(self._at, count)
        self._at += len(data)
        return data

    def skip(self, count: int) -> None:
        self._at += count
        if self._at > self._extent.size:
            raise BadImage("tar archive: it ends in the middle of an entry")


class Archive:
    """An image in a tar archive: members by name. A link is taken for the member it names (docker save makes such)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._members: dict[bytes, Extent] = {}
        self._links: dict[bytes, bytes] = {}
        whole = Extent(fd, 0, os.fstat(fd).st_size)
        if whole.read(0, 2) == _GZIP_MAGIC or whole.read(0, 4) == _ZSTD_MAGIC:
            raise BadImage("the archive is compressed as a whole", remedy="uncompress it, say with `gunzip`")
        cursor = _Cursor(whole)
        reader = Reader(cursor.read, cursor.skip)
        for count, member in enumerate(reader, start=1):
            if count > ARCHIVE_MEMBERS_MAX:
                raise BadImage(f"the archive has more than {ARCHIVE_MEMBERS_MAX} members")
            self._add(member, reader.position)
        for name, target in self._links.items():
            if target in self._members:
                self._members.setdefault(name, self._members[target])

    def _add(self, member: Member, position: int) -> None:
        name = b"/".join(path_parts(member.name))
        if name in self._members or name in self._links:
            raise BadImage(f"the archive has {printable(name)} twice")
        if member.kind is Kind.FILE:
            self._members[name] = Extent(self._fd, position, member.size)
        elif member.kind is Kind.SYMLINK:
            self._links[name] = os.path.normpath(os.path.dirname(name) + b"/" + member.link)  # noqa: PTH120 - bytes
        elif member.kind is Kind.HARDLINK:
            self._links[name] = os.path.normpath(member.link)

    def find(self, name: str) -> Extent | None:
        return self._members.get(os.path.normpath(name).encode("utf-8", "surrogateescape"))


def document(source: Source, name: str, what: str) -> bytes:
    """Return a whole small file; raises `BadImage`."""
    extent = source.find(name)
    if extent is None:
        raise BadImage(f"{what}: there is no {printable(name.encode('utf-8', 'replace'))} in the image")
    if extent.size > DOCUMENT_BYTES_MAX:
        raise BadImage(f"{what}: longer than {DOCUMENT_BYTES_MAX} bytes")
    return b"".join(extent.chunks())


@dataclass(slots=True)
class Spent:
    """What the image has used of its limits so far."""

    limits: ImageLimits
    unpacked_bytes: int = 0
    entries: int = 0

    def unpack(self, count: int) -> None:
        self.unpacked_bytes += count
        if self.unpacked_bytes > self.limits.unpacked_bytes_max:
            raise BadImage(
                f"the image: more than {self.limits.unpacked_bytes_max} bytes unpacked",
                remedy="raise [images] unpacked_bytes_max, or take a smaller image",
            )

    def enter(self) -> None:
        self.entries += 1
        if self.entries > self.limits.entries_max:
            raise BadImage(
                f"the image: more than {self.limits.entries_max} entries",
                remedy="raise [images] entries_max, or take a smaller image",
            )


class LayerStream:
    """One layer as a stream of tar. `finish` reads the rest, and raises unless both digests are the right ones."""

    def __init__(self, source: Source, layer: Layer, spent: Spent) -> None:
        self._layer = layer
        self._spent = spent
        self._what = f"layer {layer.digest or printable(layer.place.encode('utf-8', 'replace'))}"
        extent = source.find(layer.place)
        if extent is None:
            raise BadImage(f"{self._what}: it is not in the image")
        if layer.size is not None and extent.size != layer.size:
            raise BadImage(f"{self._what}: it has {extent.size} bytes and not {layer.size}")
        magic = extent.read(0, 4)
        if magic == _ZSTD_MAGIC:
            raise BadImage(f"{self._what}: it is zstd; plain and gzip tar are known", remedy="save it with gzip")
        self._compressed = 0
        self._blob, self._diff = hashlib.sha256(), hashlib.sha256()
        gzip = magic[:2] == _GZIP_MAGIC if layer.gzip is None else layer.gzip
        self._plain = self._inflate(self._raw(extent)) if gzip else self._raw(extent)
        self._buffer = bytearray()

    def read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = next(self._plain, b"")
            if not data:
                break
            self._take(data)
            self._buffer += data
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    def finish(self) -> None:
        self._buffer.clear()
        for data in self._plain:
            self._take(data)
        blob, diff = f"sha256:{self._blob.hexdigest()}", f"sha256:{self._diff.hexdigest()}"
        if self._layer.digest and blob != self._layer.digest:
            raise BadImage(f"{self._what}: its digest is {blob}")
        if diff != self._layer.diff_id:
            raise BadImage(f"{self._what}: its content's digest is {diff} and not {self._layer.diff_id}")

    def _take(self, data: bytes) -> None:
        self._diff.update(data)
        self._spent.unpack(len(data))

    def _raw(self, extent: Extent) -> Iterator[bytes]:
        for data in extent.chunks():
            self._blob.update(data)
            self._compressed += len(data)
            yield data

    def _inflate(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        inflater = zlib.decompressobj(_GZIP_WBITS)
        unpacked, started = 0, False
        for chunk in chunks:
            data = chunk
            while data:
                started = True
                try:
                    plain = inflater.decompress(data, CHUNK_BYTES)
                except zlib.error as error:
                    raise BadImage(f"{self._what}: it is not gzip, or damaged") from error
                unpacked += len(plain)
                self._check_ratio(unpacked)
                if plain:
                    yield plain
                data = inflater.unconsumed_tail
                if inflater.eof:
                    # Members follow one another (RFC 1952); anything else after one is damage.
                    data, started = inflater.unused_data, False
                    inflater = zlib.decompressobj(_GZIP_WBITS)
        while started:
            # What the last chunk left behind because of the limit on one call.
            plain = inflater.decompress(b"", CHUNK_BYTES)
            unpacked += len(plain)
            self._check_ratio(unpacked)
            if not plain:
                break
            yield plain
        if started and not inflater.eof:
            raise BadImage(f"{self._what}: its gzip stream is cut off")

    def _check_ratio(self, unpacked: int) -> None:
        most = self._spent.limits.compression_ratio_max
        if unpacked > RATIO_FROM_BYTES and unpacked > most * self._compressed:
            raise BadImage(
                f"{self._what}: it unpacks to more than {most} times its size",
                remedy="if it is meant to, raise [images] compression_ratio_max",
            )
