"""An attempt to get out of a sandbox: a probe that runs inside and says how far it came.

A probe is a Python text. It calls `reached(what)` when the attempt worked, or came past the border that should stop it,
and `refused(why)` when it was stopped. Probes are harmless where the border fails: pointers that fault, files opened
and never written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.launcher import Launcher

PRELUDE = """
import ctypes, errno, json, os, socket, stat, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
BAD = 1  # an address that faults
def reached(what=''):
    print(json.dumps(['reached', str(what)]), flush=True); os._exit(0)
def refused(why=''):
    print(json.dumps(['refused', str(why)]), flush=True); os._exit(0)
def name(number): return errno.errorcode.get(number, str(number))
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in arguments])
    return result, (name(ctypes.get_errno()) if result < 0 else '')
def judge(result, error, by=('EPERM', 'ENOSYS')):
    # Any other errno means that the kernel looked at the arguments: the border was passed.
    (refused if result < 0 and error in by else reached)(error or result)
def opens(path, flags):
    try: fd = os.open(path, flags)
    except OSError as e: refused(f'{path}: {name(e.errno)}')
    os.close(fd); reached(path)
"""

# What turns an agent into root of the host within its own mount, pid and network namespaces: for twins only.
ROOT: dict[str, Any] = {
    "weaken": ("seccomp", "capabilities", "user_namespace", "new_privileges", "landlock"),
    "uid": 0,
    "gid": 0,
}


@dataclass(slots=True)
class Tally:
    """Attempts of this test run: refused where they must be, and found where a control was left out."""

    refused: int = 0
    twins: int = 0
    absent: int = 0  # twins of what this kernel or host does not have
    second_kernel: int = 0  # refused on another kernel as well

    def describe(self) -> str:
        text = f"attempts to break out: {self.refused} refused, {self.twins} twins found"
        text += f", {self.absent} of what this kernel does not have" if self.absent else ""
        return text + (f"; on a second kernel {self.second_kernel} refused" if self.second_kernel else "")


TALLY = Tally()


@dataclass(frozen=True, slots=True)
class Outcome:
    reached: bool
    detail: str


def attempt(launcher: Launcher, probe: str, fds: Sequence[int] = (), **changes: Any) -> Outcome:
    """Run a probe in a sandbox of its own; one that dies of the attempt (SIGSYS) was refused."""
    agent = launcher.run(["python3", "-I", "-c", PRELUDE + probe], fds, **changes)
    assert agent.status is not None
    weak = bool(changes.get("weaken"))
    if agent.status["signal"] is not None:
        TALLY.refused += not weak
        return Outcome(reached=False, detail=f"signal {agent.status['signal']}")
    lines = [line for line in agent.stdout.splitlines() if line.startswith("[")]
    assert lines, f"probe said nothing: {agent.status} {agent.stdout} {agent.stderr}"
    word, detail = json.loads(lines[-1])
    TALLY.refused += not weak and word == "refused"
    TALLY.twins += weak and word == "reached"
    return Outcome(reached=word == "reached", detail=detail)
