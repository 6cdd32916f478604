"""The launcher as the daemon sees it: reached, asked what it holds, heard, and reached again when it has gone.

What a launcher holds is taken up by `recovery.py`; this says when, in which order, and what each event means.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final, cast

import structlog

from sandbox.filters import pack_filters
from supervisord.actions.types import Action, CannotReadLog
from supervisord.channel import close_all
from supervisord.errors import StockadeError
from supervisord.lifecycle import Event, State, can
from supervisord.limit_actions import met_limit_action, oom_action
from supervisord.recovery import Kept, Recovery, exit_action, exit_left, exit_of, reach_launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import JSON
    from supervisord.acts import Acts
    from supervisord.agents import Agent, Agents
    from supervisord.config import Config
    from supervisord.egress_plane import EgressPlane
    from supervisord.endings import Endings
    from supervisord.filegrants import FileGrants
    from supervisord.ids import GrantId
    from supervisord.launcher_link import LauncherLink, Message
    from supervisord.provisions import Provisions
    from supervisord.scopes import GrantBook
    from supervisord.slots import Slots
    from supervisord.store import Store
    from supervisord.told_calls import ToldCalls

log = structlog.get_logger()

LAUNCHER_PAUSE_SECONDS: Final = 0.2
SETTLE_PAUSE_SECONDS: Final = 1.0


class LauncherWatch:
    """Keeps the table of agents true to what the launcher says; `ended` is told of each agent that has ended."""

    def __init__(
        self,
        link: LauncherLink,
        *,
        config: Config,
        agents: Agents,
        book: GrantBook,
        actions: ActionLog,
        store: Store,
        slots: Slots,
        filters: Iterable[tuple[str, tuple[bytes, ...]]],
        provisions: Provisions,
        files: FileGrants,
        plane: EgressPlane,
        acts: Acts,
        endings: Endings,
        told_calls: ToldCalls,
        ended: Callable[[Agent], None],
        in_background: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        self._link = link
        self._config = config
        self._agents = agents
        self._book = book
        self._actions = actions
        self._store = store
        self._slots = slots
        self._filters = tuple(filters)
        self._provisions = provisions
        self._files = files
        self._plane = plane
        self._acts = acts
        self._endings = endings
        self._told_calls = told_calls
        self._ended = ended
        self._in_background = in_background
        self._stopping = False
        self._frozen: set[str] = set()
        self._adopted: list[str] = []  # whose gates are to be opened
        self._live_ids: set[str] = set()
        self._listed_ids: set[str] = set()

    @property
    def held_ids(self) -> set[str]:
        """Whom the launcher holds: those it gave up, and those that it is still building or ending."""
        return self._live_ids | self._listed_ids

    def stop(self) -> None:
        """Have a launcher that goes from now on not be reached again."""
        self._stopping = True

    async def reach(self) -> None:
        """Connect, starting a launcher where there is none, and have it give what it holds; raises Unavailable."""
        await reach_launcher(
            self._link,
            self._config,
            managed=bool(os.environ.get("STOCKADE_LAUNCHER_MANAGED")),
            greet=self._greet,
        )

    async def _greet(self) -> None:
        # Read before the greeting, which brings the agents: what was taken back or spent must not come with them.
        kept = await Kept.read(self._store, unwritten=self._endings.unwritten())
        self._recovery = Recovery(
            agents=self._agents,
            provisions=self._provisions,
            launcher=self._link,
            actions=self._actions,
            slots=self._slots,
            output_dir=self._config.run_dir / "agents",
            kept=kept,
            hold=self._files.hold,
            adopted=self._adopted,
        )
        self._live_ids = set()
        self._listed = await self._recovery.greet(self._files.groups())
        self._listed_ids = {str(entry["agent_id"]) for entry in self._listed}
        self._frozen = {str(entry["agent_id"]) for entry in self._listed if entry.get("state") == "FROZEN"}
        for digest, programs in self._filters:
            fd = os.memfd_create("filter", os.MFD_CLOEXEC)
            try:
                os.write(fd, pack_filters(programs))
                await self._link.call("filter", (fd,), digest=digest)
            finally:
                os.close(fd)

    async def recover(self) -> None:
        """Take up what an earlier daemon left; the adopt events have come with the greeting."""
        ended = await self._recovery.find_ended(self._live_ids)
        self._slots.reconcile(agent.what.slot for agent in self._agents.live())
        for agent in self._agents.live():
            if agent.agent_id in self._frozen:
                self._agents.apply(agent, Event.FREEZE)
        await self._files.reconcile(self._listed)
        shut = [agent.agent_id for agent in self._agents.live() if agent.listener is None]
        if shut:
            log.error("agents have no way out: the launcher had died too, and nobody kept their gate", agents=shut)
        if self._recovery.adopted or ended or self._recovery.half_built:
            await self._actions.record(
                Action(
                    "",
                    "daemon",
                    "daemon.recover",
                    self._config.instance,
                    "done",
                    "",
                    {
                        "adopted": list(self._recovery.adopted),
                        "ended": [agent.agent_id for agent in ended],
                        "undone": list(self._recovery.half_built),
                        **({"without_gate": cast("JSON", shut)} if shut else {}),
                    },
                )
            )
        for agent_id in await self._without_launch():
            log.error("an agent runs whose launch is not in the action log", agent=agent_id)
            await self._actions.record(
                Action(agent_id, "daemon", "agent.adopt", "agent", "done", "its launch is not in the action log")
            )
        await self._recovery.open_gates()

    async def _without_launch(self) -> list[str]:
        try:
            return await self._recovery.without_launch()
        except CannotReadLog as error:
            log.error("cannot tell whose launch is in the action log", cause=error.message)
            return []

    def heard(self, message: Message, fds: list[int]) -> None:
        """Do what an event says; its descriptors are ours."""
        agent_id = str(message.get("agent_id"))
        match message.get("ev"):
            case "adopt":
                self._live_ids.add(agent_id)
                meta, posture, ids = _object(message, "meta"), _object(message, "posture"), message.get("ids")
                self._recovery.adopt(agent_id, meta, fds, posture=posture, ids=ids if isinstance(ids, int) else None)
                return
            case "exited":
                self._exited(agent_id, message)
            case "met_limit":
                self._met_limit(agent_id, message)
            case "called":
                self._told_calls.tell(agent_id, str(message.get("stream_id")), message.get("events"))
            case "exec_exited":
                status = message.get("status")
                self._acts.exec_ended(
                    str(message.get("stream_id")), exit_of(status if isinstance(status, dict) else {})
                )
            case other:
                log.warning("the launcher sent an unknown event", event=other)
        close_all(fds)

    def _exited(self, agent_id: str, message: Message) -> None:
        """Pid 1 has ended, and nothing of the agent is left on the host."""
        self._live_ids.discard(agent_id)
        self._listed_ids.discard(agent_id)
        agent = self._agents.get(agent_id)
        if agent is None or not agent.live:
            return
        status = message.get("status")
        agent.exit = exit_of(status if isinstance(status, dict) else {}, oom=message.get("oom") is True)
        if not can(agent.state, Event.EXITED):
            return
        self._agents.apply(agent, Event.EXITED)
        if not agent.live:
            self._ended(agent)
            self._in_background(self._record_exit(agent))

    def _met_limit(self, agent_id: str, message: Message) -> None:
        agent, details = self._agents.get(agent_id), message.get("details")
        if agent is None or not isinstance(details, dict):
            return
        action = met_limit_action(agent, str(message.get("kind")), details)
        if action is not None:
            self._in_background(self._actions.note(action))

    async def _record_exit(self, agent: Agent) -> None:
        if agent.exit is not None and agent.exit.out_of_memory:
            await self._actions.note(oom_action(agent))
        await self._actions.note(exit_action(agent))

    def lost(self) -> None:
        """Reach the next launcher."""
        if not self._stopping:
            log.error("the launcher has gone: launches fail until it is back; agents run on, confined")
            self._acts.end_streams()
            self._in_background(self._reconnect())

    async def _reconnect(self) -> None:
        while not self._stopping:
            await asyncio.sleep(LAUNCHER_PAUSE_SECONDS)
            known = {grant.grant_id for grant in self._book.all()}
            try:
                await self.reach()
            except (OSError, StockadeError) as error:  # as where there is no descriptor just now
                log.error("no launcher", cause=str(error))
                continue
            self._settle_lost()
            await self._settle(known)
            await self._actions.note(Action("", "daemon", "launcher.restart", self._config.instance, "done"))
            return

    async def _settle(self, known: set[GrantId]) -> None:
        """Have what this launcher holds be as it is granted; again, where a step fails, for as long as it is there."""
        while self._link.connected:
            try:
                await self._files.reconcile(self._listed, known=known)
                await self._recovery.open_gates()
                await self._thaw_unordered()
            except (OSError, StockadeError) as error:
                log.error("what a new launcher holds is not taken up yet", cause=str(error))
                await asyncio.sleep(SETTLE_PAUSE_SECONDS)
            else:
                return

    async def _thaw_unordered(self) -> None:
        """Let go on what a launcher stopped for a moment, to take files away, and died in that moment."""
        for agent in self._agents.live():
            # Not one whose gate is closed: it is being frozen by somebody who waits for this launcher.
            ordered = self._plane.is_frozen(agent.agent_id)
            if agent.agent_id in self._frozen and agent.state is State.RUNNING and not ordered:
                try:
                    await self._link.call("thaw", agent_id=agent.agent_id)
                except StockadeError as error:
                    log.error("cannot thaw an agent", agent=agent.agent_id, cause=error.message)

    def _settle_lost(self) -> None:
        """Note the end of agents that a new launcher did not find alive."""
        for agent in self._agents.live():
            # One that the launcher is still ending is not lost: it will say when nothing is left. And a launch or a
            # kill that is under way asks by itself, and says how that ended.
            if agent.agent_id not in self.held_ids and agent.state not in (State.STARTING, State.KILLING):
                agent.exit = exit_left(self._config.run_dir / "agents" / agent.agent_id)
                event = Event.LOST if agent.exit is None else Event.EXITED
                if agent.exit is None:
                    agent.failure = agent.failure or "it ended while no launcher ran"
                if can(agent.state, event):
                    self._agents.apply(agent, event)
                    self._ended(agent)
                    self._in_background(self._record_exit(agent))


def _object(message: Message, key: str) -> dict[str, object]:
    value = message.get(key)
    return dict(value) if isinstance(value, dict) else {}
