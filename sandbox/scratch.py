"""Disk-backed scratch: one ext4 image for each agent, whose size is the limit on bytes and whose inodes that on files.

An image is a sparse file without a name (O_TMPFILE) behind a loop device that lets go of it by itself, mounted without
being attached anywhere: a launcher that dies at any moment leaves neither file nor device nor mount, and no image ever
has a second owner. Only what must outlive its agent gets a name (`keep`).

The file system is written once for each size (mke2fs), into an image that is thrown away; its few blocks are kept in
memory and make every further image. No journal and no barriers: what is on scratch is not worth the host's time, and a
program that calls fsync(2) must not make the host's own log wait. Freed blocks go back to the host (discard).
"""

# ruff: noqa: PTH108, PTH110, PTH116 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from sandbox import syscalls

BLOCK_BYTES: Final = 4096
INODE_BYTES: Final = 256
BYTES_PER_INODE: Final = 16384
INODES_MIN: Final = 1024
INODES_MAX: Final = 1 << 20
READY: Final = 2
SIZES_MAX: Final = 4  # kinds of images that are kept ready, the last ones asked for
RESERVE_BYTES: Final = 256 << 20
RESERVE_PART: Final = 10
USUAL_BYTES: Final = 1 << 30

TMP, HOME, WORKSPACE, UPPER, WORK, LOWER = "tmp", "home", "workspace", "upper", "work", "lower"
LAYERS, HOMES = "layers", "homes"
# Who owns a kept home on disk: the agents that have it one after the other have different ids.
HOME_ID: Final = 1000
# What an image has at its top, with the modes; nothing of it is a place that an agent can name from inside.
_PLACES: Final = ((TMP, 0o1777), (HOME, 0o750), (WORKSPACE, 0o750), (UPPER, 0o755), (WORK, 0o700), (LOWER, 0o700))
_MKE2FS: Final = ("/usr/sbin/mke2fs", "/sbin/mke2fs")
# Named one by one: what /etc/mke2fs.conf adds on this host may be newer than its kernel.
_FEATURES: Final = (
    "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,metadata_csum,"
    "sparse_super2,64bit"
)
_ATTRIBUTES: Final = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOATIME
_OPTIONS: Final = ("nobarrier", "noinit_itable", "discard")
_ATTEMPTS_MAX: Final = 16  # loop devices that somebody else took first


class CannotMakeScratch(RuntimeError):  # noqa: N818 - reads as what happened
    """An image could not be made or mounted; nothing of it is left."""

    def __init__(self, message: str, number: int = 0, remedy: str = "") -> None:
        super().__init__(message)
        self.number = number
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Geometry:
    """What an image must be like for an agent to get so many bytes on it."""

    image_bytes: int
    inodes: int


