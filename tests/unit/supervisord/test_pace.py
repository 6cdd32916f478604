"""How long requests wait: never in honest use, and as long as it takes to keep a flood to its rate."""

from __future__ import annotations

from supervisord.pace import (
    ABANDONED_TOLD_SECONDS_MIN,
    BESIDE_OTHERS_SECONDS,
    DENIALS_AT_ONCE_MAX,
    DENIALS_PER_SECOND_MAX,
    REQUESTS_AT_ONCE_BESIDE_OTHERS_MAX,
    REQUESTS_PER_SECOND_BESIDE_OTHERS_MAX,
    Pace,
)


def denials_judged(pace: Pace, *, seconds: float) -> int:
    """An agent that asks again as soon as it was refused."""
    now = count = 0.0
    while now < seconds:
        now += pace.ask("ag_flood", now) + 0.001
        pace.denied("ag_flood", now)
        count += 1
    return int(count)


def test_denials_beyond_a_burst_are_judged_at_their_rate() -> None:
    judged = denials_judged(Pace(), seconds=60)
    most = DENIALS_AT_ONCE_MAX + 60 * DENIALS_PER_SECOND_MAX
    assert most * 0.95 <= judged <= most + 2


def test_a_burst_of_denials_does_not_wait() -> None:
    pace = Pace()
    for _ in range(DENIALS_AT_ONCE_MAX):
        assert pace.ask("ag_one", 1.0) == 0
        pace.denied("ag_one", 1.0)
    assert pace.ask("ag_one", 1.0) == 0
    pace.denied("ag_one", 1.0)
    assert pace.ask("ag_one", 1.0) > 0
    assert pace.ask("ag_one", 1000.0) == 0


def test_one_that_is_alone_does_not_wait() -> None:
    pace = Pace()
    assert [pace.ask("ag_one", 0.001 * n) for n in range(5000)] == [0.0] * 5000


def test_one_beside_others_is_held_to_its_share_and_they_are_not() -> None:
    pace = Pace()
    waited = 0.0
    for n in range(3000):
        now = n / 1000
        if n % 20 == 0:
            assert pace.ask("ag_polite", now) == 0
        waited = pace.ask("ag_flood", now)
    behind = (3000 - REQUESTS_AT_ONCE_BESIDE_OTHERS_MAX) / REQUESTS_PER_SECOND_BESIDE_OTHERS_MAX - 3
    assert abs(waited - behind) < 0.2
    # The other has been silent for a while: what was asked too much is still paid back, and nothing is added.
    later = 3 + waited + BESIDE_OTHERS_SECONDS
    assert [pace.ask("ag_flood", later + n / 1000) for n in range(1000)] == [0.0] * 1000


def test_abandoned_requests_are_counted_and_told_of_now_and_then() -> None:
    pace = Pace()
    assert pace.abandoned("ag_unknown", 0.0) == 0
    pace.ask("ag_one", 0.0)
    assert [pace.abandoned("ag_one", n / 10) for n in range(100)] == [1] + [0] * 99
    assert pace.abandoned("ag_one", ABANDONED_TOLD_SECONDS_MIN) == 100
    assert pace.abandoned("ag_one", ABANDONED_TOLD_SECONDS_MIN + 1) == 0
    assert pace.forget("ag_one") == 1
    assert pace.forget("ag_one") == 0
