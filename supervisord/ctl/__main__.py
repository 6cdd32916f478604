"""stockadectl: people's way to the daemon."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import NoReturn


def main() -> NoReturn:
    """Does what sys.argv says, and exits."""
    # gRPC's own log lines and fork handlers have nothing to say to a person at a terminal.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # `import grpc` imports its asyncio half at once, 12 of some 130 ms, and nothing here uses it.
    sys.modules.setdefault("grpc.aio", ModuleType("grpc.aio"))
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