def geometry(disk_bytes: int) -> Geometry:
    """The image for a limit: what the file system needs for itself is added to it, to within 1 MiB."""
    inodes = min(max(disk_bytes // BYTES_PER_INODE, INODES_MIN), INODES_MAX)
    # ext4 holds back 2 %, at most 4096 blocks, for what it may have to split (ext4_calculate_resv_clusters).
    held_back = min(disk_bytes // 50, 4096 * BLOCK_BYTES)
    size = disk_bytes + inodes * INODE_BYTES + held_back + disk_bytes // (8 * BLOCK_BYTES) + (1 << 20)
    return Geometry(-(-size // BLOCK_BYTES) * BLOCK_BYTES, inodes)


@dataclass(slots=True, eq=False)
class Image:
    """A mounted image; whoever has it lets go of it with `drop` or gives `root` and `file` to the sweeper."""

    mount: int  # detached; closed when it was handed to the sandbox
    root: int  # its top directory, which keeps it mounted
    file: int  # -1 where it was found again by its device
    disk_bytes: int
    kept: str = ""  # the path of an image that outlives its agent

    def own(self, uid: int, gid: int) -> None:
        """Give the top directories to an agent's host ids."""
        for name in (HOME, WORKSPACE, UPPER):
            os.chown(name, uid, gid, dir_fd=self.root, follow_symlinks=False)

    def keep(self, path: str) -> None:
        """Give the image a name, so that it outlives whoever has it open."""
        descriptors = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(str(self.file), path, src_dir_fd=descriptors, follow_symlinks=True)
        finally:
            os.close(descriptors)
        self.kept = path

    def forget(self) -> None:
        """Take its name away again."""
        if self.kept:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.kept)
            self.kept = ""

    def close_mount(self) -> None:
        if self.mount >= 0:
            os.close(self.mount)
            self.mount = -1

    def give_mount(self) -> int:
        """The mount alone, for whoever wants nothing else of the image."""
        mount, self.mount = self.mount, -1
        os.close(self.root)
        self.root = -1
        return mount

    def drop(self) -> None:
        """Let go; an image without a name is gone with everything on it. Blocks while pages are freed."""
        self.close_mount()
        if self.root >= 0:
            if not self.kept:
                with contextlib.suppress(OSError):
                    syscalls.shut_file_system_down(self.root)
            os.close(self.root)
            if self.file >= 0:
                os.close(self.file)
            self.root = self.file = -1


@dataclass(slots=True)
class _Template:
    size: int
    pages: list[tuple[int, bytes]] = field(default_factory=list)


class Stock:
    """Images for the sizes asked for last, made ahead of need; `lacking` says why this host can have none."""

    def __init__(
        self,
        directory: str,
        *,
        label: str,
        size: int = READY,
        reserve_bytes: int = RESERVE_BYTES,
        preallocate: bool = False,
    ) -> None:
        self.directory = directory
        self.lacking = lacking(directory)
        self._label = label
        self._size = size
        self._reserve_bytes = reserve_bytes
        self._preallocate = preallocate
        self._templates: dict[int, _Template] = {}
        self._stock: dict[int, list[Image]] = {USUAL_BYTES: []}
        self._broken = False
        self.reserve_part = RESERVE_PART

    def __len__(self) -> int:
        return sum(map(len, self._stock.values()))

    def take(self, disk_bytes: int) -> Image:
        """An image of one's own, ready-made or made now; raises `CannotMakeScratch`."""
        self._check_room()
        ready = self._stock.pop(disk_bytes, [])
        self._stock[disk_bytes] = ready  # at the end: the last ones asked for stay
        while len(self._stock) > SIZES_MAX:
            for image in self._stock.pop(next(iter(self._stock))):
                image.drop()
        image = ready.pop() if ready else self._make(disk_bytes)
        self._broken = False
        return image

    def refill(self) -> bool:
        """Make one more where one is missing; True where more are. A failure is told by the next `take()`."""
        if self.lacking or self._broken:
            return False
        for disk_bytes, ready in self._stock.items():
            if len(ready) < self._size:
                try:
                    self._check_room()
                    ready.append(self._make(disk_bytes))
                except CannotMakeScratch:
                    self._broken = True
                    return False
                return True
        return False

    def close(self) -> None:
        for ready in self._stock.values():
            while ready:
                ready.pop().drop()

    def open(self, path: str) -> Image:
        """Mount an image that was kept; raises `CannotMakeScratch`, also where it is mounted already."""
        with self._telling(f"mount {path}"):
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode) or status.st_uid != 0:
                    raise OSError(errno.EINVAL, "it is not a file of root")
                # Two devices over one file would each write what the other does not know of.
                if (device := attached(file)) is not None:
                    raise OSError(errno.EBUSY, f"it is in use ({device})")
                return self._mounted(file, 0, kept=path)
            except BaseException:
                os.close(file)
                raise

    def layer_path(self, agent_id: str) -> str:
        """Where the image of an agent with a layer is kept."""
        return f"{self.directory}/{LAYERS}/{agent_id}.img"

    def home_path(self, name: str) -> str:
        return f"{self.directory}/{HOMES}/{name}.img"

    def home(self, name: str, disk_bytes: int) -> Image:
        """The kept home of this name, made where there is none; raises `CannotMakeScratch`."""
        path = self.home_path(name)
        if os.path.exists(path):
            return self.open(path)
        image = self.take(disk_bytes)
        try:
            with self._telling(f"make {path}"):
                os.chown(HOME, HOME_ID, HOME_ID, dir_fd=image.root, follow_symlinks=False)
                image.keep(path)  # last: one that has a name is never looked at again
        except CannotMakeScratch:
            image.drop()
            raise
        return image

    def read(self, path: str) -> int:
        """Return the top of what the agent changed, mounted once more and read-only; links in it lead nowhere.

        The mount is gone with the descriptor. Raises `CannotMakeScratch`.
        """
        with self._telling(f"read {path}"):
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                device = attached(file)
                mount = mount_device(device) if device else self._mounted(file, 0, kept=path).give_mount()
            finally:
                os.close(file)
            try:
                attributes = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSYMFOLLOW | syscalls.MOUNT_ATTR_NOEXEC
                syscalls.mount_setattr(mount, "", syscalls.AT_EMPTY_PATH, set_=attributes)
                return os.open(UPPER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=mount)
            finally:
                os.close(mount)

    def make_kept(self, disk_bytes: int, path: str) -> Image:
        """Make an image that has a name from its start; raises `CannotMakeScratch`."""
        image = self.take(disk_bytes)
        try:
            with self._telling(f"make {path}"):
                image.keep(path)
        except CannotMakeScratch:
            image.drop()
            raise
        return image

    def _check_room(self) -> None:
        with self._telling("make scratch"):
            room = os.statvfs(self.directory)
        free = room.f_bavail * room.f_frsize
        # Of a small file system a tenth: state_dir may have one of its own.
        reserve = min(self._reserve_bytes, room.f_blocks * room.f_frsize // self.reserve_part)
        if free < reserve:
            raise CannotMakeScratch(
                f"{self.directory} has {free} bytes left, and {reserve} stay free for the host",
                errno.ENOSPC,
                "make room, or set scratch.reserve in stockade.toml",
            )

    def _make(self, disk_bytes: int) -> Image:
        with self._telling("make scratch"):
            template = self._templates.get(disk_bytes) or self._format(disk_bytes)
            file = self._new_file(template.size)
            try:
                if self._preallocate:
                    os.posix_fallocate(file, 0, template.size)
                for offset, page in template.pages:
                    os.pwrite(file, page, offset)
                image = self._mounted(file, disk_bytes)
            except BaseException:
                os.close(file)
                raise
            try:
                for name, mode in _PLACES:
                    os.mkdir(name, dir_fd=image.root)
                    os.chmod(name, mode, dir_fd=image.root)
            except BaseException:
                image.drop()
                raise
        return image

    def _new_file(self, size: int) -> int:
        file = os.open(self.directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, size)
        except BaseException:
            os.close(file)
            raise
        return file

    def _format(self, disk_bytes: int) -> _Template:
        """Have an image of this size written, and keep what is not zero of it."""
        wanted = geometry(disk_bytes)
        file = self._new_file(wanted.image_bytes)
        try:
            _mke2fs(file, wanted)
            template = _Template(wanted.image_bytes, list(_pages(file)))
        finally:
            os.close(file)
        while len(self._templates) >= SIZES_MAX:
            del self._templates[next(iter(self._templates))]
        self._templates[disk_bytes] = template
        return template

    def _mounted(self, file: int, disk_bytes: int, kept: str = "") -> Image:
        device, path = _attach(file, self._label)
        try:
            mount = mount_device(path)
        finally:
            os.close(device)  # the mount holds it; without one the device lets go of the file
        try:
            root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        except BaseException:
            os.close(mount)
            raise
        return Image(mount, root, file, disk_bytes, kept)

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CannotMakeScratch(
                f"cannot {what}: {error.strerror or error}", error.errno or 0, "see `stockadectl doctor` (disk-quota)"
            ) from error


def lacking(directory: str) -> str:
    """Why this host cannot have disk-backed scratch in this directory; nothing where it can."""
    if not directory:
        return "the launcher was given no directory for it"
    if not any(os.path.exists(program) for program in _MKE2FS):
        return "there is no mke2fs (package e2fsprogs)"
    try:
        os.close(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC))
        os.close(syscalls.fsopen("ext4"))
        os.close(os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600))
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else str(error)
        return f"{place}: {os.strerror(error.errno or 0)}"
    return ""


def attached(file: int) -> str | None:
    """The loop device that has this file, or None."""
    status = os.fstat(file)
    for name in os.listdir("/sys/block"):  # noqa: PTH208 - see above
        if not name.startswith("loop"):
            continue
        try:
            device = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            number, inode, _ = syscalls.loop_status(device)
        except OSError:
            continue
        finally:
            os.close(device)
        if (number, inode) == (status.st_dev, status.st_ino):
            return f"/dev/{name}"
    return None


def again(inside: str) -> tuple[int, int] | None:
    """Mount and top directory of the image that a directory is on, or None where it is on no loop device.

    For a launcher that was restarted: the agent's own mounts show parts of the image only.
    """
    device = os.stat(inside, follow_symlinks=False).st_dev
    name = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")) if device else ""  # noqa: PTH115, PTH119 - see above
    if not name.startswith("loop"):
        return None
    mount = mount_device(f"/dev/{name}")
    return mount, os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)


def mount_device(path: str) -> int:
    """Return a detached mount; the same file system where it is mounted already."""
    context = syscalls.fsopen("ext4")
    try:
        syscalls.fsconfig_string(context, "source", path)
        for option in _OPTIONS:
            syscalls.fsconfig_flag(context, option)
        syscalls.fsconfig_create(context)
        return syscalls.fsmount(context, _ATTRIBUTES)
    finally:
        os.close(context)


def _attach(file: int, label: str) -> tuple[int, str]:
    """Put the file behind a free loop device; gives its descriptor and path."""
    # Direct: one copy in memory, the agent's own, instead of a second one of the file's.
    flags = syscalls.LO_FLAGS_AUTOCLEAR | syscalls.LO_FLAGS_DIRECT_IO
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS_MAX):
            path = f"/dev/loop{syscalls.loop_get_free(control)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                syscalls.loop_configure(device, file, flags=flags, label=label)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return device, path
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "every free loop device was taken by somebody else first")


