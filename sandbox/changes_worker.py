"""The process that reads and applies what an agent changed: python -I -S -E changes_worker.py, started by the daemon.

Descriptors: 3 the layer (a mount of its own, read-only), 4 the workspace, 5 the order (JSON), 6 the report (a JSON
object a line, the last one with `done`). It takes the ids of the workspace's owner and keeps one capability, to read
what the agent made unreadable; it has no network and, where the kernel has Landlock, no other file than these.
"""

# ruff: noqa: PTH100, PTH120 - imported before anything of ours

import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before any import

import base64
import difflib
import json
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from sandbox import capabilities, landlock, syscalls
from sandbox.changes import Apply, Bounds, Change, TooMuch, Walk, digest, pieces, wanted

UPPER, LOWER, ORDER, REPORT = 3, 4, 5, 6
ORDER_BYTES_MAX: Final = 1 << 20
CPU_SECONDS_MAX: Final = 300
MEMORY_BYTES_MAX: Final = 2 << 30
OPEN_FILES_MAX: Final = 1024
PATCH_FILE_BYTES_MAX: Final = 256 << 10
PATCH_LINES_MAX: Final = 8000
_CAP_DAC_READ_SEARCH: Final = 1 << 2


@dataclass(slots=True)
class Report:
    """Lines for the daemon, never more bytes than it takes."""

    left: int

    def say(self, **fields: object) -> None:
        line = json.dumps(fields, separators=(",", ":")).encode() + b"\n"
        self.left -= len(line)
        if self.left < 0:
            raise TooMuch("more to tell than can be told")
        view = memoryview(line)
        while view:
            view = view[os.write(REPORT, view) :]


def main() -> None:
    order = json.loads(os.pread(ORDER, ORDER_BYTES_MAX, 0))
    _confine(order)
    report = Report(int(order["report_bytes_max"]))
    reserve = 4096
    report.left -= reserve
    problem = ""
    facts: dict[str, object] = {}
    try:
        facts = _perform(order, report)
    except TooMuch as error:
        problem = str(error)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
    report.left += reserve
    report.say(done=True, problem=problem[:500], **facts)


def _perform(order: dict[str, Any], report: Report) -> dict[str, object]:
    bounds = Bounds(int(order["entries_max"]), int(order["read_bytes_max"]))
    walk = Walk(UPPER, LOWER, int(order["since_ns"]), bounds)
    found = list(walk.changes())
    name = digest(found)
    facts: dict[str, object] = {"digest": name, "changes": len(found)}
    chosen = [os.fsdecode(base64.b64decode(path)) for path in order["paths"]]
    if order["op"] == "diff":
        patcher = Patcher(int(order["patch_bytes_max"])) if order["patch"] else None
        for change in found:
            if wanted(change.path, chosen):
                patch = b"" if patcher is None else patcher.patch(change)
                report.say(**_told(change), **({"patch": base64.b64encode(patch).decode()} if patch else {}))
        return facts
    if order["digest"] and order["digest"] != name:
        return facts | {"stale": True}
    missing = [path for path in chosen if not any(wanted(change.path, [path]) for change in found)]
    if missing:
        return facts | {"missing": base64.b64encode(os.fsencode(missing[0])).decode()}
    apply = Apply(UPPER, LOWER, bool(order["force"]))
    for change in found:
        if wanted(change.path, chosen):
            outcome, why = apply.perform(change)
            report.say(**_told(change), outcome=outcome, why=why)
    return facts


def _told(change: Change) -> dict[str, object]:
    return {
        "path": base64.b64encode(os.fsencode(change.path)).decode(),
        "kind": change.kind,
        "type": change.type,
        "size": change.size,
        "mode": change.mode,
        "sha256": change.sha256,
        "link": base64.b64encode(os.fsencode(change.link)).decode(),
        "notes": change.notes,
        "conflict": change.conflict,
        "refused": change.refused,
    }


class Patcher:
    """Unified differences of text files, as long as there is room; what is too long says so in a line."""

    def __init__(self, bytes_max: int) -> None:
        self._left = bytes_max

    def patch(self, change: Change) -> bytes:
        text = b"".join(self._lines(change))
        if len(text) > self._left:
            text = b"(no room for more differences)\n" if self._left > 0 else b""
            self._left = 0
            return text
        self._left -= len(text)
        return text

    def _lines(self, change: Change) -> Iterator[bytes]:
        old = b""
        if change.type != "file" or change.refused or self._left <= 0:
            return
        below = change.below
        if below is not None and below.type == "file":
            old = _start(LOWER, change.path)
        new = b"" if change.kind == "deleted" else _start(UPPER, change.path)
        name = os.fsencode(change.path)
        if max(len(old), len(new)) > PATCH_FILE_BYTES_MAX or max(map(_lines, (old, new))) > PATCH_LINES_MAX:
            yield b"(" + name + b" is too long to be compared by lines)\n"
        elif b"\0" in old or b"\0" in new:
            yield b"(" + name + b" is not text)\n"
        else:
            before = b"a/" + name if change.kind != "added" else b"/dev/null"
            after = b"b/" + name if change.kind != "deleted" else b"/dev/null"
            for line in difflib.diff_bytes(
                difflib.unified_diff, old.splitlines(keepends=True), new.splitlines(keepends=True), before, after
            ):
                yield line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"


def _lines(data: bytes) -> int:
    return data.count(b"\n")


def _start(top: int, path: str) -> bytes:
    try:
        return b"".join(pieces(top, path, PATCH_FILE_BYTES_MAX + 1))
    except OSError:
        return b""


def _confine(order: dict[str, Any]) -> None:
    """Give up whatever reading and writing two directories does not need; what fails here ends the process."""
    syscalls.close_range(REPORT + 1)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    for what, value in (
        (resource.RLIMIT_CPU, CPU_SECONDS_MAX),
        (resource.RLIMIT_AS, MEMORY_BYTES_MAX),
        (resource.RLIMIT_NOFILE, OPEN_FILES_MAX),
        (resource.RLIMIT_CORE, 1),
    ):
        resource.setrlimit(what, (value, value))
    syscalls.unshare(syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS)
    os.umask(0)  # every mode is said
    uid, gid = int(order["uid"]), int(order["gid"])
    capabilities.lock()
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    syscalls.capset(_CAP_DAC_READ_SEARCH, _CAP_DAC_READ_SEARCH, 0)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    # The change of ids cleared it (prctl(2)).
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    if landlock.ABI:
        landlock.only(readable=(UPPER, LOWER), writable=(LOWER,) if order["op"] == "apply" else ())


if __name__ == "__main__":
    main()
