"""What workers say, as it reaches the judge: each speaks for the agents that it serves."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, cast

import pytest

from gateway_client.egress import messages
from supervisord.config import UsersConfig
from supervisord.dialer_process import DialerProcess
from supervisord.egress_plane import EgressPlane, Served, Worker
from supervisord.errors import Unavailable

AGENT, ENDED = "ag_" + "a" * 26, "ag_" + "b" * 26
MINE, NEIGHBOUR = "w1.1", "w2.2"


class Judge:
    def __init__(self) -> None:
        self.told: list[tuple[str, messages.Moved]] = []

    def moved(self, worker_id: str, moved: messages.Moved) -> None:
        self.told.append((worker_id, moved))


@pytest.fixture
def plane() -> EgressPlane:
    made = EgressPlane(
        users=UsersConfig(), configure=cast("Any", None), dialer=cast("Any", None), workers=0, records=Path()
    )
    for worker_id in (MINE, NEIGHBOUR):
        place = worker_id.partition(".")[0]
        made._workers[worker_id] = Worker(
            worker_id, place, dedicated=False, child=cast("Any", None), channel=cast("Any", None),
            dialer_end=cast("Any", None),
        )  # fmt: skip
    made._served[AGENT] = Served(AGENT, "n", {}, -1, "w1")
    made.judge = cast("Any", Judge())
    return made


@pytest.mark.parametrize(("worker_id", "agent_id", "want"), [(MINE, AGENT, 7), (NEIGHBOUR, AGENT, 0), (MINE, ENDED, 0)])
def test_more_of_a_budget_is_lent_only_to_whoever_serves_the_agent(
    plane: EgressPlane, worker_id: str, agent_id: str, want: int
) -> None:
    plane._from_worker(worker_id, messages.encode(messages.Moved(agent_id, used=5, back=3, want=7)), [])
    assert cast("Any", plane.judge).told == [(worker_id, messages.Moved(agent_id, used=5, back=3, want=want))]


def test_an_agent_that_gets_no_descriptor_for_its_gate_gets_no_worker_either(
    plane: EgressPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []

    def start(*, dedicated: bool) -> Worker:
        started.append(dedicated)
        raise Unavailable("cannot start a worker")

    monkeypatch.setattr(plane, "_start_worker", start)
    own = len(list(Path("/proc/self/fd").iterdir()))
    with open(os.devnull) as file:  # noqa: PTH123 - its number
        with pytest.raises(Unavailable, match="cannot start a worker"):
            plane.listen("ag_c", name="c", labels={}, listener=file.fileno(), dedicated=True)
        monkeypatch.setattr(os, "dup", _none_left)
        with pytest.raises(Unavailable, match="cannot open the gate: Too many open files"):
            plane.listen("ag_c", name="c", labels={}, listener=file.fileno(), dedicated=True)
    assert started == [True]
    assert len(list(Path("/proc/self/fd").iterdir())) == own


def _none_left(_fd: int) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(("error", "failures"), [("cut", []), ("cannot connect", ["cannot connect"])])
def test_a_dial_that_was_ordered_to_end_is_no_failure_of_the_gateway(error: str, failures: list[str]) -> None:
    told: list[str] = []
    dialer = DialerProcess(
        user="", configure=cast("Any", None), record=Path(), introduce=lambda: None, died=lambda: None,
        not_connected=told.append, in_background=lambda work: work.close(),
    )  # fmt: skip
    dialer._heard(messages.encode(messages.Dialed(MINE, 1, ok=False, error=error)), [])
    assert told == failures