def _mke2fs(file: int, wanted: Geometry) -> None:
    program = next(path for path in _MKE2FS if os.path.exists(path))
    # The file has no name, and another process can open it by this one all the same (proc(5)).
    target = f"/proc/{os.getpid()}/fd/{file}"
    options = "lazy_itable_init=1,nodiscard,packed_meta_blocks=1,num_backup_sb=0,root_owner=0:0"
    argv = [program, "-q", "-F", "-t", "ext4", "-O", _FEATURES, "-b", str(BLOCK_BYTES), "-I", str(INODE_BYTES)]
    argv += ["-N", str(wanted.inodes), "-m", "0", "-U", "clear", "-L", "stockade", "-E", options, target]
    said = os.memfd_create("mke2fs", os.MFD_CLOEXEC)
    try:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, said, 1),
            (os.POSIX_SPAWN_DUP2, said, 2),
        ]
        pid = os.posix_spawn(program, argv, {"PATH": "/usr/sbin:/sbin", "LC_ALL": "C"}, file_actions=actions)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            text = os.pread(said, 300, 0).decode("ascii", "replace").strip()
            raise OSError(errno.EIO, f"mke2fs ended with {code}: {text}")
    finally:
        os.close(said)


def _pages(file: int) -> Iterator[tuple[int, bytes]]:
    """Yield every block that is not zero, with its place."""
    end, position = os.fstat(file).st_size, 0
    zero = bytes(BLOCK_BYTES)
    while position < end:
        try:
            position = os.lseek(file, position, os.SEEK_DATA)
        except OSError:
            return
        hole = os.lseek(file, position, os.SEEK_HOLE)
        for offset in range(position - position % BLOCK_BYTES, hole, BLOCK_BYTES):
            page = os.pread(file, BLOCK_BYTES, offset)
            if page != zero[: len(page)]:
                yield offset, page
        position = hole
