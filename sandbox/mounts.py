"""The mounts of a sandbox: what the agent sees as its file system, built while still root of the host.

Runs in the child, in a mount namespace of its own that is private already. Every function works below a directory that
is the root of the sandbox to be; only `pivot` makes it so. Everything is nosuid; nodev everywhere but on the six
devices and devpts. Nothing is looked up by a path that an agent could have shaped: sources are descriptors, targets are
resolved with `openat2` below the new root without following links.
"""

# ruff: noqa: PTH102, PTH103, PTH106, PTH108, PTH112, PTH114, PTH120, PTH123, PTH208, PTH211 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sandbox import etc, javatrust, scratch, syscalls
from sandbox.plan import SandboxPlan
from sandbox.sync import step

DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")
# Of the root file system; the rest of a host's root is not shown. /opt, /var, /srv, /root, /home stay out.
HOST_ROOT: Final = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Made by the sandbox itself, whatever a root given as a directory has there.
OWN: Final = frozenset({"proc", "sys", "dev", "tmp", "run", "etc", "home", "workspace", "grants", "root", "lost+found"})
# Covered, because they show or steer the host. Not `subset=pid`: Java and Node read cpuinfo and meminfo.
PROC_FILES_MASKED: Final = (
    "cmdline",
    "config.gz",
    "interrupts",
    "kallsyms",
    "kcore",
    "key-users",
    "keys",
    "kmsg",
    "latency_stats",
    "modules",
    "sched_debug",
    "slabinfo",
    "sysrq-trigger",
    "timer_list",
    "timer_stats",
    "vmallocinfo",
)
PROC_DIRECTORIES_MASKED: Final = ("acpi", "asound", "driver", "scsi")
PROC_READ_ONLY: Final = ("bus", "fs", "irq", "pressure", "sys")

READ_ONLY: Final = syscalls.MOUNT_ATTR_RDONLY
SAFE: Final = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
_MS_SAFE: Final = syscalls.MS_NOSUID | syscalls.MS_NODEV
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Of /var in a root given as a directory: places of services, and what the sandbox makes itself.
_OWN_IN_VAR: Final = frozenset({"tmp", "run", "lock"})
# All agents share kernel.pty.max - kernel.pty.reserve (3072) terminals: none may take them from the others.
TERMINALS_MAX: Final = 64
_DEVPTS: Final = f"ptmxmode=0666,mode=0620,max={TERMINALS_MAX}"
_TTY_GROUP_INSIDE: Final = 5


