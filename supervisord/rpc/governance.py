"""GrantService, RequestService, ActionService and PolicyService: decode, call, encode."""

from __future__ import annotations

import base64
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from stockade.v1 import (
    actions_pb2,
    actions_pb2_grpc,
    grants_pb2,
    grants_pb2_grpc,
    policies_pb2,
    policies_pb2_grpc,
    requests_pb2,
    requests_pb2_grpc,
)

from supervisord.actions.checkpoint import size_of
from supervisord.actions.labelled import Labelled, launched_with
from supervisord.actions.query import verb_fits
from supervisord.callers import current_caller
from supervisord.documents import InvalidDocument
from supervisord.errors import InvalidInput, NotFound, StockadeError
from supervisord.explain import explain
from supervisord.hostfiles import file_uid
from supervisord.ids import GrantId, shown
from supervisord.ids import grant_id as parse_grant_id
from supervisord.policy import Policy, RootfsName, policy_yaml
from supervisord.question import RequestState
from supervisord.rpc import convert
from supervisord.scopes import read_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from supervisord import scopes
    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import Entry
    from supervisord.acts import Acts
    from supervisord.agents import Agents
    from supervisord.config import Config
    from supervisord.images import Images
    from supervisord.policies import PolicyShelf
    from supervisord.requests import Requests
    from supervisord.scopes import GrantBook
    from supervisord.sinks.feed import Sinks

ACTIONS_PAGE_MAX: Final = 1000

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class GrantService(grants_pb2_grpc.GrantServiceServicer):
    def __init__(self, *, agents: Agents, book: GrantBook, acts: Acts) -> None:
        self._agents = agents
        self._book = book
        self._acts = acts

    async def Grant(self, request: grants_pb2.GrantRequest, _context: Context) -> grants_pb2.GrantResponse:
        grant = await self._acts.grant(
            self._agents.find_live(request.agent),
            read_scope(request.scope),
            actor=current_caller().actor,
            file_uid=file_uid(current_caller()),
            reason=convert.text("reason", request.reason),
            ticket=convert.text("ticket", request.ticket),
            terms=convert.terms(request),
            grant_id=parse_grant_id(request.grant_id) if request.grant_id else "",
        )
        return grants_pb2.GrantResponse(grant=self._encode(grant))

    async def Revoke(self, request: grants_pb2.RevokeRequest, _context: Context) -> grants_pb2.RevokeResponse:
        grant, cut, warning = await self._acts.revoke(
            _known_form(request.grant_id),
            actor=current_caller().actor,
            reason=convert.text("reason", request.reason),
        )
        return grants_pb2.RevokeResponse(grant=self._encode(grant), relays_cut=cut, warning=warning)

    async def ListGrants(
        self, request: grants_pb2.ListGrantsRequest, _context: Context
    ) -> grants_pb2.ListGrantsResponse:
        grants = self._book.all(include_ended=request.include_ended)
        if request.agent:
            agent = self._agents.find(request.agent)
            grants = tuple(grant for grant in grants if grant.agent_id == agent.agent_id)
        shown, token = convert.page(
            grants, size=request.page_size, token=request.page_token, key=lambda grant: grant.grant_id
        )
        return grants_pb2.ListGrantsResponse(grants=[self._encode(grant) for grant in shown], next_page_token=token)

    def _encode(self, grant: scopes.Grant) -> grants_pb2.ScopeGrant:
        agent = self._agents.get(grant.agent_id)
        return convert.grant(grant, agent.name if agent else "")


