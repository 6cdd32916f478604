"""The three ways to operate Stockade behind one face: the command line, the client library, and it on asyncio."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stockade.client import AsyncStockade, Stockade, StockadeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.instance import Instance

WAYS = ("command line", "client", "asyncio client")


@dataclass(frozen=True)
class Step:
    """An entry of the action log, as far as a test looks at it."""

    verb: str
    verdict: str
    actor: str
    object: str
    reason: str


class Operator(Protocol):
    """Names are names of agents; refusals raise."""

    def launch(self, name: str, script: str) -> dict[str, Any]: ...
    def state(self, name: str) -> str: ...
    def inside(self, name: str, script: str) -> str: ...
    def logs(self, name: str) -> str: ...
    def grant(self, name: str, scope: str, *, ttl: str | None = None, max_uses: int | None = None) -> str: ...
    def revoke(self, grant_id: str) -> str: ...
    def grants(self, name: str) -> dict[str, int | None]: ...
    def freeze(self, name: str) -> None: ...
    def thaw(self, name: str) -> None: ...
    def kill(self, name: str) -> dict[str, Any]: ...
    def steps(self, name: str) -> list[Step]: ...
    def verified(self) -> bool: ...


class ByCommandLine:
    def __init__(self, stockade: Instance) -> None:
        self._stockade = stockade

    def launch(self, name: str, script: str) -> dict[str, Any]:
        return self._stockade.launch("--name", name, "--", "sh", "-c", script)

    def state(self, name: str) -> str:
        return str(self._stockade.json("status", name)[0]["state"])

    def inside(self, name: str, script: str) -> str:
        return self._stockade.ctl("exec", name, "--", "sh", "-c", script).out

    def logs(self, name: str) -> str:
        return self._stockade.ctl("logs", name).out

    def grant(self, name: str, scope: str, *, ttl: str | None = None, max_uses: int | None = None) -> str:
        terms = [*(("--ttl", ttl) if ttl else ()), *(("--max-uses", str(max_uses)) if max_uses else ())]
        return str(self._stockade.json("grant", name, scope, "--reason", "a test", *terms)["grant_id"])

    def revoke(self, grant_id: str) -> str:
        return str(self._stockade.json("revoke", grant_id, "--reason", "enough")["state"])

    def grants(self, name: str) -> dict[str, int | None]:
        return {grant["grant_id"]: grant["uses_left"] for grant in self._stockade.json("grants", name)}

    def freeze(self, name: str) -> None:
        self._stockade.json("freeze", name)

    def thaw(self, name: str) -> None:
        self._stockade.json("thaw", name)

    def kill(self, name: str) -> dict[str, Any]:
        return dict(self._stockade.json("kill", name, "--reason", "the end")[0])

    def steps(self, name: str) -> list[Step]:
        return [Step(*(str(entry[key]) for key in Step.__annotations__)) for entry in self._stockade.actions(name)]

    def verified(self) -> bool:
        return self._stockade.ctl("log", "verify").code == 0


SECONDS = {"5s": 5.0, "10m": 600.0}


class ByClient:
    def __init__(self, client: Stockade) -> None:
        self._client = client

    def launch(self, name: str, script: str) -> dict[str, Any]:
        return plain(self._client.launch(["sh", "-c", script], name=name).info)

    def state(self, name: str) -> str:
        return self._client.agent(name).state.value

    def inside(self, name: str, script: str) -> str:
        return self._client.agent(name).exec(["sh", "-c", script]).stdout.decode()

    def logs(self, name: str) -> str:
        return b"".join(output.data for output in self._client.agent(name).logs() if output.stream == "stdout").decode()

    def grant(self, name: str, scope: str, *, ttl: str | None = None, max_uses: int | None = None) -> str:
        seconds = SECONDS[ttl] if ttl else None
        return self._client.agent(name).grant(scope, ttl=seconds, max_uses=max_uses, reason="a test").grant_id

    def revoke(self, grant_id: str) -> str:
        return self._client.revoke(grant_id, "enough").state

    def grants(self, name: str) -> dict[str, int | None]:
        return {grant.grant_id: grant.uses_left for grant in self._client.grants(name)}

    def freeze(self, name: str) -> None:
        self._client.agent(name).freeze()

    def thaw(self, name: str) -> None:
        self._client.agent(name).thaw()

    def kill(self, name: str) -> dict[str, Any]:
        return asdict(self._client.agent(name).kill("the end"))

    def steps(self, name: str) -> list[Step]:
        return [step(entry) for entry in self._client.actions(name)]

    def verified(self) -> bool:
        return self._client.verify_log().ok


class ByAsyncClient:
    """Each order is a run of one event loop, on which the connection lives."""

    def __init__(self, client: AsyncStockade, runner: asyncio.Runner) -> None:
        self._client = client
        self._run = runner.run

    def launch(self, name: str, script: str) -> dict[str, Any]:
        return plain(self._run(self._client.launch(["sh", "-c", script], name=name)).info)

    def state(self, name: str) -> str:
        return self._run(self._client.agent(name)).state.value

    def inside(self, name: str, script: str) -> str:
        async def execute() -> str:
            return (await (await self._client.agent(name)).exec(["sh", "-c", script])).stdout.decode()

        return self._run(execute())

    def logs(self, name: str) -> str:
        async def read() -> str:
            agent = await self._client.agent(name)
            return b"".join([output.data async for output in agent.logs() if output.stream == "stdout"]).decode()

        return self._run(read())

    def grant(self, name: str, scope: str, *, ttl: str | None = None, max_uses: int | None = None) -> str:
        seconds = SECONDS[ttl] if ttl else None
        made = self._run(self._client.grant(name, scope, ttl=seconds, max_uses=max_uses, reason="a test"))
        return made.grant_id

    def revoke(self, grant_id: str) -> str:
        return self._run(self._client.revoke(grant_id, "enough")).state

    def grants(self, name: str) -> dict[str, int | None]:
        return {grant.grant_id: grant.uses_left for grant in self._run(self._client.grants(name))}

    def freeze(self, name: str) -> None:
        async def freeze() -> None:
            await (await self._client.agent(name)).freeze()

        self._run(freeze())

    def thaw(self, name: str) -> None:
        async def thaw() -> None:
            await (await self._client.agent(name)).thaw()

        self._run(thaw())

    def kill(self, name: str) -> dict[str, Any]:
        async def kill() -> dict[str, Any]:
            return asdict(await (await self._client.agent(name)).kill("the end"))

        return self._run(kill())

    def steps(self, name: str) -> list[Step]:
        async def read() -> list[Step]:
            return [step(entry) async for entry in self._client.actions(name)]

        return self._run(read())

    def verified(self) -> bool:
        return self._run(self._client.verify_log()).ok


def step(entry: Any) -> Step:
    return Step(entry.verb, entry.verdict, entry.actor, entry.object, entry.reason)


def plain(info: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(asdict(info), default=str))
    return value


@contextmanager
def operator(stockade: Instance, way: str) -> Iterator[Operator]:
    """Operate this instance in one of WAYS."""
    target = f"unix:{stockade.run_dir}/control.sock"
    if way == "command line":
        yield ByCommandLine(stockade)
    elif way == "client":
        with Stockade(target) as client:
            yield ByClient(client)
    else:
        with asyncio.Runner() as runner:
            connected = runner.run(connect(target))
            try:
                yield ByAsyncClient(connected, runner)
            finally:
                runner.run(connected.close())


async def connect(target: str) -> AsyncStockade:
    return AsyncStockade(target)


__all__ = ["WAYS", "Operator", "Step", "StockadeError", "operator"]
