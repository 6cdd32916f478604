"""`stockadectl backup`: the daemon's state and log in a directory of ours, verified before it gets its name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from stockade.client import methods
from stockade.v1 import system_pb2

from supervisord.ctl.command import FAILED, OK, PROGRAM, Usage
from supervisord.ctl.output import complain, print_json, say

if TYPE_CHECKING:
    from argparse import Namespace
    from typing import BinaryIO

    from stockade.client.sync import Stockade


def backup(stockade: Stockade, options: Namespace) -> int:
    target = Path(options.subject)
    partial = target.with_name(f"{target.name}.partial")
    if target.exists() or target.is_symlink():
        raise Usage(f"cannot make {target}: it is there already", f"{PROGRAM} backup --help")
    try:
        partial.mkdir(mode=0o700)  # refuses what somebody else, or a backup that broke off, has put there
    except OSError as error:
        raise Usage(f"cannot make {partial}: {error.strerror}", f"{PROGRAM} backup --help") from error
    try:
        _fetch(stockade, partial)
        found = _verified(partial)
        if not found["ok"]:
            complain(f"{PROGRAM}: cannot back up: the copied log does not verify: {found['problem']}")
            return FAILED
        partial.rename(target)
    except OSError as error:
        complain(f"{PROGRAM}: cannot back up: {error.strerror or error}")
        return FAILED
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    document = {"path": str(target), "size": found["size"], "root": found["root"]}
    if options.output == "json":
        print_json(document)
    else:
        say(f"{target}: state, and {document['size']} entries of the log, root {document['root']}")
        say("the key that signs the log is not in it: keep a copy of keys/log.key apart")
    return OK


def _fetch(stockade: Stockade, directory: Path) -> None:
    name, file = "", None
    try:
        for message in stockade.stream(methods.BACKUP, system_pb2.BackupRequest()):
            if message.path != name or file is None:
                if file is not None:
                    _close(file)
                name, file = message.path, _create(directory, message.path)
            file.write(message.data)
    finally:
        if file is not None:
            _close(file)


def _create(directory: Path, name: str) -> BinaryIO:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise Usage(f"cannot write {name}: it is not below the directory", f"{PROGRAM} backup --help")
    for parent in list(reversed(path.parents))[1:]:
        (directory / parent).mkdir(mode=0o700, exist_ok=True)
    return os.fdopen(os.open(directory / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _close(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


def _verified(directory: Path) -> dict[str, object]:
    from supervisord.actions.verify import verify  # noqa: PLC0415 - it imports cryptography

    keys = directory / "keys"
    first = keys / "log.key.first.pub"
    report = verify(directory / "log", first if first.exists() else keys / "log.key.pub")
    return {"ok": report.ok, "size": report.size, "root": report.root, "problem": report.problem}
