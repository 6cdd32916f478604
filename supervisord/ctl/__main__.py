"""stockadectl: people's way to the daemon."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from supervisord.ctl.deferred import defer


def main() -> NoReturn:
    """Does what sys.argv says, and exits."""
    # gRPC's own log lines and fork handlers have nothing to say to a person at a terminal.
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
    # gRPC's threads may be waiting for input that never comes; there is nothing left to wait for.
    os._exit(code)


if __name__ == "__main__":
    main()
