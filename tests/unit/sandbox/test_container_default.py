"""Our list of system calls beside the container world's default: each difference has a reason, or this fails.

Theirs is the profile that podman and buildah apply, as Debian's golang-github-containers-common ships it, read for a
container on x86_64 that has no capability, as an agent has none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pyseccomp  # type: ignore[import-untyped]

PROFILE: Final = Path(__file__).resolve().parents[3] / "policies/seccomp/default.json"
THEIRS: Final = Path("/usr/share/containers/seccomp.json")

NAMESPACES: Final = "no namespaces of its own: they multiply the kernel's attack surface"
MOUNTS: Final = "an agent mounts nothing; the sandbox is complete before it starts"
OTHERS: Final = "reaches into another process; a debugger is not worth what an attacker gets"

# What they allow and we do not.
REFUSED: Final = {
    "adjtimex": "sets clocks; reading them needs it not",
    "clock_adjtime": "sets clocks; reading them needs it not",
    "clone3": "its flags are in memory, where a filter cannot see them; ENOSYS makes every libc use clone",
    "fanotify_mark": "of no use without fanotify_init, which neither allows",
    "fsconfig": MOUNTS,
    "fsmount": MOUNTS,
    "fsopen": MOUNTS,
    "fspick": MOUNTS,
    "get_mempolicy": "NUMA placement belongs to the host",
    "get_thread_area": "of 32-bit programs, which cannot run",
    "io_cancel": "asynchronous I/O of old: its events are counted host-wide (fs.aio-max-nr)",
    "io_destroy": "as io_cancel",
    "io_getevents": "as io_cancel",
    "io_setup": "as io_cancel",
    "io_submit": "as io_cancel",
    "keyctl": "kernel keyrings were a way out more than once (CVE-2016-0728)",
    "mbind": "NUMA placement belongs to the host",
    "memfd_secret": "memory that the host cannot look at or swap",
    "modify_ldt": "16-bit segments: an attack surface that no agent needs (CVE-2015-5157)",
    "mount": MOUNTS,
    "mount_setattr": MOUNTS,
    "move_mount": MOUNTS,
    "name_to_handle_at": "handles are half of the way around paths (CVE-2014-3519)",
    "open_tree": MOUNTS,
    "openat2": "its mode is in memory: a set-id bit would pass unseen; ENOSYS makes callers use openat",
    "personality": "switches off address space randomisation",
    "pidfd_getfd": OTHERS,
    "pivot_root": MOUNTS,
    "process_mrelease": OTHERS,
    "process_vm_readv": OTHERS,
    "process_vm_writev": OTHERS,
    "ptrace": OTHERS,
    "reboot": "never, in any namespace",
    "set_mempolicy": "NUMA placement belongs to the host",
    "set_thread_area": "of 32-bit programs, which cannot run",
    "setns": NAMESPACES,
    "syslog": "reads and clears the host's kernel log",
    "umount2": MOUNTS,
}
# What we allow and they do not.
ALLOWED: Final = {
    "futex_waitv": "waits like futex does; newer than their list",
}
# What both allow, we only with some arguments.
RESTRICTED: Final = {
    "chmod": "no set-id bits",
    "clone": "no new namespaces",
    "creat": "no set-id bits",
    "fchmod": "no set-id bits",
    "fchmodat": "no set-id bits",
    "mkdir": "no set-id bits",
    "mkdirat": "no set-id bits",
    "mknod": "no devices, no set-id bits",
    "mknodat": "no devices, no set-id bits",
    "open": "no set-id bits",
    "openat": "no set-id bits",
    "renameat2": "no whiteout, which is a device",
    "seccomp": "no listener",
    "socket": "UNIX, TCP, UDP, and netlink for routes",
    "socketpair": "UNIX",
    "unshare": "no new namespaces",
}


def theirs() -> set[str]:
    """Every call that their profile lets through on x86_64, with whatever arguments."""
    allowed: set[str] = set()
    for rule in json.loads(THEIRS.read_text())["syscalls"]:
        wanted = rule.get("includes") or {}
        if rule["action"] != "SCMP_ACT_ALLOW" or wanted.get("caps") or "amd64" not in wanted.get("arches", ["amd64"]):
            continue
        allowed |= {name for name in rule["names"] if pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name) >= 0}
    return allowed


def ours() -> tuple[set[str], set[str]]:
    """Every call that ours lets through, and those of them that depend on their arguments."""
    always: set[str] = set()
    sometimes: set[str] = set()
    for group in json.loads(PROFILE.read_text())["groups"]:
        if group["action"] == "allow":
            (sometimes if group.get("when") else always).update(group["calls"])
    return always | sometimes, sometimes


def test_whatever_they_allow_and_we_do_not_has_a_reason() -> None:
    assert theirs() - ours()[0] == set(REFUSED)


def test_whatever_we_allow_and_they_do_not_has_a_reason() -> None:
    assert ours()[0] - theirs() == set(ALLOWED)


def test_whatever_we_allow_in_part_has_a_reason() -> None:
    assert ours()[1] & theirs() == set(RESTRICTED)


def test_the_comparison_reads_their_profile() -> None:
    """A list that were read wrong would differ in nothing: what everybody allows and nobody allows is told apart."""
    known = theirs()
    assert {"read", "execve", "socket", "arch_prctl"} <= known
    assert known.isdisjoint({"bpf", "kexec_load", "init_module", "io_uring_setup", "chroot"})
