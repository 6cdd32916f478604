"""What processes did is written in batches; while the log takes none, memory is bounded, and losses are told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from supervisord import told_calls
from supervisord.actions.types import CannotRecord
from supervisord.told_calls import ToldCalls

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from supervisord.actions.types import Action

EXEC = {"kind": "exec", "path": "/bin/true", "pid": 2, "ppid": 1, "argc": 1, "args": ["true"], "digest": "x"}


class SlowLog:
    """Takes a batch when it is let to."""

    def __init__(self) -> None:
        self.batches: list[list[Action]] = []
        self.free = asyncio.Event()
        self.fails = False

    async def append(self, actions: Sequence[Action]) -> None:
        await self.free.wait()
        if self.fails:
            raise CannotRecord("cannot record: the disk is full", remedy="make room")
        self.batches.append(list(actions))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_a_log_that_hangs_does_not_take_is_bounded_and_counted() -> None:
    log = SlowLog()
    told = ToldCalls(log.append, call_name=str)
    told.tell("ag_1", "ag_1", [EXEC])
    await settle()
    told.tell("ag_1", "st_1", [EXEC] * (told_calls.PENDING_MAX + 3))
    told.tell("ag_2", "ag_2", [EXEC, EXEC, "no event", {"kind": "of a later release"}])
    log.free.set()
    await settle()
    assert [len(batch) for batch in log.batches] == [1, told_calls.PENDING_MAX + 2]
    assert [(a.agent_id, a.verb, a.details["times"]) for a in log.batches[1][-2:]] == [
        ("ag_1", "process.watch", 3),
        ("ag_2", "process.watch", 2),
    ]
    told.tell("ag_2", "ag_2", [EXEC])
    await settle()
    assert [a.verb for a in log.batches[2]] == ["process.exec"], "the twin: a log that goes on loses nothing"


async def test_a_log_that_refuses_is_tried_again_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told_calls, "RETRY_SECONDS", 0)
    log = SlowLog()
    log.free.set()
    log.fails = True
    told = ToldCalls(log.append, call_name=str)
    told.tell("ag_1", "ag_1", [EXEC])
    await settle()
    told.tell("ag_2", "ag_2", [EXEC] * told_calls.PENDING_MAX)
    await settle()
    log.fails = False
    await settle()
    (batch,) = log.batches
    assert [action.agent_id for action in batch] == ["ag_1", *["ag_2"] * (told_calls.PENDING_MAX - 1), "ag_2"]
    assert (batch[-1].verb, batch[-1].details["times"]) == ("process.watch", 1), "what there was no room for"


async def test_what_is_told_just_as_a_batch_is_done_is_written_too() -> None:
    """In the very turn of the event loop in which the writing of all before ends."""
    loop = asyncio.get_running_loop()
    batches: list[list[Action]] = []
    taken: asyncio.Future[None] = loop.create_future()

    async def append(actions: Sequence[Action]) -> None:
        batches.append(list(actions))
        await taken

    told = ToldCalls(append, call_name=str)
    told.tell("ag_1", "ag_1", [EXEC])
    await settle()
    taken.set_result(None)
    loop.call_soon(told.tell, "ag_2", "ag_2", [EXEC])
    await settle()
    assert [[action.agent_id for action in batch] for batch in batches] == [["ag_1"], ["ag_2"]]


async def test_no_list_of_events_is_nothing() -> None:
    log = SlowLog()
    log.free.set()
    told = ToldCalls(log.append, call_name=str)
    nothing: tuple[object, ...] = (None, "exec", {"kind": "exec"}, [])
    for events in nothing:
        told.tell("ag_1", "ag_1", events)
    await settle()
    assert log.batches == []
