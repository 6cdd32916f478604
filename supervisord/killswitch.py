"""The kill switch: the gate first, then the cgroup, then the proof (DESIGN section 6).

Kill waits for no lock, no policy and no log: what cannot be recorded is reported in the daemon's journal and done all
the same. Whoever asks again gets the receipt of the first kill.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from supervisord.actions.types import Action
from supervisord.egress_plane import CUT_FIRST_SECONDS_MAX
from supervisord.errors import StockadeError, Unavailable
from supervisord.launcher_link import LauncherFailed
from supervisord.lifecycle import Event, State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway_client.egress import messages
    from supervisord.actions.types import JSON
    from supervisord.agents import Agent, Agents
    from supervisord.launcher_link import LauncherLink

log = structlog.get_logger()

DEADLINE_SECONDS: Final = 10.0
LAUNCHER_SECONDS_MAX: Final = 15.0
RETRY_SECONDS: Final = 0.2
INSIST_SECONDS: Final = 1.0
NOTE_SECONDS_MAX: Final = 1.0
RECEIPTS_KEPT_MAX: Final = 4096
REASON_CHARACTERS_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a kill did and found. `statement` is what was signed: canonical JSON of the other fields."""

    receipt_id: str
    agent_id: str
    name: str
    verified_empty: bool
    processes_killed: int
    egress_cut_ms: float
    dead_ms: float
    reason: str
    killed_by: str
    time_ns: int
    already_dead: bool
    relays_cut: int
    bytes_cut: int
    grants_revoked: int = 0
    left_pids: tuple[int, ...] = ()
    statement: bytes = b""
    signature: bytes = b""


class Records(Protocol):
    """What a kill is written to, at once or as soon as that can be."""

    async def note(self, action: Action, *, durable: bool = False) -> None: ...


class Gates(Protocol):
    """What closes an agent's way out."""

    async def cut(self, agent_id: str) -> messages.CutDone | None: ...


