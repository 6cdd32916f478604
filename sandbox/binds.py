"""What a plan binds: cloned with ids mapped in the launcher, layered and put where it belongs in the child.

Nothing is looked up by a path that an agent could have shaped: sources are descriptors, targets are resolved with
`openat2` below the new root without following links.
"""

import errno
import os
import stat
from typing import Final

from sandbox import scratch, syscalls
from sandbox.controls import BY_NAME
from sandbox.mounts import READ_ONLY, SAFE, Staged
from sandbox.plan import Bind, SandboxPlan
from sandbox.sync import StepError, step

_IN_ROOT: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS


def clone_bind(bind: Bind, fd: int, userns: int, *, safe: bool) -> tuple[int, str]:
    """Return a detached mount of what the bind names, ids mapped, and what shows where that could not be.

    Runs in the launcher: a mount can be cloned only in the mount namespace in which its descriptor was opened.
    """
    unmapped = ""
    read_only = not bind.writable
    tree = clone_tree(fd, bind.target)
    try:
        try:
            syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH, set_=syscalls.MOUNT_ATTR_IDMAP, userns_fd=userns)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if bind.without_idmap == "refuse":
                raise StepError(
                    f"bind {bind.target}",
                    errno.EINVAL,
                    "its file system cannot map ids (no idmapped mounts): this host lacks idmap for it",
                    BY_NAME["idmap"].remedy,
                ) from error
            read_only = True
            unmapped = f"{bind.target} is read-only and shows the owner of the host"
        attributes = (READ_ONLY if read_only else 0) | (SAFE if safe else 0)
        syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH, set_=attributes)
    except BaseException:
        os.close(tree)
        raise
    return tree, unmapped


def clone_tree(fd: int, target: str, flags: int = 0) -> int:
    """Return a detached copy of the mount behind an O_PATH descriptor, from that directory or file on."""
    try:
        return syscalls.open_tree(fd, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH | flags)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise StepError(
            f"bind {target}",
            errno.EINVAL,
            "its descriptor is of another mount namespace",
            "run stockaded without PrivateTmp=, ProtectSystem=, ProtectHome= and the like",
        ) from error


def attach_binds(plan: SandboxPlan, trees: list[int], stage: str) -> None:
    """Put the detached mounts of the plan's binds, one each, where they belong. Raises `StepError`.

    The image of scratch is attached at `stage`/image already.
    """
    for bind, given in zip(plan.binds, trees, strict=True):
        tree = _layered(bind, given, stage, safe="mount_flags" not in plan.weaken) if bind.layer else given
        with step(f"bind {bind.target}"):
            target = _target(bind.target, directory=stat.S_ISDIR(os.fstat(tree).st_mode))
            try:
                syscalls.move_mount(
                    tree, "", target, "", syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
                )
            finally:
                os.close(target)


def _layered(bind: Bind, tree: int, stage: str, *, safe: bool) -> int:
    """Return a detached overlay of what the agent changes over the directory that it is given.

    Marks in the user's extended attributes: whoever reads the layer later needs no capability for them, and the agent
    cannot set them through the overlay. No redirects: the layer means nothing without the paths in it.
    """
    with step(f"overlay {bind.target}"):
        lower = Staged(tree, f"{stage}/lower").attach()
        top = os.open(f"{stage}/image", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        context = syscalls.fsopen("overlay")
        try:
            syscalls.fsconfig_string(context, "lowerdir", f"/proc/self/fd/{lower}")
            # By descriptor, whatever characters the path to them has.
            syscalls.fsconfig_string(context, "upperdir", f"/proc/self/fd/{top}/{scratch.UPPER}")
            syscalls.fsconfig_string(context, "workdir", f"/proc/self/fd/{top}/{scratch.WORK}")
            for option in ("redirect_dir=nofollow", "index=off", "xino=off", "metacopy=off"):
                syscalls.fsconfig_string(context, *option.split("="))
            syscalls.fsconfig_flag(context, "userxattr")
            syscalls.fsconfig_create(context)
            overlay = syscalls.fsmount(context, SAFE if safe else 0)
        finally:
            os.close(context)
            os.close(top)
            os.close(lower)
        # An overlay that cannot write becomes read-only without a word: try it before the agent does.
        if os.fstatvfs(overlay).f_flag & os.ST_RDONLY:
            raise StepError(f"overlay {bind.target}", errno.EROFS, "the layer cannot be written")
        probe = f".stockade-{os.urandom(8).hex()}"
        os.mkdir(probe, dir_fd=overlay)
        os.rmdir(probe, dir_fd=overlay)
    return overlay


def _target(path: str, *, directory: bool) -> int:
    """Return an O_PATH descriptor of the place to mount at, made where it is missing; no link is followed."""
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    parts = path.strip("/").split("/")
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        try:
            if last and not directory:
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=here))
            else:
                os.mkdir(part, 0o755, dir_fd=here)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno == errno.ENOTDIR:
                raise StepError(
                    f"bind {path}",
                    error.errno,
                    f"/{'/'.join(parts[:index])} is a link or a file inside the sandbox",
                    "give it another place: fs:ro:/host/path=/in/agent",
                ) from error
            # EOVERFLOW: here is another bind, whose id map has no place for root. Nothing is made on the host's disk.
            if error.errno not in (errno.EOVERFLOW, errno.EROFS):
                raise
            raise StepError(
                f"bind {path}",
                error.errno,
                "there is no such place in what is bound above it",
                "make it on the host, or choose a target that is not below another bind",
            ) from error
        try:
            inner = syscalls.openat2(here, part, os.O_PATH | os.O_NOFOLLOW, resolve=_IN_ROOT)
        finally:
            os.close(here)
        here = inner
    return here
