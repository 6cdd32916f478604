"""Doctor on this very host: what it says is there is there, and looking changes nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sandbox import doctor

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: tries what only root may")
ROOT = Path(__file__).resolve().parents[2]


def test_a_host_that_runs_these_tests_has_everything_required() -> None:
    missing = [item for item in doctor.probe() if item.required and not item.present]
    # `./bootstrap setup` makes the users; a guest kernel under test has no use for them.
    assert [item for item in missing if item.control != "users"] == []


def test_probing_leaves_the_host_and_the_caller_as_they_were() -> None:
    def state() -> tuple[str, set[str], set[str]]:
        return (
            str(Path("/proc/thread-self/ns/net").readlink()),
            {name for _, name in socket.if_nameindex()},
            {path.name for path in Path("/proc/self/fd").iterdir()},
        )

    before = state()
    doctor.probe()
    assert state() == before


@pytest.mark.parametrize(
    ("number", "control", "text"),
    [
        (437, "system-calls", "no openat2"),
        (442, "system-calls", "no mount_setattr"),
        (444, "landlock", "not in this"),
        (301, "file-grants", "cannot be denied"),
    ],
)
def test_a_kernel_without_a_call_is_found(number: int, control: str, text: str) -> None:
    """A filter that answers ENOSYS stands for a kernel that lacks the call."""
    program = f"""
        import struct, sys
        sys.path.insert(0, {str(ROOT)!r})
        from sandbox import syscalls, doctor
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)]
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        syscalls.seccomp_filter(b"".join(struct.pack("<HBBI", *item) for item in code))
        print({{item.control: item for item in doctor.probe()}}[{control!r}])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30, check=True
    )
    assert "present=False" in done.stdout
    assert text in done.stdout


def test_without_privilege_it_says_so_and_does_not_break() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from sandbox import doctor\n" + textwrap.dedent(
        """
        found = {item.control: item for item in doctor.probe()}
        print(found["root"].present, found["network"].present, found["seccomp"].present)
        """
    )
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["False", "False", "True"], done.stderr
