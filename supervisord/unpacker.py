"""The daemon's end of an unpacker (sandbox/images/unpacker.py): starts it, opens files for it, hears what it found.

What it says was shaped by an image, so it is checked and bounded like anything else from outside.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from supervisord.channel import Channel, close_all
from supervisord.errors import CannotLaunch, StockadeError, Unavailable
from supervisord.processes import Child, python, spawn_connected

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MESSAGE_BYTES_MAX: Final = 64 << 10
TEXT_CHARACTERS_MAX: Final = 4000
FILES_MAX: Final = 4096  # that a layout can ask for
COUNTS_MAX: Final = 16

_FILE: Final = re.compile(r"oci-layout|index\.json|manifest\.json|blobs/sha256/[0-9a-f]{64}", re.ASCII)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_SEARCH_PATH: Final = re.compile(r"(/[!-~]{0,4096})?", re.ASCII)
_FORMS: Final = ("oci", "docker")


@dataclass(frozen=True, slots=True)
class Told:
    digest: str
    form: str
    path: str


class Unpacker:
    """One process for one image; `source` is the archive, or the directory of a layout, open for reading."""

    def __init__(self, name: str, archive: bool, source: int, *, record: Path) -> None:  # noqa: FBT001 - one caller
        self._name = name
        self._archive = archive
        self._source = source
        self._path = record
        self._said: asyncio.Queue[Mapping[str, object]] = asyncio.Queue()
        self._files = 0
        self._child: Child | None = None
        self._channel: Channel | None = None

    async def start(self, root: int, *, user: str, selector: str, limits: Mapping[str, int]) -> Told:
        """Start it on the directory `root`; give which image it found. Raises CannotLaunch with what it said."""
        try:
            self._child, ours = spawn_connected("unpacker", python("sandbox.images.unpacker"), record=self._path)
        except Unavailable as error:
            raise self._failed(error.message) from error
        self._channel = Channel(
            ours,
            name="unpacker",
            on_packet=self._packet,
            on_close=lambda: self._said.put_nowait({"error": "its process ended without a word"}),
            packet_bytes_max=MESSAGE_BYTES_MAX,
        )
        request = {
            "kind": "archive" if self._archive else "layout",
            "selector": selector,
            "limits": dict(limits),
            "user": user,
        }
        self._send(request, (root, self._source) if self._archive else (root,))
        said = await self._hear()
        digest, form, path = said.get("resolved"), said.get("form"), said.get("path")
        texts = isinstance(digest, str) and isinstance(form, str) and isinstance(path, str)
        if (
            not texts
            or not _DIGEST.fullmatch(str(digest))
            or form not in _FORMS
            or not _SEARCH_PATH.fullmatch(str(path))
        ):
            raise self._failed("its process made no sense")
        return Told(str(digest), form, str(path))

    async def unpack(self) -> dict[str, int]:
        """Have it unpack; give its counts when every file is on disk. Raises CannotLaunch."""
        self._send({"unpack": True})
        counts = (await self._hear()).get("done")
        if not isinstance(counts, dict) or len(counts) > COUNTS_MAX:
            raise self._failed("its process made no sense")
        return {_bounded(str(key)): value for key, value in counts.items() if isinstance(value, int)}

    async def end(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._child is not None:
            await self._child.end()
        self._path.unlink(missing_ok=True)

    async def _hear(self) -> Mapping[str, object]:
        said = await self._said.get()
        if "error" in said:
            raise self._failed(_bounded(str(said["error"])), remedy=_bounded(str(said.get("remedy", ""))))
        return said

    def _failed(self, cause: str, *, remedy: str = "") -> CannotLaunch:
        return CannotLaunch(
            f"cannot use rootfs {self._name}: {cause}",
            remedy=remedy or "see the daemon's journal",
            step="unpack image",
        )

    def _send(self, message: Mapping[str, object], fds: tuple[int, ...] = ()) -> None:
        if self._channel is None or self._channel.closed:
            raise self._failed("its process ended without a word")
        self._channel.send(json.dumps(message).encode(), fds)

    def _packet(self, data: bytes, fds: list[int]) -> None:
        close_all(fds)
        try:
            said = json.loads(data)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            said = {"error": "its process made no sense"}
        if "need" in said:
            try:
                self._open(said["need"])
            except StockadeError as error:
                self._said.put_nowait({"error": error.message})
            return
        self._said.put_nowait(said)

    def _open(self, name: object) -> None:
        """Answer with a file of the layout; no link is followed, and nothing but a regular file is opened."""
        self._files += 1
        if self._archive or not isinstance(name, str) or not _FILE.fullmatch(name) or self._files > FILES_MAX:
            raise self._failed("its process asked for what is no file of a layout")
        try:
            fd = open_below(self._source, name)
        except OSError as error:
            self._send({"missing": error.strerror or ""})
            return
        try:
            self._send({"file": name}, (fd,))
        finally:
            os.close(fd)


def open_below(directory: int, name: str) -> int:
    """A regular file below a directory, open for reading; raises OSError, also for a link on the way."""
    fd = os.dup(directory)
    try:
        for part in name.split("/"):
            inner = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = inner
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileNotFoundError(2, "it is no regular file", name)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _bounded(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:TEXT_CHARACTERS_MAX])
