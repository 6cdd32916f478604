"""Images for tests: layers byte by byte, and the three forms in which an image is saved."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

BLOCK = 512
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
PLAIN = "application/vnd.oci.image.layer.v1.tar"
GZIP = PLAIN + "+gzip"
BUSYBOX = Path("/bin/busybox")


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    link: bytes = b"",
    size_field: bytes | None = None,
) -> bytes:
    """One header, as odd as it is asked for; its checksum is right."""
    number = b"%011o\0" % size if size_field is None else size_field
    fields = [name.ljust(100, b"\0"), b"%07o\0" % mode, b"%07o\0" % uid, b"0000000\0", number, b"00000000000\0"]
    block = b"".join([*fields, b" " * 8, kind, link.ljust(100, b"\0"), b"ustar\x0000"]).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def entry(name: bytes, kind: bytes = b"0", content: bytes = b"", **more: Any) -> bytes:
    """A header with what belongs behind it."""
    return header(name, kind, **({"size": len(content)} | more)) + content + b"\0" * (-len(content) % BLOCK)


def pax(**records: bytes) -> bytes:
    """An extended header; `__` in a key stands for a dot."""
    return entry(b"pax", b"x", b"".join(record(key.replace("__", "."), value) for key, value in records.items()))


def record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


END = b"\0" * (2 * BLOCK)


def layer(*entries: bytes) -> bytes:
    return b"".join(entries) + END


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@cache
def programs() -> bytes:
    """A layer with a shell and the usual tools: a static busybox, and links to it."""
    text = BUSYBOX.read_bytes()
    names = ("sh", "cat", "ls", "echo", "env", "id", "touch", "test", "sleep", "readlink", "true", "stat", "find")
    return b"".join(
        [
            entry(b"bin/", b"5", mode=0o755),
            entry(b"bin/busybox", b"0", text, mode=0o755),
            *(entry(b"bin/" + name.encode(), b"1", mode=0o755, link=b"bin/busybox") for name in names),
        ]
    )


@dataclass
class Built:
    """An image: its layers as stored, and every document; a test may spoil each before it is saved."""

    layers: list[bytes]
    compress: bool = True
    env: list[str] = field(default_factory=list)
    tag: str = "latest"
    architecture: str = "amd64"
    media_type: str | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    diff_ids: list[str] | None = None

    def __post_init__(self) -> None:
        diff_ids = self.diff_ids or [sha256(each) for each in self.layers]
        self.config = json.dumps(
            {
                "os": "linux",
                "architecture": self.architecture,
                "config": {"Env": self.env},
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
            }
        ).encode()
        self.stored = [gzip.compress(each, 1, mtime=0) if self.compress else each for each in self.layers]
        kind = self.media_type or (GZIP if self.compress else PLAIN)
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": self.put(self.config, CONFIG),
                "layers": [self.put(each, kind) for each in self.stored],
            }
        ).encode()
        self.digest = sha256(self.manifest)
        self.index = {"schemaVersion": 2, "manifests": [self.descriptor()]}

    def put(self, data: bytes, media_type: str) -> dict[str, Any]:
        self.blobs[sha256(data)] = data
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}

    def descriptor(self) -> dict[str, Any]:
        return self.put(self.manifest, MANIFEST) | {
            "platform": {"os": "linux", "architecture": self.architecture},
            "annotations": {"org.opencontainers.image.ref.name": self.tag},
        }

    def files(self) -> dict[str, bytes]:
        files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(self.index).encode()}
        return files | {f"blobs/sha256/{digest[7:]}": data for digest, data in self.blobs.items()}

    def layout(self, path: Path) -> Path:
        for name, data in self.files().items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path

    def oci_archive(self, path: Path) -> Path:
        return write_tar(path, self.files())

    def docker_archive(self, path: Path, **changes: bytes) -> Path:
        """As `docker save` did before it wrote layouts; `changes` replace files by name."""
        config = f"{sha256(self.config)[7:]}.json"
        names = [f"{index:064x}/layer.tar" for index in range(len(self.layers))]
        listed = [{"Config": config, "RepoTags": [f"test/image:{self.tag}"], "Layers": names}]
        files = {config: self.config, "manifest.json": json.dumps(listed).encode()}
        return write_tar(path, files | dict(zip(names, self.layers, strict=True)) | changes)


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def copy_program(root: Path, program: str) -> None:
    """Copy a program of the host and the libraries it loads into a root directory."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in [program, *(word for word in listing.split() if word.startswith("/"))]:
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
