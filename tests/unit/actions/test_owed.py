"""What happened while the log took nothing: kept over a daemon's death, recorded in its order, bounded, and counted."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from supervisord.actions import owed as module
from supervisord.actions.files import SegmentFile
from supervisord.actions.owed import Owed
from supervisord.actions.types import Action, CannotRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from supervisord.actions.log import ActionLog

NOW_NS = 1_700_000_000_123_000_000


def act(number: int, actor: str = "uid:0(root)") -> Action:
    return Action(f"ag_{number}", actor, "agent.kill", "x\udcff", "done", "why", {"n": number})


def owed_in(directory: Path) -> Owed:
    return Owed(directory / "private" / "owed", now_ns=lambda: NOW_NS)


def drain(owed: Owed) -> list[Action]:
    """What is owed, until nothing is."""
    drained: list[Action] = []
    while owed:
        actions = list(owed.next(3))
        owed.paid(actions)
        drained += actions
    return drained


def test_a_later_daemon_goes_on_with_it_and_says_when_it_was(tmp_path: Path) -> None:
    first = owed_in(tmp_path)
    for number in range(5):
        first.keep(act(number), cause="full")
    with (tmp_path / "private" / "owed").open("ab") as file:
        file.write(b'{"agent_id": "ag_5", "act')  # a crash cut it off
    second = owed_in(tmp_path)
    assert second.came.is_set()
    *actions, lost = drain(second)
    assert [(action.agent_id, action.object, action.details["n"]) for action in actions] == [
        (f"ag_{number}", "x\udcff", number) for number in range(5)
    ]
    assert {action.details["happened_at"] for action in actions} == {"2023-11-14T22:13:20.123000Z"}
    assert (lost.verb, lost.details["times"]) == ("log.lost", 1)
    assert not owed_in(tmp_path), "its twin: what is recorded is owed no more"
    assert not second.came.is_set()


def test_what_agents_do_leaves_room_for_what_operators_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OWED_MAX", 6)
    monkeypatch.setattr(module, "OF_AGENTS_MAX", 4)
    owed = owed_in(tmp_path)
    for number in range(10):
        owed.keep(act(number, actor="agent:ag_x"), cause="full")
    for number in range(10, 14):
        owed.keep(act(number), cause="full")
    *actions, lost = drain(owed)
    assert [action.details["n"] for action in actions] == [0, 1, 2, 3, 10, 11]
    assert lost.details["times"] == 8
    owed.keep(act(20, actor="agent:ag_x"), cause="full")
    assert [action.details["n"] for action in drain(owed)] == [20], "there is room again"


def test_a_disk_that_takes_one_now_and_then_lets_the_file_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OWED_MAX", 4)
    owed = owed_in(tmp_path)
    for number in range(100):
        owed.keep(act(number), cause="full")
        if number >= 3:
            owed.paid(owed.next(1))
    lines = (tmp_path / "private" / "owed").read_bytes().splitlines()
    assert len(lines) <= 2 * 4
    assert [action.details["n"] for action in drain(owed)] == [97, 98, 99]


async def test_what_comes_while_losses_are_told_is_not_taken_for_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OWED_MAX", 1)
    owed = owed_in(tmp_path)
    for number in range(3):
        owed.keep(act(number), cause="full")
    owed.paid(owed.next(1))
    told = owed.next(1)
    owed.keep(act(3), cause="full")
    owed.keep(act(4), cause="full")
    owed.paid(told)
    left, lost = drain(owed)
    assert (left.details["n"], lost.details["times"]) == (3, 1)


def drain_of(owed: Owed) -> list[Action]:
    """What is owed, which stays so."""
    return [*owed.next(100), *([lost] if (lost := owed.next(0)[0]).details["times"] else [])]


async def test_a_log_records_it_in_its_order_as_soon_as_it_can(
    open_log: Callable[..., ActionLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owed = owed_in(tmp_path)
    log = open_log(owed=owed)
    monkeypatch.setattr("supervisord.actions.log.RETRY_SECONDS", 0.01)
    paying = asyncio.create_task(log.pay_forever())
    full: Any = OSError(28, "No space left on device")

    def write(_self: object, _data: bytes) -> int:
        raise full

    with monkeypatch.context() as context:
        context.setattr("supervisord.actions.files.SegmentFile.write", write)
        with pytest.raises(CannotRecord):
            await log.append(act(0))
        await log.note(act(1))
        await log.note(act(2), durable=True)
        await asyncio.sleep(0.1)
        assert len(owed) == 2
    for _ in range(500):
        await asyncio.sleep(0.01 if owed else 0)
    assert not owed
    await log.note(act(3))
    entries = await log.query()
    assert [(entry.action.verb, entry.action.details.get("n")) for entry in entries] == [
        ("log.recover", None), ("agent.kill", 1), ("agent.kill", 2), ("agent.kill", 3),
    ]  # fmt: skip
    # Two were refused; that one of them was tried again and again counts as nothing.
    assert entries[0].action.details == {"refused": 2}
    assert ["happened_at" in entry.action.details for entry in entries] == [False, True, True, False]
    paying.cancel()
    assert (await log.verify()).ok


@pytest.mark.parametrize("recorded", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("durability", ["batched", "strict"])
async def test_what_a_daemon_recorded_and_had_no_time_to_forget_is_not_recorded_again(
    open_log: Callable[..., ActionLog], tmp_path: Path, recorded: int, durability: str
) -> None:
    now = iter(range(NOW_NS, NOW_NS + 10**9, 1000))

    def owed_now() -> Owed:
        return Owed(tmp_path / "private" / "owed", now_ns=lambda: next(now))

    first = owed_now()
    for _ in range(7):
        first.keep(act(1), cause="full")  # the same each time: they differ in when they were
    log = open_log(owed=owed_now(), durability=durability)
    for action in first.next(recorded) if recorded else ():
        await log.record(action)  # and there the daemon was killed
    await log.pay()
    times = [str(entry.action.details["happened_at"]) for entry in await log.query()]
    assert (len(times), times) == (7, sorted(set(times)))
    assert not (tmp_path / "private" / "owed").exists()


async def test_a_strict_log_on_a_disk_that_fails_now_and_then_records_each_once(
    open_log: Callable[..., ActionLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owed = owed_in(tmp_path)
    for number in range(600):
        owed.keep(act(number), cause="full")
    log = open_log(owed=owed, durability="strict")
    really, calls = SegmentFile.write, iter(range(1000))

    def write(segment: SegmentFile, data: bytes) -> int:
        if next(calls) % 2:
            return really(segment, data)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SegmentFile, "write", write)
    for _ in range(20):
        with contextlib.suppress(CannotRecord):
            await log.pay()
    assert not owed
    found = [entry.action.details["n"] for entry in await log.query() if entry.action.verb == "agent.kill"]
    assert found == list(range(600))


def test_what_run_dir_has_no_room_for_is_written_there_once_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [NOW_NS]
    owed = Owed(tmp_path / "private" / "owed", now_ns=lambda: now[0])
    owed.keep(act(0), cause="full")
    really = module._write
    full = True

    def write(path: Path, actions: Sequence[Action]) -> None:
        if full:
            with path.open("ab") as file:
                file.write(b'{"agent_id": "ag_1", "act')  # as much as there was room for
            raise OSError(28, "No space left on device")
        really(path, actions)

    monkeypatch.setattr(module, "_write", write)
    with capture_logs() as said:
        owed.keep(act(1), cause="full")
        owed.keep(act(2), cause="full")
        owed.keep(act(9, actor="agent:ag_x"), cause="full")
    assert [line["entry"]["details"]["n"] for line in said if "entry" in line] == [1, 2]
    # What was written before the disk was full stays, and the rest is counted as lost where the daemon dies now.
    *actions, lost = drain_of(owed_in(tmp_path))
    assert ([action.details["n"] for action in actions], lost.verb) == ([0], "log.lost")
    full = False
    now[0] += 2 * 10**9
    owed.keep(act(3), cause="full")
    owed.keep(act(4), cause="full")
    assert [action.details["n"] for action in drain_of(owed_in(tmp_path))] == [0, 1, 2, 9, 3, 4]


def test_how_much_is_lost_outlives_a_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OWED_MAX", 2)
    owed = owed_in(tmp_path)
    for number in range(5):
        owed.keep(act(number), cause="full")
    owed.save()
    owed.keep(act(5), cause="full")
    owed.save()
    for _ in range(2):
        *actions, lost = drain_of(owed_in(tmp_path))
        assert ([action.details["n"] for action in actions], lost.details["times"]) == ([0, 1], 4)
    later = owed_in(tmp_path)
    drain(later)
    assert (len(later), len(owed_in(tmp_path))) == (0, 0), "told once"


def test_what_comes_after_a_line_that_a_crash_cut_off_is_kept(tmp_path: Path) -> None:
    owed_in(tmp_path).keep(act(0), cause="full")
    with (tmp_path / "private" / "owed").open("ab") as file:
        file.write(b'{"agent_id": "ag_1", "act')
    owed_in(tmp_path).keep(act(2), cause="full")
    *actions, lost = drain_of(owed_in(tmp_path))
    assert ([action.details["n"] for action in actions], lost.details["times"]) == ([0, 2], 1)


async def test_what_no_log_can_take_keeps_nothing_behind_it(open_log: Callable[..., ActionLog], tmp_path: Path) -> None:
    owed = owed_in(tmp_path)
    owed.keep(Action("", "daemon", "x", "x", "done", "", {"n": float("nan")}), cause="its details are not JSON")
    owed.keep(Action("", "daemon", "x", "x", "done", "", {"long": ["x" * 3000] * 100}), cause="full")
    owed.keep(act(1), cause="full")
    log = open_log(owed=owed)
    await log.pay()
    long, kill, lost = [entry.action for entry in await log.query()]
    assert (long.details["cut"], "happened_at" in long.details) == (True, True)
    assert (kill.verb, lost.verb, lost.details["times"]) == ("agent.kill", "log.lost", 1)
