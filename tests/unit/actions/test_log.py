"""Recording, reading back, resuming, proving: what callers of the log see."""

from __future__ import annotations

import asyncio
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from supervisord.actions import merkle
from supervisord.actions.checkpoint import Verifier, open_checkpoint
from supervisord.actions.labelled import Labelled, launched_with
from supervisord.actions.log import ActionLog
from supervisord.actions.query import verb_fits
from supervisord.actions.types import Action, CannotOpenLog, CannotRecord, Entry
from supervisord.actions.verify import verify
from tests.unit.actions.conftest import act

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.actions.conftest import Open


async def test_what_is_recorded_is_found_and_verified(open_log: Open, tmp_path: Path) -> None:
    log = open_log()
    first = await log.record(act(1, verb="agent.launch"))
    second = await log.append(act(2))
    third = await log.append(act(3, agent="ag_b", verdict="denied"))
    assert [first.seq, second.seq, third.seq, log.size] == [1, 2, 3, 3]
    assert await log.query() == [first, second, third]
    assert await log.query(agent_id="ag_b") == [third]
    assert await log.query(verb="egress.") == [second, third]
    assert await log.query(verb="egress") == [second, third]
    assert await log.query(verb="egres") == await log.query(verb="egress.req") == []
    assert await log.query(verb="agent.launch", verdict="allowed") == [first]
    assert await log.query(agent_ids=frozenset({"ag_b", "ag_none"})) == [third]
    assert await log.query(agent_ids=frozenset()) == []
    assert await log.query(verdict="denied", after_seq=3) == []
    assert await log.query(since_ns=second.time_ns, until_ns=third.time_ns) == [second]
    assert await log.query(newest_first=True, limit=2) == [third, second]
    online = await log.verify()
    await log.close()
    offline = verify(tmp_path / "log", tmp_path / "key.pub")
    assert online == offline
    assert (offline.ok, offline.size, offline.sealed, offline.problem) == (True, 3, 3, "")


async def test_entries_are_found_by_what_their_agent_was_launched_with(open_log: Open) -> None:
    log = open_log()
    labelled = Labelled(log)

    async def launched(agent: str, **labels: str) -> Entry:
        return await log.record(replace(act(1, verb="agent.launch", agent=agent), details={"labels": dict(labels)}))

    red = await launched("ag_red", team="red", tier="two")
    await launched("ag_blue", team="blue")
    await log.record(replace(act(2, agent="ag_liar"), details={"labels": {"team": "red"}}))  # no launch
    assert await labelled.agents({"team": "red"}) == {"ag_red"}
    assert await labelled.agents({"team": "red", "tier": "one"}) == set()
    await launched("ag_late", team="red")
    assert await labelled.agents({"team": "red"}) == {"ag_red", "ag_late"}
    assert await labelled.agents({"team": "red", "tier": "two"}) == {"ag_red"}
    assert launched_with(red.action, frozenset({("team", "red")}))
    assert not launched_with(red.action, frozenset({("team", "blue")}))
    await log.close()


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [("", True), ("egress.request", True), ("egress.", True), ("egress", True), ("egres", False), ("egress.re", False)],
)
def test_a_verb_fits_as_a_query_has_it(wanted: str, *, fits: bool) -> None:
    assert verb_fits("egress.request", wanted) is fits


async def test_the_key_is_private_and_its_public_half_beside_it(open_log: Open, tmp_path: Path) -> None:
    log = open_log(origin="host.example/actions")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert Verifier.parse((tmp_path / "key.pub").read_text()).name == "host.example/actions"
    assert log.public_key == (tmp_path / "key.pub").read_text().strip()
    await log.close()


async def test_a_second_writer_is_refused_while_the_first_lives(open_log: Open) -> None:
    log = open_log()
    with pytest.raises(CannotOpenLog, match="another process"):
        open_log()
    await log.close()
    await open_log().close()


async def test_a_log_goes_on_where_it_stopped(open_log: Open, tmp_path: Path) -> None:
    log = open_log()
    before = [await log.append(act(number)) for number in range(5)]
    note = await log.checkpoint()
    await log.close()
    log = open_log()
    after = await log.record(act(5))
    assert after.seq == 6
    assert await log.query() == [*before, after]
    await log.close()
    report = verify(tmp_path / "log", tmp_path / "key.pub", kept=note)
    assert (report.ok, report.size) == (True, 6)


async def test_segments_change_and_nothing_is_lost(open_log: Open, tmp_path: Path) -> None:
    log = open_log(segment_bytes=4000)
    entries: list[Entry] = []
    for number in range(200):
        entries += [await log.append(act(number))]
        if number % 10 == 0:
            entries += await asyncio.gather(*[log.record(act(number + each)) for each in range(3)])
    assert [entry.seq for entry in sorted(entries, key=lambda entry: entry.seq)] == list(range(1, len(entries) + 1))
    assert await log.query(limit=10_000) == sorted(entries, key=lambda entry: entry.seq)
    await log.close()
    assert len(list((tmp_path / "log" / "segments").iterdir())) > 3
    report = verify(tmp_path / "log", tmp_path / "key.pub")
    assert (report.ok, report.size, report.sealed) == (True, len(entries), len(entries))
    log = open_log(segment_bytes=4000)
    assert log.size == len(entries)
    await log.close()


async def test_many_at_once_are_answered_in_one_order(open_log: Open) -> None:
    log = open_log(durability="strict")
    entries = await asyncio.gather(
        *[log.record(act(number)) if number % 2 else log.append(act(number)) for number in range(300)]
    )
    assert [entry.seq for entry in entries] == list(range(1, 301))
    assert [entry.action.details["number"] for entry in entries] == list(range(300))
    more = await log.append_all([act(1), act(2)])
    assert [entry.seq for entry in more] == [301, 302]
    await log.close()


