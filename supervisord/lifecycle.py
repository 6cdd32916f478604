"""The life of an agent as a table: the only place that says which state follows which (pure)."""

from enum import Enum
from typing import Final

from supervisord.errors import Conflict


class State(Enum):
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    FROZEN = "FROZEN"
    KILLING = "KILLING"
    KILLED = "KILLED"
    EXITED = "EXITED"
    FAILED = "FAILED"


class Event(Enum):
    EXEC_OK = "exec_ok"  # the sync pipe closed: the program runs
    LAUNCH_FAILED = "launch_failed"  # a step failed, everything was undone
    FREEZE = "freeze"
    THAW = "thaw"
    KILL = "kill"
    EXITED = "exited"  # pid 1 ended by itself and nothing of the agent is left
    CGROUP_EMPTY = "cgroup_empty"  # a kill is proven: the cgroup says `populated 0`
    LOST = "lost"  # nothing of the agent is left and nobody knows its status


LIVE: Final = frozenset({State.STARTING, State.RUNNING, State.FROZEN, State.KILLING})
ENDED: Final = frozenset({State.KILLED, State.EXITED, State.FAILED})

NEXT: Final[dict[tuple[State, Event], State]] = {
    (State.STARTING, Event.EXEC_OK): State.RUNNING,
    (State.STARTING, Event.LAUNCH_FAILED): State.FAILED,
    (State.STARTING, Event.KILL): State.KILLING,
    # After a restart the daemon may learn of the exec and of the exit at once.
    (State.STARTING, Event.EXITED): State.EXITED,
    (State.STARTING, Event.LOST): State.FAILED,
    (State.RUNNING, Event.FREEZE): State.FROZEN,
    (State.RUNNING, Event.THAW): State.RUNNING,
    (State.RUNNING, Event.KILL): State.KILLING,
    (State.RUNNING, Event.EXITED): State.EXITED,
    (State.RUNNING, Event.LOST): State.FAILED,
    (State.FROZEN, Event.FREEZE): State.FROZEN,
    (State.FROZEN, Event.THAW): State.RUNNING,
    (State.FROZEN, Event.KILL): State.KILLING,
    # A frozen process still dies of SIGKILL from the host or of the OOM killer.
    (State.FROZEN, Event.EXITED): State.EXITED,
    (State.FROZEN, Event.LOST): State.FAILED,
    # While killing, only the empty cgroup ends it: pid 1 being gone proves nothing about its children. The answers to
    # what was under way when the kill came change nothing.
    (State.KILLING, Event.EXEC_OK): State.KILLING,
    (State.KILLING, Event.LAUNCH_FAILED): State.KILLING,
    (State.KILLING, Event.KILL): State.KILLING,
    (State.KILLING, Event.EXITED): State.KILLING,
    (State.KILLING, Event.CGROUP_EMPTY): State.KILLED,
    (State.KILLING, Event.LOST): State.KILLED,
    # Killing the dead answers the same again, and late reports of an end change nothing.
    (State.KILLED, Event.KILL): State.KILLED,
    (State.KILLED, Event.EXITED): State.KILLED,
    (State.KILLED, Event.CGROUP_EMPTY): State.KILLED,
    # What lives for an instant only: its exit is heard of before the launch that waits for the exec goes on.
    (State.EXITED, Event.EXEC_OK): State.EXITED,
    (State.EXITED, Event.KILL): State.EXITED,
    (State.EXITED, Event.CGROUP_EMPTY): State.EXITED,
    (State.FAILED, Event.KILL): State.FAILED,
    (State.FAILED, Event.CGROUP_EMPTY): State.FAILED,
}

_REMEDY: Final = {
    State.STARTING: "wait until it runs",
    State.RUNNING: "look at `stockadectl status`",
    State.FROZEN: "thaw it first",
    State.KILLING: "it is being killed; launch it anew",
    State.KILLED: "it has ended; launch it anew",
    State.EXITED: "it has ended; launch it anew",
    State.FAILED: "it has ended; launch it anew",
}


def transition(state: State, event: Event) -> State:
    """The state after `event`; raises Conflict where the table has no such step."""
    after = NEXT.get((state, event))
    if after is None:
        raise Conflict(f"cannot {event.value} an agent that is {state.value}", remedy=_REMEDY[state])
    return after


def can(state: State, event: Event) -> bool:
    return (state, event) in NEXT
