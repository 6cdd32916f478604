"""Values that unit tests of the daemon need again and again."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gateway_client.egress.request import Dialect, EgressRequest, Form
from supervisord.agents import Agent, Description
from supervisord.ids import AgentId, AgentName
from supervisord.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Callable

DESCRIPTION = Description(
    agent_id=AgentId("ag_" + "a" * 26),
    name=AgentName("reader"),
    policy="default",
    policy_digest="sha256:0",
    labels={},
    owner="",
    purpose="",
    command=("true",),
    workspace="",
    workspace_mode="",
    launched_by="uid:0(root)",
    idempotency_key="",
    slot=0,
    tty=False,
    stdin=False,
    memory_bytes=1 << 30,
    cpus=1.0,
    pids=256,
    dedicated_worker=False,
    on_supervisor_loss="contain",
    budget={},
    grants=(),
    launched_at_ns=1,
)


def agent_id(letter: str) -> AgentId:
    return AgentId("ag_" + letter * 26)


def make_agent(letter: str = "a", state: State = State.RUNNING, **fields: Any) -> Agent:
    """An agent whose id is made of one letter."""
    fields.setdefault("name", AgentName(f"agent-{letter}"))
    return Agent(replace(DESCRIPTION, agent_id=agent_id(letter), **fields), state=state)


def ticks(start: int = 1_790_000_000) -> Callable[[], int]:
    """A clock of nanoseconds that goes on by a second each time it is looked at."""
    seconds = itertools.count(start)
    return lambda: next(seconds) * 1_000_000_000


def web(host: str = "status.example", path: str = "/a", method: str = "GET") -> EgressRequest:
    return EgressRequest(form=Form.FORWARD, method=method, scheme="http", host=host, port=80, path=path)


def model_call(model: str = "m", max_tokens: int | None = None) -> EgressRequest:
    return EgressRequest(
        form=Form.MODEL, method="POST", scheme="http", host="gateway.internal", port=3128, path="/v1/chat/completions",
        dialect=Dialect.OPENAI_CHAT, model=model, max_tokens=max_tokens,
    )  # fmt: skip


def self_call(method: str, topic: str, body: str = "", query: str = "") -> EgressRequest:
    return EgressRequest(
        form=Form.SELF, method=method, scheme="http", host="gateway.internal", port=3128,
        path=f"/.stockade/v1/{topic}", body=body, query=query, has_query=bool(query),
    )  # fmt: skip
