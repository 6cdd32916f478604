"""Old segments of the action log go where the configuration says so, and content that somebody ordered away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.errors import StockadeError

if TYPE_CHECKING:
    from supervisord.actions.log import ActionLog
    from supervisord.config import LogConfig

log = structlog.get_logger()

SWEEP_SECONDS: Final = 600.0
DAY_SECONDS: Final = 86400.0


async def retire_forever(actions: ActionLog, config: LogConfig) -> None:
    """Runs as long as the daemon; returns at once where everything is kept."""
    while config.keep_days or config.keep_bytes:
        try:
            await actions.retire(keep_seconds=config.keep_days * DAY_SECONDS, keep_bytes=config.keep_bytes)
        except (StockadeError, OSError) as error:
            log.error("cannot retire old entries of the action log", cause=str(error))
        await asyncio.sleep(SWEEP_SECONDS)


async def finish_redactions(actions: ActionLog) -> None:
    """What a crash or a full disk left of redactions; the next start goes on where this one cannot."""
    try:
        done = await actions.finish_redactions()
    except (StockadeError, OSError) as error:
        log.error("cannot finish the redaction of entries of the action log", cause=str(error))
    else:
        if done:
            log.info("finished redactions of entries of the action log", entries=done)
