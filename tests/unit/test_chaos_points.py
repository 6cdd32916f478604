"""The points of a chaos run: the same for the same seed, wherever a run begins, and spread over deeds and victims."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.points import DELAY_SECONDS_MAX, Deed, Victim, point


@given(seed=st.integers(0, 2**32 - 1), number=st.integers(1, 10_000))
def test_a_point_depends_on_seed_and_number_alone(seed: int, number: int) -> None:
    whole_run = [point(seed, each) for each in range(max(1, number - 3), number + 1)]
    assert whole_run[-1] == point(seed, number)
    assert 0 <= whole_run[-1].delay_seconds <= DELAY_SECONDS_MAX
    assert (whole_run[-1].deed is Deed.APPEND) == (whole_run[-1].victim is Victim.WRITER)


def test_every_deed_meets_every_death_that_it_can() -> None:
    points = [point(1, number) for number in range(1, 2001)]
    deeds, pairs = Counter(each.deed for each in points), Counter((each.deed, each.victim) for each in points)
    assert min(deeds[deed] for deed in Deed) > 400
    assert {victim for _, victim in pairs} == set(Victim)
    assert min(pairs.values()) > 20
    assert [point(1, n) for n in range(1, 50)] != [point(2, n) for n in range(1, 50)]
