"""The launcher: a small root process with one thread that performs plans and holds what runs.

Started as `python -I -S -E …/sandbox/launcher.py --run-dir DIR --instance NAME [--linger-seconds N]`, by systemd or by
the daemon, and outlives a daemon that dies. It imports nothing but the standard library, because every launch forks it
and it is root next to hostile code. Sockets: `DIR/launcher.sock` (mode 0600).
"""

# ruff: noqa: PTH100, PTH102, PTH103, PTH108, PTH120 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import os
import sys

# -I and -S leave the path with the standard library only. Ours goes last: nothing there may stand in for a module of
# it.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before any import

import argparse
import contextlib
import gc
import resource
import signal
import socket
import stat
import time
from typing import Final

from sandbox import cgroups, pages, syscalls
from sandbox.guard import Guard
from sandbox.loop import READ, Loop
from sandbox.netpool import Pool
from sandbox.restore import Notifier, restore
from sandbox.running import EXEC_SECONDS_MAX, State
from sandbox.scratch import HOMES, LAYERS, RESERVE_BYTES, Stock
from sandbox.scratch import READY as IMAGES_READY
from sandbox.serve import Server
from sandbox.starters import READY, Starters
from sandbox.sweeper import Sweeper
from sandbox.userns import Holders
from sandbox.watching import Watching
from sandbox.workshop import Workshop

PROXY_PORT: Final = 3128
NETWORKS_READY: Final = 4
IDLE_SECONDS: Final = 0.02
BUSY_SECONDS: Final = 0.1
WAIT_SECONDS: Final = 5.0
BACKLOG: Final = 16
_BEGINNING: Final = (State.BUILDING, State.BUILT, State.STARTING)


def main() -> int:
    options = _options()
    os.umask(0o077)
    syscalls.set_process_name("stockade-launch")
    _allow_descriptors()
    _make_directories(options.run_dir)
    _make_scratch_directory(options.scratch_dir)
    lock = _only_one(options.run_dir)
    loop = Loop()
    layout = cgroups.detect(parent=options.cgroup_parent)
    workshop = Workshop(
        run_dir=options.run_dir,
        instance=options.instance,
        loop=loop,
        layout=layout,
        pool=Pool(options.instance, PROXY_PORT, options.networks),
        holders=Holders(),
        starters=Starters(layout, options.instance, f"{options.run_dir}/root", options.starters),
        guard=Guard(loop, options.run_dir),
        stock=Stock(
            options.scratch_dir,
            label=f"stockade-{options.instance}",
            size=options.images,
            reserve_bytes=options.scratch_reserve_bytes,
            preallocate=options.scratch_preallocate,
        ),
        sweeper=Sweeper(loop),
        watching=Watching(loop, f"{options.run_dir}/watched"),
        allow_weakened=options.allow_weakened,
        exec_seconds=options.exec_seconds,
    )
    notifier = Notifier()
    server = Server(workshop, _listen(options.run_dir))
    server.on_change.append(notifier.agent_changed)
    workshop.guard.on_group.append(notifier.guard_made)
    restore(server, notifier)
    _end_on_signals(loop)
    # What is there now is never garbage: without this each collection in a child would copy the pages of all of it.
    gc.collect()
    gc.freeze()
    while workshop.holders.refill():
        pass
    workshop.pool.refill(1)
    notifier.send("READY=1")
    _run(server, options.linger_seconds)
    workshop.starters.close()
    workshop.stock.close()
    workshop.sweeper.close()
    workshop.holders.close()
    workshop.pool.close()
    workshop.guard.close()
    workshop.watching.close()
    with contextlib.suppress(OSError):
        os.unlink(f"{options.run_dir}/launcher.sock")
    layout.tidy(options.instance)
    os.close(lock)
    return 0


