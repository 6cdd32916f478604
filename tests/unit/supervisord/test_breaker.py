"""The gateway's breaker: every state and event, when it opens, and what it never counts."""

from __future__ import annotations

from itertools import product

import pytest

from supervisord.breaker import FAILURES_MAX, NEXT, Breaker, Event, State


def test_every_state_has_every_event() -> None:
    assert set(NEXT) == set(product(State, Event))


def test_it_opens_after_so_many_failures_in_a_row_and_not_before() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_MAX - 1):
        breaker = breaker.after(Event.FAILED, "refused")
        assert breaker.passes
    assert not breaker.after(Event.FAILED, "refused").passes
    breaker = breaker.after(Event.ANSWERED).after(Event.FAILED, "refused")
    assert (breaker.passes, breaker.failures) == (True, 1), "an answer in between begins the count anew"


def test_only_a_probe_closes_it_and_calls_are_refused_while_it_runs() -> None:
    opened = Breaker(State.OPEN, FAILURES_MAX, "refused")
    assert opened.after(Event.ANSWERED).state is State.OPEN
    trying = opened.after(Event.TRIED)
    assert (trying.state, trying.passes, trying.cause) == (State.HALF_OPEN, False, "refused")
    assert trying.after(Event.FAILED, "again").state is State.OPEN
    assert trying.after(Event.ANSWERED) == Breaker()


@pytest.mark.parametrize("state", State)
def test_failing_never_closes(state: State) -> None:
    breaker = Breaker(state, FAILURES_MAX)
    for _ in range(10):
        breaker = breaker.after(Event.FAILED)
    assert breaker.state is State.OPEN
