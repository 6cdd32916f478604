"""Messages to values and back: the only module here that knows the generated stubs' fields."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Literal, ParamSpec, TypedDict, TypeVar, Unpack

from stockade.client import values, words
from stockade.client.errors import InvalidArgument
from stockade.v1 import (
    actions_pb2,
    agents_pb2,
    changes_pb2,
    grants_pb2,
    policies_pb2,
    registry_pb2,
    requests_pb2,
    system_pb2,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message
    from google.protobuf.struct_pb2 import Struct, Value
    from google.protobuf.timestamp_pb2 import Timestamp

NANOS_PER_MICRO: Final = 1_000
_STREAMS: Final[dict[int, values.Stream]] = {
    agents_pb2.OUTPUT_STREAM_STDOUT: "stdout",
    agents_pb2.OUTPUT_STREAM_STDERR: "stderr",
}
_MODES: Final = {
    "ro": agents_pb2.WORKSPACE_MODE_READ_ONLY,
    "rw": agents_pb2.WORKSPACE_MODE_READ_WRITE,
    "overlay": agents_pb2.WORKSPACE_MODE_OVERLAY,
}


def time_of(message: Message, name: str) -> datetime | None:
    """The field's time in UTC; None where it is not set."""
    if not message.HasField(name):
        return None
    stamp: Timestamp = getattr(message, name)
    return datetime.fromtimestamp(stamp.seconds, UTC) + timedelta(microseconds=stamp.nanos // NANOS_PER_MICRO)


def set_seconds(field: Duration, seconds: float | timedelta | str) -> None:
    field.FromTimedelta(words.time_span(seconds))


def agent(message: agents_pb2.Agent) -> values.AgentInfo:
    spend = message.spend
    return values.AgentInfo(
        agent_id=message.agent_id,
        name=message.name,
        state=values.State(agents_pb2.AgentState.Name(message.state).removeprefix("AGENT_STATE_")),
        policy=message.policy,
        exit_code=message.exit_code if message.HasField("exit_code") else None,
        started_at=time_of(message, "started_at"),
        memory_bytes=message.memory_bytes if message.HasField("memory_bytes") else None,
        pids=message.pids if message.HasField("pids") else None,
        posture=struct(message.posture),
        policy_digest=message.policy_digest,
        labels=dict(message.labels),
        exit_signal=message.exit_signal if message.HasField("exit_signal") else None,
        out_of_memory=message.out_of_memory,
        ended_at=time_of(message, "ended_at"),
        launched_by=message.launched_by,
        owner=message.owner,
        purpose=message.purpose,
        command=tuple(message.command),
        workspace=workspace(message.workspace) if message.HasField("workspace") else None,
        spend=values.Spend(spend.input_tokens, spend.output_tokens, spend.cost_usd, spend.estimated),
        failure=message.failure,
        changes_kept=message.changes_kept,
        definition=message.definition,
        definition_digest=message.definition_digest,
        counters=dict(message.counters),
        effective=struct(message.effective),
        budget=tuple(map(budget_use, message.budget)),
        cpu_seconds=message.cpu_seconds if message.HasField("cpu_seconds") else None,
        lease_left=message.lease_left.ToTimedelta().total_seconds() if message.HasField("lease_left") else None,
    )


def budget_use(message: agents_pb2.BudgetUse) -> values.BudgetUse:
    return values.BudgetUse(message.bound, message.spent, message.limit, message.reserved, message.label, message.since)


def struct(message: Struct) -> values.JsonObject:
    """A Struct as a mapping, its whole numbers as such: it knows only doubles."""
    return {key: _value(value) for key, value in message.fields.items()}


def _value(value: Value) -> object:
    # Not json_format: every launch's answer is read here.
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return struct(value.struct_value)
        case "list_value":
            return [_value(item) for item in value.list_value.values]
        case _:
            return None


def killed_exec(message: agents_pb2.KillExecResponse) -> values.KilledExec:
    return values.KilledExec(message.processes_killed, message.verified_empty, tuple(message.left_pids))


def workspace(message: agents_pb2.Workspace) -> values.Workspace:
    mode: Literal["ro", "rw", "overlay"] = "ro"
    if message.mode == agents_pb2.WORKSPACE_MODE_READ_WRITE:
        mode = "rw"
    elif message.mode == agents_pb2.WORKSPACE_MODE_OVERLAY:
        mode = "overlay"
    return values.Workspace(message.path, mode)


def change(message: changes_pb2.Change) -> values.Change:
    return values.Change(
        path=os.fsdecode(message.path),
        kind=changes_pb2.ChangeKind.Name(message.kind).removeprefix("CHANGE_KIND_").lower(),
        type=message.type,
        size_bytes=message.size_bytes,
        mode=message.mode,
        sha256=message.sha256,
        link=os.fsdecode(message.link),
        notes=tuple(message.notes),
        conflict=message.conflict,
        refused=message.refused,
        patch=message.patch,
    )


def applied(message: changes_pb2.AppliedChange) -> values.Change:
    outcome = changes_pb2.ApplyOutcome.Name(message.outcome).removeprefix("APPLY_OUTCOME_").lower()
    return replace(change(message.change), outcome=outcome, why=message.why)


def changes(
    messages: Iterable[changes_pb2.DiffResponse] | Iterable[changes_pb2.ApplyResponse],
) -> values.Changes:
    """The whole answer of Diff or Apply."""
    summary = changes_pb2.ChangesSummary()
    found: list[values.Change] = []
    for message in messages:
        if isinstance(message, changes_pb2.DiffResponse):
            found += map(change, message.changes)
        else:
            found += map(applied, message.changes)
        if message.HasField("summary"):
            summary = message.summary
    return values.Changes(
        agent_id=summary.agent_id,
        agent_name=summary.agent_name,
        workspace=summary.workspace,
        digest=summary.digest,
        kept=summary.kept,
        changes=tuple(found),
    )


def diff_request(agent: str, paths: Iterable[str | bytes], *, patch: bool) -> changes_pb2.DiffRequest:
    return changes_pb2.DiffRequest(agent=agent, paths=arguments(paths), patch=patch)


def apply_request(
    agent: str, paths: Iterable[str | bytes], *, force: bool, digest: str, reason: str
) -> changes_pb2.ApplyRequest:
    return changes_pb2.ApplyRequest(agent=agent, paths=arguments(paths), force=force, digest=digest, reason=reason)


def exit_status(message: agents_pb2.ExitStatus) -> values.ExitStatus:
    return values.ExitStatus(
        message.code if message.HasField("code") else None,
        message.signal if message.HasField("signal") else None,
        message.out_of_memory,
    )


def output(message: agents_pb2.OutputChunk | agents_pb2.LogsResponse) -> values.Output:
    return values.Output(_STREAMS[message.stream], message.data, message.offset)


def receipt(message: agents_pb2.Receipt) -> values.Receipt:
    return values.Receipt(
        receipt_id=message.receipt_id,
        agent_id=message.agent_id,
        name=message.name,
        verified_empty=message.verified_empty,
        processes_killed=message.processes_killed,
        egress_cut_ms=message.egress_cut_ms,
        dead_ms=message.dead_ms,
        reason=message.reason,
        killed_by=message.killed_by,
        time=time_of(message, "time"),
        already_dead=message.already_dead,
        left_pids=tuple(message.left_pids),
        statement=message.statement,
        signature=message.signature,
        relays_cut=message.relays_cut,
        grants_revoked=message.grants_revoked,
        bytes_cut=message.bytes_cut,
    )


def hold(message: agents_pb2.HoldOrder) -> values.Hold:
    kind = message.target.WhichOneof("target")
    return values.Hold(
        hold_id=message.hold_id,
        kind=kind or "name",
        value=getattr(message.target, kind) if kind else "",
        reason=message.reason,
        held_by=message.held_by,
        held_at=time_of(message, "held_at"),
        ticket=message.ticket,
    )


def grant(message: grants_pb2.ScopeGrant) -> values.Grant:
    return values.Grant(
        grant_id=message.grant_id,
        agent_id=message.agent_id,
        agent_name=message.agent_name,
        scope=message.scope,
        state=grants_pb2.GrantState.Name(message.state).removeprefix("GRANT_STATE_"),
        granted_at=time_of(message, "granted_at"),
        expires_at=time_of(message, "expires_at"),
        uses_left=message.uses_left if message.HasField("uses_left") else None,
        uses=message.uses,
        granted_by=message.granted_by,
        reason=message.reason,
        bytes_left=message.bytes_left if message.HasField("bytes_left") else None,
        bytes_used=message.bytes_used,
        cost_usd_left=message.cost_usd_left if message.HasField("cost_usd_left") else None,
        cost_usd=message.cost_usd,
        ticket=message.ticket,
    )


def revoked(message: grants_pb2.RevokeResponse) -> values.Grant:
    return replace(grant(message.grant), warning=message.warning)


def request(message: requests_pb2.ScopeRequest) -> values.Request:
    return values.Request(
        request_id=message.request_id,
        agent_id=message.agent_id,
        agent_name=message.agent_name,
        scope=message.scope,
        reason=message.reason,
        state=requests_pb2.RequestState.Name(message.state).removeprefix("REQUEST_STATE_"),
        asked_at=time_of(message, "asked_at"),
        decided_at=time_of(message, "decided_at"),
        decided_by=message.decided_by,
        grant_id=message.grant_id,
        digest=message.digest,
        approved_by=tuple(message.approved_by),
        approvers=message.approvers,
        answer=message.answer,
    )


def approved(message: requests_pb2.ApproveResponse) -> values.Grant | values.Request:
    return grant(message.grant) if message.HasField("grant") else request(message.request)


def action(message: actions_pb2.Action) -> values.Action:
    seconds, nanos = divmod(message.time_unix_nanos, 1_000_000_000)
    return values.Action(
        seq=message.seq,
        time=datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=nanos // NANOS_PER_MICRO),
        agent_id=message.agent_id,
        actor=message.actor,
        verb=message.verb,
        object=message.object,
        verdict=message.verdict,
        reason=message.reason,
        details=json.loads(message.details_json) if message.details_json else {},
    )


def verification(message: actions_pb2.VerifyLogResponse) -> values.Verification:
    return values.Verification(message.ok, message.size, message.root, message.problem, message.redacted)


def proof(message: actions_pb2.ProveResponse) -> values.Proof:
    return values.Proof(message.entry, message.leaf_index, tuple(message.audit_path), message.checkpoint)


def consistency(message: actions_pb2.ProveConsistencyResponse) -> values.Consistency:
    return values.Consistency(message.old_size, message.old_root, message.size, message.root, tuple(message.path))


def risk(number: registry_pb2.RiskClass) -> str:
    """The class as a word; empty where none is said."""
    word = registry_pb2.RiskClass.Name(number).removeprefix("RISK_CLASS_").lower()
    return "" if word == "unspecified" else word


def definition(message: registry_pb2.Definition) -> values.Definition:
    reach = message.reach
    return values.Definition(
        name=message.name,
        version=message.version,
        digest=message.digest,
        owner=message.owner,
        purpose=message.purpose,
        risk=risk(message.risk),
        contact=message.contact,
        policy=message.policy,
        models=tuple(message.models),
        data=tuple(message.data),
        scopes=tuple(message.scopes),
        reach=values.Reach(tuple(reach.files), tuple(reach.hosts), tuple(reach.models), tuple(reach.tools)),
        labels=dict(message.labels),
        registered_by=message.registered_by,
        registered_at=time_of(message, "registered_at"),
        deprecated=message.deprecated,
        deprecated_by=message.deprecated_by,
        deprecated_at=time_of(message, "deprecated_at"),
        problem=message.problem,
    )


def review_finding(message: registry_pb2.ReviewFinding) -> values.ReviewFinding:
    return values.ReviewFinding(
        kind=message.kind,
        subject=message.subject,
        agent_id=message.agent_id,
        owner=message.owner,
        detail=message.detail,
        remedy=message.remedy,
    )


def running(message: registry_pb2.RunningAgent) -> values.RunningAgent:
    return values.RunningAgent(
        agent=agent(message.agent),
        risk=risk(message.risk),
        policy_risk=risk(message.policy_risk),
        contact=message.contact,
        deprecated=message.deprecated,
        grants=tuple(map(grant, message.grants)),
        budget=dict(message.budget),
        budget_left=dict(message.budget_left),
    )


def register_request(content: bytes, path: str) -> registry_pb2.RegisterDefinitionRequest:
    return registry_pb2.RegisterDefinitionRequest(content=content, filename=path, directory=directory_of(path))


def review_request(unused: float | timedelta | None) -> registry_pb2.ReviewRequest:
    message = registry_pb2.ReviewRequest()
    if unused is not None:
        set_seconds(message.unused, unused)
    return message


def policy(message: policies_pb2.Policy) -> values.Policy:
    return values.Policy(
        name=message.name,
        version=message.version,
        digest=message.digest,
        risk=message.risk,
        extends=message.extends,
        filename=message.filename,
        scopes=tuple(message.scopes),
        problem=message.problem,
    )


def problem(message: policies_pb2.PolicyProblem) -> values.PolicyProblem:
    return values.PolicyProblem(
        filename=message.filename,
        line=message.line,
        column=message.column,
        key=message.key,
        message=message.message,
        remedy=message.remedy,
    )


def explanation(message: policies_pb2.ExplainResponse) -> values.Explanation:
    return values.Explanation(
        allowed=message.allowed,
        reason=message.reason,
        grant_id=message.grant_id,
        steps=tuple(message.steps),
        remedy=message.remedy,
    )


def finding(message: system_pb2.Finding) -> values.Finding:
    return values.Finding(
        control=message.control,
        present=message.present,
        required=message.required,
        how=message.how,
        remedy=message.remedy,
        source=message.source,
        protects=message.protects,
        absence=message.absence,
    )


def version(message: system_pb2.VersionResponse) -> values.DaemonVersion:
    return values.DaemonVersion(
        version=message.version,
        instance=message.instance,
        kernel=message.kernel,
        python=message.python,
        started_at=time_of(message, "started_at"),
    )


def selector(value: values.Selector) -> agents_pb2.Selector:
    if not isinstance(value, values.Selector) or isinstance(value.agents, str):
        raise TypeError(f"whom to select is said as Selector(agents=('NAME',)) or Selector(all=True), not as {value!r}")
    return agents_pb2.Selector(
        agents=value.agents, labels=value.labels, policy=value.policy, owner=value.owner, all=value.all
    )


def arguments(command: Iterable[str | bytes]) -> list[bytes]:
    if isinstance(command, str | bytes):
        raise TypeError(f"a command is a list of words, not {command!r}: say ['sh', '-c', …]")
    return [os.fsencode(argument) for argument in command]


P = ParamSpec("P")
R = TypeVar("R")


def _checked(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, with what protobuf or we find in a value of the caller's as the error that the daemon has for such."""

    @functools.wraps(make)
    def made(*given: P.args, **options: P.kwargs) -> R:
        try:
            return make(*given, **options)
        except ValueError as error:
            raise InvalidArgument(
                f"cannot make the call: {error}", remedy="correct the value", reason="INVALID_INPUT"
            ) from error

    return made


def _known(options: Mapping[str, object], kind: type) -> None:
    """Raises TypeError for an option that nobody would look at: a launch without it would be another one."""
    for name in options:
        if name not in kind.__annotations__:
            raise TypeError(f"there is no option {name!r}: there are {', '.join(kind.__annotations__)}")


class LaunchOptions(TypedDict, total=False):
    """What a launch may say. The rest comes from the policy, `default` where none is named."""

    name: str
    policy: str
    workspace: values.Workspace | str  # a directory of the host, read-only but for DIR:rw and DIR:overlay
    scopes: Sequence[str]
    labels: Mapping[str, str]
    memory_bytes: int
    cpus: float
    pids: int
    budget: Mapping[str, float]
    env: Mapping[str, str]
    terminal: tuple[int, int]  # rows, columns: stdio is a terminal
    stdin: bool  # it will be written by attach(); else stdin is empty
    owner: str
    purpose: str
    lease: float | timedelta | str  # not renewed for so long, it is frozen, and killed after as long again
    definition: bytes  # the text of a file of kind Agent; everything above goes before what it says
    definition_path: str
    registered: str  # a definition of the registry, NAME or NAME@VERSION; what is above may narrow it
    agent_id: str  # chosen by the caller, so that a retry finds the first attempt
    idempotency_key: str


def directory_of(path: str) -> str:
    """The absolute directory of a file, no links followed; empty for no file and for stdin."""
    return os.path.dirname(os.path.abspath(path)) if path and path != "-" else ""  # noqa: PTH100, PTH120 - resolve() would follow them


@_checked
def launch_request(command: Sequence[str | bytes], **options: Unpack[LaunchOptions]) -> agents_pb2.LaunchRequest:
    """The message for a launch; relative host paths become absolute here, where the current directory is known."""
    _known(options, LaunchOptions)
    if isinstance(options.get("scopes"), str):
        raise TypeError("scopes is a list of scopes, not one")
    spec = agents_pb2.LaunchSpec(
        command=arguments(command),
        name=options.get("name"),
        policy=options.get("policy"),
        scopes=options.get("scopes"),
        labels=options.get("labels"),
        budget=options.get("budget"),
        env=options.get("env"),
        stdin=options.get("stdin"),
        owner=options.get("owner"),
        purpose=options.get("purpose"),
    )
    if "workspace" in options:
        wanted = options["workspace"]
        if isinstance(wanted, str):
            wanted = words.workspace(wanted)
        spec.workspace.path = os.path.abspath(wanted.path)  # noqa: PTH100 - resolve() would follow links, too early
        spec.workspace.mode = _MODES[wanted.mode]
    if "memory_bytes" in options:
        spec.limits.memory_bytes = options["memory_bytes"]
    if "cpus" in options:
        spec.limits.cpus = options["cpus"]
    if "pids" in options:
        spec.limits.pids = options["pids"]
    if "lease" in options:
        set_seconds(spec.lease, options["lease"])
    if "terminal" in options:
        spec.tty.rows, spec.tty.cols = options["terminal"]
    path = options.get("definition_path", "")
    return agents_pb2.LaunchRequest(
        spec=spec,
        definition_yaml=options.get("definition"),
        definition_filename=path,
        definition_directory=directory_of(path),
        registered=options.get("registered"),
        agent_id=options.get("agent_id"),
        idempotency_key=options.get("idempotency_key"),
    )


@_checked
def grant_request(
    agent: str, scope: str, *, grant_id: str = "", **terms: Unpack[values.Terms]
) -> grants_pb2.GrantRequest:
    return _bounded(grants_pb2.GrantRequest(agent=agent, scope=scope, grant_id=grant_id), terms)


@_checked
def approve_request(
    request_id: str, *, scope: str = "", digest: str = "", **terms: Unpack[values.Terms]
) -> requests_pb2.ApproveRequest:
    return _bounded(requests_pb2.ApproveRequest(request_id=request_id, scope=scope, digest=digest), terms)


Bounded = TypeVar("Bounded", grants_pb2.GrantRequest, requests_pb2.ApproveRequest)


def _bounded(message: Bounded, terms: values.Terms) -> Bounded:
    _known(terms, values.Terms)
    if (ttl := terms.get("ttl")) is not None:
        set_seconds(message.ttl, ttl)
    if (max_uses := terms.get("max_uses")) is not None:
        message.max_uses = max_uses
    if (max_bytes := terms.get("max_bytes")) is not None:
        message.max_bytes = max_bytes
    if (max_cost_usd := terms.get("max_cost_usd")) is not None:
        message.max_cost_usd = max_cost_usd
    message.reason = terms.get("reason", "")
    message.ticket = terms.get("ticket", "")
    return message


def query_request(
    *,
    agent: str,
    verb: str,
    verdict: str,
    since: datetime | None,
    after_seq: int,
    page_token: str,
    until: datetime | None = None,
    labels: Mapping[str, str] | None = None,
) -> actions_pb2.QueryActionsRequest:
    message = actions_pb2.QueryActionsRequest(
        agent=agent, verb=verb, verdict=verdict, after_seq=after_seq, page_token=page_token, labels=labels
    )
    if since is not None:
        message.since.FromDatetime(since.astimezone(UTC))
    if until is not None:
        message.until.FromDatetime(until.astimezone(UTC))
    return message
