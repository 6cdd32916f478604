"""What a daemon finds when it starts: a launcher or none, agents that live on, agents that ended meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import structlog

import sandbox
from supervisord.actions.types import JSON, Action, CannotReadLog
from supervisord.agents import Agent, Description, Exit, Spend
from supervisord.channel import close_all
from supervisord.errors import StockadeError, Unavailable
from supervisord.launch_actions import confirmed
from supervisord.lifecycle import ENDED, Event, State
from supervisord.limit_actions import oom_action
from supervisord.processes import spawn
from supervisord.store import AgentRow

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from supervisord.actions.log import ActionLog
    from supervisord.agents import Agents
    from supervisord.budgets import Amounts
    from supervisord.config import Config
    from supervisord.ids import AgentId
    from supervisord.launcher_link import LauncherLink
    from supervisord.provisions import Provisions
    from supervisord.scopes import Grant
    from supervisord.slots import Slots
    from supervisord.store import Store

log = structlog.get_logger()

CONNECT_SECONDS_MAX: Final = 15.0
CONNECT_PAUSE_SECONDS: Final = 0.02
LINGER_SECONDS: Final = 2
STATE_BYTES_MAX: Final = 4 << 20
LAUNCHER: Final = Path(sandbox.__file__ or "").resolve().parent / "launcher.py"


async def reach_launcher(
    link: LauncherLink, config: Config, *, managed: bool, greet: Callable[[], Awaitable[None]]
) -> None:
    """Connect to the launcher and `greet` it.

    Where nobody answers and no service manager keeps one (`managed`), it is started in a session of its own and
    outlives this daemon. One that goes while it is greeted is no failure: it had had nothing to do for LINGER_SECONDS
    just as this daemon came. Raises Unavailable.
    """
    deadline = asyncio.get_running_loop().time() + CONNECT_SECONDS_MAX
    while True:
        await _connect(link, config, managed=managed, deadline=deadline)
        try:
            await greet()
            link.greeted()
        except Unavailable:
            if link.connected or asyncio.get_running_loop().time() > deadline:
                raise
        else:
            return


async def _connect(link: LauncherLink, config: Config, *, managed: bool, deadline: float) -> None:
    started = managed
    while True:
        try:
            link.connect()
        except PermissionError as error:
            raise Unavailable(f"cannot reach the launcher: {error}", remedy="check who owns the run_dir") from error
        except OSError as error:
            if not started:
                started = True
                spawn("launcher", launcher_command(config), fds={}, new_session=True)
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(
                    f"cannot reach the launcher at {config.run_dir}/launcher.sock: {error.strerror}",
                    remedy="see its messages in the journal; under systemd: systemctl status stockade-launcher",
                ) from error
            await asyncio.sleep(CONNECT_PAUSE_SECONDS)
        else:
            return


def launcher_command(config: Config) -> list[str]:
    """The command line of a launcher that the daemon starts itself."""
    argv = [sys.executable, "-I", "-S", "-E", str(LAUNCHER)]
    argv += ["--run-dir", str(config.run_dir), "--instance", config.instance]
    argv += ["--linger-seconds", str(LINGER_SECONDS), "--networks", str(config.pool_netns)]
    argv += ["--scratch-dir", str(config.scratch_dir), "--images", str(config.pool_images)]
    argv += ["--scratch-reserve-bytes", str(config.scratch.reserve_bytes)]
    return [*argv, "--scratch-preallocate"] if config.scratch.preallocate else argv


@dataclass(frozen=True, slots=True)
class Kept:
    """What the store has of agents, read before any of them is taken up."""

    history: Mapping[str, AgentRow] = field(default_factory=dict)
    grants: Mapping[str, Sequence[Grant]] = field(default_factory=dict)
    spent: Mapping[AgentId, Amounts] = field(default_factory=dict)

    @classmethod
    async def read(cls, store: Store, *, unwritten: Sequence[Grant]) -> Kept:
        """Read it; `unwritten` are ends of grants that the store has not taken yet. Raises CannotStore."""
        grants = {grant.grant_id: grant for grant in await store.grants()}
        grants |= {grant.grant_id: grant for grant in unwritten}
        by_agent: dict[str, list[Grant]] = {}
        for grant in grants.values():
            by_agent.setdefault(grant.agent_id, []).append(grant)
        return cls({row.agent_id: row for row in await store.agents()}, by_agent, await store.spent())


class Recovery:
    """Takes up what an earlier daemon left, and what an earlier launcher left to this one."""

    def __init__(
        self,
        *,
        agents: Agents,
        provisions: Provisions,
        launcher: LauncherLink,
        actions: ActionLog,
        slots: Slots,
        output_dir: Path,
        kept: Kept,
        hold: Callable[[object, Sequence[int]], None],
        adopted: list[str],
    ) -> None:
        self._agents = agents
        self._provisions = provisions
        self._launcher = launcher
        self._actions = actions
        self._slots = slots
        self._output_dir = output_dir
        self._kept = kept
        self._history = kept.history
        self._hold = hold
        self.adopted = adopted  # with those of a launcher that went while it was greeted
        self.half_built: list[str] = []

    async def greet(self, groups: Sequence[int] = ()) -> list[dict[str, object]]:
        """Say hello, with the guard of an earlier launcher where there was one; gives the launcher's list of agents.

        Those that live come back as `adopt` events.
        """
        reply = await self._launcher.call("hello", groups)
        self._hold(reply.body.get("pid"), reply.fds)
        listed = reply.body.get("agents")
        agents = cast("list[dict[str, object]]", listed) if isinstance(listed, list) else []
        for entry in agents:
            ours = self._agents.get(str(entry["agent_id"])) is not None  # ordered while this was asked
            if entry.get("state") in ("BUILDING", "BUILT") and not ours:
                # Its daemon died between the plan and the exec: nobody was answered, so nothing may come of it.
                self.half_built.append(str(entry["agent_id"]))
                await self._abort(str(entry["agent_id"]))
        return agents

    def adopt(
        self, agent_id: str, meta: dict[str, object], fds: list[int], *, posture: dict[str, object], ids: int | None
    ) -> Agent | None:
        """Take a living agent up, or give this launcher's descriptors to one that we have already.

        `ids` is the first of its range; a launcher of an earlier release does not say it.
        """
        if agent_id in self.half_built:
            close_all(fds)
            return None
        pidfd, listener = fds[0], fds[1] if len(fds) > 1 else None
        known = self._agents.get(agent_id)
        if known is not None:
            close_all([pidfd])
            if listener is not None:
                close_all([listener])
            elif known.listener is not None:
                self._give_back(known)
            return known
        agent = take_up(self._agents, agent_id, meta, fds, row=self._history.get(agent_id))
        if agent is None:
            return None
        # Not the number that it was launched with: `uid_first` may be another one now, and its claim must stay.
        if ids is not None:
            agent.what = replace(agent.what, slot=self._slots.of_range(ids))
        if not agent.posture:  # its daemon died between the exec and the keeping of it
            agent.posture = confirmed(agent, posture)
        self._provisions.give_scopes(
            agent, kept=self._kept.grants.get(agent_id, ()), spent=self._kept.spent.get(agent.agent_id)
        )
        self.adopted.append(agent_id)
        return agent

    async def open_gates(self) -> None:
        """Let the agents that were taken up reach their gate: the last step, when all that binds them is in force.

        Raises Unavailable where no worker runs just now.
        """
        while self.adopted:
            agent_id = self.adopted[0]
            agent = self._agents.get(agent_id)
            if agent is not None and agent.live:
                self._provisions.open_gate(agent, frozen=agent.state is State.FROZEN)
            del self.adopted[0]  # not before: where that fails it is tried again
            if agent is not None and agent.live:
                try:
                    await self._provisions.open_transparent(agent)
                except StockadeError as error:
                    log.error("an agent reaches its proxy alone", agent=agent_id, cause=error.message)

    async def without_launch(self) -> list[str]:
        """Which of the agents taken up have no entry of their launch in the log: it was cut, or begun anew."""
        return [
            agent_id
            for agent_id in self.adopted
            if not await self._actions.query(agent_id=agent_id, verb="agent.launch", limit=1)
        ]

    def _give_back(self, agent: Agent) -> None:
        async def give() -> None:
            if agent.listener is None:
                return
            try:
                await self._launcher.call("adopt", (agent.listener,), agent_id=agent.agent_id)
            except StockadeError as error:
                log.warning("cannot give a listener back", agent=agent.agent_id, cause=error.message)

        self._giving = asyncio.get_running_loop().create_task(give())

    async def _abort(self, agent_id: str) -> None:
        try:
            await self._launcher.call("abort", agent_id=agent_id)
        except StockadeError as error:
            log.warning("cannot abort a half-built agent", agent=agent_id, cause=error.message)

    async def find_ended(self, live: Iterable[str]) -> list[Agent]:
        """Agents that ended while no daemon ran: from the files that the launcher left of them."""
        alive = set(live)
        directories = list(self._output_dir.iterdir()) if self._output_dir.is_dir() else []
        left = [
            agent
            for directory in directories
            if directory.name not in alive and self._agents.get(directory.name) is None
            if (agent := self._ended_agent(directory)) is not None
        ]
        found = []
        since_ns = await self._last_start_ns()
        for agent in sorted(left, key=lambda agent: agent.what.launched_at_ns):
            row = self._history.get(agent.agent_id)
            if row is not None:
                remember(agent, row)
            if row is not None and State(row.state) in ENDED:
                agent.state = State(row.state)  # it had ended before; this daemon only remembers it
                agent.ended.set()
                self._agents.remember(agent)
                if since_ns is not None and (row.ended_at_ns or 0) >= since_ns:
                    await self._note_unsaid(agent)
                continue
            self._agents.remember(agent)
            found.append(agent)
            # Where the database had no room for it, or no daemon could write, the log says how that was.
            said = await self._said_of_end(agent.agent_id)
            if said == "agent.kill":
                self._agents.apply(agent, Event.KILL)
                self._agents.apply(agent, Event.CGROUP_EMPTY)
                continue
            self._agents.apply(agent, Event.EXITED if agent.exit is not None else Event.LOST)
            if said:
                continue
            if agent.exit is not None and agent.exit.out_of_memory:
                await self._actions.note(oom_action(agent))
            await self._actions.note(exit_action(agent))
        return found

    async def _last_start_ns(self) -> int | None:
        """Return when the daemon before this one started, which recorded the ends of all that it found."""
        try:
            starts = await self._actions.query(verb="daemon.start", newest_first=True, limit=2)
        except CannotReadLog:
            return None
        return starts[1].time_ns if len(starts) > 1 else None

    async def _note_unsaid(self, agent: Agent) -> None:
        """Record an end that the database had when the daemon died, and the log not yet."""
        if agent.state in (State.KILLED, State.EXITED) and not await self._said_of_end(agent.agent_id):
            action = exit_action(agent)
            reason = f"{agent.state.value}, and not recorded before its daemon died"
            await self._actions.note(replace(action, reason=reason))

    async def _said_of_end(self, agent_id: str) -> str:
        """Return the verb by which the end of an agent is in the log already; empty where it is not."""
        try:
            kills = await self._actions.query(agent_id=agent_id, verb="agent.kill", verdict="done", limit=1)
            exits = await self._actions.query(agent_id=agent_id, verb="agent.exit", limit=1)
        except CannotReadLog as error:
            log.error("cannot tell whether the end of an agent is in the action log", cause=error.message)
            return ""
        # What came first: one that had ended by itself may have been killed for good measure, which says so.
        return min(((entry.seq, entry.action.verb) for entry in (*kills, *exits)), default=(0, ""))[1]

    def _ended_agent(self, directory: Path) -> Agent | None:
        try:
            with (directory / "state.json").open("rb") as file:
                state = json.loads(file.read(STATE_BYTES_MAX))
            agent = Agent(Description.from_json(state["meta"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("cannot read what is left of an agent", directory=str(directory), cause=str(error))
            return None
        agent.exit = exit_left(directory)
        if agent.exit is None:
            agent.failure = "it ended while no daemon ran, and its exit status is not known"
        return agent


def take_up(
    agents: Agents, agent_id: str, meta: dict[str, object], fds: list[int], *, row: AgentRow | None = None
) -> Agent | None:
    """Take a living agent with the launcher's descriptors into the table; None where another version launched it."""
    try:
        agent = Agent(Description.from_json(meta))
    except (TypeError, KeyError) as error:
        log.error("an agent of another version is left alone: kill it by its cgroup", agent=agent_id, cause=str(error))
        close_all(fds)
        return None
    agent.pidfd, agent.listener = fds[0], fds[1] if len(fds) > 1 else None
    if row is not None:
        remember(agent, row)
    agents.add(agent)
    agents.apply(agent, Event.EXEC_OK)
    agent.started_at_ns = agent.started_at_ns or agent.what.launched_at_ns
    return agent


