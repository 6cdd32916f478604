"""Ranges of ids: claimed once on the whole host, rested long, given back by whoever claimed them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from sandbox.plan import IDS_PER_AGENT
from supervisord.errors import Exhausted
from supervisord.slots import Slots

if TYPE_CHECKING:
    from pathlib import Path

FIRST = 7 * IDS_PER_AGENT


def test_two_instances_never_have_one_slot(tmp_path: Path) -> None:
    one, two = (Slots(tmp_path, instance=name, first=FIRST, count=64) for name in ("one", "two"))
    with ThreadPoolExecutor(8) as pool:
        claims = [pool.submit((one, two)[n % 2].claim) for n in range(64)]
    slots = [claim.result() for claim in claims]
    assert sorted(slots) == list(range(64))
    with pytest.raises(Exhausted, match="64"):
        one.claim()
    one.release(slots[0])
    assert two.claim() == slots[0]


def test_instances_with_parts_of_the_ids_that_overlap_never_give_one_range_to_two(tmp_path: Path) -> None:
    one = Slots(tmp_path, instance="one", first=FIRST, count=4)
    two = Slots(tmp_path, instance="two", first=FIRST + 2 * IDS_PER_AGENT, count=4)
    ranges = [*(one.claim() for _ in range(4)), *(two.claim() + 2 for _ in range(2))]
    assert sorted(ranges) == list(range(6))
    with pytest.raises(Exhausted):
        two.claim()


def test_slots_begin_where_ranges_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 65536"):
        Slots(tmp_path, instance="one", first=FIRST + 1, count=4)


def test_a_slot_rests_before_it_is_taken_again(tmp_path: Path) -> None:
    slots = Slots(tmp_path, instance="one", first=FIRST, count=4)
    first = slots.claim()
    slots.release(first)
    assert [slots.claim() for _ in range(4)] == [1, 2, 3, 0]


def test_a_start_gives_back_ones_own_and_nobody_elses(tmp_path: Path) -> None:
    one, two = (Slots(tmp_path, instance=name, first=FIRST, count=8) for name in ("one", "two"))
    mine, lost, others = one.claim(), one.claim(), two.claim()
    one.release(mine)  # its file was lost, and the agent lives
    again = Slots(tmp_path, instance="one", first=FIRST, count=8)
    again.reconcile([mine])
    names = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert names == {str(7 + mine), str(7 + others)}
    assert str(7 + lost) not in names
    assert (tmp_path / str(7 + mine)).read_text() == "one"
    assert again.claim() not in (mine, others)


def test_who_lives_keeps_its_range_when_the_ids_begin_elsewhere(tmp_path: Path) -> None:
    before = Slots(tmp_path, instance="one", first=FIRST, count=8)
    living = [before.claim() for _ in range(3)][2]
    after = Slots(tmp_path, instance="one", first=FIRST + IDS_PER_AGENT, count=8)
    known = after.of_range(FIRST + living * IDS_PER_AGENT)
    assert known != living
    after.reconcile([known])
    assert known not in {after.claim() for _ in range(7)}
    after.release(known)
    assert not (tmp_path / str(7 + living)).exists()


def test_giving_back_twice_is_no_error(tmp_path: Path) -> None:
    slots = Slots(tmp_path, instance="one", first=FIRST, count=2)
    slot = slots.claim()
    slots.release(slot)
    slots.release(slot)
    assert slots.claim() == 1


def test_an_instance_that_ends_leaves_its_mark_only_with_its_claims(tmp_path: Path) -> None:
    slots = Slots(tmp_path, instance="one", first=FIRST, count=2)
    slot = slots.claim()
    slots.close()
    assert {path.name for path in tmp_path.iterdir()} == {".one", "7"}
    slots.release(slot)
    slots.close()
    slots.close()
    assert list(tmp_path.iterdir()) == []
