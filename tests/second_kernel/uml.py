"""Boot Debian's User-Mode Linux, an ordinary process, with the host's files as its root, and run tests in it.

Another kernel (6.1), cgroup v2 with its controllers, no Landlock: what a hybrid host hides shows here. The guest sees
the host's files read-only; it writes to memory, to a disk image of its own, and to one directory that the caller gives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = Path(__file__).resolve().parents[2]
KERNEL: Final = Path("/usr/bin/linux.uml")
INIT: Final = ROOT / "vagrant" / "uml-init.sh"
MEMORY_MIB: Final = 1024
DISK_MIB: Final = 256
DISK: Final = "disk.ext4"
CONSOLE_BYTES_MAX: Final = 20_000


class GuestFailed(AssertionError):  # noqa: N818 - reads as what happened
    """The guest did not come to a result; the text has the end of its console."""


@dataclass(frozen=True, slots=True)
class Case:
    """One test as the guest ran it; `outcome` is passed, failed or skipped, `text` why."""

    name: str
    outcome: str
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    kernel: str
    cgroup: str
    controllers: tuple[str, ...]
    temporary: str
    cases: tuple[Case, ...]

    def outcome(self, name: str) -> str:
        """The outcome of the tests with this name, parameters left out; they must agree."""
        outcomes = {case.outcome for case in self.cases if case.name.partition("[")[0] == name}
        if len(outcomes) != 1:
            raise GuestFailed(f"{name}: {sorted(outcomes) or 'did not run in the guest'}")
        return outcomes.pop()


def run(scratch: Path, *tests: str, seconds_max: float) -> Report:
    """Run tests in a guest; raises `GuestFailed` when it does not finish in time. Nothing is left but `scratch`."""
    out = _prepared(scratch)
    console = _boot(
        f"STOCKADE_TESTS={','.join(tests)}",
        scratch=scratch,
        seconds_max=seconds_max,
    )
    try:
        facts = dict(line.split(" ", 1) for line in (out / "facts.txt").read_text().splitlines())
        cases = tuple(_case(item) for item in ET.parse(out / "result.xml").iter("testcase"))  # noqa: S314 - our own
    except (OSError, ET.ParseError, ValueError) as error:
        raise GuestFailed(f"the guest left no result ({error}):\n{console}") from error
    return Report(
        kernel=facts["kernel"],
        cgroup=facts["cgroup"],
        controllers=tuple(facts["controllers"].split()),
        temporary=facts["temporary"],
        cases=cases,
    )


def cut(scratch: Path, *arguments: str, enough: Callable[[bytes], bool], seconds_max: float) -> tuple[bytes, Path]:
    """Run Python with these arguments in a guest, and take its power away once it has printed enough.

    Returns what it printed, and the image of its disk as the cut left it: killing the guest's processes loses all that
    its kernel had not written yet, and all that its disk had not done yet. Raises `GuestFailed`.
    """
    _prepared(scratch)
    console = scratch / "console"
    with _guest(f"STOCKADE_RUN={','.join(arguments)}", scratch=scratch) as guest:
        deadline = time.monotonic() + seconds_max
        while not enough(console.read_bytes()):
            if guest.poll() is not None or time.monotonic() > deadline:
                raise GuestFailed(f"the guest did not print enough in {seconds_max:.0f} s:\n{_end(console)}")
            time.sleep(0.01)
    return console.read_bytes(), scratch / DISK


def _prepared(scratch: Path) -> Path:
    out = scratch / "out"
    out.mkdir()
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(scratch / DISK), f"{DISK_MIB}M"], check=True, timeout=60)
    return out


def _boot(*arguments: str, scratch: Path, seconds_max: float) -> str:
    """Start the kernel and wait until it powers off; the text of its console."""
    console = scratch / "console"
    with _guest(*arguments, scratch=scratch) as guest:
        try:
            guest.wait(seconds_max)
        except subprocess.TimeoutExpired:
            raise GuestFailed(f"the guest did not power off in {seconds_max:.0f} s:\n{_end(console)}") from None
    return _end(console)


@contextlib.contextmanager
def _guest(*arguments: str, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A kernel that runs, until this is left: all of its processes end then."""
    with (scratch / "console").open("wb") as output:
        guest = subprocess.Popen(
            [
                *(str(KERNEL), "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={INIT}"),
                *(f"ubd0={scratch / DISK}", f"mem={MEMORY_MIB}M", "quiet", "loglevel=1", "panic=1"),
                *(f"STOCKADE_OUT={scratch / 'out'}", f"STOCKADE_PYTHON={sys.executable}", *arguments),
                *("con=null", "con0=null,fd:1", f"uml_dir={scratch}", "umid=guest"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM": "dumb",
                "TMPDIR": "/dev/shm",
            },  # its memory, unlinked at once
            process_group=0,  # the kernel runs as several processes, which are ended together
        )
        try:
            yield guest
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guest.pid, signal.SIGKILL)
            guest.wait()


def _end(console: Path) -> str:
    return console.read_bytes().decode(errors="replace")[-CONSOLE_BYTES_MAX:]


def _case(item: ET.Element) -> Case:
    for outcome, tag in (("failed", "failure"), ("failed", "error"), ("skipped", "skipped")):
        found = item.find(tag)
        if found is not None:
            return Case(item.get("name", ""), outcome, f"{found.get('message', '')}\n{found.text or ''}".strip())
    return Case(item.get("name", ""), "passed", "")
