"""Every agent of this instance, running or ended: one owner, one table of states, one way to be told of a change."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

from supervisord.errors import Conflict, InvalidInput, NotFound
from supervisord.ids import AgentId, AgentName, is_agent_id, shown
from supervisord.lifecycle import ENDED, LIVE, Event, State, transition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ENDED_AGENTS_KEPT_MAX: Final = 2048


@dataclass(frozen=True, slots=True)
class Exit:
    """How the agent's program ended: `code` or `signal`, one of the two."""

    code: int | None
    signal: int | None
    out_of_memory: bool = False


@dataclass(slots=True)
class Spend:
    """What the agent used of models so far; cost in US dollars."""

    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    estimated: bool = False
    requests: int = 0


@dataclass(frozen=True, slots=True)
class LaunchGrant:
    """A scope the agent has from its start, and who gave it."""

    grant_id: str
    scope: str
    by: str


@dataclass(frozen=True, slots=True)
class Description:
    """What was launched: fixed for the agent's life and kept by the launcher for a daemon that comes back."""

    agent_id: AgentId
    name: AgentName
    policy: str
    policy_digest: str
    labels: dict[str, str]
    owner: str
    purpose: str
    command: tuple[str, ...]
    workspace: str
    workspace_mode: str
    launched_by: str
    idempotency_key: str
    slot: int
    tty: bool
    stdin: bool
    memory_bytes: int
    cpus: float
    pids: int
    dedicated_worker: bool
    on_supervisor_loss: str
    budget: dict[str, int | None]
    grants: tuple[LaunchGrant, ...]
    launched_at_ns: int
    authority: str = ""
    """The name of its certificate authority; empty where it has none."""
    transparent: bool = False
    definition: str = ""
    definition_digest: str = ""
    launched_mono: float = 0.0
    """Seconds on the kernel's monotonic clock, which goes on over restarts of the daemon."""
    on_exhausted: str = "deny"
    lease_seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        # Not asdict of it all: its copies would be made while a launch waits.
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"grants": [asdict(grant) for grant in self.grants]}

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Description:
        """The description again; raises TypeError or KeyError where it is another version's."""
        fields = dict(value)
        command, grants = fields["command"], fields["grants"]
        if not isinstance(command, list | tuple) or not isinstance(grants, list | tuple):
            raise TypeError("command and grants are lists")
        fields["command"] = tuple(str(part) for part in command)
        fields["grants"] = tuple(LaunchGrant(**grant) for grant in grants)
        return cls(**fields)  # type: ignore[arg-type]


@dataclass(slots=True)
class Agent:
    """One agent. `state` is written by `apply` alone."""

    what: Description
    state: State = State.STARTING
    posture: dict[str, object] = field(default_factory=dict)
    started_at_ns: int | None = None
    ended_at_ns: int | None = None
    exit: Exit | None = None
    failure: str = ""
    spend: Spend = field(default_factory=Spend)
    pidfd: int | None = None
    listener: int | None = None
    version: int = 0
    slot_held: bool = True
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def agent_id(self) -> AgentId:
        return self.what.agent_id

    @property
    def name(self) -> AgentName:
        return self.what.name

    @property
    def live(self) -> bool:
        return self.state in LIVE


@dataclass(frozen=True, slots=True)
class Selector:
    """Which agents an order means; nothing set is refused, so that no order means all by accident."""

    agents: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    policy: str = ""
    owner: str = ""
    all: bool = False