def row_of(agent: Agent) -> AgentRow:
    """What is kept of an agent in the store."""
    record: dict[str, object] = {"posture": agent.posture, "failure": agent.failure, "spend": asdict(agent.spend)}
    return AgentRow(agent.agent_id, agent.name, agent.state.value, agent.started_at_ns, agent.ended_at_ns, record)


def remember(agent: Agent, row: AgentRow) -> None:
    """Give an agent that was found again what the store kept of it."""
    posture, spend = row.record.get("posture"), row.record.get("spend")
    agent.started_at_ns, agent.ended_at_ns = row.started_at_ns, row.ended_at_ns
    agent.posture = dict(posture) if isinstance(posture, dict) else {}
    agent.failure = agent.failure or str(row.record.get("failure") or "")
    if isinstance(spend, dict) and spend.keys() == asdict(Spend()).keys():
        agent.spend = Spend(**spend)


def exit_left(directory: Path) -> Exit | None:
    """How an agent ended, as its pid 1 wrote it down before it went; None where nothing says so."""
    try:
        return exit_of(json.loads((directory / "exit").read_text()))
    except (OSError, ValueError, AttributeError):
        return None


def exit_of(status: dict[str, object], *, oom: bool = False) -> Exit:
    code, number = status.get("code"), status.get("signal")
    return Exit(
        code if isinstance(code, int) else None,
        number if isinstance(number, int) else None,
        oom or status.get("oom") is True,
    )


