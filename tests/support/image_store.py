"""A store of images with a real unpacker, for images that attack it."""

# ruff: noqa: ASYNC240 - files of a test, and nobody else in its loop

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sandbox.images.limits import ImageLimits
from supervisord.policy import RootfsName
from tests.support.image import entry

if TYPE_CHECKING:
    from supervisord.actions.types import Action
    from supervisord.images import Images, OpenRoot


LIMITS = ImageLimits(unpacked_bytes_max=64 << 20, entries_max=300, layers_max=4, unpack_seconds_max=20)
VICTIM = f"/tmp/sktest-images-victim-{os.getpid()}"
FILE = entry(b"file", b"0", b"fine")
DIR = entry(b"dir/", b"5", mode=0o755)


@dataclass
class Place:
    """A store of images of its own, and a directory outside of it that must stay as it is."""

    directory: Path
    images: Images
    actions: list[Action] = field(default_factory=list)

    async def open(self, path: Path, selector: str = "") -> OpenRoot:
        return await self.images.open(RootfsName(PurePosixPath(path), selector))

    async def tree(self, image: Path, selector: str = "") -> dict[str, os.stat_result]:
        """What of an image lies on disk afterwards, by name."""
        opened = await self.open(image, selector)
        try:
            found = {}
            for above, names, files, fd in os.fwalk(dir_fd=opened.fd, top="."):
                for name in (*names, *files):
                    path = os.path.normpath(f"{above}/{name}")
                    found[path] = os.stat(name, dir_fd=fd, follow_symlinks=False)
            return found
        finally:
            os.close(opened.fd)

    def kept(self) -> list[str]:
        return sorted(each.name for each in (self.directory / "images" / "1").iterdir())

    def half(self) -> list[str]:
        return [each.name for each in (self.directory / "images").iterdir() if each.name != "1"]