class Agents:
    """The table of agents, by id and by name."""

    def __init__(self, *, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._by_id: OrderedDict[AgentId, Agent] = OrderedDict()
        self._latest: dict[str, AgentId] = {}
        self._changed = asyncio.Event()
        self._version = 0
        self.on_change: list[Callable[[Agent], None]] = []

    @property
    def version(self) -> int:
        return self._version

    def live(self) -> list[Agent]:
        return [agent for agent in self._by_id.values() if agent.live]

    def all(self) -> list[Agent]:
        return list(self._by_id.values())

    def add(self, agent: Agent) -> None:
        """Take a new agent in; raises Conflict where its id is known or its name is that of a live one."""
        if agent.agent_id in self._by_id:
            raise Conflict(
                f"cannot launch {agent.agent_id}: there is an agent with this id", remedy="leave the id to the daemon"
            )
        other = self._named(agent.name)
        if other is not None and other.live:
            raise Conflict(
                f"cannot launch {agent.name}: an agent of this name is {other.state.value}",
                remedy=f"choose another name, or `stockadectl kill {agent.name}` first",
            )
        self._by_id[agent.agent_id] = agent
        self._latest[agent.name] = agent.agent_id
        self._forget_old()
        self._note(agent)

    def remember(self, agent: Agent) -> None:
        """Take in an agent that ended under an earlier daemon: its name may be that of a live or a later one by now."""
        self._by_id[agent.agent_id] = agent
        other = self._named(agent.name)
        if other is None or (not other.live and other.what.launched_at_ns < agent.what.launched_at_ns):
            self._latest[agent.name] = agent.agent_id
        self._forget_old()
        self._note(agent)

    def get(self, agent_id: str) -> Agent | None:
        return self._by_id.get(AgentId(agent_id))

    def find(self, name_or_id: str) -> Agent:
        """The agent of this id, or the live one of this name, or the last of it; raises NotFound."""
        agent = self.get(name_or_id) if is_agent_id(name_or_id) else self._named(name_or_id)
        if agent is None:
            raise NotFound(f"cannot find agent {shown(name_or_id)}: there is none", remedy="see `stockadectl status`")
        return agent

    def find_live(self, name_or_id: str) -> Agent:
        agent = self.find(name_or_id)
        if not agent.live:
            raise Conflict(
                f"cannot use agent {agent.name}: it is {agent.state.value}", remedy="launch it anew, or name another"
            )
        return agent

    def select(self, selector: Selector, *, live_only: bool) -> list[Agent]:
        """Every agent the selector means; raises NotFound for a named one that is not there, and then means none."""
        if not (selector.agents or selector.labels or selector.policy or selector.owner or selector.all):
            raise InvalidInput(
                "cannot select agents: the selector is empty", remedy="name agents, a label, a policy, an owner, or all"
            )
        chosen: dict[AgentId, Agent] = {}
        for name in selector.agents:
            agent = self.find(name)
            chosen[agent.agent_id] = agent
        if selector.labels or selector.policy or selector.owner or selector.all:
            for agent in self._by_id.values():
                if (agent.live or not live_only) and _matches(agent, selector):
                    chosen[agent.agent_id] = agent
        return list(chosen.values())

    def apply(self, agent: Agent, event: Event) -> None:
        """Move the agent along the table; raises Conflict where it has no such step."""
        agent.state = transition(agent.state, event)
        if agent.state is State.RUNNING and agent.started_at_ns is None:
            agent.started_at_ns = self._now_ns()
        if agent.state is State.EXITED and event is Event.EXEC_OK:
            agent.started_at_ns = agent.ended_at_ns  # it ran for less time than its launch took to hear of it
        if agent.state in ENDED and not agent.ended.is_set():
            agent.ended_at_ns = self._now_ns()
            agent.ended.set()
        self._note(agent)

    def describe(self, agent: Agent, key: str, value: object) -> None:
        """Put a fact into the agent's posture, or take it out where it is None or empty."""
        if value:
            agent.posture[key] = value
        else:
            agent.posture.pop(key, None)
        self._note(agent)

    async def wait_changed(self, since: int) -> int:
        """Return the table's version once it is beyond `since`."""
        while self._version <= since:
            await self._changed.wait()
        return self._version

    def _named(self, name: str) -> Agent | None:
        agent_id = self._latest.get(name)
        return None if agent_id is None else self._by_id.get(agent_id)

    def _note(self, agent: Agent) -> None:
        self._version += 1
        agent.version = self._version
        for callback in self.on_change:
            callback(agent)
        woken, self._changed = self._changed, asyncio.Event()
        woken.set()

    def _forget_old(self) -> None:
        ended = [agent for agent in self._by_id.values() if not agent.live]
        for agent in ended[: max(0, len(ended) - ENDED_AGENTS_KEPT_MAX)]:
            del self._by_id[agent.agent_id]
            if self._latest.get(agent.name) == agent.agent_id:
                del self._latest[agent.name]


def _matches(agent: Agent, selector: Selector) -> bool:
    return (
        all(agent.what.labels.get(key) == value for key, value in selector.labels)
        and selector.policy in ("", agent.what.policy)
        and selector.owner in ("", agent.what.owner)
    )
