"""The embedded gateway's process: `python -I -m gateway_client.gateways.embedded`, configuration on descriptor 3.

One line of JSON comes in; one line goes out, `{"ready": true, "pid": N}` or `{"ready": false, "error": TEXT}`. Then the
descriptor is the life line: when its other end is gone, so is the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import sys
from typing import TYPE_CHECKING, Final

import structlog

from gateway_client.gateways.embedded import config as configs
from gateway_client.gateways.embedded import forward, http_client, server
from gateway_client.gateways.embedded.build import build_api
from gateway_client.gateways.embedded.confinement import give_up_root
from gateway_client.gateways.embedded.mcp import McpGateway
from gateway_client.gateways.embedded.models.local import LocalModelError
from gateway_client.gateways.guardrails.rules import Rules

if TYPE_CHECKING:
    from gateway_client.gateways.embedded.api import Api
    from gateway_client.gateways.embedded.config import Config
    from gateway_client.gateways.guardrails.rules import Verdict

LIFE_LINE: Final = 3
READ_BYTES: Final = 64 * 1024
TELL_SECONDS_MAX: Final = 5.0


def read_config(descriptor: int) -> Config:
    """Read one line from the descriptor; what may follow is left."""
    data = bytearray()
    while b"\n" not in data:
        piece = os.read(descriptor, READ_BYTES)
        if not piece:
            break
        data += piece
        if len(data) > configs.CONFIG_BYTES_MAX:
            raise configs.ConfigError(f"cannot read gateway config: larger than {configs.CONFIG_BYTES_MAX} bytes")
    return configs.parse(bytes(data).partition(b"\n")[0])


def tell(descriptor: int, value: dict[str, object]) -> None:
    """Answer on the descriptor where it can be written: a pipe is one-way."""
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        os.write(descriptor, json.dumps(value).encode() + b"\n")


class Teller:
    """Tells the daemon of verdicts, on the life line: it records them, and no worker has a say in it."""

    def __init__(self, descriptor: int) -> None:
        self._life_line = socket.socket(fileno=os.dup(descriptor))
        self._life_line.setblocking(False)
        self._turn = asyncio.Lock()

    async def tell(self, agent_id: str, x: int, verdict: Verdict) -> None:
        """Wait until the daemon's end has it; raises OSError or TimeoutError, and then nothing goes on."""
        told = {
            "agent_id": agent_id,
            "x": x,
            "direction": verdict.direction.value,
            "action": verdict.action.value,
            "rules": list(verdict.rules),
            "patterns": dict(verdict.patterns),
        }
        line = json.dumps({"guardrail": told}).encode() + b"\n"
        async with asyncio.timeout(TELL_SECONDS_MAX), self._turn:
            await asyncio.get_running_loop().sock_sendall(self._life_line, line)


async def run(config: Config, api: Api, listener: socket.socket, life_line: int, posture: tuple[str, ...]) -> None:
    """Serve until the life line ends."""
    rules = forward.Rules(config.hosts, config.allow_networks)
    gateway = server.Server(api, rules, forward.Resolver(), allowed_uid=config.allowed_uid, mcp=McpGateway(config.mcp))
    serving = await gateway.start(listener)
    ended = asyncio.Event()

    def readable() -> None:
        if not os.read(life_line, READ_BYTES):
            ended.set()
            return
        # Whatever the daemon writes asks whether we still turn; where it takes nothing just now it will ask again.
        with contextlib.suppress(BlockingIOError):
            tell(life_line, {"pong": True})

    loop = asyncio.get_running_loop()
    loop.add_reader(life_line, readable)
    tell(life_line, {"ready": True, "pid": os.getpid(), "posture": list(posture)})
    await ended.wait()
    loop.remove_reader(life_line)
    serving.close()


def main() -> int:
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    os.set_inheritable(LIFE_LINE, False)
    try:
        config = read_config(LIFE_LINE)
        listener = server.bind(config.socket_path, config.allowed_uid)
        http_client.tls_context()
        rules = Rules(config.guardrails)
        api = build_api(config.models, config.scripts, rules=rules, tell=Teller(LIFE_LINE).tell if rules else None)
        # None only where the caller is not root to begin with, or in a test that looks at something else.
        posture = give_up_root(config.user) if config.user is not None else ()
    except (OSError, ValueError, LocalModelError) as error:
        sys.stderr.write(f"cannot start the embedded gateway: {error}\n")
        tell(LIFE_LINE, {"ready": False, "error": str(error)})
        return 1
    asyncio.run(run(config, api, listener, LIFE_LINE, posture))
    return 0


if __name__ == "__main__":
    # Not asyncio.run's cleanup alone: a local model's threads may still run, and nothing here needs saving.
    sys.stdout.flush()
    os._exit(main())