class RequestService(requests_pb2_grpc.RequestServiceServicer):
    def __init__(self, *, agents: Agents, requests: Requests, acts: Acts) -> None:
        self._agents = agents
        self._requests = requests
        self._acts = acts

    async def ListRequests(
        self, request: requests_pb2.ListRequestsRequest, _context: Context
    ) -> requests_pb2.ListRequestsResponse:
        found = [r for r in self._requests.all() if request.include_decided or r.state.value == "pending"]
        if request.agent:
            agent = self._agents.find(request.agent)
            found = [r for r in found if r.agent_id == agent.agent_id]
        shown, token = convert.page(
            found, size=request.page_size, token=request.page_token, key=lambda each: each.request_id
        )
        return requests_pb2.ListRequestsResponse(
            requests=[convert.request(each) for each in shown], next_page_token=token
        )

    async def Approve(self, request: requests_pb2.ApproveRequest, _context: Context) -> requests_pb2.ApproveResponse:
        caller = current_caller()
        approved, grant = await self._acts.approve(
            request.request_id, convert.offer(request, caller.actor), file_uid=file_uid(caller)
        )
        return requests_pb2.ApproveResponse(
            request=convert.request(approved),
            grant=None if grant is None else convert.grant(grant, approved.agent_name),
        )

    async def Deny(self, request: requests_pb2.DenyRequest, _context: Context) -> requests_pb2.DenyResponse:
        reason = convert.text("reason", request.reason)
        denied = await self._requests.deny(request.request_id, actor=current_caller().actor, reason=reason)
        return requests_pb2.DenyResponse(request=convert.request(denied))

    async def WatchRequests(
        self, request: requests_pb2.WatchRequestsRequest, _context: Context
    ) -> AsyncIterator[requests_pb2.WatchRequestsResponse]:
        epoch, version = convert.resume_point(request.resume_token)
        # A token of an earlier daemon counts another daemon's changes: begin with what is pending.
        resumes = epoch == self._requests.epoch
        version = version if resumes else 0
        while True:
            upto = self._requests.version
            for number, each in [(each.version, each) for each in self._requests.changed_since(version)]:
                if resumes or each.state is RequestState.PENDING:
                    yield requests_pb2.WatchRequestsResponse(
                        request=convert.request(each), resume_token=f"{self._requests.epoch}.{number}"
                    )
            version, resumes = upto, True
            await self._requests.wait_changed(version)