async def crash_action(actions: ActionLog, instance: str) -> Action | None:
    """The entry for a daemon before this one that ended without a word; None where it said so, or there was none."""
    try:
        starts = await actions.query(verb="daemon.start", newest_first=True, limit=1)
        stops = await actions.query(verb="daemon.stop", newest_first=True, limit=1)
    except CannotReadLog as error:
        log.error("cannot tell from the action log how the last daemon ended", cause=error.message)
        return None
    if not starts or (stops and stops[0].seq > starts[0].seq):
        return None
    started = starts[0]
    details: dict[str, JSON] = {"pid": started.action.details.get("pid"), "started_seq": started.seq}
    return Action("", "daemon", "daemon.crash", instance, "failed", "it ended without a word", details)


async def policies_before(actions: ActionLog) -> str:
    """Return the digest of the policies that were in force last; empty where the log does not say."""
    try:
        starts = await actions.query(verb="daemon.start", newest_first=True, limit=1)
        loads = await actions.query(verb="policy.load", newest_first=True, limit=1)
    except CannotReadLog as error:
        log.error("cannot tell from the action log which policies were in force", cause=error.message)
        return ""
    if loads and (not starts or loads[0].seq > starts[0].seq):
        return digest_of(loads[0].action.details)
    return str(starts[0].action.details.get("policies") or "") if starts else ""


def digest_of(policies: Mapping[str, JSON]) -> str:
    """Return one digest for those of all policies, by name."""
    return "sha256:" + hashlib.sha256(json.dumps(dict(policies), sort_keys=True).encode()).hexdigest()


def exit_action(agent: Agent) -> Action:
    """The entry that says how an agent ended."""
    ended = agent.exit or Exit(None, None)
    return Action(
        agent.agent_id,
        f"agent:{agent.agent_id}",
        "agent.exit",
        agent.name,
        "done" if agent.state is State.EXITED else "failed",
        "out of memory" if ended.out_of_memory else agent.failure,
        {"code": ended.code, "signal": ended.signal, "out_of_memory": ended.out_of_memory},
    )
