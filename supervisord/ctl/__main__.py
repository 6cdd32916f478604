"""stockadectl: people's way to the daemon."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from supervisord.ctl.deferred import defer


def main() -> NoReturn:
    """Does what sys.argv says, and exits."""
    # gRPC's own log lines and fork handlers have nothing to say to a person at a terminal.
    stand_in()
    speak_utf8()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    defer("asyncio", "grpc.aio")
    from supervisord.ctl.command import run  # noqa: PLC0415 - after the environment that gRPC reads at import

    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        pass
    except OSError:  # what was printed did not arrive
        code = code or 1
    # gRPC's threads may be waiting for input that never comes; there is nothing left to wait for.
    os._exit(code)


def speak_utf8() -> None:
    """Have files and pipes get UTF-8 whatever the locale is: a checkpoint is a note of certain bytes.

    A terminal gets what it can show, and the rest escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def stand_in() -> None:
    """Have /dev/null where stdin, stdout or stderr was closed: a socket that is opened next would take its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


if __name__ == "__main__":
    main()
