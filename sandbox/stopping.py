"""The acts that stop what runs, as the launcher's channel asks for them: kill, the end of one exec, freeze and thaw.

Each answers when the kernel says that it is so, or that its time is over; the loop waits for none of them.
"""

# ruff: noqa: PTH110, PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import errno
import json
import os
import time
from typing import Final

from sandbox.cgroups import CannotConfine
from sandbox.channel import Answer
from sandbox.loop import Loop
from sandbox.running import PIDS_SHOWN_MAX, Agent, State, agent_error
from sandbox.sync import StepError
from sandbox.workshop import Workshop

KILL_DEADLINE_MS: Final = 10_000
KILL_DEADLINE_MS_MAX: Final = 600_000
FREEZE_SECONDS_MAX: Final = 5.0
POLL_SECONDS: Final = 0.002


def kill(loop: Loop, agent: Agent, deadline_ms: int, answer: Answer) -> None:
    """End an agent; answers with what is known when it is over, or at the deadline."""
    already = agent.state is State.ENDING
    answered = False

    def report(agent: Agent) -> None:
        nonlocal answered
        if answered or agent.ending is None:
            return
        answered = True
        ending = agent.ending
        over = agent.state is State.GONE
        left = list(ending.left) if over else agent.group.pids() if agent.group is not None else []
        answer(
            processes_killed=ending.processes,
            egress_cut_ms=round(ending.egress_cut_ms, 3),
            dead_ms=round(ending.dead_ms, 3),
            verified_empty=over and agent.pidfd < 0 and not ending.problem and not left,
            already=already,
            left=left[:PIDS_SHOWN_MAX],
            problem=ending.problem,
        )

    agent.gone.append(report)
    loop.later(min(max(deadline_ms, 1), KILL_DEADLINE_MS_MAX) / 1000, lambda: report(agent))
    agent.end()


def kill_gone(workshop: Workshop, agent_id: str, answer: Answer) -> None:
    """Answer for an agent that is not held here; raises `StepError` where there never was one."""
    directory = f"{workshop.run_dir}/agents/{agent_id}"
    if "/" in agent_id or not os.path.exists(f"{directory}/exit"):
        raise agent_error(agent_id, "kill")
    left = _left_of(workshop, directory)
    answer(
        processes_killed=0,
        egress_cut_ms=0.0,
        dead_ms=0.0,
        verified_empty=not left,
        already=True,
        left=left,
        problem="processes that no launcher holds: end them by hand" if left else "",
    )


def _left_of(workshop: Workshop, directory: str) -> list[int]:
    """Processes in the group of an agent that is not held here any more: there should be none."""
    try:
        with open(f"{directory}/state.json", encoding="utf-8") as file:
            group = workshop.layout.open(workshop.instance, str(json.load(file)["group"]))
    except (OSError, ValueError, KeyError, TypeError, CannotConfine):
        return []  # it never was let go, or its group was removed, which takes an empty one
    try:
        return group.pids()[:PIDS_SHOWN_MAX]
    finally:
        group.close()


def end_exec(loop: Loop, agent: Agent, stream_id: str, answer: Answer) -> None:
    """Kill all that one exec started, children that changed their parents included."""
    tree = None if agent.group is None else agent.trees().of.get(stream_id)
    if tree is None:  # nothing of it is left, or never was
        answer(known=False, processes_killed=0, verified_empty=True, left=[])
        return
    count = len(tree.pids())
    tree.kill()
    _await_empty(loop, agent, stream_id, (count, time.monotonic() + KILL_DEADLINE_MS / 1000), answer)


def _await_empty(loop: Loop, agent: Agent, stream_id: str, since: tuple[int, float], answer: Answer) -> None:
    """Answer when the kernel says that nothing of it is left, or the time is over."""
    count, deadline = since
    tree = None if agent.exec_trees is None else agent.exec_trees.of.get(stream_id)
    if tree is not None and tree.populated():
        if time.monotonic() < deadline:
            loop.later(POLL_SECONDS, lambda: _await_empty(loop, agent, stream_id, since, answer))
            return
        answer(known=True, processes_killed=count, verified_empty=False, left=tree.pids()[:PIDS_SHOWN_MAX])
        return
    agent.drop_trees()
    answer(known=True, processes_killed=count, verified_empty=True, left=[])


def freeze(loop: Loop, agent: Agent, answer: Answer) -> None:
    """Stop a running agent where it is; answers when every process of it stands still."""
    assert agent.group is not None  # noqa: S101 - it runs
    agent.group.freeze()
    agent.frozen = True
    _await_frozen(loop, agent, answer, FREEZE_SECONDS_MAX)


def _await_frozen(loop: Loop, agent: Agent, answer: Answer, seconds: float) -> None:
    if agent.group is None:
        answer(StepError("freeze", 0, "the agent ended"))
    elif agent.group.frozen():
        answer(frozen=True)
    elif seconds <= 0:
        answer(StepError("freeze", errno.ETIMEDOUT, "a process did not stop in time", "kill it instead"))
    else:
        loop.later(POLL_SECONDS, lambda: _await_frozen(loop, agent, answer, seconds - POLL_SECONDS))


def thaw(agent: Agent, answer: Answer) -> None:
    """Let a frozen agent go on."""
    assert agent.group is not None  # noqa: S101 - it runs
    if not agent.pausing:  # else when that is over
        agent.group.thaw()
    agent.frozen = False
    answer(frozen=False)
