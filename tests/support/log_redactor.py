"""A process that redacts an entry of an action log and dies at each step of that in turn; started by tests.

    python -m tests.support.log_redactor DIRECTORY SEQ

The steps are the calls that change files or wait for the disk, from the order on. For each there is a copy of
DIRECTORY, in which a child dies on coming to it; one JSON line says what was found afterwards. The last line is of the
child that came to no step any more.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervisord.actions.log import ActionLog
from supervisord.actions.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = ("write", "pwrite", "fsync", "fdatasync", "open", "utime", "rename")


def open_log(directory: Path) -> ActionLog:
    return ActionLog.open(directory / "log", directory / "key", now_ns=time.time_ns, checkpoint_seconds=60.0)


def die_at(step: int) -> None:
    """Have this process die on coming to its n-th step from now."""
    lock, left = threading.Lock(), itertools.count(1)

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def perform(*arguments: Any, **options: Any) -> Any:
            with lock:
                if next(left) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return perform

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))


async def redact(directory: Path, seq: int, step: int) -> None:
    log = open_log(directory)
    await log.checkpoint()
    die_at(step)
    await log.redact(seq, actor="uid:0(root)", reason="a secret")
    os._exit(0)  # as after a kill: nothing is put in order


async def finish(directory: Path) -> None:
    log = open_log(directory)
    await log.finish_redactions()
    await log.close()


def child(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        asyncio.run(work())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def holds(directory: Path, text: bytes) -> bool:
    return any(text in path.read_bytes() for path in (directory / "log" / "segments").iterdir())


def main() -> None:
    base, seq, secret = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
    for step in itertools.count(1):
        copy = base.with_name(f"{base.name}-{step}")
        shutil.copytree(base, copy)
        code = child(lambda copy=copy, step=step: redact(copy, seq, step))  # type: ignore[misc]
        died = verify(copy / "log", copy / "key.pub")
        left = holds(copy, secret)
        ended = child(lambda copy=copy: finish(copy))  # type: ignore[misc]
        then = verify(copy / "log", copy / "key.pub")
        facts = {
            "code": code,
            "problem": died.problem,
            "redacted": died.redacted,
            "holds": left,
            "finished": ended,
            "problem_then": then.problem,
            "redacted_then": then.redacted,
            "holds_then": holds(copy, secret),
            "ordered": holds(copy, b"log.redact"),
        }
        os.write(1, json.dumps(facts).encode() + b"\n")
        shutil.rmtree(copy)
        if code == 0:
            break


if __name__ == "__main__":
    main()
