"""Root file systems that policies name: what is at the path, and images unpacked once, by a process of their own.

An unpacked image lies in `<state_dir>/images/<rules>/<digest>-<path>`: `rootfs` is what agents get, `image.json` says
what it is. The path's hash is in the name because the digest is the unpacker's word: an image that took its unpacker
over could claim another's, and would find that only its own path is served from there. It is made under another name
and renamed when it is whole and on disk, so what has that name is whole. At each launch the path is looked at anew;
which image is there, is asked again when the file was changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.actions.types import Action
from supervisord.channel import close_all
from supervisord.errors import CannotLaunch, InvalidInput, NotFound, StockadeError, Unavailable
from supervisord.gateway_process import user_id
from supervisord.hostfiles import open_path
from supervisord.processes import end_leftover
from supervisord.unpacker import Unpacker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sandbox.images.limits import ImageLimits
    from supervisord.actions.types import JSON
    from supervisord.policy import RootfsName

log = structlog.get_logger()

RULES: Final = "1"  # of unpacking: modes, owners, what is left out; another number unpacks anew
UNPACKERS_MAX: Final = 2
KNOWN_MAX: Final = 256
PATH_DIGITS: Final = 32
RECORD_BYTES_MAX: Final = 64 << 10
# A file that is changed twice within one tick of the kernel's clock looks unchanged (gitformat-index, "racily clean").
SETTLED_SECONDS: Final = 2.0
DIRECTORY: Final = "directory"
LAYOUT: Final = "oci-layout"
ARCHIVE: Final = "archive"

_STEP: Final = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_Key = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class There:
    """What is at a policy's path, opened (O_PATH); `marks` change when its content does."""

    fd: int
    kind: str
    marks: _Key
    changed_at: float


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An image that was found out: `form` is how it was saved, `path` the search path it asks for."""

    digest: str
    form: str
    path: str
    place: str


@dataclass(frozen=True, slots=True)
class OpenRoot:
    """A root file system ready to be shown; the receiver closes `fd`."""

    fd: int
    form: str
    digest: str
    path: str


def look(name: RootfsName, *, own: tuple[Path, ...] = ()) -> There:
    """Open what a policy names as its root file system, and say what it is; raises InvalidInput, NotFound.

    A directory that holds one of `own` (the daemon's own directories) is none for an agent.
    """
    for path in own:
        if path.is_relative_to(Path(name.path)):
            raise InvalidInput(
                f"cannot use rootfs {name.path}: {path} of this daemon is in it",
                remedy="name a directory made for agents, or write `rootfs: host`",
            )
    fd = open_path(name.path)
    try:
        facts = os.fstat(fd)
        kind, judged = ARCHIVE, facts
        if stat.S_ISDIR(facts.st_mode):
            kind = LAYOUT if _is_file("oci-layout", fd) else DIRECTORY
            if kind == LAYOUT:
                judged = os.stat("index.json", dir_fd=fd, follow_symlinks=False)
        elif not stat.S_ISREG(facts.st_mode):
            raise InvalidInput(
                f"cannot use rootfs {name.path}: it is neither a directory nor a file", remedy="see docs/POLICY.md"
            )
        if kind == DIRECTORY and name.selector:
            raise InvalidInput(
                f"cannot use rootfs {name}: {name.path} is a plain directory, and has no images to choose from",
                remedy=f"write `rootfs: {name.path}`",
            )
    except BaseException as error:
        os.close(fd)
        if isinstance(error, FileNotFoundError):
            raise NotFound(
                f"cannot use rootfs {name.path}: the OCI layout has no index.json", remedy="save the image anew"
            ) from error
        raise
    marks = (judged.st_dev, judged.st_ino, judged.st_size, judged.st_mtime_ns, judged.st_ctime_ns)
    return There(fd, kind, marks, max(judged.st_mtime, judged.st_ctime))


def _is_file(name: str, directory: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


class Images:
    """Gives root file systems by name; an image is unpacked once, however many ask for it at a time."""

    def __init__(
        self,
        *,
        directory: Path,
        records: Path,
        user: str,
        limits: ImageLimits,
        own: tuple[Path, ...],
        record: Callable[[Action], Awaitable[object]],
    ) -> None:
        self._directory = directory
        self._whole = directory / RULES
        self._records = records
        self._user = user
        self._limits = limits
        self._own = own
        self._record = record
        self._known: dict[_Key, Unpacked] = {}
        self._running: dict[_Key, asyncio.Task[Unpacked]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._turns = asyncio.Semaphore(UNPACKERS_MAX)

    async def start(self) -> None:
        """Make the directories, and take away what a daemon that died left half unpacked; raises Unavailable."""
        for record in self._records.glob("unpacker-*.json"):
            end_leftover(record)
        await asyncio.to_thread(self._make_directories)

    async def stop(self) -> None:
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def glance(self, name: RootfsName) -> tuple[str, str]:
        """What is at the path, and its digest where that is known; unpacks nothing; raises StockadeError."""
        there = look(name, own=self._own)
        os.close(there.fd)
        known = self._known.get((*there.marks, str(name)))
        return (there.kind, "") if known is None else (known.form, known.digest)

    async def open(self, name: RootfsName) -> OpenRoot:
        """Give the root file system, unpacked first where that is needed; raises StockadeError."""
        there = look(name, own=self._own)
        if there.kind == DIRECTORY:
            return OpenRoot(there.fd, DIRECTORY, "", "")
        try:
            key = (*there.marks, str(name))
            known = self._known.get(key)
            opened = None if known is None else self._open_whole(known)
            if opened is None:
                # Shielded: who waits may give up, and others go on waiting for the same.
                known = await asyncio.shield(self._task(key, name, there))
                opened = self._open_whole(known)
        finally:
            os.close(there.fd)
        if opened is None:
            raise Unavailable(f"cannot use rootfs {name}: what was unpacked is gone", remedy="launch again")
        return opened

    def _task(self, key: _Key, name: RootfsName, there: There) -> asyncio.Task[Unpacked]:
        task = self._running.get(key)
        if task is None:
            source = os.open(f"/proc/self/fd/{there.fd}", os.O_RDONLY | os.O_CLOEXEC)
            began = time.time()
            task = asyncio.get_running_loop().create_task(self._find_out(name, there.kind, source))
            self._running[key] = task

            def ended(task: asyncio.Task[Unpacked]) -> None:
                os.close(source)
                del self._running[key]
                if not task.cancelled() and task.exception() is None and there.changed_at < began - SETTLED_SECONDS:
                    while len(self._known) >= KNOWN_MAX:
                        del self._known[next(iter(self._known))]
                    self._known[key] = task.result()

            task.add_done_callback(ended)
        return task

    async def _find_out(self, name: RootfsName, kind: str, source: int) -> Unpacked:
        async with self._turns:
            staging, root = await asyncio.to_thread(self._stage)
            try:
                async with asyncio.timeout(self._limits.unpack_seconds_max):
                    return await self._unpack(name, kind, source, staging, root)
            except TimeoutError as error:
                raise CannotLaunch(
                    f"cannot use rootfs {name}: not unpacked within {self._limits.unpack_seconds_max} seconds",
                    remedy="raise [images] unpack_seconds_max, or take a smaller image",
                    step="unpack image",
                ) from error
            finally:
                os.close(root)
                await asyncio.to_thread(_remove, staging)

    async def _unpack(self, name: RootfsName, kind: str, source: int, staging: Path, root: int) -> Unpacked:
        record = self._records / f"unpacker-{staging.name}.json"
        unpacker = Unpacker(str(name), kind == ARCHIVE, source, record=record)
        try:
            told = await unpacker.start(root, user=self._user, selector=name.selector, limits=asdict(self._limits))
            form = f"{told.form}-archive" if kind == ARCHIVE else kind
            found = Unpacked(told.digest, form, told.path, _place(name, told.digest))
            async with self._locks.setdefault(found.place, asyncio.Lock()):
                opened = self._open_whole(found)
                if opened is None:
                    await self._unpack_whole(unpacker, name, found, staging)
                else:
                    os.close(opened.fd)
            return found
        finally:
            await unpacker.end()

    async def _unpack_whole(self, unpacker: Unpacker, name: RootfsName, found: Unpacked, staging: Path) -> None:
        details: dict[str, JSON] = {"digest": found.digest, "form": found.form}
        await self._record(Action("", "daemon", "image.unpack", str(name), "allowed", "", details))
        try:
            counts = await unpacker.unpack()
            await asyncio.to_thread(self._keep, staging, found, counts)
        except StockadeError as error:
            await self._record(Action("", "daemon", "image.unpack", str(name), "failed", error.message, details))
            raise
        outcome: dict[str, JSON] = {**details, **counts}
        await self._record(Action("", "daemon", "image.unpack", str(name), "done", "", outcome))
        log.info("image unpacked", rootfs=str(name), **outcome)

    # --- the directory

    def _make_directories(self) -> None:
        try:
            for path in (self._directory, self._whole):
                path.mkdir(mode=0o700, exist_ok=True)
                path.chmod(0o700)
            for left in self._directory.glob(".unpack-*"):
                _remove(left)
        except OSError as error:
            raise Unavailable(f"cannot use {self._directory}: {error.strerror}", remedy="check state_dir") from error

    def _stage(self) -> tuple[Path, int]:
        """Make a place to unpack in: only its `rootfs` is the unpacker's, and nobody gets to it by a path."""
        uid = user_id(self._user)
        staging = self._directory / f".unpack-{secrets.token_hex(8)}"
        try:
            (staging / "rootfs").mkdir(mode=0o700, parents=True)
            staging.chmod(0o700)
            fd = os.open(staging / "rootfs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            os.fchown(fd, uid, -1)
        except OSError as error:
            raise Unavailable(
                f"cannot unpack in {self._directory}: {error.strerror}", remedy="make room in state_dir"
            ) from error
        return staging, fd

    def _keep(self, staging: Path, found: Unpacked, counts: dict[str, int]) -> None:
        """Give what was unpacked its name. The files are on disk already (the unpacker's syncfs)."""
        try:
            with (staging / "image.json").open("x", encoding="utf-8") as file:
                json.dump({**asdict(found), "counts": counts}, file)
                file.flush()
                os.fsync(file.fileno())
            _sync(staging)
            staging.rename(self._whole / found.place)
            _sync(self._whole)
        except OSError as error:
            raise Unavailable(f"cannot keep an unpacked image: {error}", remedy="make room in state_dir") from error

    def _open_whole(self, found: Unpacked) -> OpenRoot | None:
        """Open an unpacked image; None where there is none. Raises Unavailable for one not as the daemon makes it."""
        fds: list[int] = []
        try:
            fds.append(os.open(self._directory, _STEP))
            for part in (RULES, found.place):
                fds.append(os.open(part, _STEP, dir_fd=fds[-1]))
            for fd in fds:
                facts = os.fstat(fd)
                if facts.st_uid != 0 or stat.S_IMODE(facts.st_mode) & 0o077:
                    raise Unavailable(
                        f"cannot use the unpacked image {found.digest}: others than root get at {self._directory}",
                        remedy="find out who changed that, remove the directory, and launch again",
                    )
            if _record_of(fds[-1]).get("place") != found.place:
                raise Unavailable(
                    f"cannot use the unpacked image {found.digest}: its image.json is of another",
                    remedy=f"remove {self._whole / found.place}, and launch again",
                )
            return OpenRoot(os.open("rootfs", _STEP, dir_fd=fds[-1]), found.form, found.digest, found.path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"cannot use the unpacked image {found.digest}: {error}",
                remedy=f"remove {self._whole / found.place}, and launch again",
            ) from error
        finally:
            close_all(fds)


def _place(name: RootfsName, digest: str) -> str:
    path = hashlib.sha256(os.fsencode(name.path)).hexdigest()
    return f"{digest.replace(':', '-')}-{path[:PATH_DIGITS]}"


def _record_of(directory: int) -> dict[str, object]:
    fd = os.open("image.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
        value = json.loads(file.read(RECORD_BYTES_MAX))
    return value if isinstance(value, dict) else {}


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(tree: Path) -> None:
    """Take a tree away, by descriptors; what cannot be removed stays, has no name that is ever used, and is told of."""
    with contextlib.suppress(FileNotFoundError):
        try:
            shutil.rmtree(tree)
        except FileNotFoundError:
            raise
        except (OSError, RecursionError) as error:
            log.error("cannot remove a half unpacked image", path=str(tree), cause=str(error))
