"""What has to be there before the daemon acts: its directories, room to record, and the log with its checkpoints."""

from __future__ import annotations

import os
import tempfile
import time
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.actions.log import ActionLog
from supervisord.errors import CannotRecord, Unavailable

if TYPE_CHECKING:
    from pathlib import Path

    from supervisord.actions.owed import Owed
    from supervisord.config import Config

log = structlog.get_logger()

ROOM_BYTES_MIN: Final = 256 * 1024


def make_directories(config: Config) -> None:
    for path, mode in (
        (config.state_dir, 0o700),
        (config.state_dir / "log", 0o700),
        (config.state_dir / "keys", 0o700),
        (config.run_dir, 0o711),
        (config.run_dir / "private", 0o700),
        (config.run_dir / "processes", 0o700),
        (config.run_dir / "agents", 0o700),
    ):
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            path.chmod(mode)
        except OSError as error:
            raise Unavailable(
                f"cannot use {path}: {error.strerror}", remedy="check state_dir and run_dir in the configuration"
            ) from error


def need_room(state_dir: Path) -> None:
    """Raise CannotRecord where the first records of a start, and what indexes them, would not all find room."""
    try:
        with tempfile.TemporaryFile(dir=state_dir) as file:
            os.posix_fallocate(file.fileno(), 0, ROOM_BYTES_MIN)
    except OSError as error:
        raise CannotRecord(
            f"cannot record anything in {state_dir}: {error.strerror}", remedy="make room for it"
        ) from error


def open_log(config: Config, owed: Owed) -> ActionLog:
    return ActionLog.open(
        config.state_dir / "log",
        config.state_dir / "keys" / "log.key",
        durability=config.log.durability.value,
        now_ns=time.time_ns,
        origin=f"stockade/{config.instance}/{os.uname().nodename}",
        checkpoint_every_entries=config.log.checkpoint_entries,
        checkpoint_seconds=config.log.checkpoint_seconds,
        on_checkpoint=lambda note: _publish(note, config),
        owed=owed,
    )


def _publish(note: str, config: Config) -> None:
    """Give a checkpoint to the journal and to the witness directory: whoever kept one finds a rollback."""
    log.info("checkpoint", note=note)
    if config.log.witness_dir is None:
        return
    try:
        with (config.log.witness_dir / f"{config.instance}.checkpoints").open("a", encoding="utf-8") as file:
            file.write(f"{note}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        log.error("no checkpoint in the witness directory", cause=str(error))
