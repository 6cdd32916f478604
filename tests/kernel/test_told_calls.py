"""What agents execute and are refused is told, by a watcher that nothing an agent does can get around or slow down."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox import watcher
from sandbox.plan import Record
from tests.support.launcher import TELLING, Launcher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.launcher import Agent

TOLD = {"filter_digest": TELLING, "record": Record(execs=True, refusals=True, arguments=4)}


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with Launcher.start() as started:
        yield started


def called(launcher: Launcher, agent: Agent, *, seconds: float = 3.0) -> list[dict[str, Any]]:
    """Everything told of an agent that has ended; what it was told last comes with its end."""
    deadline = time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        launcher.request("stats", agent_ids=[])
        for event in [e for e in launcher.events if e.get("ev") == "called" and e["agent_id"] == agent.agent_id]:
            launcher.events.remove(event)
            found += [one | {"stream": event["stream_id"]} for one in event["events"]]
        if found and not (launcher.run_dir / "agents" / agent.agent_id / "state.json").parent.joinpath("x").exists():
            time.sleep(0.05)
            launcher.request("stats", agent_ids=[])
            for event in [e for e in launcher.events if e.get("ev") == "called" and e["agent_id"] == agent.agent_id]:
                launcher.events.remove(event)
                found += [one | {"stream": event["stream_id"]} for one in event["events"]]
            return found
        time.sleep(0.01)
    return found


def test_smoke(launcher: Launcher) -> None:
    agent = launcher.sh("/bin/echo a b; unshare -U true; true", **TOLD)
    print(agent.status, agent.stdout, agent.stderr)
    for e in called(launcher, agent):
        print(e)
    print(agent.timings_us)
    assert 0
