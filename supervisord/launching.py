"""Launch: from an order to a program that runs, or to nothing at all.

The intent goes into the log's group commit while the launcher builds; execve waits for both. Every failure undoes what
was done, and says which step it was.
"""

from __future__ import annotations

import asyncio
import posixpath
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import structlog

from gateway_client.egress.scope import format_scope
from supervisord.agents import Agent, Description, LaunchGrant
from supervisord.authorities import read_ca_file
from supervisord.channel import close_all
from supervisord.definitions import check_registered
from supervisord.errors import CannotLaunch, Conflict, InvalidInput, StockadeError
from supervisord.grantable import check_launched_with
from supervisord.hostfiles import file_uid, open_files
from supervisord.ids import AgentId, AgentName, agent_name, new_agent_id, new_grant_id
from supervisord.launch_actions import confirmed, intent_action, outcome_action
from supervisord.lifecycle import Event, State
from supervisord.plan import LaunchOrder, Root, build, check_order, wanted_files
from supervisord.policy import Home, Policy, Worker
from supervisord.scopes import check_scopes_reachable
from supervisord.sharing import check_no_sockets, check_not_shared

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from sandbox.plan import SandboxPlan
    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import Action, Entry
    from supervisord.agents import Agents
    from supervisord.authorities import Authorities
    from supervisord.callers import Caller
    from supervisord.config import Config
    from supervisord.holds import Holds
    from supervisord.homes import Homes
    from supervisord.images import Images
    from supervisord.killswitch import KillSwitch
    from supervisord.launcher_link import LauncherLink, Reply
    from supervisord.layers import Layers
    from supervisord.plan import OpenedFile
    from supervisord.policies import PolicyShelf
    from supervisord.provisions import Provisions
    from supervisord.scopes import GrantBook
    from supervisord.slots import Slots

log = structlog.get_logger()

NAME_CHARACTERS_MAX: Final = 40
T = TypeVar("T")

Variant: TypeAlias = tuple[str, bool, bool]


def variant(policy: Policy) -> Variant:
    """Which compiled filter a policy wants: the profile, and whether execs and refused calls are told of."""
    return policy.seccomp, policy.record.execs, policy.record.refusals