def make_standard(base: str, plan: SandboxPlan, tree: int | None, mark: Callable[[str], None]) -> javatrust.Begun:
    """Build at `base` (an existing directory) what does not depend on who the agent is, and go there.

    `tree` is a detached mount of the directory that stands for `/`; None for the host's own. Returns what `make_own`
    goes on from.
    """
    weak = frozenset(plan.weaken)
    with step("make root"):
        if tree is not None:
            # Under the root to be, which covers it: it goes with the old root.
            syscalls.move_mount(tree, "", syscalls.AT_FDCWD, base, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        rootfs = os.open("/" if tree is None else base, os.O_PATH | os.O_CLOEXEC)
        _tmpfs(base, _flags(weak), plan.scratch.root_bytes, mode=0o755, inodes=4096)
        os.chdir(base)
    with step("show root file system"):
        _show_rootfs(plan, rootfs, read_only="read_only_root" not in weak, safe="mount_flags" not in weak)
    mark("rootfs")
    with step("show /etc"):
        store = _show_etc(plan, rootfs)
        os.close(rootfs)
    mark("etc")
    with step("mount /dev"):
        _make_dev(weak)
    mark("dev")
    with step("mount /proc"):
        _make_proc(weak)
    mark("proc")
    return store


@dataclass(frozen=True, slots=True)
class Staged:
    """A detached mount, and a directory of the host to attach it at in passing: both go with the old root.

    A mount that is attached nowhere cannot be cloned (before Linux 6.15), and detaching it again here would cost a
    grace period more.
    """

    mount: int
    stage: str

    def attach(self) -> int:
        """Return a descriptor of its top, in this mount namespace."""
        syscalls.move_mount(self.mount, "", syscalls.AT_FDCWD, self.stage, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        return os.open(self.stage, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def make_own(
    plan: SandboxPlan,
    store: javatrust.Begun,
    *,
    image: Staged | None,
    home: Staged | None,
    mark: Callable[[str], None],
) -> None:
    """Add what is this agent's own: files below /etc, the group of its terminals, scratch. Works in the root to be.

    `image` is the agent's disk-backed scratch, None for memory; `home` the image of a home that is kept.
    """
    weak = frozenset(plan.weaken)
    with step("write /etc"):
        _write_etc(plan, store)
    mark("own etc")
    with step("mount scratch"):
        if "devices" not in weak:
            options = f"{_DEVPTS},gid={plan.ids.host(_TTY_GROUP_INSIDE)}"
            flags = syscalls.MS_NOSUID | syscalls.MS_NOEXEC
            syscalls.mount("devpts", "dev/pts", "devpts", flags | syscalls.MS_REMOUNT, options)
        _make_scratch(plan, image, home, _flags(weak))
    mark("scratch")


def _flags(weak: frozenset[str]) -> int:
    return 0 if "mount_flags" in weak else _MS_SAFE


def _tmpfs(target: str, flags: int, size: int, *, mode: int, inodes: int, uid: int = 0, gid: int = 0) -> None:
    syscalls.mount("tmpfs", target, "tmpfs", flags, f"size={size},nr_inodes={inodes},mode={mode:o},uid={uid},gid={gid}")


def _show(dirfd: int, name: str, target: str, attributes: int, *, clear: int = 0, recursive: bool = False) -> None:
    """Bind an entry of a directory at a path below the root being built."""
    below = syscalls.AT_RECURSIVE if recursive else 0
    tree = syscalls.open_tree(dirfd, name, syscalls.OPEN_TREE_CLONE | syscalls.AT_SYMLINK_NOFOLLOW | below)
    try:
        syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH | below, set_=attributes, clear=clear)
        syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def _show_entry(dirfd: int, name: str, target: str, attributes: int) -> bool:
    """Show a file or directory as a bind, a link as the same link; False where there is no such entry."""
    try:
        status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=dirfd), target)
    elif stat.S_ISDIR(status.st_mode):
        os.mkdir(target, 0o755)
        # Recursive: /usr may be made of several mounts. What is mounted over it by the host is the host's word.
        _show(dirfd, name, target, attributes, recursive=True)
    elif stat.S_ISREG(status.st_mode):
        _touch(target)
        _show(dirfd, name, target, attributes)
    return True


def _show_rootfs(plan: SandboxPlan, rootfs: int, *, read_only: bool, safe: bool) -> None:
    attributes = (READ_ONLY if read_only else 0) | (SAFE if safe else 0)
    names = HOST_ROOT if plan.rootfs.kind == "host" else tuple(n for n in _names(rootfs) if n not in OWN)
    for name in names:
        if name != "var":
            _show_entry(rootfs, name, name, attributes)
    _show_var(rootfs, attributes, shown="var" in names)
    for name in ("etc", "proc", "sys", "dev", "tmp", "home", "home/agent", "run", "grants"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755)


def _show_var(rootfs: int, attributes: int, *, shown: bool) -> None:
    """Make /var of what a directory given as root has there, with the sandbox's own /var/tmp.

    Entry by entry: in a /var that is shown as a whole nothing of the sandbox's could be put. A /var that is a link is
    left at that, and nothing is made through it: here it would still lead to the host.
    """
    try:
        if shown and stat.S_ISLNK(os.stat("var", dir_fd=rootfs, follow_symlinks=False).st_mode):
            _show_entry(rootfs, "var", "var", attributes)
            return
        source = os.open("var", _DIRECTORY, dir_fd=rootfs) if shown else None
    except NotADirectoryError:
        source = None
    os.mkdir("var", 0o755)
    if source is not None:
        try:
            for name in os.listdir(source):
                if name not in _OWN_IN_VAR:
                    _show_entry(source, name, f"var/{name}", attributes)
        finally:
            os.close(source)
    os.symlink("/tmp", "var/tmp")  # noqa: S108 - the private one of the sandbox


