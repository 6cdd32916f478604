"""A process that writes an action log until it is killed or its disk refuses; started by tests.

It prints one JSON line for each thing that was acknowledged, after it was, unbuffered: what is printed must be in the
log whatever happens next.

    python -m tests.support.log_writer DIRECTORY stream   records and appends until killed
    python -m tests.support.log_writer DIRECTORY unsynced the same, and nothing is synced: what a test has to find
    python -m tests.support.log_writer DIRECTORY small    in a mount namespace with a tiny tmpfs: full, freed, full
    python -m tests.support.log_writer DIRECTORY failing  a few records, of which syncs fail by fault injection
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from supervisord.actions.log import ActionLog
from supervisord.actions.types import Action, CannotReadLog, CannotRecord

MS_REC, MS_PRIVATE, CLONE_NEWNS = 0x4000, 1 << 18, 0x20000
TMPFS_BYTES = 512 * 1024
RETRY_SECONDS_MAX = 20


def say(**what: object) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def act(number: int, bytes_extra: int = 0) -> Action:
    return Action("ag_x", "agent:ag_x", "egress.request", f"http://a.example/{number}", "allowed", "x" * bytes_extra)


def open_log(directory: Path) -> ActionLog:
    return ActionLog.open(
        directory / "log",
        directory.parent / f"{directory.name}.key" if (directory / "tmpfs").exists() else directory / "key",
        now_ns=time.time_ns,
        segment_bytes=8000,
        checkpoint_every_entries=16,
        checkpoint_seconds=0.02,
    )


async def stream(directory: Path) -> None:
    log = open_log(directory)
    say(opened=log.size)

    async def one(durable: bool) -> None:  # noqa: FBT001 - two kinds of writer
        number = 0
        while True:
            number += 1
            entry = await (log.record(act(number)) if durable else log.append(act(number)))
            say(seq=entry.seq, leaf=entry.leaf_hash.hex(), durable=durable)
            await asyncio.sleep(0 if durable else 0.0005)

    await asyncio.gather(one(durable=True), one(durable=True), one(durable=False))


async def unsynced(directory: Path) -> None:
    os.fdatasync = os.fsync = lambda _fd: None  # type: ignore[assignment]
    await stream(directory)


async def small(directory: Path) -> None:
    """Fill the disk, see the refusal, free some space, see the log record again."""
    filler = directory / "filler"
    filler.write_bytes(b"\0" * (TMPFS_BYTES * 3 // 4))
    log = open_log(directory)
    await until_refused(log)
    for _ in range(3):
        try:
            await log.record(act(0, bytes_extra=4000))
        except CannotRecord as error:
            say(refused=error.message)
    report = await log.verify()
    say(verified=report.ok, problem=report.problem, size=report.size)
    filler.unlink()
    for _ in range(20):
        entry = await log.record(act(0, bytes_extra=4000))
        say(seq=entry.seq, leaf=entry.leaf_hash.hex())
    say(recovered=await told(log))
    await log.close()


async def told(log: ActionLog) -> list[dict[str, object]]:
    """What the log.recover entries say; the index may need a moment where the disk was full."""
    deadline = time.monotonic() + RETRY_SECONDS_MAX
    while True:
        try:
            return [dict(entry.action.details) for entry in await log.query(verb="log.recover")]
        except CannotReadLog as error:
            if time.monotonic() > deadline:
                raise
            say(unreadable=error.message)
            await asyncio.sleep(0.1)


async def until_refused(log: ActionLog) -> None:
    number = 0
    while True:
        number += 1
        try:
            entry = await (log.record if number % 2 else log.append)(act(number, bytes_extra=3000))
        except CannotRecord as error:
            say(refused=error.message)
            return
        say(seq=entry.seq, leaf=entry.leaf_hash.hex())


async def failing(directory: Path) -> None:
    log = open_log(directory)
    say(opened=log.size)
    deadline = time.monotonic() + RETRY_SECONDS_MAX
    done = number = 0
    while done < 10 and time.monotonic() < deadline:
        number += 1
        try:
            entry = await log.record(act(number))
        except CannotRecord as error:
            say(refused=error.message)
            await asyncio.sleep(0.1)
        else:
            done += 1
            say(seq=entry.seq, leaf=entry.leaf_hash.hex())
    say(recovered=await told(log))
    await log.close()


def mount_small(directory: Path) -> None:
    """A tiny tmpfs on `directory`, seen by this process alone."""
    import ctypes  # noqa: PLC0415 - in this mode only

    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={TMPFS_BYTES}".encode()
    target = os.fsencode(directory)
    if (
        libc.unshare(CLONE_NEWNS) < 0
        or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) < 0
        or libc.mount(b"sktest", target, b"tmpfs", 0, options) < 0
    ):
        raise OSError(ctypes.get_errno(), "cannot mount a tmpfs in a mount namespace of its own")


def main() -> None:
    directory, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "small":
        mount_small(directory)
        (directory / "tmpfs").touch()
    asyncio.run({"stream": stream, "unsynced": unsynced, "small": small, "failing": failing}[mode](directory))
    if mode == "small":
        # The mount goes with this process: verify while it is there.
        from supervisord.actions.verify import verify  # noqa: PLC0415 - in this mode only

        report = verify(directory / "log", directory.parent / f"{directory.name}.key.pub")
        say(offline=report.ok, problem=report.problem, size=report.size)


if __name__ == "__main__":
    main()
