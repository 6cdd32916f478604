"""Every (state, event) pair is either in this table or refused."""

import itertools

import pytest

from supervisord.errors import Conflict
from supervisord.lifecycle import ENDED, LIVE, Event, State, can, transition

# Written out by hand and by column, so that it does not share a mistake with the table it checks.
EXPECTED = """
            EXEC_OK LAUNCH_FAILED FREEZE THAW    KILL    EXITED  CGROUP_EMPTY LOST
STARTING    RUNNING FAILED        -      -       KILLING EXITED  -            FAILED
RUNNING     -       -             FROZEN RUNNING KILLING EXITED  -            FAILED
FROZEN      -       -             FROZEN RUNNING KILLING EXITED  -            FAILED
KILLING     KILLING KILLING       -      -       KILLING KILLING KILLED       KILLED
KILLED      -       -             -      -       KILLED  KILLED  KILLED       -
EXITED      EXITED  -             -      -       EXITED  -       EXITED       -
FAILED      -       -             -      -       FAILED  -       FAILED       -
"""


def expected() -> dict[tuple[State, Event], State | None]:
    header, *rows = EXPECTED.strip().splitlines()
    events = [Event[word] for word in header.split()]
    return {
        (State[row.split()[0]], event): None if word == "-" else State[word]
        for row in rows
        for event, word in zip(events, row.split()[1:], strict=True)
    }


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair(state: State, event: Event) -> None:
    after = expected()[(state, event)]
    assert can(state, event) is (after is not None)
    if after is None:
        with pytest.raises(Conflict) as raised:
            transition(state, event)
        assert state.value in str(raised.value)
        assert raised.value.remedy
    else:
        assert transition(state, event) is after


def test_live_and_ended_are_all_states_and_nothing_leads_back_to_life() -> None:
    assert set(State) == LIVE | ENDED
    assert not LIVE & ENDED
    for state, event in itertools.product(ENDED, Event):
        if can(state, event):
            assert transition(state, event) is state


@pytest.mark.parametrize("state", [state for state in State if state in LIVE])
def test_a_kill_is_legal_in_every_live_state_and_ends_only_with_an_empty_cgroup(state: State) -> None:
    killing = transition(state, Event.KILL)
    assert killing is State.KILLING
    assert transition(killing, Event.EXITED) is State.KILLING
    assert transition(killing, Event.CGROUP_EMPTY) is State.KILLED
