"""The client library over the real protocol, both halves of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from stockade.client import (
    AsyncStockade,
    Conflict,
    Failed,
    InvalidArgument,
    NotFound,
    NotPermitted,
    Selector,
    State,
    Stockade,
    StockadeError,
    Unreachable,
    Workspace,
)

from tests.support.scripted_api import AGENT_ID, Api, scripted_api

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with scripted_api(tmp_path / "control.sock") as served:
        yield served


def test_an_agents_life(api: Api) -> None:
    with Stockade(api.target) as stockade:
        agent = stockade.launch(
            command=["exit", "7"], name="reader", policy="default", scopes=["llm:*"], labels={"team": "a"},
            workspace=Workspace("/srv/logs", "rw"), memory_bytes=1 << 30, idempotency_key="k",
        )  # fmt: skip
        assert (agent.agent_id, agent.name, agent.state) == (AGENT_ID, "reader", State.RUNNING)
        assert agent.info.labels == {"team": "a"}
        assert agent.info.started_at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
        assert agent.posture == {"seccomp": "sha256:00", "degraded": [], "limits": {"pids": 256, "cpus": 1.5}}
        assert "256.0" not in str(agent.posture)
        assert [(part.stream, part.data) for part in agent.logs()][1] == ("stderr", b"err\n")
        assert agent.freeze().state is State.FROZEN
        grant = agent.grant("llm:*", ttl=timedelta(minutes=2), max_uses=0)
        assert (grant.uses_left, grant.expires_at) == (0, datetime(2023, 11, 14, 22, 15, 20, tzinfo=UTC))
        with pytest.raises(TimeoutError, match="still RUNNING"):
            agent.wait(0.1)
        assert agent.wait().exit_code == 7
        receipt = agent.kill(reason="enough")
        assert (receipt.verified_empty, receipt.processes_killed, receipt.reason) == (True, 51, "enough")
    sent = api.agents.launches[0]
    assert (sent.idempotency_key, sent.spec.workspace.mode, sent.spec.limits.memory_bytes) == ("k", 2, 1 << 30)
    assert list(api.agents.selectors[-1].agents) == [AGENT_ID]


@pytest.mark.parametrize(
    ("deed", "kind"),
    [
        (lambda s: s.launch(["true"], polcy="narrow"), TypeError),  # it would have run with the default
        (lambda s: s.launch("true --now"), TypeError),
        (lambda s: s.launch(["true"], scopes="llm:*"), TypeError),
        (lambda s: s.grant("reader", "llm:*", max_use=1), TypeError),
        (lambda s: s.kill_all("reader"), TypeError),
        (lambda s: s.kill_all({"all": True}), TypeError),
        (lambda s: s.kill_all(Selector(agents="reader")), TypeError),  # type: ignore[arg-type]
        (lambda s: s.launch(["true"], pids=-1), InvalidArgument),
        (lambda s: s.launch(["true"], workspace=":rw"), InvalidArgument),
        (lambda s: s.launch(["true"], name="\ud800"), InvalidArgument),
        (lambda s: s.grant("reader", "llm:*", max_uses=-1), InvalidArgument),
        (lambda s: s.grant("reader", "llm:*", ttl="soon"), InvalidArgument),
        (lambda s: s.grant("reader", "llm:*", ttl=1e300), InvalidArgument),
    ],
)
def test_what_cannot_be_meant_is_not_sent(api: Api, deed: object, kind: type[Exception]) -> None:
    assert callable(deed)
    with Stockade(api.target) as stockade, pytest.raises(kind):
        deed(stockade)
    assert (api.agents.launches, api.grants.requests) == ([], [])


def test_words_are_taken_as_on_the_command_line(api: Api) -> None:
    with Stockade(str(api.socket)) as stockade:  # a path without unix:
        for workspace in ("/srv/logs", "/srv/logs:ro", "/srv/logs:rw", Workspace("/srv/logs:rw")):
            stockade.launch(["true"], workspace=workspace, lease="30s")
        stockade.grant("reader", "llm:*", ttl="10m")
    sent = [launch.spec.workspace for launch in api.agents.launches]
    assert [(each.path, each.mode) for each in sent] == [
        ("/srv/logs", 1), ("/srv/logs", 1), ("/srv/logs", 2), ("/srv/logs:rw", 1),
    ]  # fmt: skip
    assert api.agents.launches[0].spec.lease.seconds == 30
    assert api.grants.requests[0].ttl.seconds == 600


def test_a_killed_agent_knows_that_it_is(api: Api) -> None:
    with Stockade(api.target) as stockade:
        agent = stockade.agent("reader")
        assert not agent.state.ended
        agent.kill()
        assert agent.state.ended


def test_lists_come_whole_and_selectors_go_whole(api: Api) -> None:
    with Stockade(api.target) as stockade:
        assert [agent.state for agent in stockade.agents(include_ended=True)] == [State.RUNNING, State.EXITED]
        assert len(stockade.agents()) == 1
        assert [entry.seq for entry in stockade.actions(follow=True)] == [1, 2, 3]
        stockade.kill_all(Selector(labels={"team": "a"}, owner="o", policy="p"), "reason")
    selector = api.agents.selectors[0]
    assert (dict(selector.labels), selector.owner, selector.policy, selector.all) == ({"team": "a"}, "o", "p", False)


def test_exec_collects_and_knows_its_limit(api: Api) -> None:
    with Stockade(api.target) as stockade:
        agent = stockade.agent("reader")
        ended = agent.exec(["print"])
        assert (ended.status.code, ended.stdout, ended.stderr) == (0, b"\x00\xffout\x1b[31m\n", b"err\xfe")
        text = bytes(range(256)) * 4096
        assert agent.exec(["cat"], stdin=text, output_bytes_max=len(text)).stdout == text
        with pytest.raises(Failed, match="more than 1048575 bytes"):
            agent.exec(["cat"], stdin=text, output_bytes_max=len(text) - 1)


def test_writing_to_what_has_ended_is_a_broken_pipe(api: Api) -> None:
    with Stockade(api.target) as stockade, stockade.agent("reader").open(["exit", "0"], stdin=True) as session:
        assert list(session) == []
        assert session.status.code == 0
        with pytest.raises(BrokenPipeError):
            session.write(b"x" * (64 << 20))
        session.feed(b"x")
        session.send_signal(15)


@pytest.mark.parametrize(
    ("deed", "kind", "reason", "remedy"),
    [
        (lambda s: s.agent("nobody"), NotFound, "NOT_FOUND", "see status"),
        (lambda s: s.kill_all(Selector(agents=("mine-not",))), NotPermitted, "ROLE_TOO_LOW", "ask root"),
        (lambda s: s.launch(["true"], name="held"), Conflict, "HELD", "see holds"),
        (lambda s: s.grant("reader", "nonsense"), InvalidArgument, "INVALID_INPUT", "write llm:*"),
        (lambda s: s.launch(["missing"]), Failed, "CANNOT_LAUNCH", "check the command"),
    ],
)
def test_failures_are_told_apart(api: Api, deed: object, kind: type[StockadeError], reason: str, remedy: str) -> None:
    assert callable(deed)
    with Stockade(api.target) as stockade, pytest.raises(kind) as caught:
        deed(stockade)
    assert (caught.value.reason, caught.value.remedy) == (reason, remedy)
    assert str(caught.value).startswith("cannot ")


def test_the_facts_of_a_failure_come_along(api: Api) -> None:
    with Stockade(api.target) as stockade, pytest.raises(Failed) as caught:
        stockade.launch(["missing"])
    assert caught.value.facts == {"step": "exec", "errno": "2"}


def test_nobody_there(tmp_path: Path) -> None:
    with Stockade(f"unix:{tmp_path}/none.sock") as stockade, pytest.raises(Unreachable, match=r"none\.sock"):
        stockade.agents()


async def test_the_asyncio_half_says_the_same(api: Api) -> None:
    async with AsyncStockade(api.target) as stockade:
        agent = await stockade.launch(command=["exit", "7"], labels={"team": "a"})
        assert (agent.agent_id, agent.state, agent.info.labels) == (AGENT_ID, State.RUNNING, {"team": "a"})
        assert (await agent.freeze()).state is State.FROZEN
        assert (await agent.grant("llm:*", max_uses=3)).uses_left == 3
        assert [part.data async for part in agent.logs()][1] == b"err\n"
        assert [entry.seq async for entry in stockade.actions(follow=True)] == [1, 2, 3]
        assert [found.state for found in await stockade.agents(include_ended=True)] == [State.RUNNING, State.EXITED]
        ended = await agent.exec(["cat"], stdin=b"x" * 200_000)
        assert (ended.status.code, ended.stdout) == (0, b"x" * 200_000)
        with pytest.raises(Failed, match="more than 10 bytes"):
            await agent.exec(["print"], output_bytes_max=10)
        assert (await agent.wait()).exit_code == 7
        assert (await agent.kill(reason="enough")).verified_empty
        assert (await stockade.verify_log()).ok
        with pytest.raises(NotFound) as caught:
            await stockade.agent("nobody")
        assert caught.value.remedy == "see status"
        assert (await stockade.plan(["true"])).startswith("bind fd 0")


async def test_nobody_there_for_asyncio_either(tmp_path: Path) -> None:
    async with AsyncStockade(f"unix:{tmp_path}/none.sock") as stockade:
        with pytest.raises(Unreachable):
            await stockade.agents()


def test_both_halves_have_the_same_words() -> None:
    def words(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    only_blocking = {"open"}  # a Session is for a person's terminal
    assert words(Stockade) - only_blocking == words(AsyncStockade) - {"execute"}
