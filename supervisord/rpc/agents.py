"""AgentService: decode, call, encode."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import structlog
from stockade.v1 import agents_pb2, agents_pb2_grpc

from supervisord.callers import Role, current_caller
from supervisord.definitions import registered_as
from supervisord.errors import InvalidInput, PermissionDenied, StockadeError
from supervisord.holds import Hold
from supervisord.ids import agent_id as parse_agent_id
from supervisord.ids import agent_name as parse_name
from supervisord.ids import idempotency_key as parse_key
from supervisord.ids import image_digest as parse_digest
from supervisord.ids import label, new_hold_id, shown
from supervisord.ids import policy_name as parse_policy
from supervisord.output import Chunk, Tail, follow
from supervisord.plan import LaunchOrder
from supervisord.policy import AgentSpec
from supervisord.rpc import convert

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    import grpc

    from supervisord.acts import Acts
    from supervisord.agents import Agent, Agents
    from supervisord.holds import Holds
    from supervisord.killswitch import KillSwitch
    from supervisord.launcher_link import LauncherLink
    from supervisord.launching import Launching
    from supervisord.layers import Layers
    from supervisord.leases import Leases
    from supervisord.ledgers import Ledgers
    from supervisord.policies import PolicyShelf
    from supervisord.registry import Registry

log = structlog.get_logger()

INPUT_BYTES_MAX: Final = 64 * 1024
WAIT_SECONDS_MAX: Final = 366 * 86400.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AgentService(agents_pb2_grpc.AgentServiceServicer):
    """Ten-line methods; the daemon's parts are passed in."""

    def __init__(
        self,
        *,
        agents: Agents,
        launching: Launching,
        killswitch: KillSwitch,
        acts: Acts,
        holds: Holds,
        policies: PolicyShelf,
        registry: Registry,
        launcher: LauncherLink,
        layers: Layers,
        ledgers: Ledgers,
        leases: Leases,
        output_dir: Path,
        entropy: Callable[[int], bytes],
        now_ns: Callable[[], int],
    ) -> None:
        self._agents = agents
        self._launching = launching
        self._killswitch = killswitch
        self._acts = acts
        self._holds = holds
        self._policies = policies
        self._registry = registry
        self._launcher = launcher
        self._layers = layers
        self._ledgers = ledgers
        self._leases = leases
        self._output_dir = output_dir
        self._entropy = entropy
        self._now_ns = now_ns
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- launch and look

    async def Launch(self, request: agents_pb2.LaunchRequest, _context: Context) -> agents_pb2.LaunchResponse:
        caller = current_caller()
        order = self._order(request)
        if request.dry_run:
            return agents_pb2.LaunchResponse(plan_text=self._launching.describe(order, caller=caller))
        agent_id = parse_agent_id(request.agent_id) if request.agent_id else ""
        key = parse_key(request.idempotency_key) if request.idempotency_key else ""
        # A caller that goes away leaves no half a launch: the launch ends one way or the other.
        launch = asyncio.get_running_loop().create_task(
            self._launching.launch(order, caller=caller, agent_id=agent_id, idempotency_key=key)
        )
        self._tasks.add(launch)
        launch.add_done_callback(self._tasks.discard)
        agent, existed = await asyncio.shield(launch)
        return agents_pb2.LaunchResponse(agent=self._shown(agent), existed=existed)

    def _order(self, request: agents_pb2.LaunchRequest) -> LaunchOrder:
        if not request.registered:
            return convert.launch_order(request.spec, self._definition(request))
        if request.definition_yaml:
            raise InvalidInput("cannot launch: a file and a definition of the registry are named", remedy="name one")
        definition = self._registry.find(request.registered)
        order = convert.launch_order(request.spec, definition.spec)
        return replace(order, registered=registered_as(definition, order, self._policies.get(order.policy)))

    def _shown(self, agent: Agent, usage: Mapping[str, int] | None = None) -> agents_pb2.Agent:
        uses = self._ledgers.uses(agent.agent_id) if agent.live else ()
        left = self._leases.left(agent)
        return convert.agent(agent, usage, changes=self._layers.kept(agent.agent_id), uses=uses, lease_left=left)

    def _definition(self, request: agents_pb2.LaunchRequest) -> AgentSpec | None:
        if not request.definition_yaml:
            return None
        source = convert.text("file name", request.definition_filename) or "agent.yaml"
        try:
            content = request.definition_yaml.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"cannot read {source}: it is not UTF-8", remedy="save it as UTF-8") from error
        directory = PurePosixPath(request.definition_directory) if request.definition_directory else None
        if directory is not None and not directory.is_absolute():
            raise InvalidInput("cannot launch: definition_directory is not absolute", remedy="write it in full")
        found = self._policies.check(content, source=source, directory=directory)
        if not isinstance(found, AgentSpec):
            raise InvalidInput(f"cannot launch {source}: its kind is Policy, not Agent", remedy="give an agent's file")
        return found

    async def GetAgent(self, request: agents_pb2.GetAgentRequest, _context: Context) -> agents_pb2.GetAgentResponse:
        agent = self._agents.find(request.agent)
        usage = await self._usage([agent])
        message = self._shown(agent, usage.get(agent.agent_id))
        if agent.live:
            message.counters.update(await self._counters(agent))
        if request.examine and agent.live:
            convert.effective(message, await self._examine(agent))
        return agents_pb2.GetAgentResponse(agent=message)

    async def ListAgents(
        self, request: agents_pb2.ListAgentsRequest, _context: Context
    ) -> agents_pb2.ListAgentsResponse:
        if request.HasField("selector"):
            chosen = self._agents.select(convert.selector(request.selector), live_only=not request.include_ended)
        else:
            chosen = self._agents.all() if request.include_ended else self._agents.live()
        shown, token = convert.page(
            chosen, size=request.page_size, token=request.page_token, key=lambda agent: agent.agent_id
        )
        usage = await self._usage(shown)
        return agents_pb2.ListAgentsResponse(
            agents=[self._shown(agent, usage.get(agent.agent_id)) for agent in shown], next_page_token=token
        )

    async def WatchAgents(
        self, request: agents_pb2.WatchAgentsRequest, _context: Context
    ) -> AsyncIterator[agents_pb2.WatchAgentsResponse]:
        wanted = convert.selector(request.selector) if request.HasField("selector") else None
        seen = convert.token_number(request.resume_token)
        while True:
            everyone = self._agents.all() if wanted is None else self._agents.select(wanted, live_only=False)
            version = self._agents.version
            # By the versions of this moment: one that changes while another is sent is sent again, in its turn.
            for number, agent in sorted(((agent.version, agent) for agent in everyone), key=lambda pair: pair[0]):
                if number > seen:
                    yield agents_pb2.WatchAgentsResponse(agent=self._shown(agent), resume_token=str(number))
            seen = version
            await self._agents.wait_changed(seen)

    async def Wait(self, request: agents_pb2.WaitRequest, _context: Context) -> agents_pb2.WaitResponse:
        agent = self._agents.find(request.agent)
        limit = convert.seconds(request.timeout) if request.HasField("timeout") else WAIT_SECONDS_MAX
        try:
            async with asyncio.timeout(limit):
                await agent.ended.wait()
        except TimeoutError:
            pass  # the answer shows that it lives
        return agents_pb2.WaitResponse(agent=self._shown(agent))

    # --- streams

    async def Logs(self, request: agents_pb2.LogsRequest, _context: Context) -> AsyncIterator[agents_pb2.LogsResponse]:
        agent = self._agents.find(request.agent)
        wanted = {name for name, value in convert.STREAMS.items() if not request.streams or value in request.streams}
        if not wanted:
            raise InvalidInput("cannot read logs: there is no such stream", remedy="ask for stdout or stderr")
        tails = self._tails(agent, _offsets(request), wanted)
        async for chunk in follow(tails, ended=agent.ended if request.follow else None):
            yield agents_pb2.LogsResponse(stream=convert.STREAMS[chunk.stream], data=chunk.data, offset=chunk.offset)

    async def Attach(
        self, requests: AsyncIterator[agents_pb2.AttachRequest], _context: Context
    ) -> AsyncIterator[agents_pb2.AttachResponse]:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("input") != "start":
            raise InvalidInput("cannot attach: the first message is not `start`", remedy="send `start` first")
        agent = self._agents.find(first.start.agent)
        offsets = _offsets(first.start)
        feeding = asyncio.get_running_loop().create_task(self._feed(agent.agent_id, requests))
        try:
            yield agents_pb2.AttachResponse(started=agents_pb2.AttachStarted(agent_id=agent.agent_id))
            tails = self._tails(agent, offsets, {"stdout", "stderr"})
            async for chunk in follow(tails, ended=agent.ended):
                yield agents_pb2.AttachResponse(chunk=_chunk(chunk))
            yield agents_pb2.AttachResponse(exit=convert.exit_status(agent.exit))
        finally:
            feeding.cancel()

    async def Exec(
        self, requests: AsyncIterator[agents_pb2.ExecRequest], _context: Context
    ) -> AsyncIterator[agents_pb2.ExecResponse]:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("input") != "start":
            raise InvalidInput("cannot enter: the first message is not `start`", remedy="send `start` first")
        start = first.start
        agent = self._agents.find_live(start.agent)
        tty = convert.terminal(start.tty) if start.HasField("tty") else None
        stream = await self._acts.exec(
            agent,
            LaunchOrder(command=tuple(part.decode("utf-8", "surrogateescape") for part in start.command)),
            actor=current_caller().actor,
            env=dict(start.env),
            cwd=start.cwd or "/workspace",
            tty=tty,
            stdin=start.stdin,
        )
        feeding = asyncio.get_running_loop().create_task(self._feed(stream.stream_id, requests))
        try:
            yield agents_pb2.ExecResponse(
                started=agents_pb2.ExecStarted(agent_id=agent.agent_id, stream_id=stream.stream_id)
            )
            directory = self._output_dir / agent.agent_id
            tails = [
                Tail(directory / f"exec-{stream.stream_id}.out", stream="stdout"),
                Tail(directory / f"exec-{stream.stream_id}.err", stream="stderr"),
            ]
            async for chunk in follow(tails, ended=stream.ended):
                yield agents_pb2.ExecResponse(chunk=_chunk(chunk))
            yield agents_pb2.ExecResponse(exit=convert.exit_status(stream.exit))
        finally:
            feeding.cancel()

    def _tails(self, agent: Agent, offsets: dict[str, int], wanted: set[str]) -> list[Tail]:
        directory = self._output_dir / agent.agent_id
        return [Tail(directory / f"{name}.log", stream=name, offset=offsets[name]) for name in sorted(wanted)]

    async def _feed(
        self, stream_id: str, requests: AsyncIterator[agents_pb2.AttachRequest] | AsyncIterator[agents_pb2.ExecRequest]
    ) -> None:
        """Pass a client's input on; the launcher's answer to each piece is what slows a fast client down."""
        try:
            async for message in requests:
                match message.WhichOneof("input"):
                    case "stdin":
                        if len(message.stdin) > INPUT_BYTES_MAX:
                            log.warning("input dropped: a piece is too long", stream=stream_id)
                            return
                        await self._launcher.stdin(stream_id, message.stdin, eof=False)
                    case "stdin_eof":
                        await self._launcher.stdin(stream_id, b"", eof=True)
                    case "resize":
                        size = convert.terminal(message.resize)
                        await self._launcher.call("resize", stream_id=stream_id, rows=size.rows, cols=size.cols)
                    case "signal":
                        await self._launcher.call("signal", stream_id=stream_id, signal=message.signal)
                    case _:
                        return
        except StockadeError as error:
            log.info("input ended", stream=stream_id, cause=error.message)

    # --- intervene

    async def Kill(self, request: agents_pb2.KillRequest, _context: Context) -> agents_pb2.KillResponse:
        chosen = self._agents.select(convert.selector(request.selector), live_only=True)
        reason = convert.words(request.reason)
        receipts = await self._killswitch.kill(chosen, actor=current_caller().actor, reason=reason)
        return agents_pb2.KillResponse(receipts=[convert.receipt(receipt) for receipt in receipts])

    async def Freeze(self, request: agents_pb2.FreezeRequest, _context: Context) -> agents_pb2.FreezeResponse:
        chosen = self._agents.select(convert.selector(request.selector), live_only=True)
        reason = convert.words(request.reason)
        await self._acts.freeze(chosen, actor=current_caller().actor, reason=reason)
        return agents_pb2.FreezeResponse(agents=[self._shown(agent) for agent in chosen])

    async def Thaw(self, request: agents_pb2.ThawRequest, _context: Context) -> agents_pb2.ThawResponse:
        chosen = self._agents.select(convert.selector(request.selector), live_only=True)
        reason = convert.text("reason", request.reason)
        await self._acts.thaw(chosen, actor=current_caller().actor, reason=reason)
        return agents_pb2.ThawResponse(agents=[self._shown(agent) for agent in chosen])

    async def Renew(self, request: agents_pb2.RenewRequest, _context: Context) -> agents_pb2.RenewResponse:
        agent, caller = self._agents.find(request.agent), current_caller()
        if caller.actor != agent.what.launched_by and caller.role < Role.ADMIN:
            raise PermissionDenied(
                f"cannot renew the lease of {agent.name}: {agent.what.launched_by} holds it",
                remedy="have its holder renew it, or an admin",
            )
        await self._leases.renew(agent, actor=caller.actor)
        return agents_pb2.RenewResponse(agent=self._shown(agent))

    async def KillExec(self, request: agents_pb2.KillExecRequest, _context: Context) -> agents_pb2.KillExecResponse:
        agent = self._agents.find_live(request.agent)
        reason = convert.words(request.reason)
        stream_id = convert.text("stream_id", request.stream_id)
        killed = await self._acts.kill_exec(agent, stream_id, actor=current_caller().actor, reason=reason)
        return agents_pb2.KillExecResponse(
            processes_killed=killed.processes, verified_empty=killed.verified_empty, left_pids=killed.left_pids
        )

    async def Hold(self, request: agents_pb2.HoldRequest, _context: Context) -> agents_pb2.HoldResponse:
        kind = request.target.WhichOneof("target")
        if kind is None:
            raise InvalidInput("cannot hold: the target is empty", remedy="name a name, a label, a policy or a digest")
        subject = str(getattr(request.target, kind))
        match kind:
            case "name" if subject.startswith("ag_"):
                subject = self._agents.find(subject).name  # NAME is either; a hold outlives the agent
            case "name":
                parse_name(subject)
            case "label":
                key, equals, value = subject.partition("=")
                if not equals:  # no agent has it, so it would hold nobody
                    raise InvalidInput(f"cannot hold label {shown(subject)}: it is not KEY=VALUE", remedy="name both")
                label(key, value)
            case "rootfs_digest":
                parse_digest(subject)
            case _:
                parse_policy(subject)
        hold = Hold(
            hold_id=new_hold_id(self._entropy),
            kind=kind,
            subject=subject,
            reason=convert.text("reason", request.reason),
            held_by=current_caller().actor,
            held_at_ns=self._now_ns(),
            ticket=convert.text("ticket", request.ticket),
        )
        return agents_pb2.HoldResponse(hold=convert.hold(await self._acts.hold(hold)))

    async def Release(self, request: agents_pb2.ReleaseRequest, _context: Context) -> agents_pb2.ReleaseResponse:
        reason = convert.text("reason", request.reason)
        hold = await self._acts.release(request.hold_id, actor=current_caller().actor, reason=reason)
        return agents_pb2.ReleaseResponse(hold=convert.hold(hold))

    async def ListHolds(self, request: agents_pb2.ListHoldsRequest, _context: Context) -> agents_pb2.ListHoldsResponse:
        shown, token = convert.page(
            self._holds.all(), size=request.page_size, token=request.page_token, key=lambda hold: hold.hold_id
        )
        return agents_pb2.ListHoldsResponse(holds=[convert.hold(hold) for hold in shown], next_page_token=token)

    async def ListBudgets(
        self, request: agents_pb2.ListBudgetsRequest, _context: Context
    ) -> agents_pb2.ListBudgetsResponse:
        shown, token = convert.page(
            self._ledgers.shared(), size=request.page_size, token=request.page_token, key=lambda use: use.key
        )
        return agents_pb2.ListBudgetsResponse(budgets=map(convert.budget_use, shown), next_page_token=token)

    async def _counters(self, agent: Agent) -> dict[str, int]:
        """How often a live agent met its limits; empty where the launcher has no answer, or the kernel no figure."""
        try:
            reply = await self._launcher.call("counters", agent_id=agent.agent_id)
        except StockadeError as error:
            log.info("no counters", cause=error.message)
            return {}
        counters = reply.body.get("counters")
        found = counters.items() if isinstance(counters, dict) else ()
        return {name: number for name, number in found if isinstance(number, int) and number >= 0}

    async def _usage(self, agents: Sequence[Agent]) -> dict[str, dict[str, int]]:
        """What live agents use now; an empty answer where the launcher has none."""
        ids = [agent.agent_id for agent in agents if agent.live]
        if not ids:
            return {}
        try:
            reply = await self._launcher.call("stats", agent_ids=ids)
        except StockadeError as error:
            log.info("no usage figures", cause=error.message)
            return {}
        stats = reply.body.get("stats")
        return stats if isinstance(stats, dict) else {}

    async def _examine(self, agent: Agent) -> dict[str, object]:
        """What the kernel says of a live agent; where it cannot be read, the cause: silence would pass for good."""
        try:
            reply = await self._launcher.call("examine", agent_id=agent.agent_id)
        except StockadeError as error:
            return {"unreadable": error.message}
        found = reply.body.get("effective")
        return found if isinstance(found, dict) else {"unreadable": "the launcher gave no answer"}


def _offsets(request: agents_pb2.LogsRequest | agents_pb2.AttachStart) -> dict[str, int]:
    return {
        "stdout": convert.number("stdout_offset", request.stdout_offset),
        "stderr": convert.number("stderr_offset", request.stderr_offset),
    }


def _chunk(chunk: Chunk) -> agents_pb2.OutputChunk:
    return agents_pb2.OutputChunk(stream=convert.STREAMS[chunk.stream], data=chunk.data, offset=chunk.offset)