def _allow_descriptors() -> None:
    """Take all that the hard limit gives: every agent needs some twenty, and has limits of its own."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="stockade-launcher", description="performs sandbox plans; started by stockaded"
    )
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--instance", required=True)
    parser.add_argument(
        "--linger-seconds", type=float, default=None, help="end when there was nothing to do for so long"
    )
    parser.add_argument("--cgroup-parent", default=None, help="group that was delegated to us, relative to the root")
    parser.add_argument("--networks", type=int, default=NETWORKS_READY, help="networks made ahead of need")
    parser.add_argument(
        "--allow-weakened", action="store_true", help="for tests: perform plans that leave controls out"
    )
    parser.add_argument("--starters", type=int, default=READY, help="sandboxes begun ahead of need")
    parser.add_argument("--exec-seconds", type=float, default=EXEC_SECONDS_MAX, help="limit on one execve")
    parser.add_argument("--scratch-dir", default="", help="where images for scratch on disk are made; empty: memory")
    parser.add_argument("--images", type=int, default=IMAGES_READY, help="images of each size made ahead of need")
    parser.add_argument(
        "--scratch-reserve-bytes", type=int, default=RESERVE_BYTES, help="what stays free where images are made"
    )
    parser.add_argument("--scratch-preallocate", action="store_true", help="take all the room of an image at once")
    return parser.parse_args()


def _make_directories(run_dir: str) -> None:
    os.makedirs(run_dir, 0o711, exist_ok=True)
    for name in ("agents", "filters", "root", "stage", "stage/image", "stage/home", "stage/lower"):
        path = f"{run_dir}/{name}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0:
            raise SystemExit(f"cannot use {path}: it is not a directory of root; remove it")


def _make_scratch_directory(top: str) -> None:
    for path in (top, f"{top}/{LAYERS}", f"{top}/{HOMES}") if top else ():
        os.makedirs(path, 0o700, exist_ok=True)
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0:
            raise SystemExit(f"cannot use {path}: it is not a directory of root; remove it")


def _only_one(run_dir: str) -> int:
    """Hold the lock of this run directory; two launchers would each unlink the other's socket."""
    fd = os.open(f"{run_dir}/launcher.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.lockf(fd, os.F_TLOCK, 0)
    except BlockingIOError:
        raise SystemExit(f"cannot start: another launcher serves {run_dir}") from None
    return fd


def _listen(run_dir: str) -> socket.socket:
    path = f"{run_dir}/launcher.sock"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)  # 0600: the umask is 077
    listener.listen(BACKLOG)
    return listener


def _end_on_signals(loop: Loop) -> None:
    """End in order on SIGTERM; agents stay, and the next launcher finds them."""

    def end(*_: object) -> None:
        loop.running = False

    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    loop.watch(read, READ, lambda _events: _discard(read))


def _discard(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(fd, 512)


def _run(server: Server, linger_seconds: float | None) -> None:
    loop, workshop = server.loop, server.workshop
    last = busy_since = time.monotonic()
    quiet = True
    full = filling = False
    forks = 0
    while loop.running:
        busy = loop.turn(0 if filling else WAIT_SECONDS if full else IDLE_SECONDS)
        now = time.monotonic()
        if busy or server.agents or server.channel.connections:
            last = now
        if linger_seconds is not None and now - last > linger_seconds:
            return
        if busy:
            full = filling = False
        launching = any(agent.state in _BEGINNING for agent in server.agents.values())
        # Stocks are filled when there was nothing to do for a moment, one piece a turn; and a piece now and then where
        # there is always something: an agent that never stops printing must not cost others what is made ahead.
        if quiet:
            busy_since = now  # the last turn may have waited for long: a launch that ended it must not wait for a piece
        quiet = not (busy or launching)
        if quiet or now - busy_since >= BUSY_SECONDS:
            busy_since = now
            full, filling = _refill(workshop)
            if full and workshop.forks != forks:
                forks = workshop.forks
                pages.own()


def _refill(workshop: Workshop) -> tuple[bool, bool]:
    """Make a piece or two for the stocks; whether they are full, and whether to go on at once."""
    forks = workshop.forks
    more = workshop.holders.refill() or workshop.starters.refill()
    image = not more and workshop.stock.refill()
    networks = workshop.pool.refill(1)
    # Not at once where it is the end of a discarded one that is waited for.
    return not (more or image or networks), bool(image or networks or workshop.forks != forks)


if __name__ == "__main__":
    sys.exit(main())
