"""The asyncio client: the same words as the blocking one, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Self

import grpc

from stockade.client import convert, methods, words
from stockade.client.errors import Failed, StockadeError, from_rpc
from stockade.client.session import INPUT_BYTES_MAX
from stockade.client.sync import (
    CALL_SECONDS_MAX,
    CHANNEL_OPTIONS,
    EXEC_OUTPUT_BYTES_MAX,
    default_target,
    launch_seconds,
)
from stockade.client.values import Completed, ExitStatus, Selector
from stockade.v1 import actions_pb2, agents_pb2, changes_pb2, grants_pb2, registry_pb2, requests_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from datetime import datetime, timedelta
    from types import TracebackType
    from typing import Unpack

    from stockade.client.convert import LaunchOptions
    from stockade.client.methods import Method, Req, Res
    from stockade.client.values import (
        Action,
        AgentInfo,
        BudgetUse,
        Changes,
        Consistency,
        Definition,
        Grant,
        Hold,
        KilledExec,
        Output,
        Receipt,
        Request,
        ReviewFinding,
        RunningAgent,
        State,
        Terms,
        Verification,
    )


class AsyncStockade:
    """A connection to the daemon, to be used from one event loop. Raises what the blocking client raises."""

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout_seconds: float = CALL_SECONDS_MAX,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.target = words.target(target) if target else default_target()
        self._timeout = timeout_seconds
        self._channel: Any = (
            grpc.aio.insecure_channel(self.target, CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(self.target, credentials, CHANNEL_OPTIONS)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def call(self, method: Method[Req, Res], request: Req, *, timeout_seconds: float | None = None) -> Res:
        """The answer to one RPC; with 0 seconds it may take for ever."""
        limit = self._timeout if timeout_seconds is None else timeout_seconds
        act = self._channel.unary_unary(method.path, method.encode, method.decode)
        try:
            answer: Res = await act(request, timeout=limit or None)
        except grpc.RpcError as error:
            # It may have to try the socket once more, which blocks.
            raise await asyncio.to_thread(from_rpc, error, self.target) from error
        return answer

    async def stream(self, method: Method[Req, Res], request: Req) -> AsyncIterator[Res]:
        """The answers to one RPC as they come; closing the generator ends it."""
        answers = self._channel.unary_stream(method.path, method.encode, method.decode)(request)
        try:
            async for answer in answers:
                yield answer
        except grpc.RpcError as error:
            raise await asyncio.to_thread(from_rpc, error, self.target) from error
        finally:
            answers.cancel()

    async def launch(self, command: Sequence[str | bytes] = (), **options: Unpack[LaunchOptions]) -> AsyncAgent:
        """An agent that runs: when this returns, its execve has happened."""
        request = convert.launch_request(command, **options)
        answer = await self.call(methods.LAUNCH, request, timeout_seconds=launch_seconds(self._timeout))
        return AsyncAgent(self, convert.agent(answer.agent))

    async def plan(self, command: Sequence[str | bytes] = (), **options: Unpack[LaunchOptions]) -> str:
        """What a launch would do, a line a step; nothing is started or recorded."""
        request = convert.launch_request(command, **options)
        request.dry_run = True
        return (await self.call(methods.LAUNCH, request)).plan_text

    async def agent(self, name: str, *, examine: bool = False) -> AsyncAgent:
        """The agent of this name or id; of several with one name the live one, else the last.

        With `examine`, `info.effective` is what the kernel says is in force now, and its `drift` from the plan.
        """
        answer = await self.call(methods.GET_AGENT, agents_pb2.GetAgentRequest(agent=name, examine=examine))
        return AsyncAgent(self, convert.agent(answer.agent))

    async def agents(self, selector: Selector | None = None, *, include_ended: bool = False) -> list[AsyncAgent]:
        """The agents that match; all live ones where no selector is given."""
        request = agents_pb2.ListAgentsRequest(include_ended=include_ended)
        if selector is not None:
            request.selector.CopyFrom(convert.selector(selector))
        found = []
        while True:
            answer = await self.call(methods.LIST_AGENTS, request)
            found += [AsyncAgent(self, convert.agent(message)) for message in answer.agents]
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    async def kill_all(self, selector: Selector, reason: str = "") -> list[Receipt]:
        """A receipt for each agent that matches."""
        request = agents_pb2.KillRequest(selector=convert.selector(selector), reason=reason)
        return [convert.receipt(message) for message in (await self.call(methods.KILL, request)).receipts]

    async def freeze_all(self, selector: Selector, reason: str = "") -> list[AgentInfo]:
        request = agents_pb2.FreezeRequest(selector=convert.selector(selector), reason=reason)
        return [convert.agent(message) for message in (await self.call(methods.FREEZE, request)).agents]

    async def thaw_all(self, selector: Selector, reason: str = "") -> list[AgentInfo]:
        request = agents_pb2.ThawRequest(selector=convert.selector(selector), reason=reason)
        return [convert.agent(message) for message in (await self.call(methods.THAW, request)).agents]

    async def hold(
        self,
        *,
        name: str = "",
        label: str = "",
        policy: str = "",
        rootfs_digest: str = "",
        reason: str = "",
        ticket: str = "",
    ) -> Hold:
        """The order that nothing of this name, label (`key=value`) or policy may run; give exactly one."""
        target = agents_pb2.HoldTarget(
            name=name or None, label=label or None, policy=policy or None, rootfs_digest=rootfs_digest or None
        )
        request = agents_pb2.HoldRequest(target=target, reason=reason, ticket=ticket)
        return convert.hold((await self.call(methods.HOLD, request)).hold)

    async def release(self, hold_id: str, reason: str = "") -> Hold:
        request = agents_pb2.ReleaseRequest(hold_id=hold_id, reason=reason)
        return convert.hold((await self.call(methods.RELEASE, request)).hold)

    async def budgets(self) -> list[BudgetUse]:
        """What labels share, and what is used of it; an agent's own is in its `budget`."""
        request = agents_pb2.ListBudgetsRequest()
        found: list[BudgetUse] = []
        while True:
            answer = await self.call(methods.LIST_BUDGETS, request)
            found += map(convert.budget_use, answer.budgets)
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    async def holds(self) -> list[Hold]:
        request = agents_pb2.ListHoldsRequest()
        found: list[Hold] = []
        while True:
            answer = await self.call(methods.LIST_HOLDS, request)
            found += map(convert.hold, answer.holds)
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    async def grant(self, agent: str, scope: str, *, grant_id: str = "", **terms: Unpack[Terms]) -> Grant:
        """A grant that is in force. `ttl` in seconds; left out: as long as the agent lives."""
        request = convert.grant_request(agent, scope, grant_id=grant_id, **terms)
        return convert.grant((await self.call(methods.GRANT, request)).grant)

    async def revoke(self, grant_id: str, reason: str = "") -> Grant:
        """The grant as it ended; nothing passes on it any more, and connections that stood on it are reset.

        Its `warning` says what is in force but not certain yet, as an end that a full disk has not taken.
        """
        request = grants_pb2.RevokeRequest(grant_id=grant_id, reason=reason)
        return convert.revoked(await self.call(methods.REVOKE, request))

    async def grants(self, agent: str = "", *, include_ended: bool = False) -> list[Grant]:
        request = grants_pb2.ListGrantsRequest(agent=agent, include_ended=include_ended)
        found: list[Grant] = []
        while True:
            answer = await self.call(methods.LIST_GRANTS, request)
            found += map(convert.grant, answer.grants)
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    async def requests(self, agent: str = "", *, include_decided: bool = False) -> list[Request]:
        """What agents asked for and nobody has answered yet."""
        request = requests_pb2.ListRequestsRequest(agent=agent, include_decided=include_decided)
        found: list[Request] = []
        while True:
            answer = await self.call(methods.LIST_REQUESTS, request)
            found += map(convert.request, answer.requests)
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    async def approve(
        self, request_id: str, *, scope: str = "", digest: str = "", **terms: Unpack[Terms]
    ) -> Grant | Request:
        """The grant that answers the request, or the request where more people have to approve it.

        `scope` may be narrower than asked. Give the `digest` of the request as you saw it: another one is then refused.
        """
        request = convert.approve_request(request_id, scope=scope, digest=digest, **terms)
        return convert.approved(await self.call(methods.APPROVE, request))

    async def deny(self, request_id: str, reason: str = "") -> Request:
        request = requests_pb2.DenyRequest(request_id=request_id, reason=reason)
        return convert.request((await self.call(methods.DENY, request)).request)

    async def watch_requests(self, resume_token: str = "") -> AsyncIterator[tuple[Request, str]]:
        """Each request that is pending, then each that comes or changes, with the token to go on after it; no end."""
        wanted = requests_pb2.WatchRequestsRequest(resume_token=resume_token)
        async for news in self.stream(methods.WATCH_REQUESTS, wanted):
            yield convert.request(news.request), news.resume_token

    async def actions(
        self,
        agent: str = "",
        *,
        verb: str = "",
        verdict: str = "",
        since: datetime | None = None,
        until: datetime | None = None,
        after_seq: int = 0,
        follow: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Action]:
        """The log's entries in order; with `follow`, then each new one as it is written, without end.

        `labels` are those that an entry's agent was launched with.
        """
        request = convert.query_request(
            agent=agent,
            verb=verb,
            verdict=verdict,
            since=since,
            until=until,
            after_seq=after_seq,
            page_token="",
            labels=labels,
        )
        seen = after_seq
        while True:
            answer = await self.call(methods.QUERY_ACTIONS, request)
            for message in answer.actions:
                seen = message.seq
                yield convert.action(message)
            request.page_token = answer.next_page_token
            if not request.page_token:
                break
        if follow:
            tail = actions_pb2.TailActionsRequest(
                after_seq=seen, agent=agent, verb=verb, verdict=verdict, labels=labels
            )
            async for entry in self.stream(methods.TAIL_ACTIONS, tail):
                yield convert.action(entry.action)

    async def prove_consistency(self, old_size: int, size: int = 0) -> Consistency:
        """That the log of `size` entries (0: all) continues that of `old_size`."""
        request = actions_pb2.ProveConsistencyRequest(old_size=old_size, size=size)
        return convert.consistency(await self.call(methods.PROVE_CONSISTENCY, request))

    async def register(self, definition: bytes, path: str = "") -> Definition:
        """The definition of a file of kind Agent, now in the registry; raises Conflict where the version is another."""
        answer = await self.call(methods.REGISTER_DEFINITION, convert.register_request(definition, path))
        return convert.definition(answer.definition)

    async def definition(self, reference: str) -> tuple[Definition, bytes]:
        """What the registry has of `NAME` or `NAME@VERSION`, and its text as it was registered."""
        answer = await self.call(methods.GET_DEFINITION, registry_pb2.GetDefinitionRequest(reference=reference))
        return convert.definition(answer.definition), answer.content

    async def definitions(self, name: str = "") -> list[Definition]:
        request = registry_pb2.ListDefinitionsRequest(name=name)
        found: list[Definition] = []
        while True:
            answer = await self.call(methods.LIST_DEFINITIONS, request)
            found += map(convert.definition, answer.definitions)
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    async def deprecate(self, reference: str, reason: str) -> Definition:
        """Says why `NAME@VERSION` should not be launched any more; agents that run go on."""
        request = registry_pb2.DeprecateDefinitionRequest(reference=reference, reason=reason)
        return convert.definition((await self.call(methods.DEPRECATE_DEFINITION, request)).definition)

    async def review(self, unused: float | timedelta | None = None) -> list[ReviewFinding]:
        """What somebody should look at; `unused` is how long (seconds) a grant may go unused, 30 days if not said."""
        answer = await self.call(methods.REVIEW, convert.review_request(unused), timeout_seconds=0)
        return [convert.review_finding(message) for message in answer.findings]

    async def running(self) -> list[RunningAgent]:
        """Every live agent, and what it can do now."""
        request = registry_pb2.ListRunningRequest()
        found: list[RunningAgent] = []
        while True:
            answer = await self.call(methods.LIST_RUNNING, request)
            found += map(convert.running, answer.agents)
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    async def diff(self, agent: str, paths: Sequence[str | bytes] = (), *, patch: bool = False) -> Changes:
        """What the agent changed in its overlay workspace so far; with `patch`, text files line by line."""
        request = convert.diff_request(agent, paths, patch=patch)
        return convert.changes([message async for message in self.stream(methods.DIFF, request)])

    async def apply(
        self,
        agent: str,
        paths: Sequence[str | bytes] = (),
        *,
        force: bool = False,
        digest: str = "",
        reason: str = "",
    ) -> Changes:
        """What became of each change; give the `digest` of the diff you saw, and nothing else is applied."""
        request = convert.apply_request(agent, paths, force=force, digest=digest, reason=reason)
        return convert.changes([message async for message in self.stream(methods.APPLY, request)])

    async def discard(self, agent: str, reason: str = "") -> None:
        """Throws away what the agent changed."""
        await self.call(methods.DISCARD, changes_pb2.DiscardRequest(agent=agent, reason=reason))

    async def verify_log(self) -> Verification:
        """What a check of the whole log found."""
        answer = await self.call(methods.VERIFY_LOG, actions_pb2.VerifyLogRequest(), timeout_seconds=0)
        return convert.verification(answer)

    async def checkpoint(self) -> str:
        """The log's signed state, a C2SP tlog-checkpoint: keep it elsewhere, and a rollback is found out."""
        return (await self.call(methods.CHECKPOINT, actions_pb2.CheckpointRequest())).note

    async def execute(self, start: agents_pb2.ExecStart, stdin: bytes, output_bytes_max: int) -> Completed:
        """AsyncAgent.exec(), which see."""

        async def inputs() -> AsyncIterator[agents_pb2.ExecRequest]:
            yield agents_pb2.ExecRequest(start=start)
            if start.stdin:
                for at in range(0, len(stdin), INPUT_BYTES_MAX):
                    yield agents_pb2.ExecRequest(stdin=stdin[at : at + INPUT_BYTES_MAX])
                yield agents_pb2.ExecRequest(stdin_eof=True)

        parts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        status, size = ExitStatus(None, None), 0
        method = methods.EXEC
        answers = self._channel.stream_stream(method.path, method.encode, method.decode)(inputs())
        try:
            async for answer in answers:
                if answer.HasField("exit"):
                    status = convert.exit_status(answer.exit)
                elif answer.HasField("chunk"):
                    output = convert.output(answer.chunk)
                    parts[output.stream].append(output.data)
                    size += len(output.data)
                if size > output_bytes_max:
                    raise Failed(
                        f"cannot exec in {start.agent}: the program wrote more than {output_bytes_max} bytes",
                        remedy="have it write to a file in the workspace",
                    )
        except grpc.RpcError as error:
            raise await asyncio.to_thread(from_rpc, error, self.target) from error
        finally:
            answers.cancel()
        return Completed(status, b"".join(parts["stdout"]), b"".join(parts["stderr"]))


