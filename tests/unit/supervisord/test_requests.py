"""What agents ask people for: bounded by agent, however many ask at once."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any, cast

import pytest

from gateway_client.egress.scope import parse_scope
from supervisord.actions.types import Action, CannotRecord
from supervisord.errors import Conflict
from supervisord.policy import GrantRules, Policy
from supervisord.question import RequestState
from supervisord.requests import DECIDED_PER_AGENT_MAX, PENDING_PER_AGENT_MAX, Requests

if TYPE_CHECKING:
    from supervisord.agents import Agent


class Log:
    def __init__(self) -> None:
        self.full = False
        self.entries = 0

    async def record(self, _action: Action) -> None:
        await asyncio.sleep(0.001)
        if self.full:
            raise CannotRecord("cannot record: no space")
        self.entries += 1


class Asker:
    """As much of an agent as asks."""

    def __init__(self, name: str) -> None:
        self.agent_id, self.name, self.live = f"ag_{name}", name, True


def made(*, asks_per_minute: int = 600) -> tuple[Requests, Log]:
    numbers, log = itertools.count(), Log()
    requests = Requests(
        agents=cast("Any", None),
        actions=cast("Any", log),
        new_id=lambda: f"rq_{next(numbers)}",
        now_ns=lambda: 1,
        now=lambda: 1.0,
        policy_of=lambda _: Policy("p", grants=GrantRules(asks_per_minute=asks_per_minute)),
        check=lambda _scope, _policy: None,
    )
    return requests, log


async def ask(requests: Requests, agent: Asker, model: str) -> str:
    verdict = await requests._post(cast("Agent", agent), f'{{"scope": "llm:{model}"}}')
    return str(cast("Any", verdict).status)


async def test_many_at_once_are_bounded_as_one_after_the_other_are() -> None:
    requests, log = made()
    mine, theirs = Asker("mine"), Asker("theirs")
    answers = await asyncio.gather(*(ask(requests, mine, f"m{n}") for n in range(200)))
    assert answers.count("202") == PENDING_PER_AGENT_MAX == len(requests.all()) == log.entries
    assert answers.count("429") == 200 - PENDING_PER_AGENT_MAX
    assert await ask(requests, theirs, "m1") == "202"


async def test_the_same_question_at_once_is_one_request() -> None:
    requests, log = made()
    answers = await asyncio.gather(*(ask(requests, Asker("mine"), "m") for _ in range(50)))
    assert set(answers) == {"202"}
    assert (len(requests.all()), log.entries) == (1, 1)


async def test_a_request_that_cannot_be_recorded_takes_no_place() -> None:
    requests, log = made()
    mine = Asker("mine")
    log.full = True
    assert set(await asyncio.gather(*(ask(requests, mine, f"m{n}") for n in range(10)))) == {"503"}
    log.full = False
    assert set(await asyncio.gather(*(ask(requests, mine, f"m{n}") for n in range(16)))) == {"202"}


async def test_whoever_ends_while_it_is_recorded_leaves_nothing_pending() -> None:
    requests, _ = made()
    mine = Asker("mine")
    asking = asyncio.ensure_future(ask(requests, mine, "m"))
    await asyncio.sleep(0)
    mine.live = False
    await asking
    assert [request.state for request in requests.all()] == [RequestState.EXPIRED]


async def test_pending_ones_of_others_are_never_forgotten_for_one_who_asks_a_lot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("supervisord.requests.REQUESTS_KEPT_MAX", 100)
    requests, _ = made()
    quiet = [Asker(f"quiet{n}") for n in range(20)]
    for agent in quiet:
        await ask(requests, agent, "m")
    loud = Asker("loud")
    for n in range(300):
        await ask(requests, loud, f"m{n}")
        requests.end_agent(cast("Any", loud.agent_id))
    pending = [request for request in requests.all() if request.state is RequestState.PENDING]
    assert {request.agent_name for request in pending} == {agent.name for agent in quiet}
    assert len(requests.all()) <= 20 + DECIDED_PER_AGENT_MAX + 1
    with pytest.raises(Conflict):
        await requests.deny(requests.all()[-1].request_id, actor="uid:0(root)", reason="")


async def test_a_held_question_ends_with_its_time_unless_the_agent_asked_by_itself_too() -> None:
    requests, _ = made()
    mine = cast("Agent", Asker("mine"))
    held = await requests._ask(mine, parse_scope("llm:a"), "held", held_seconds=0.02)
    both = await requests._ask(mine, parse_scope("llm:b"), "held", held_seconds=0.02)
    assert await requests._ask(mine, parse_scope("llm:b"), "by itself") is both
    async with asyncio.timeout(5):
        await held.decided.wait()
    assert (held.state, both.state) == (RequestState.EXPIRED, RequestState.PENDING)


async def test_more_questions_than_a_minute_takes_are_turned_away() -> None:
    requests, _ = made(asks_per_minute=2)
    mine = Asker("mine")
    assert [await ask(requests, mine, f"m{n}") for n in range(3)] == ["202", "202", "429"]
    assert await ask(requests, mine, "m1") == "202"  # the same question again is none
    assert await ask(requests, Asker("theirs"), "m") == "202"


async def test_a_client_that_goes_ends_its_hold_alone() -> None:
    requests, _ = made()
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    hold = asyncio.ensure_future(requests.hold(cast("Agent", Asker("mine")), "llm:a", "a call", gone=gone))
    asked = asyncio.Event()
    requests.on_change.append(lambda _: asked.set())
    async with asyncio.timeout(5):
        await asked.wait()
        gone.set_result(None)
        held = await hold
    assert (held.granted, held.said) == (False, "the client has gone")
    assert [request.state for request in requests.all()] == [RequestState.PENDING]
