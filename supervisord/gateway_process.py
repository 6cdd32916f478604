"""The embedded gateway as a child process: its configuration goes down a descriptor that is its life line."""

from __future__ import annotations

import asyncio
import json
import pwd
import re
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.config import ModelKind
from supervisord.errors import InvalidInput, Unavailable
from supervisord.processes import Child, end_leftover, python, spawn_connected, start_again

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from supervisord.config import Config, Guardrail, ModelRoute

log = structlog.get_logger()

READY_SECONDS_MAX: Final = 30.0
RESTART_SECONDS: Final = 0.5
ANSWER_BYTES_MAX: Final = 64 * 1024
SECRET_BYTES_MAX: Final = 16 * 1024
SCRIPT_BYTES_MAX: Final = 1 << 20
PONG: Final = b'{"pong": true}'
NAMES_MAX: Final = 256

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", re.ASCII)


def socket_path(config: Config) -> Path:
    return config.run_dir / "gateway" / "gateway.sock"


@dataclass(frozen=True, slots=True)
class GuardrailVerdict:
    """What a guardrail found in one exchange, as the gateway tells it: names and counts, never a text."""

    agent_id: str
    x: int
    direction: str
    action: str
    rules: tuple[str, ...]
    patterns: Mapping[str, int]


def read_verdict(line: bytes) -> GuardrailVerdict:
    """Read one line of the gateway's; raises ValueError. It parses what agents write, so it is held to the form."""
    match json.loads(line):
        case {
            "guardrail": {
                "agent_id": str(agent_id), "x": int(x), "direction": "request" | "response" as direction,
                "action": "block" | "mask" as action, "rules": list(rules), "patterns": dict(patterns)
            }
        }:  # fmt: skip
            names = [*rules, *patterns]
            if len(names) <= NAMES_MAX and all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
                counts = {name: count for name, count in patterns.items() if type(count) is int and count > 0}
                return GuardrailVerdict(agent_id[:64], x, direction, action, tuple(rules), counts)
    raise ValueError("not of the form")