def _names(directory: int) -> list[str]:
    """List a directory that is open with O_PATH only."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return sorted(os.listdir(fd))
    finally:
        os.close(fd)


def _show_etc(plan: SandboxPlan, rootfs: int) -> javatrust.Begun:
    """Show what is shown of the /etc of the root file system, and write what is the same for all."""
    os.symlink("/proc/self/mounts", "etc/mtab")
    os.mkdir("etc/stockade", 0o755)
    _write(f"etc/{etc.CA_BUNDLE_INSIDE}", _file_of(rootfs, etc.CA_BUNDLE) + b"\n")
    store = _file_of(rootfs, etc.JAVA_STORE)
    _write(f"etc/{etc.JAVA_STORE_INSIDE}", store)
    for name, text in etc.FIXED.items():
        _write(f"etc/{name}", text.encode())
    # Nearly always it is the agent's own authority that is added.
    begun = javatrust.begin(store, len(javatrust.certificates(plan.ca_certificate or "")) or 1)
    try:
        source = os.open("etc", _DIRECTORY, dir_fd=rootfs)
    except (FileNotFoundError, NotADirectoryError):
        return begun
    host = plan.rootfs.kind == "host"
    for name in os.listdir(source):
        if name not in etc.NEVER and name not in etc.OWN and (etc.wanted(name) if host else True):
            _show_entry(source, name, f"etc/{name}", READ_ONLY | SAFE)
    os.close(source)
    return begun


def _write_etc(plan: SandboxPlan, begun: javatrust.Begun) -> None:
    """Write the agent's own files; one that stands where the root file system's is shown takes its place."""
    files = {name: text for name, text in etc.files(plan).items() if etc.FIXED.get(name) != text}
    for name in etc.FIXED.keys() & files.keys():
        os.unlink(f"etc/{name}")
    for top in {name.split("/", 1)[0] for name in files} - etc.OWN:
        if os.path.lexists(f"etc/{top}"):
            _uncover(f"etc/{top}")
    for name, text in files.items():
        _write(f"etc/{name}", text.encode("utf-8", "surrogateescape"))
    if plan.ca_certificate is not None:
        fd = os.open(f"etc/{etc.CA_BUNDLE_INSIDE}", os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, plan.ca_certificate.encode())
        finally:
            os.close(fd)
        added = javatrust.certificates(plan.ca_certificate)
        with open(f"etc/{etc.JAVA_STORE_INSIDE}", "r+b", buffering=0, opener=_no_link) as store:
            if begun.more != len(added):
                begun = javatrust.begin(store.read(), len(added))
            change = begun.with_certificates(added)
            store.seek(0)
            store.write(change.head)
            store.seek(change.at)
            store.write(change.tail)
            store.truncate()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _uncover(path: str) -> None:
    """Take an entry of the root file system away from where it is shown."""
    if os.path.ismount(path) or not os.path.islink(path):
        with contextlib.suppress(OSError):
            syscalls.umount2(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    if os.path.isdir(path) and not os.path.islink(path):
        with contextlib.suppress(OSError):
            os.rmdir(path)
    else:
        os.unlink(path)


def _file_of(rootfs: int, path: str) -> bytes:
    """Return a file of the root file system, at most 4 MiB, or nothing; links stay below it, no device is opened."""
    try:
        place = syscalls.openat2(rootfs, path, os.O_PATH, resolve=syscalls.RESOLVE_IN_ROOT)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
            return b""
        raise
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            return b""
        fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(place)
    with open(fd, "rb") as file:
        return file.read(4 << 20)


def _write(path: str, content: bytes) -> None:
    parent = os.path.dirname(path)
    if "/" in parent:
        os.makedirs(parent, 0o755, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))


def _make_dev(weak: frozenset[str]) -> None:
    host = os.open("/dev", os.O_PATH | os.O_CLOEXEC)
    try:
        if "devices" in weak:
            syscalls.mount("/dev", "dev", None, syscalls.MS_BIND | syscalls.MS_REC)
            return
        _tmpfs("dev", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC, 1 << 16, mode=0o755, inodes=64)
        for name in DEVICES:
            _touch(f"dev/{name}")
            attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NOEXEC
            _show(host, name, f"dev/{name}", attributes, clear=syscalls.MOUNT_ATTR_NODEV)
    finally:
        os.close(host)
    os.mkdir("dev/pts", 0o755)
    os.mkdir("dev/shm", 0o755)
    # An instance of its own: no terminal of the host or of another agent in it. ptmx is for the agent, hence 0666.
    # Whose group a terminal gets is said when the agent is known.
    flags = syscalls.MS_NOSUID | syscalls.MS_NOEXEC
    syscalls.mount("devpts", "dev/pts", "devpts", flags, f"newinstance,{_DEVPTS}")
    for name, target in (
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ):
        os.symlink(target, f"dev/{name}")
    syscalls.mount_setattr(syscalls.AT_FDCWD, "dev", 0, set_=READ_ONLY)


def _make_proc(weak: frozenset[str]) -> None:
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    if "hidden_proc" in weak:
        syscalls.mount("proc", "proc", "proc", flags)
        return
    # invisible: /proc/1 and with it the runtime does not exist for the agent.
    syscalls.mount("proc", "proc", "proc", flags, "hidepid=invisible")
    proc = os.open("proc", os.O_PATH | os.O_CLOEXEC)
    null = os.open("dev/null", os.O_PATH | os.O_CLOEXEC)
    try:
        present = set(os.listdir("proc"))
        for name in PROC_READ_ONLY:
            if name in present:
                _show(proc, name, f"proc/{name}", READ_ONLY | SAFE | syscalls.MOUNT_ATTR_NOEXEC)
        for name in PROC_FILES_MASKED:
            if name in present:
                _mask_file(null, f"proc/{name}")
        for name in PROC_DIRECTORIES_MASKED:
            if name in present:
                _mask_directory(f"proc/{name}")
    finally:
        os.close(proc)
        os.close(null)


def _mask_file(null: int, target: str, *, at: int = syscalls.AT_FDCWD) -> None:
    """Cover a file (`at` alone, where the path is empty) with a null device on a nodev mount: it opens for nobody."""
    tree = syscalls.open_tree(null, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
    try:
        syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH, set_=READ_ONLY | SAFE | syscalls.MOUNT_ATTR_NOEXEC)
        flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | (0 if target else syscalls.MOVE_MOUNT_T_EMPTY_PATH)
        syscalls.move_mount(tree, "", at, target, flags)
    finally:
        os.close(tree)


def _mask_directory(target: str) -> None:
    syscalls.mount(
        "tmpfs", target, "tmpfs", _MS_SAFE | syscalls.MS_NOEXEC | syscalls.MS_RDONLY, "size=4096,nr_inodes=2,mode=0555"
    )


def _make_scratch(plan: SandboxPlan, image: Staged | None, home: Staged | None, flags: int) -> None:
    sizes, uid, gid = plan.scratch, plan.ids.host(plan.uid), plan.ids.host(plan.gid)
    if "user_namespace" in plan.weaken:
        uid, gid = plan.uid, plan.gid
    os.mkdir("workspace", 0o755)
    own_workspace = not any(bind.target == "/workspace" for bind in plan.binds)
    if image is None:
        _tmpfs("tmp", flags, sizes.tmp_bytes, mode=0o1777, inodes=sizes.inodes)
        _tmpfs("home/agent", flags, sizes.home_bytes, mode=0o750, inodes=sizes.inodes, uid=uid, gid=gid)
        if own_workspace:
            _tmpfs("workspace", flags, sizes.workspace_bytes, mode=0o750, inodes=sizes.inodes, uid=uid, gid=gid)
    else:
        parts = [(scratch.TMP, "tmp")]
        if home is None:
            parts.append((scratch.HOME, "home/agent"))
        else:
            _show_image(home, [(scratch.HOME, "home/agent")], unsafe=not flags)
        if own_workspace:
            parts.append((scratch.WORKSPACE, "workspace"))
        _show_image(image, parts, unsafe=not flags)
    if "devices" not in plan.weaken:
        _tmpfs("dev/shm", flags, sizes.shm_bytes, mode=0o1777, inodes=sizes.inodes)


def _show_image(image: Staged, parts: list[tuple[str, str]], *, unsafe: bool) -> None:
    """Show parts of an image where they belong; the whole stays out."""
    top = image.attach()
    try:
        for name, target in parts:
            _show(top, name, target, 0, clear=SAFE if unsafe else 0)
    finally:
        os.close(top)


def hide(paths: tuple[str, ...]) -> None:
    """Cover paths of the root file system; one that is not there needs no cover."""
    null = os.open("dev/null", os.O_PATH | os.O_CLOEXEC)
    root = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        for path in paths:
            with step(f"hide {path}"):
                try:
                    fd = syscalls.openat2(root, path, os.O_PATH, resolve=syscalls.RESOLVE_IN_ROOT)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                try:
                    if stat.S_ISDIR(os.fstat(fd).st_mode):
                        _mask_directory(f"/proc/self/fd/{fd}")
                    else:
                        _mask_file(null, "", at=fd)
                finally:
                    os.close(fd)
    finally:
        os.close(root)
        os.close(null)


def pivot(*, read_only: bool) -> None:
    """Make the working directory the root and let the old one go; nothing of the host's tree is reachable after it."""
    # new_root and put_old the same: the old root ends up on top of the new one and is detached there (pivot_root(2)).
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")
    if read_only:
        syscalls.mount_setattr(syscalls.AT_FDCWD, "/", 0, set_=READ_ONLY)