class ActionService(actions_pb2_grpc.ActionServiceServicer):
    def __init__(self, *, agents: Agents, actions: ActionLog, sinks: Sinks) -> None:
        self._agents = agents
        self._actions = actions
        self._sinks = sinks
        self._labelled = Labelled(actions)

    async def QueryActions(
        self, request: actions_pb2.QueryActionsRequest, _context: Context
    ) -> actions_pb2.QueryActionsResponse:
        size = convert.page_size(request.page_size, ACTIONS_PAGE_MAX)
        found = await self._actions.query(
            agent_id=self._agent_id(request.agent),
            verb=request.verb or None,
            verdict=request.verdict or None,
            since_ns=convert.nanoseconds("since", request.since) if request.HasField("since") else None,
            until_ns=convert.nanoseconds("until", request.until) if request.HasField("until") else None,
            after_seq=max(convert.number("after_seq", request.after_seq), convert.token_number(request.page_token)),
            limit=size + 1,
            agent_ids=frozenset(await self._labelled.agents(request.labels)) if request.labels else None,
        )
        token = str(found[size - 1].seq) if len(found) > size else ""
        return actions_pb2.QueryActionsResponse(
            actions=[convert.action(entry) for entry in found[:size]], next_page_token=token
        )

    async def TailActions(
        self, request: actions_pb2.TailActionsRequest, _context: Context
    ) -> AsyncIterator[actions_pb2.TailActionsResponse]:
        agent_id = self._agent_id(request.agent)
        after = convert.number("after_seq", request.after_seq)
        if not request.HasField("after_seq"):
            after = self._actions.size
        labels = frozenset(request.labels.items())
        labelled = await self._labelled.agents(request.labels) if labels else set()
        async for entry in self._actions.subscribe(after):
            if labels and launched_with(entry.action, labels):
                labelled.add(entry.action.agent_id)
            if labels and entry.action.agent_id not in labelled:
                continue
            if _wanted(entry, agent_id, request.verb, request.verdict):
                yield actions_pb2.TailActionsResponse(action=convert.action(entry))

    async def VerifyLog(
        self, _request: actions_pb2.VerifyLogRequest, _context: Context
    ) -> actions_pb2.VerifyLogResponse:
        report = await self._actions.verify()
        return convert.report(report, base64.b64decode(report.root))

    async def Checkpoint(
        self, _request: actions_pb2.CheckpointRequest, _context: Context
    ) -> actions_pb2.CheckpointResponse:
        return actions_pb2.CheckpointResponse(note=await self._actions.checkpoint())

    async def Prove(self, request: actions_pb2.ProveRequest, _context: Context) -> actions_pb2.ProveResponse:
        if not 1 <= request.seq <= self._actions.size:
            raise NotFound(f"cannot prove entry {request.seq}: there is none", remedy="see `stockadectl actions`")
        proof = await self._actions.proof(request.seq)
        return actions_pb2.ProveResponse(
            entry=proof.entry, leaf_index=request.seq - 1, audit_path=list(proof.path), checkpoint=proof.checkpoint
        )

    async def ProveConsistency(
        self, request: actions_pb2.ProveConsistencyRequest, _context: Context
    ) -> actions_pb2.ProveConsistencyResponse:
        note = "" if request.size else await self._actions.checkpoint()
        size = request.size or size_of(note)
        if not 1 <= request.old_size <= size <= self._actions.size:
            raise NotFound(
                f"cannot prove {size} entries from {request.old_size}: the log has {self._actions.size}",
                remedy="ask for sizes from 1 to that, the smaller first; where a kept checkpoint has more, the log"
                " was put back to an earlier state",
            )
        return actions_pb2.ProveConsistencyResponse(
            old_size=request.old_size,
            old_root=await self._actions.root(request.old_size),
            size=size,
            root=await self._actions.root(size),
            path=await self._actions.consistency(request.old_size, size),
            checkpoint=note,
        )

    async def LogStatus(
        self, _request: actions_pb2.LogStatusRequest, _context: Context
    ) -> actions_pb2.LogStatusResponse:
        return actions_pb2.LogStatusResponse(
            size=self._actions.size,
            first_seq=self._actions.first_seq,
            public_key=self._actions.public_key,
            sinks=[
                actions_pb2.SinkStatus(
                    name=state.name,
                    kind=state.kind,
                    delivered_seq=state.delivered_seq,
                    behind=state.behind,
                    failing=state.failing,
                    cause=convert.printable(state.cause),
                )
                for state in self._sinks.states()
            ],
        )

    async def RotateKey(
        self, request: actions_pb2.RotateKeyRequest, _context: Context
    ) -> actions_pb2.RotateKeyResponse:
        entry = await self._actions.rotate_key(
            actor=current_caller().actor, reason=convert.text("reason", request.reason)
        )
        return actions_pb2.RotateKeyResponse(public_key=self._actions.public_key, seq=entry.seq)

    async def RedactAction(
        self, request: actions_pb2.RedactActionRequest, _context: Context
    ) -> actions_pb2.RedactActionResponse:
        reason = convert.text("reason", request.reason)
        if not reason:
            raise InvalidInput("cannot redact an entry without a reason", remedy="say why: --reason TEXT")
        ordered = await self._actions.redact(
            request.seq,
            actor=current_caller().actor,
            reason=reason,
            needed=lambda action: (
                f"agent {action.agent_id} runs, and its launch has to be on record"
                if action.verb == "agent.launch" and action.agent_id in {each.agent_id for each in self._agents.live()}
                else ""
            ),
        )
        leaf_hash = bytes.fromhex(str(ordered.action.details["leaf_hash"]))
        return actions_pb2.RedactActionResponse(seq=ordered.seq, leaf_hash=leaf_hash)

    def _agent_id(self, name: str) -> str | None:
        if not name:
            return None
        if name.startswith("ag_"):
            return name  # also one that the daemon has forgotten: the log has not
        return self._agents.find(name).agent_id