class GatewayProcess:
    """Keeps the embedded gateway running; while it is not there agents get 502."""

    def __init__(self, config: Config, on_verdict: Callable[[GuardrailVerdict], None]) -> None:
        self._config = config
        self._on_verdict = on_verdict
        self._record = config.run_dir / "processes" / "gateway.json"
        self._child: Child | None = None
        self._life_line: socket.socket | None = None
        self._ready = asyncio.Event()
        self._pong = asyncio.Event()
        self._stopping = False
        self._restart: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it and wait until it serves; raises Unavailable with what it said."""
        end_leftover(self._record)
        directory = socket_path(self._config).parent
        directory.mkdir(exist_ok=True)
        directory.chmod(0o711)  # the dialer's user passes; whom the socket serves, its mode and SO_PEERCRED say
        document = gateway_document(self._config)
        child, ours = spawn_connected(
            "embedded gateway",
            python("gateway_client.gateways.embedded"),
            kind=socket.SOCK_STREAM,
            on_exit=self._exited,
            record=self._record,
        )
        ours.setblocking(False)
        self._child = child
        answer = await self._begin(ours, document)
        if answer.get("ready") is not True or child.exited.is_set():
            ours.close()
            await child.end()
            raise Unavailable(
                f"cannot start the embedded gateway: {answer.get('error', 'it ended')}",
                remedy="correct [gateway] in the configuration; its messages are in the daemon's journal",
            )
        self._life_line = ours
        self._ready.set()
        self._listening = asyncio.get_running_loop().create_task(self._listen(ours))

    async def _begin(self, life_line: socket.socket, document: Mapping[str, object]) -> Mapping[str, object]:
        """Give it its configuration; returns what it says to that."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(READY_SECONDS_MAX):
                await loop.sock_sendall(life_line, json.dumps(document).encode() + b"\n")
                answer = json.loads(await loop.sock_recv(life_line, ANSWER_BYTES_MAX) or b"{}")
        except (TimeoutError, OSError, ValueError) as error:
            return {"error": str(error) or "it did not answer in time"}
        return answer if isinstance(answer, dict) else {}

    async def _listen(self, life_line: socket.socket) -> None:
        """Take what the gateway tells; one that tells nonsense, or too much at once, is ended and started anew."""
        loop = asyncio.get_running_loop()
        told = bytearray()
        try:
            while data := await loop.sock_recv(life_line, ANSWER_BYTES_MAX):
                told += data
                *lines, rest = told.split(b"\n")
                for line in map(bytes, lines):
                    if line == PONG:
                        self._pong.set()
                    else:
                        self._on_verdict(read_verdict(line))
                told = rest
                if len(told) > ANSWER_BYTES_MAX:
                    raise ValueError("a line is too long")
        except (ValueError, RecursionError) as error:
            log.error("the embedded gateway told what is no verdict", cause=str(error))
            if self._child is not None:
                self._child.signal(signal.SIGKILL)
        except OSError:
            return  # it has ended, and its exit is seen elsewhere

    async def probe(self) -> None:
        """Return when the gateway says that it still turns; raises Unavailable or OSError where it is not there."""
        if not self._ready.is_set() or self._life_line is None:
            raise Unavailable("cannot use the embedded gateway: it is being started", remedy="see the daemon's journal")
        self._pong.clear()
        await asyncio.get_running_loop().sock_sendall(self._life_line, b"\n")
        await self._pong.wait()

    async def stop(self) -> None:
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
        self._hang_up()
        if self._child is not None:
            await self._child.end()
        self._record.unlink(missing_ok=True)

    def _exited(self, code: int) -> None:
        if self._stopping or not self._ready.is_set():
            return  # whoever waits in start() hears of it there
        self._ready.clear()
        self._hang_up()
        log.error("the embedded gateway died", code=code)
        again = start_again(
            "embedded gateway", self.start, wanted=lambda: not self._stopping, pause_seconds=RESTART_SECONDS
        )
        self._restart = asyncio.get_running_loop().create_task(again)

    def _hang_up(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
        if self._life_line is not None:
            self._life_line.close()


def gateway_document(config: Config) -> dict[str, object]:
    """The embedded gateway's configuration; keys of providers are read here and are nowhere else."""
    gateway = config.gateway
    scripts = {str(route.script): _script(route.script) for route in gateway.models if route.script is not None}
    return {
        "socket_path": str(socket_path(config)),
        "allowed_uid": user_id(config.users.dialer),
        "user": config.users.gateway,
        "models": [_model(route) for route in gateway.models],
        "scripted": scripts,
        "hosts": dict(gateway.hosts),
        "mcp": [
            {
                "name": server.name,
                "url": server.url,
                "key": "" if server.credential_file is None else read_secret(server.credential_file),
            }
            for server in gateway.mcp
        ],
        "guardrails": [_guardrail(guardrail) for guardrail in gateway.guardrails],
        "allow_networks": [str(network) for network in gateway.allow_networks],
    }


def _guardrail(guardrail: Guardrail) -> dict[str, object]:
    return {
        "name": guardrail.name,
        "direction": guardrail.direction.value,
        "action": guardrail.action.value,
        "patterns": list(guardrail.patterns),
        "own": dict(guardrail.own),
        "models": list(guardrail.models),
    }


def _model(route: ModelRoute) -> dict[str, object]:
    model: dict[str, object] = {"name": route.name, "kind": route.kind.value}
    if route.listed or not set(route.name) & set("*?["):
        model["listed"] = list(route.listed) or [route.name]
    if route.script is not None:
        model["script"] = str(route.script)
    if route.kind in (ModelKind.OPENAI, ModelKind.ANTHROPIC):
        model["url"] = route.url
        model["model"] = route.model
        if route.kind is ModelKind.OPENAI:
            model["responses"] = route.responses
        if route.key_file is not None:
            model["key"] = read_secret(route.key_file)
    if route.kind is ModelKind.LOCAL:
        model["path"] = "" if route.path is None else str(route.path)
        model["context_tokens"] = route.context_tokens
    if route.input_usd_per_mtok is not None and route.output_usd_per_mtok is not None:
        model["price"] = {
            "input_usd_per_mtok": route.input_usd_per_mtok,
            "output_usd_per_mtok": route.output_usd_per_mtok,
        }
    return model


def _script(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return json.loads(file.read(SCRIPT_BYTES_MAX))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read script {path}: {error}", remedy="correct gateway.models.script") from error


def read_secret(path: Path) -> str:
    """The one line of a key file; raises InvalidInput where others than its owner can read it."""
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            text = file.read(SECRET_BYTES_MAX).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read key file {path}: {error}", remedy="put the key into it, one line") from error
    if mode & 0o077:
        raise InvalidInput(
            f"cannot use key file {path}: others than its owner may open it (mode {mode & 0o777:o})",
            remedy=f"chmod 600 {path}",
        )
    return text


def user_id(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise Unavailable(
            f"cannot start: there is no system user {name}", remedy="run `./bootstrap setup`, or see [users]"
        ) from error