class AsyncAgent:
    """One agent. What it knows of it is from the last answer; refresh() asks again."""

    def __init__(self, stockade: AsyncStockade, info: AgentInfo) -> None:
        self._stockade = stockade
        self.info = info

    def __repr__(self) -> str:
        return f"<AsyncAgent {self.name!r} {self.agent_id} {self.state}>"

    @property
    def agent_id(self) -> str:
        return self.info.agent_id

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def state(self) -> State:
        return self.info.state

    @property
    def exit_code(self) -> int | None:
        return self.info.exit_code

    @property
    def posture(self) -> Mapping[str, object]:
        return self.info.posture

    async def refresh(self) -> Self:
        self.info = (await self._stockade.agent(self.agent_id)).info
        return self

    async def wait(self) -> Self:
        """The agent itself, when it has ended; bound it with asyncio.timeout()."""
        request = agents_pb2.WaitRequest(agent=self.agent_id)
        answer = await self._stockade.call(methods.WAIT, request, timeout_seconds=0)
        self.info = convert.agent(answer.agent)
        return self

    async def logs(
        self, *, follow: bool = False, stdout_offset: int = 0, stderr_offset: int = 0
    ) -> AsyncIterator[Output]:
        """What it wrote, as bytes; with `follow`, until it ends."""
        request = agents_pb2.LogsRequest(
            agent=self.agent_id, follow=follow, stdout_offset=stdout_offset, stderr_offset=stderr_offset
        )
        async for chunk in self._stockade.stream(methods.LOGS, request):
            yield convert.output(chunk)

    async def kill(self, reason: str = "") -> Receipt:
        """The receipt of its death; the same one again where it is dead already."""
        receipts = await self._stockade.kill_all(Selector(agents=(self.agent_id,)), reason)
        with contextlib.suppress(StockadeError):  # a daemon that can only kill has no more to say
            await self.refresh()
        return receipts[0]

    async def freeze(self, reason: str = "") -> Self:
        self.info = (await self._stockade.freeze_all(Selector(agents=(self.agent_id,)), reason))[0]
        return self

    async def thaw(self, reason: str = "") -> Self:
        self.info = (await self._stockade.thaw_all(Selector(agents=(self.agent_id,)), reason))[0]
        return self

    async def renew(self) -> Self:
        """Begin its lease anew."""
        answer = await self._stockade.call(methods.RENEW, agents_pb2.RenewRequest(agent=self.agent_id))
        self.info = convert.agent(answer.agent)
        return self

    @contextlib.asynccontextmanager
    async def renewing(self, every_seconds: float) -> AsyncIterator[Self]:
        """Renew its lease from a task, as long as the block runs and this event loop does.

        A renewal that fails is tried again at the next time: whoever must know asks for `state`.
        """

        async def renew() -> None:
            while True:
                await asyncio.sleep(every_seconds)
                with contextlib.suppress(StockadeError):
                    await self.renew()

        await self.renew()
        task = asyncio.get_running_loop().create_task(renew())
        try:
            yield self
        finally:
            task.cancel()

    async def kill_exec(self, stream_id: str, reason: str = "") -> KilledExec:
        """End what one exec started, with all its descendants."""
        request = agents_pb2.KillExecRequest(agent=self.agent_id, stream_id=stream_id, reason=reason)
        return convert.killed_exec(await self._stockade.call(methods.KILL_EXEC, request))

    async def diff(self, paths: Sequence[str | bytes] = (), *, patch: bool = False) -> Changes:
        return await self._stockade.diff(self.agent_id, paths, patch=patch)

    async def apply(
        self, paths: Sequence[str | bytes] = (), *, force: bool = False, digest: str = "", reason: str = ""
    ) -> Changes:
        return await self._stockade.apply(self.agent_id, paths, force=force, digest=digest, reason=reason)

    async def discard(self, reason: str = "") -> None:
        await self._stockade.discard(self.agent_id, reason)

    async def grant(self, scope: str, **terms: Unpack[Terms]) -> Grant:
        return await self._stockade.grant(self.agent_id, scope, **terms)

    async def exec(
        self,
        command: Sequence[str | bytes],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        output_bytes_max: int = EXEC_OUTPUT_BYTES_MAX,
    ) -> Completed:
        """What a further program in its sandbox wrote and how it ended; raises Failed where it writes too much."""
        start = agents_pb2.ExecStart(
            agent=self.agent_id, command=convert.arguments(command), env=env, cwd=cwd, stdin=bool(stdin)
        )
        return await self._stockade.execute(start, stdin, output_bytes_max)