class PolicyService(policies_pb2_grpc.PolicyServiceServicer):
    def __init__(
        self, *, config: Config, policies: PolicyShelf, agents: Agents, book: GrantBook, images: Images
    ) -> None:
        self._config = config
        self._images = images
        self._policies = policies
        self._agents = agents
        self._book = book

    async def ListPolicies(
        self, request: policies_pb2.ListPoliciesRequest, _context: Context
    ) -> policies_pb2.ListPoliciesResponse:
        found = [*map(convert.policy, self._policies.list()), *map(convert.broken_policy, self._policies.broken())]
        found.sort(key=lambda each: each.name)
        shown, token = convert.page(found, size=request.page_size, token=request.page_token, key=lambda each: each.name)
        return policies_pb2.ListPoliciesResponse(policies=shown, next_page_token=token)

    async def GetPolicy(
        self, request: policies_pb2.GetPolicyRequest, _context: Context
    ) -> policies_pb2.GetPolicyResponse:
        policy = self._policies.get(request.name)
        return policies_pb2.GetPolicyResponse(policy=convert.policy(policy), content_yaml=policy_yaml(policy).encode())

    async def CheckPolicy(
        self, request: policies_pb2.CheckPolicyRequest, _context: Context
    ) -> policies_pb2.CheckPolicyResponse:
        source = convert.text("file name", request.filename) or "policy"
        try:
            found = self._policies.check(request.content.decode(), source=source, directory=PurePosixPath("/"))
            rootfs = found.rootfs if isinstance(found, Policy) else None
            notes = [] if rootfs is None else [self._rootfs(rootfs)]
        except InvalidDocument as error:
            problems = [
                policies_pb2.PolicyProblem(
                    filename=source,
                    line=problem.position.line if problem.position else 0,
                    column=problem.position.column if problem.position else 0,
                    key=problem.key,
                    message=problem.message,
                    remedy=problem.remedy,
                )
                for problem in error.problems
            ]
            return policies_pb2.CheckPolicyResponse(ok=False, problems=problems)
        except UnicodeDecodeError:
            problem = policies_pb2.PolicyProblem(filename=source, message="it is not UTF-8", remedy="save it as UTF-8")
            return policies_pb2.CheckPolicyResponse(ok=False, problems=[problem])
        except StockadeError as error:
            problem = policies_pb2.PolicyProblem(filename=source, message=error.message, remedy=error.remedy)
            return policies_pb2.CheckPolicyResponse(ok=False, problems=[problem])
        policy = convert.policy(found) if isinstance(found, Policy) else None
        return policies_pb2.CheckPolicyResponse(ok=True, policy=policy, notes=notes)

    def _rootfs(self, name: RootfsName) -> str:
        form, digest = self._images.glance(name)
        return f"rootfs: {name} is there ({form}{f', {digest}' if digest else ''})"

    async def Explain(self, request: policies_pb2.ExplainRequest, _context: Context) -> policies_pb2.ExplainResponse:
        scope = read_scope(request.scope)
        gateway = self._config.gateway
        try:
            agent = self._agents.find(request.name)
        except NotFound:
            policy = self._policies.get(request.name)
            return convert.explanation(explain(policy, (), scope, gateway=gateway))
        policy = self._policies.get(agent.what.policy)
        grants = self._book.for_agent(agent.agent_id)
        return convert.explanation(explain(policy, grants, scope, gateway=gateway, agent=agent.name))


def _known_form(text: str) -> GrantId:
    """The id of a grant to look for; what can be none is one that is not there."""
    try:
        return parse_grant_id(text)
    except InvalidInput:
        raise NotFound(f"cannot find grant {shown(text)}: there is none", remedy="see `stockadectl grants`") from None


def _wanted(entry: Entry, agent_id: str | None, verb: str, verdict: str) -> bool:
    action = entry.action
    return agent_id in (None, action.agent_id) and verb_fits(action.verb, verb) and verdict in ("", action.verdict)
