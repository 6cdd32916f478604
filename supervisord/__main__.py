"""stockaded: reads the configuration and runs the daemon in the foreground (systemd Type=notify)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sqlite3
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
import uvloop

from sandbox import doctor
from supervisord.actions.owed import Owed
from supervisord.actions.types import CannotOpenLog, CannotRecord, DamagedLog
from supervisord.alone import alone
from supervisord.api import control_listener
from supervisord.config_reader import load_config, missing_files
from supervisord.daemon import Daemon
from supervisord.errors import StockadeError
from supervisord.killonly import MEND, KillOnly
from supervisord.opening import make_directories
from supervisord.outlets import dialer_configuration, worker_configuration
from supervisord.parts import SLOTS_DIR
from supervisord.policies import PolicyShelf
from supervisord.store import CannotStore

if TYPE_CHECKING:
    from supervisord.config import Config

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
OPEN_AGAIN_SECONDS: Final = 2.0
LOGGED_TO_JOURNAL: Final = "JOURNAL_STREAM"


def main() -> int:
    """Run; the exit code is 0 after an orderly stop, 1 when it could not start, 2 for a wrong command line or file."""
    options = _options()
    _configure_logging(verbose=options.verbose)
    try:
        config = load_config(options.config)
    except StockadeError as error:
        return _fail(error, EXIT_USAGE)
    if os.geteuid() != 0:
        sys.stderr.write("stockaded: cannot start: it needs root to make sandboxes\n  run it as root, or by systemd\n")
        return EXIT_FAILED
    if options.check:
        return _check(config)
    os.umask(0o077)
    try:
        make_directories(config)
        with alone(run_dir=config.run_dir, marks=SLOTS_DIR, instance=config.instance):
            uvloop.run(_run(config))
    except StockadeError as error:
        return _fail(error, EXIT_FAILED)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stockaded", description="Stockade's daemon: launches and governs AI agents.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="stockade.toml")
    parser.add_argument("--check", action="store_true", help="judge configuration and host, and start nothing")
    parser.add_argument("--verbose", action="store_true", help="also log what is of use when debugging")
    return parser.parse_args()


def _check(config: Config) -> int:
    """Print what the host has and lacks; 1 where a required control is missing, or what the file names is no good."""
    missing = 0
    for finding in doctor.probe(doctor.Host(state_dir=config.state_dir)):
        mark = "ok     " if finding.present else ("MISSING" if finding.required else "absent ")
        missing += finding.required and not finding.present
        sys.stdout.write(f"{mark} {finding.control}: {finding.how} ({finding.source})\n")
        if not finding.present and finding.remedy:
            sys.stdout.write(f"        needed: {finding.absence}; protects {finding.protects}\n")
            sys.stdout.write(f"        {finding.remedy}\n")
    wrong = _wrong(config)
    sys.stdout.flush()
    for line in wrong:
        sys.stderr.write(f"stockaded: {line}\n")
    if not wrong:
        sys.stdout.write(f"configuration {config.source}: ok\n")
    return EXIT_FAILED if missing or wrong else 0


def _wrong(config: Config) -> list[str]:
    """What is wrong with what the file names: directories, key files, policies."""
    found = list(missing_files(config))
    for key, directory in (("state_dir", config.state_dir), ("run_dir", config.run_dir)):
        there = next(path for path in (directory, *directory.parents) if path.exists())
        if not there.is_dir():
            found.append(f"cannot use {key} {directory}: {there} is not a directory")
    try:
        if not found:
            worker_configuration(config)
            dialer_configuration(config)
        shelf = PolicyShelf(config.policy_dirs, gateway=config.gateway)
    except StockadeError as error:
        return [*found, f"{error.message}; {error.remedy}"]
    return [*found, *(f"{broken.source}: {broken.error.message}" for broken in shelf.broken())]


async def _run(config: Config) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watchdog = loop.create_task(_watchdog())
    daemon, listener = await _opened(config, stop)
    if daemon is None:
        return
    try:
        await daemon.start(listener=listener)
    except BaseException:
        await daemon.abandon()
        raise
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = loop.create_task(_reload(daemon))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    # What is there now stays: no collection looks at all of it while somebody waits.
    gc.collect()
    gc.freeze()
    notify("READY=1\nSTATUS=")
    await stop.wait()
    notify("STOPPING=1")
    watchdog.cancel()
    await daemon.stop()


async def _opened(config: Config, stop: asyncio.Event) -> tuple[Daemon | None, socket.socket | None]:
    """A daemon whose log and database are open, or None where `stop` came first; until then kills alone are served.

    With it comes the control socket, where that was opened for them.
    """
    killing: KillOnly | None = None
    listener: socket.socket | None = None
    owed = Owed(config.run_dir / "private" / "owed", now_ns=time.time_ns)
    while True:
        daemon = Daemon(config, owed)
        try:
            await daemon.open()
        except (CannotOpenLog, CannotStore, CannotRecord) as error:
            await daemon.abandon()
            if not _leaves_killing(error):
                raise
            if killing is None:
                listener = control_listener(config)
                remedy = error.remedy if isinstance(error, DamagedLog) else MEND
                killing = KillOnly(config, error.message, remedy=remedy, owed=owed, entropy=os.urandom)
                await killing.start(listener.dup())
                notify(f"READY=1\nSTATUS=kill-only: {error.message}")
        except BaseException:
            await daemon.abandon()
            raise
        else:
            if killing is not None:
                await killing.stop(ending=False)
            return daemon, listener
        owed.save()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OPEN_AGAIN_SECONDS):
                await stop.wait()
            notify("STOPPING=1")
            await killing.stop(ending=True)
            return None, None


def _leaves_killing(error: StockadeError) -> bool:
    """Whether agents can be killed all the same: a disk takes nothing, or the log is damaged and nobody may write on.

    Else another daemon has the files and its own kill switch, or the key is not to be used.
    """
    cause = error.__cause__
    if isinstance(error, CannotRecord | DamagedLog):
        return True
    return isinstance(cause, OSError | sqlite3.OperationalError) and not isinstance(cause, BlockingIOError)


async def _reload(daemon: Daemon) -> None:
    try:
        await daemon.reload()
    except StockadeError as error:
        structlog.get_logger().error("cannot reload", cause=str(error))


async def _watchdog() -> None:
    """Tell systemd that the loop turns, twice in each of its intervals (sd_watchdog_enabled(3))."""
    microseconds = int(os.environ.pop("WATCHDOG_USEC", "0") or 0)
    while microseconds:
        await asyncio.sleep(microseconds / 2e6)
        notify("WATCHDOG=1")


def notify(text: str) -> None:
    """Say something to systemd where it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)


def _configure_logging(*, verbose: bool) -> None:
    """JSON lines on standard error; the journal stamps the time itself."""
    stamp = [] if LOGGED_TO_JOURNAL in os.environ else [structlog.processors.TimeStamper(fmt="iso", utc=True)]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            *stamp,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )


def _fail(error: StockadeError, code: int) -> int:
    sys.stderr.write(f"stockaded: {error.message}\n")
    if error.remedy:
        sys.stderr.write(f"  {error.remedy}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