class KillSwitch:
    """Kills agents; `sign` makes the statement and signature of a receipt, `ended` is told of each death.

    `grants` says how many are in force for an agent; `ended` is what ends them.
    """

    def __init__(
        self,
        *,
        agents: Agents,
        actions: Records,
        launcher: LauncherLink,
        plane: Gates,
        sign: Callable[[Receipt], Receipt],
        ended: Callable[[Agent], None],
        new_id: Callable[[], str],
        now_ns: Callable[[], int],
        grants: Callable[[str], int] = lambda _: 0,
    ) -> None:
        self._agents = agents
        self._actions = actions
        self._launcher = launcher
        self._plane = plane
        self._sign = sign
        self._ended = ended
        self._new_id = new_id
        self._now_ns = now_ns
        self._grants = grants
        self._kills: dict[str, asyncio.Task[Receipt]] = {}
        self._notes: set[asyncio.Task[None]] = set()
        self._insisting: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, str] = {}
        """What was wrong with those that are not proven dead, before that was what is wrong."""

    async def kill(self, agents: Sequence[Agent], *, actor: str, reason: str) -> list[Receipt]:
        """A receipt for each of `agents`, in their order; all are killed at once."""
        return list(await asyncio.gather(*(self._receipt(agent, actor, reason) for agent in agents)))

    async def _receipt(self, agent: Agent, actor: str, reason: str) -> Receipt:
        task = self._kills.get(agent.agent_id)
        if task is None or (task.done() and (task.exception() is not None or not task.result().verified_empty)):
            # Forget before it is made: an agent that could not be proven dead is tried again.
            task = asyncio.get_running_loop().create_task(self._kill(agent, actor, reason[:REASON_CHARACTERS_MAX]))
            self._kills[agent.agent_id] = task
            self._forget_old()
        # A caller that goes away does not end the kill.
        return await asyncio.shield(task)

    async def _kill(self, agent: Agent, actor: str, reason: str) -> Receipt:
        """Kill, and say what was found. Of one that has ended too: the launcher is asked, our table is no proof."""
        began = time.monotonic()
        ended = not agent.live
        self._agents.apply(agent, Event.KILL)
        cut = asyncio.get_running_loop().create_task(self._cut(agent))
        # The gate first: an agent that dies ends its connections itself, and nobody can say any more what was cut.
        await asyncio.wait({cut}, timeout=CUT_FIRST_SECONDS_MAX)
        body = await self._until_empty(agent)
        dead_ms = (time.monotonic() - began) * 1000
        cut_ms, relays, waiting = await cut
        verified = body.get("verified_empty") is True
        left = body.get("left")
        receipt = self._made(
            agent,
            actor,
            reason,
            already=ended and body.get("already") is True,
            verified_empty=verified,
            processes_killed=_int(body.get("processes_killed")),
            egress_cut_ms=max(cut_ms, _float(body.get("egress_cut_ms"))),
            dead_ms=dead_ms,
            relays_cut=relays,
            bytes_cut=waiting,
            grants_revoked=self._grants(agent.agent_id) if verified else 0,
            left_pids=tuple(_int(pid) for pid in left) if isinstance(left, list) else (),
        )
        self._settle(agent, body, unproven=receipt)
        await self._note(agent, receipt)
        return receipt

    async def undo(self, agent: Agent) -> bool:
        """End what there is of a launch that failed; False where it is not proven that nothing is left."""
        body = await self._until_empty(agent)
        if body.get("verified_empty") is True:
            if agent.state is State.STARTING:
                self._agents.apply(agent, Event.LAUNCH_FAILED)
            elif agent.live:
                self._agents.apply(agent, Event.CGROUP_EMPTY)
            return True
        if agent.live:
            self._agents.apply(agent, Event.KILL)
        self._settle(agent, body)
        return False

    def _settle(self, agent: Agent, body: dict[str, object], *, unproven: Receipt | None = None) -> None:
        """Note a death that is proven; one that is not is tried again until it is, and shown meanwhile.

        `unproven` is what was said of a kill that this is to prove.
        """
        if not agent.live:
            return
        if body.get("verified_empty") is True:
            agent.failure = self._failures.pop(agent.agent_id, agent.failure)
            self._agents.apply(agent, Event.CGROUP_EMPTY)
            self._ended(agent)
            return
        self._failures.setdefault(agent.agent_id, agent.failure)
        problem = str(body.get("problem") or "") or f"processes left: {body.get('left') or 'not known'}"
        agent.failure = f"not proven dead, tried again: {problem}"
        task = self._insisting.get(agent.agent_id)
        if task is None or task.done():
            self._insisting[agent.agent_id] = asyncio.get_running_loop().create_task(
                self._insist(agent, unproven=unproven)
            )

    async def _insist(self, agent: Agent, *, unproven: Receipt | None) -> None:
        began = time.monotonic()
        try:
            while agent.live:
                await asyncio.sleep(INSIST_SECONDS)
                body = await self._until_empty(agent)
                if body.get("verified_empty") is True and agent.live:
                    agent.failure = self._failures.pop(agent.agent_id, agent.failure)
                    seconds = time.monotonic() - began
                    proven = None if unproven is None else self._proven(unproven, body, seconds=seconds)
                    self._agents.apply(agent, Event.CGROUP_EMPTY)
                    self._ended(agent)
                    if proven is not None:
                        await self._note(agent, proven)
        finally:
            self._insisting.pop(agent.agent_id, None)
            if not agent.live:
                self._failures.pop(agent.agent_id, None)

    def _proven(self, unproven: Receipt, body: dict[str, object], *, seconds: float) -> Receipt:
        """A receipt of its own for a kill that could not be proven when its caller was answered."""
        return self._sign(
            replace(
                unproven,
                receipt_id=self._new_id(),
                verified_empty=True,
                processes_killed=unproven.processes_killed + _int(body.get("processes_killed")),
                dead_ms=round(unproven.dead_ms + seconds * 1000, 3),
                time_ns=self._now_ns(),
                grants_revoked=self._grants(unproven.agent_id),
                left_pids=(),
                statement=b"",
                signature=b"",
            )
        )

    async def _cut(self, agent: Agent) -> tuple[float, int, int]:
        """Return what it took, how many connections were open, and the bytes that were on their way on them."""
        began = time.monotonic()
        done = await self._plane.cut(agent.agent_id)
        relays, waiting = (0, 0) if done is None else (done.relays, done.bytes_waiting)
        return (time.monotonic() - began) * 1000, relays, waiting

    async def _until_empty(self, agent: Agent) -> dict[str, object]:
        """Have the launcher kill until the cgroup is empty; without one, end pid 1 and with it its namespace."""
        deadline = time.monotonic() + LAUNCHER_SECONDS_MAX
        while True:
            try:
                reply = await self._launcher.call(
                    "kill",
                    agent_id=agent.agent_id,
                    deadline_ms=int(DEADLINE_SECONDS * 1000),
                    seconds_max=DEADLINE_SECONDS + 5,
                )
            except Unavailable as error:
                self._kill_pid1(agent)
                if time.monotonic() > deadline:
                    log.error(
                        "a kill is not proven: the launcher does not answer", agent=agent.agent_id, cause=str(error)
                    )
                    return {"verified_empty": False}
                await asyncio.sleep(RETRY_SECONDS)
            except StockadeError as error:
                if isinstance(error, LauncherFailed) and error.errno == errno.ESRCH:
                    # The one process that starts agents has none of this id, nor what one leaves.
                    return {"verified_empty": True, "already": True}
                log.exception("a kill is not proven", agent=agent.agent_id)
                self._kill_pid1(agent)
                return {"verified_empty": False}
            else:
                return reply.body

    def _kill_pid1(self, agent: Agent) -> None:
        """End pid 1 of the agent: the kernel then ends every process of its pid namespace (pid_namespaces(7))."""
        if agent.pidfd is None:
            return
        try:
            signal.pidfd_send_signal(agent.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            log.debug("pid 1 has gone", agent=agent.agent_id)

    def _made(
        self,
        agent: Agent,
        actor: str,
        reason: str,
        *,
        already: bool,
        verified_empty: bool,
        processes_killed: int = 0,
        egress_cut_ms: float = 0.0,
        dead_ms: float = 0.0,
        relays_cut: int = 0,
        bytes_cut: int = 0,
        grants_revoked: int = 0,
        left_pids: tuple[int, ...] = (),
    ) -> Receipt:
        return self._sign(
            Receipt(
                receipt_id=self._new_id(),
                agent_id=agent.agent_id,
                name=agent.name,
                verified_empty=verified_empty,
                processes_killed=processes_killed,
                egress_cut_ms=round(egress_cut_ms, 3),
                dead_ms=round(dead_ms, 3),
                reason=reason,
                killed_by=actor,
                time_ns=self._now_ns(),
                already_dead=already,
                relays_cut=relays_cut,
                bytes_cut=bytes_cut,
                grants_revoked=grants_revoked,
                left_pids=left_pids,
            )
        )

    async def _note(self, agent: Agent, receipt: Receipt) -> None:
        """Record the kill and give the log a moment to say it is durable; no receipt is kept back for it."""
        task = asyncio.get_running_loop().create_task(self._record(agent, receipt))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)
        await asyncio.wait({task}, timeout=NOTE_SECONDS_MAX)

    async def _record(self, agent: Agent, receipt: Receipt) -> None:
        details: dict[str, JSON] = {
            "receipt_id": receipt.receipt_id,
            "verified_empty": receipt.verified_empty,
            "processes_killed": receipt.processes_killed,
            "egress_cut_ms": receipt.egress_cut_ms,
            "dead_ms": receipt.dead_ms,
            "relays_cut": receipt.relays_cut,
            "bytes_cut": receipt.bytes_cut,
            "grants_revoked": receipt.grants_revoked,
            "already_dead": receipt.already_dead,
            "signature": receipt.signature.hex(),
        }
        verdict = "done" if receipt.verified_empty else "failed"
        await self._actions.note(
            Action(agent.agent_id, receipt.killed_by, "agent.kill", agent.name, verdict, receipt.reason, details),
            durable=True,
        )

    def _forget_old(self) -> None:
        while len(self._kills) > RECEIPTS_KEPT_MAX:
            oldest = next(iter(self._kills))
            if not self._kills[oldest].done():
                return
            del self._kills[oldest]


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