async def test_the_index_is_made_again_from_the_segments(open_log: Open, tmp_path: Path) -> None:
    log = open_log(segment_bytes=4000)
    entries = await log.append_all([act(number) for number in range(600)])
    proof = await log.proof(300)
    await log.close()
    for path in (tmp_path / "log").glob("index.sqlite*"):
        path.unlink()
    (tmp_path / "log" / "index.sqlite").write_bytes(b"this is no database" * 100)
    log = open_log()
    assert await log.query(limit=10_000) == entries
    assert await log.proof(300, proof.size) == replace(proof, checkpoint="")
    await log.close()


async def test_proofs_hold_against_the_signed_checkpoint(open_log: Open) -> None:
    log = open_log()
    await log.append_all([act(number) for number in range(700)])
    verifier = Verifier.parse(log.public_key)
    for seq in (1, 256, 257, 512, 700):
        proof = await log.proof(seq)
        checkpoint = open_checkpoint(proof.checkpoint, verifier)
        assert (checkpoint.size, checkpoint.root) == (proof.size, proof.root) == (700, proof.root)
        assert merkle.leaf_hash(proof.entry) == proof.leaf_hash
        assert merkle.inclusion_holds(seq - 1, proof.size, proof.leaf_hash, proof.path, proof.root)
        assert not merkle.inclusion_holds(seq - 1, proof.size, merkle.leaf_hash(b"other"), proof.path, proof.root)
    old = await log.proof(1, 300)
    path = await log.consistency(300)
    assert merkle.consistency_holds(300, 700, old.root, (await log.proof(1)).root, path)
    for seq, size in ((0, None), (701, None), (5, 4), (5, 701)):
        with pytest.raises(ValueError, match="cannot prove"):
            await log.proof(seq, size)
    await log.close()


async def test_a_tail_resumes_and_follows_until_the_log_closes(open_log: Open) -> None:
    log = open_log()
    await log.append_all([act(number) for number in range(600)])
    seen: list[int] = []
    grown = asyncio.Event()

    async def reach(count: int) -> None:
        while len(seen) < count:
            grown.clear()
            await grown.wait()

    async def follow() -> None:
        async for entry in log.subscribe(after_seq=597):
            seen.append(entry.seq)
            grown.set()

    task = asyncio.create_task(follow())
    async with asyncio.timeout(10):
        await reach(3)
        assert seen == [598, 599, 600]
        await log.append(act(600))
        await log.record(act(601))
        await reach(5)
        await log.close()
        await task
    assert seen == [598, 599, 600, 601, 602]


async def test_a_checkpoint_comes_by_itself(open_log: Open) -> None:
    notes: list[str] = []
    loop, signed = asyncio.get_running_loop(), asyncio.Event()

    def keep(note: str) -> None:
        notes.append(note)
        loop.call_soon_threadsafe(signed.set)

    log = open_log(checkpoint_every_entries=10, checkpoint_seconds=3600, on_checkpoint=keep)
    await log.append_all([act(number) for number in range(25)])
    verifier = Verifier.parse(log.public_key)
    async with asyncio.timeout(10):
        await signed.wait()
    assert open_checkpoint(notes[0], verifier).size == 25
    await log.close()


async def test_what_is_no_json_is_refused_and_leaves_no_gap(open_log: Open) -> None:
    log = open_log()
    bad = Action("a", "b", "c", "d", "e", "", {"x": object()})  # type: ignore[dict-item]
    with pytest.raises(CannotRecord, match="not JSON"):
        await log.append_all([act(1), bad])
    with pytest.raises(CannotRecord, match="not JSON"):
        await log.record(bad)
    assert (await log.record(act(2))).seq == 1
    await log.close()
    with pytest.raises(CannotRecord, match="closed"):
        await log.append(act(3))


async def test_a_cancelled_caller_leaves_a_whole_log(open_log: Open) -> None:
    log = open_log()
    tasks = [asyncio.create_task(log.record(act(number))) for number in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (await log.record(act(99))).seq == 21
    assert (await log.verify()).ok
    await log.close()


async def test_strings_of_an_agent_forge_no_entry(open_log: Open, tmp_path: Path) -> None:
    """An object that holds a whole frame and a whole checkpoint stays one string of one entry."""
    log = open_log()
    await log.record(act(1))
    note = await log.checkpoint()
    await log.close()
    whole = next((tmp_path / "log" / "segments").iterdir()).read_bytes()
    log = open_log()
    forged = whole.decode("utf-8", "surrogateescape") + note
    entry = await log.record(Action("ag_a", "agent:ag_a", "egress.request", forged, "denied"))
    assert entry.action.object == forged
    assert await log.query(after_seq=1) == [entry]
    await log.close()
    assert verify(tmp_path / "log", tmp_path / "key.pub").size == 2
    log = open_log()
    assert log.size == 2
    await log.close()


async def test_another_key_is_refused(open_log: Open, tmp_path: Path, clock: Callable[[], int]) -> None:
    log = open_log()
    await log.record(act(1))
    await log.close()
    with pytest.raises(CannotOpenLog):
        ActionLog.open(tmp_path / "log", tmp_path / "other", now_ns=clock)
    assert not verify(tmp_path / "log", tmp_path / "other.pub").ok
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(CannotOpenLog, match="chmod 600"):
        open_log()