class Launching:
    """Launches agents; every launch is one call of `launch`."""

    def __init__(
        self,
        *,
        config: Config,
        agents: Agents,
        policies: PolicyShelf,
        book: GrantBook,
        actions: ActionLog,
        launcher: LauncherLink,
        provisions: Provisions,
        slots: Slots,
        holds: Holds,
        layers: Layers,
        homes: Homes,
        images: Images,
        killswitch: KillSwitch,
        authorities: Authorities,
        filters: dict[Variant, str],
        entropy: Callable[[int], bytes],
        now_ns: Callable[[], int],
        now: Callable[[], float],
    ) -> None:
        self._config = config
        self._agents = agents
        self._policies = policies
        self._book = book
        self._actions = actions
        self._launcher = launcher
        self._provisions = provisions
        self._slots = slots
        self._holds = holds
        self._layers = layers
        self._homes = homes
        self._images = images
        self._killswitch = killswitch
        self._tasks: set[asyncio.Task[object]] = set()
        self._filters = filters
        self._entropy = entropy
        self._now_ns = now_ns
        self._now = now
        self._authorities = authorities
        self._more_authorities = read_ca_file(config.gateway.ca_file)
        self._keys: dict[tuple[str, str], AgentId] = {}

    def describe(self, order: LaunchOrder, *, caller: Caller) -> str:
        """The plan a launch would perform, a line each; starts and records nothing."""
        policy = self._judge(order)
        agent_id = new_agent_id(self._entropy)
        files, fds = open_files(wanted_files(order, policy), caller_uid=file_uid(caller))
        close_all(fds)
        root = None
        if policy.rootfs is not None:
            form, digest = self._images.glance(policy.rootfs)
            root = Root(len(fds), form, str(policy.rootfs), digest)
        plan = build(
            order,
            policy,
            agent_id=agent_id,
            name=order.name or _made_up_name(order, agent_id),
            instance=self._config.instance,
            id_first=self._config.agents.uid_first,
            slot=0,
            files=files,
            filter_digest=self._filters[variant(policy)],
            root=root,
        )
        return "\n".join(plan.describe())

    async def launch(
        self, order: LaunchOrder, *, caller: Caller, agent_id: str = "", idempotency_key: str = ""
    ) -> tuple[Agent, bool]:
        """The agent, and whether an earlier attempt had launched it; raises StockadeError with nothing left behind."""
        known = self._known(order, caller=caller, agent_id=agent_id, idempotency_key=idempotency_key)
        if known is not None:
            return known, True
        policy = self._judge(order)
        chosen = AgentId(agent_id) if agent_id else new_agent_id(self._entropy)
        name = agent_name(order.name) if order.name else AgentName(_made_up_name(order, chosen))
        self._holds.check(name=name, labels=dict(order.labels), policy=policy.name)
        if policy.home is Home.PERSISTENT:
            if not order.name:
                raise InvalidInput(
                    f"cannot launch with policy {policy.name}: it keeps a home for each name, and none is given",
                    remedy="give the agent a name",
                )
            self._homes.claim(name, caller)
        fds: list[int] = []
        try:
            image = None if policy.rootfs is None else await self._images.open(policy.rootfs)
            if image is not None:
                fds.append(image.fd)
                # That may have taken minutes: somebody may have launched the same meanwhile, or forbidden it.
                known = self._known(order, caller=caller, agent_id=agent_id, idempotency_key=idempotency_key)
                if known is not None:
                    return known, True
                self._holds.check(name=name, labels=dict(order.labels), policy=policy.name, rootfs_digest=image.digest)
            files, opened = open_files(wanted_files(order, policy), caller_uid=file_uid(caller))
            root = None
            if image is not None:
                root = Root(len(opened), image.form, str(policy.rootfs), image.digest, image.path)
            fds[:0] = opened  # indices of files count from the first
            agent, plan = self._register(
                order, policy, chosen, name=name, files=files, root=root, caller=caller, idempotency_key=idempotency_key
            )
            sockets = None
            if files and not policy.allow_sockets:
                sockets = self._keep(asyncio.to_thread(check_no_sockets, [file.wanted for file in files], list(opened)))
            await self._perform(agent, plan, files=files, fds=fds, caller=caller, sockets=sockets)
        finally:
            close_all(fds)
        return agent, False

    def _register(
        self,
        order: LaunchOrder,
        policy: Policy,
        agent_id: AgentId,
        *,
        name: AgentName,
        files: Sequence[OpenedFile],
        root: Root | None,
        caller: Caller,
        idempotency_key: str,
    ) -> tuple[Agent, SandboxPlan]:
        """Plan the launch, and have the agent in the table with a slot of its own; raises StockadeError."""
        slot = self._slots.claim()
        named = self._authorities.take()
        try:
            plan = build(
                order,
                policy,
                agent_id=agent_id,
                name=name,
                instance=self._config.instance,
                id_first=self._config.agents.uid_first,
                slot=slot,
                files=files,
                filter_digest=self._filters[variant(policy)],
                root=root,
                ca_certificate=named.authority.certificate + self._more_authorities,
            )
            what = self._description(
                order, policy, plan, name=name, slot=slot, caller=caller, idempotency_key=idempotency_key
            )
            if not policy.shared_workspace:
                others = (other.what for other in self._agents.live())
                check_not_shared(wanted_files(order, policy), others, self._book.for_agent)
            what = replace(what, authority=named.name, transparent=policy.egress.transparent)
            agent = Agent(what)
            self._agents.add(agent)
        except BaseException:
            self._slots.release(slot)
            raise
        if idempotency_key:
            self._keys[caller.actor, idempotency_key] = agent_id
        return agent, plan

    def _known(self, order: LaunchOrder, *, caller: Caller, agent_id: str, idempotency_key: str) -> Agent | None:
        """An earlier attempt of the same caller for the same thing; raises Conflict where it was another thing."""
        earlier = self._agents.get(agent_id) if agent_id else None
        if earlier is None and idempotency_key:
            kept = self._keys.get((caller.actor, idempotency_key))
            earlier = None if kept is None else self._agents.get(kept)
        if earlier is None:
            return None
        same = earlier.what.command == order.command and earlier.what.policy == order.policy
        same &= earlier.what.definition == ("" if order.registered is None else order.registered.reference)
        if not same or earlier.what.launched_by != caller.actor or (order.name and order.name != earlier.name):
            raise Conflict(
                f"cannot launch as {earlier.agent_id}: that was another launch", remedy="use a new id or key"
            )
        return earlier

    def _judge(self, order: LaunchOrder) -> Policy:
        """The policy of an order that may be launched at all; raises StockadeError."""
        check_order(order)
        policy = self._policies.get(order.policy)
        if variant(policy) not in self._filters:
            raise CannotLaunch(
                f"cannot launch with policy {policy.name}: there is no seccomp profile {policy.seccomp}",
                remedy=f"use one of {', '.join(sorted({name for name, *_ in self._filters}))}",
                step="policy",
            )
        check_registered(order.registered, policy)
        for scope in order.scopes:
            check_launched_with(scope, policy)
        check_scopes_reachable((*policy.scopes, *order.scopes), self._config.gateway)
        return policy

    def _description(
        self,
        order: LaunchOrder,
        policy: Policy,
        plan: SandboxPlan,
        *,
        name: AgentName,
        slot: int,
        caller: Caller,
        idempotency_key: str,
    ) -> Description:
        budget = policy.budget.tightest(order.budget)
        return Description(
            agent_id=AgentId(plan.agent_id),
            name=name,
            policy=policy.name,
            policy_digest=policy.digest,
            labels=dict(order.labels),
            owner=order.owner,
            purpose=order.purpose,
            command=order.command,
            workspace="" if order.workspace is None else str(order.workspace.path),
            workspace_mode="" if order.workspace is None else order.workspace.mode,
            launched_by=caller.actor,
            idempotency_key=idempotency_key,
            slot=slot,
            tty=order.tty is not None,
            stdin=order.stdin,
            memory_bytes=plan.limits.memory_bytes,
            cpus=plan.limits.cpus,
            pids=plan.limits.pids,
            dedicated_worker=policy.egress.worker is Worker.DEDICATED,
            on_supervisor_loss=policy.on_supervisor_loss.value,
            budget=budget.to_json(),
            grants=self._grants(order, policy, caller),
            launched_at_ns=self._now_ns(),
            definition="" if order.registered is None else order.registered.reference,
            definition_digest="" if order.registered is None else order.registered.digest,
            launched_mono=self._now(),
            on_exhausted=policy.on_exhausted.value,
            lease_seconds=order.lease_seconds,
        )

    def _grants(self, order: LaunchOrder, policy: Policy, caller: Caller) -> tuple[LaunchGrant, ...]:
        """What the agent may do from the start: of the policy, then of the launch."""
        given: dict[str, str] = {}
        for scopes, by in ((policy.scopes, f"policy:{policy.name}"), (order.scopes, caller.actor)):
            for scope in scopes:
                given.setdefault(format_scope(scope), by)
        return tuple(LaunchGrant(new_grant_id(self._entropy), text, by) for text, by in given.items())

    async def _perform(
        self,
        agent: Agent,
        plan: SandboxPlan,
        *,
        files: Sequence[OpenedFile],
        fds: list[int],
        caller: Caller,
        sockets: asyncio.Task[bool] | None,
    ) -> None:
        recorded: list[asyncio.Task[None]] = []
        going: asyncio.Task[Reply] | None = None
        try:
            for file in files:
                if file.wanted.layer:
                    self._layers.add(agent, file, fd=fds[file.index])
            # The launcher first: both are waited for before anything runs, and it takes longer than the log.
            building = asyncio.ensure_future(self._build(agent, plan, fds))
            intent = asyncio.ensure_future(self._admit(agent, intent_action(agent, plan, actor=caller.actor)))
            _, reply = await _both(intent, building)
            self._built(agent, reply)
            if sockets is not None:
                agent.posture["unix_sockets"] = "none at launch" if await sockets else "too many files to look at all"
            ahead = agent.what.transparent or agent.what.dedicated_worker
            if ahead:
                self._provisions.open_gate(agent)
                await self._provisions.open_transparent(agent)
            _check_wanted(agent)
            # Again, and in one go with the order: whoever was told that it is held finds that it does not run.
            what = agent.what
            self._holds.check(name=what.name, labels=what.labels, policy=what.policy, rootfs_digest=plan.rootfs.digest)
            going = self._keep(
                self._launcher.call("go", agent_id=agent.agent_id, first=lambda: self._runs(agent, caller, recorded))
            )
            if not ahead:
                await asyncio.sleep(0)  # the order is on its way
                self._provisions.open_gate(agent)  # an agent that is quicker waits in the listener's queue
            await going
        except BaseException as error:
            if going is not None:
                going.cancel()  # whatever came of it is undone
            if sockets is not None:
                await asyncio.wait({sockets})  # it reads descriptors that are closed after this
            undo = self._keep(self._undo(agent, error, caller))
            # A caller that goes away does not leave half of it.
            await asyncio.shield(undo)
            raise
        await recorded[0]

    async def _admit(self, agent: Agent, intent: Action) -> Entry:
        self._provisions.give_scopes(agent)
        return await self._actions.record(intent)

    async def _build(self, agent: Agent, plan: SandboxPlan, fds: list[int]) -> Reply:
        _check_wanted(agent)  # in one go with the order: after it a kill finds the agent at the launcher
        return await self._launcher.call("launch", fds, plan=plan.to_json(), meta=agent.what.to_json())

    def _runs(self, agent: Agent, caller: Caller, recorded: list[asyncio.Task[None]]) -> None:
        """The program runs, or has run: said in state and log before its end can be, however soon that comes."""
        self._agents.apply(agent, Event.EXEC_OK)
        recorded.append(
            self._keep(self._actions.note(outcome_action(agent, "agent.exec", "done", reason="", actor=caller.actor)))
        )

    def _keep(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _built(self, agent: Agent, reply: Reply) -> None:
        pidfd, listener = reply.fds
        agent.pidfd, agent.listener = pidfd, listener
        posture = reply.body.get("posture")
        agent.posture = confirmed(agent, posture if isinstance(posture, dict) else {})
        timings = reply.body.get("timings_us")
        if isinstance(timings, dict):
            log.debug("built", agent=agent.agent_id, timings_us=timings)

    async def _undo(self, agent: Agent, error: BaseException, caller: Caller) -> None:
        """Leave nothing of a launch; where that cannot be proven the agent stays, KILLING, and is tried again."""
        agent.failure = error.message if isinstance(error, StockadeError) else str(error)
        if await self._killswitch.undo(agent):
            self._provisions.forget(agent)
            self._layers.forget(agent.agent_id)
        await self._actions.note(
            outcome_action(agent, "agent.fail", "failed", reason=agent.failure, actor=caller.actor)
        )


def _check_wanted(agent: Agent) -> None:
    if agent.state is not State.STARTING:
        raise Conflict(f"cannot launch {agent.name}: it was killed meanwhile", remedy="launch it anew")


async def _both(intent: asyncio.Future[Entry], building: asyncio.Future[Reply]) -> tuple[Entry, Reply]:
    """Wait for record and build; where one fails the other is waited for too, so that it can be undone."""
    results = await asyncio.gather(intent, building, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            if not isinstance(results[1], BaseException):
                close_all(results[1].fds)
            raise result
    return intent.result(), building.result()


def _made_up_name(order: LaunchOrder, agent_id: str) -> str:
    base = "".join(
        c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in posixpath.basename(order.command[0])
    )
    base = base.lower().strip("-")[:NAME_CHARACTERS_MAX] or "agent"
    return f"{base}-{agent_id[-6:]}"
