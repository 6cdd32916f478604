"""Between protobuf messages and our values: beside the services, the only importer of *_pb2 in the daemon."""

from __future__ import annotations

import json
import math
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp
from stockade.v1 import actions_pb2, agents_pb2, changes_pb2, grants_pb2, policies_pb2, requests_pb2, system_pb2

from gateway_client.egress.scope import format_scope
from sandbox.plan import Tty
from supervisord import agents as core
from supervisord.approvals import Offer
from supervisord.budgets import MICROUSD_PER_USD, in_units, parse_budget
from supervisord.errors import InvalidInput
from supervisord.ids import LABELS_MAX, agent_name, label, policy_name
from supervisord.leases import lease_seconds
from supervisord.lifecycle import State
from supervisord.plan import LaunchOrder
from supervisord.policy import AgentSpec, LimitsWanted, Policy, Workspace
from supervisord.question import Request, RequestState
from supervisord.scopes import Ended, Grant, read_scope
from supervisord.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from google.protobuf.duration_pb2 import Duration

    from sandbox.doctor import Finding
    from supervisord.actions.types import Entry, Report
    from supervisord.budgets import Use
    from supervisord.explain import Explanation
    from supervisord.holds import Hold
    from supervisord.killswitch import Receipt
    from supervisord.layers import Change, Outcome
    from supervisord.policies import Broken

PAGE_SIZE_DEFAULT: Final = 500
PAGE_SIZE_MAX: Final = 5000
TEXT_CHARACTERS_MAX: Final = 500
TTL_SECONDS_MAX: Final = 366 * 86400
NUMBER_MAX: Final = 2**63 - 1  # SQLite's integers and off_t
NUMBER_DIGITS_MAX: Final = 19

T = TypeVar("T")

_STATES: Final = {state: f"AGENT_STATE_{state.name}" for state in State}
_GRANT_STATES: Final = {
    None: grants_pb2.GRANT_STATE_ACTIVE,
    Ended.REVOKED: grants_pb2.GRANT_STATE_REVOKED,
    Ended.EXPIRED: grants_pb2.GRANT_STATE_EXPIRED,
    Ended.SPENT: grants_pb2.GRANT_STATE_USED_UP,
    Ended.AGENT_ENDED: grants_pb2.GRANT_STATE_REVOKED,
}
_REQUEST_STATES: Final = {
    RequestState.PENDING: requests_pb2.REQUEST_STATE_PENDING,
    RequestState.APPROVED: requests_pb2.REQUEST_STATE_APPROVED,
    RequestState.DENIED: requests_pb2.REQUEST_STATE_DENIED,
    RequestState.EXPIRED: requests_pb2.REQUEST_STATE_EXPIRED,
}
_WORKSPACE_MODES: Final = {
    "ro": agents_pb2.WORKSPACE_MODE_READ_ONLY,
    "rw": agents_pb2.WORKSPACE_MODE_READ_WRITE,
    "overlay": agents_pb2.WORKSPACE_MODE_OVERLAY,
}
_CHANGES: Final = {
    "added": changes_pb2.CHANGE_KIND_ADDED,
    "modified": changes_pb2.CHANGE_KIND_MODIFIED,
    "deleted": changes_pb2.CHANGE_KIND_DELETED,
}
_OUTCOMES: Final = {
    "applied": changes_pb2.APPLY_OUTCOME_APPLIED,
    "conflict": changes_pb2.APPLY_OUTCOME_CONFLICT,
    "refused": changes_pb2.APPLY_OUTCOME_REFUSED,
    "failed": changes_pb2.APPLY_OUTCOME_FAILED,
}
STREAMS: Final = {
    "stdout": agents_pb2.OUTPUT_STREAM_STDOUT,
    "stderr": agents_pb2.OUTPUT_STREAM_STDERR,
}


# --- from callers


def launch_order(spec: agents_pb2.LaunchSpec, definition: AgentSpec | None) -> LaunchOrder:
    """The order of a request; what the request sets goes before what the definition says. Raises InvalidInput."""
    base = definition or AgentSpec(name="")
    labels = dict(label(key, value) for key, value in spec.labels.items())
    limits = spec.limits
    wanted = base.limits
    return LaunchOrder(
        command=tuple(part.decode("utf-8", "surrogateescape") for part in spec.command) or base.command,
        name=agent_name(spec.name) if spec.name else base.name,
        policy=policy_name(spec.policy) if spec.policy else (base.policy or "default"),
        workspace=_workspace(spec) if spec.HasField("workspace") else base.workspace,
        scopes=(*base.scopes, *(read_scope(text) for text in spec.scopes)),
        labels=_few_labels({**base.labels, **labels}),
        limits=LimitsWanted(
            memory_bytes=limits.memory_bytes if limits.HasField("memory_bytes") else wanted.memory_bytes,
            cpus=limits.cpus if limits.HasField("cpus") else wanted.cpus,
            pids=limits.pids if limits.HasField("pids") else wanted.pids,
            disk_bytes=wanted.disk_bytes,
            open_files=wanted.open_files,
            output_bytes=wanted.output_bytes,
            swap_bytes=wanted.swap_bytes,
            io_read_bytes_per_second=wanted.io_read_bytes_per_second,
            io_write_bytes_per_second=wanted.io_write_bytes_per_second,
        ),
        budget=parse_budget(dict(spec.budget)).tightest(base.budget),
        env={**base.env, **dict(spec.env)},
        tty=terminal(spec.tty) if spec.HasField("tty") else None,
        stdin=spec.stdin,
        owner=text("owner", spec.owner or base.owner),
        purpose=text("purpose", spec.purpose or base.purpose),
        lease_seconds=lease_seconds(seconds(spec.lease)) if spec.HasField("lease") else 0.0,
    )


def _workspace(spec: agents_pb2.LaunchSpec) -> Workspace:
    mode = {number: word for word, number in _WORKSPACE_MODES.items()}.get(spec.workspace.mode)
    if mode is None:
        raise InvalidInput("cannot launch: the workspace has no mode", remedy="say read-only, read-write or overlay")
    path = PurePosixPath(spec.workspace.path)
    if not path.is_absolute():
        raise InvalidInput(f"cannot launch: workspace {path} is not absolute", remedy="write it in full")
    return Workspace(path, writable=mode == "rw", overlay=mode == "overlay")


def _few_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    if len(labels) > LABELS_MAX:
        raise InvalidInput(f"cannot launch with {len(labels)} labels: {LABELS_MAX} at most", remedy="use fewer")
    return labels


def terminal(size: agents_pb2.TerminalSize) -> Tty:
    return Tty(rows=min(max(size.rows, 1), 65535), cols=min(max(size.cols, 1), 65535))


def text(what: str, value: str) -> str:
    """A line from a caller: bounded, and no control characters; raises InvalidInput."""
    if len(value) > TEXT_CHARACTERS_MAX or any(ord(c) < ord(" ") or ord(c) == 0x7F for c in value):  # noqa: PLR2004
        raise InvalidInput(
            f"cannot take the {what}: it is longer than {TEXT_CHARACTERS_MAX} characters or has control characters",
            remedy="shorten it to one line",
        )
    return value


def words(value: str) -> str:
    """As `text`, for what must not wait for better words: cut where it is too long, other characters as `?`."""
    line = "".join(c if ord(c) >= ord(" ") and ord(c) != 0x7F else "?" for c in value)  # noqa: PLR2004
    return line if len(line) <= TEXT_CHARACTERS_MAX else f"{line[: TEXT_CHARACTERS_MAX - 1]}…"


def selector(message: agents_pb2.Selector) -> core.Selector:
    return core.Selector(
        agents=tuple(message.agents),
        labels=tuple(sorted(message.labels.items())),
        policy=message.policy,
        owner=message.owner,
        all=message.all,
    )


def ttl_seconds(message: grants_pb2.GrantRequest | requests_pb2.ApproveRequest) -> float | None:
    if not message.HasField("ttl"):
        return None
    return seconds(message.ttl)


def terms(message: grants_pb2.GrantRequest | requests_pb2.ApproveRequest) -> Terms:
    """The bounds of a grant as a caller wants them; raises InvalidInput."""
    return Terms(
        ttl_seconds=ttl_seconds(message),
        max_uses=message.max_uses if message.HasField("max_uses") else None,
        max_bytes=message.max_bytes if message.HasField("max_bytes") else None,
        max_cost_microusd=_microusd(message.max_cost_usd) if message.HasField("max_cost_usd") else None,
    )


def _microusd(usd: float) -> int:
    if not math.isfinite(usd):
        raise InvalidInput("cannot grant up to that cost: it is no number", remedy="give US dollars")
    return round(min(max(usd, 0.0) * MICROUSD_PER_USD, NUMBER_MAX))


def offer(message: requests_pb2.ApproveRequest, by: str) -> Offer:
    """What a caller is ready to give for a request; raises InvalidInput."""
    return Offer(
        by=by,
        scope=read_scope(message.scope) if message.scope else None,
        terms=terms(message),
        reason=text("reason", message.reason),
        ticket=text("ticket", message.ticket),
        digest=text("digest", message.digest),
    )


def seconds(duration: Duration) -> float:
    value = duration.seconds + duration.nanos / 1e9
    return value if math.isfinite(value) else TTL_SECONDS_MAX


def page(items: Sequence[T], *, size: int, token: str, key: Callable[[T], str]) -> tuple[Sequence[T], str]:
    """One page of `items` and the token of the next; tokens are the key of the last item shown. Raises InvalidInput."""
    start = 0
    if token:
        keys = [key(item) for item in items]
        if token not in keys:
            raise InvalidInput("cannot go on with this page token: it is not of this list", remedy="list anew")
        start = keys.index(token) + 1
    count = page_size(size, PAGE_SIZE_MAX)
    chosen = items[start : start + count]
    more = start + count < len(items)
    return chosen, key(chosen[-1]) if more and chosen else ""


def page_size(size: int, most: int) -> int:
    """How many to list; 0 is the default. Raises InvalidInput."""
    if size < 0:
        raise InvalidInput("cannot list: page_size is negative", remedy="leave it out")
    return min(size or PAGE_SIZE_DEFAULT, most)


def number(what: str, value: int) -> int:
    """A place in a log, a list or a file; raises InvalidInput beyond what these can have."""
    if not 0 <= value <= NUMBER_MAX:
        raise InvalidInput(f"cannot use {what} {value}: it is not from 0 to {NUMBER_MAX}", remedy="leave it out")
    return value


def token_number(token: str) -> int:
    """The number that a page or resume token of ours stands for, 0 for none; raises InvalidInput."""
    if not token:
        return 0
    if len(token) > NUMBER_DIGITS_MAX or not (token.isascii() and token.isdecimal()):
        raise InvalidInput("cannot go on with this token: it is not of this list", remedy="list or watch anew")
    return number("token", int(token))


def resume_point(token: str) -> tuple[int, int]:
    """The daemon and the change that a resume token `EPOCH.VERSION` of ours stands for; raises InvalidInput."""
    epoch, _, version = token.partition(".")
    return token_number(epoch), token_number(version)


def nanoseconds(what: str, value: Timestamp) -> int:
    """A time since 1970; raises InvalidInput where it is not one that an entry can have."""
    return number(f"{what} in ns", value.seconds * 10**9 + value.nanos)


# --- to callers


def timestamp(nanoseconds: int | None) -> Timestamp | None:
    if nanoseconds is None:
        return None
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


def agent(
    value: core.Agent,
    usage: Mapping[str, int] | None = None,
    *,
    changes: bool = False,
    uses: Iterable[Use] = (),
    lease_left: float | None = None,
) -> agents_pb2.Agent:
    what = value.what
    message = agents_pb2.Agent(
        agent_id=value.agent_id,
        name=value.name,
        state=_STATES[value.state],
        policy=what.policy,
        policy_digest=what.policy_digest,
        labels=what.labels,
        started_at=timestamp(value.started_at_ns),
        ended_at=timestamp(value.ended_at_ns),
        launched_by=what.launched_by,
        failure=value.failure,
        owner=what.owner,
        purpose=what.purpose,
        command=[part.encode("utf-8", "surrogateescape") for part in what.command],
        spend=agents_pb2.Spend(
            input_tokens=value.spend.input_tokens,
            output_tokens=value.spend.output_tokens,
            cost_usd=value.spend.cost_usd,
            estimated=value.spend.estimated,
        ),
        limits=agents_pb2.Limits(memory_bytes=what.memory_bytes, cpus=what.cpus, pids=what.pids),
        changes_kept=changes,
        definition=what.definition,
        definition_digest=what.definition_digest,
        budget=map(budget_use, uses),
    )
    message.posture.update(cast("dict[str, Any]", value.posture))  # quicker than json_format, and every launch waits
    if lease_left is not None:
        message.lease_left.FromNanoseconds(int(lease_left * 1e9))
    if what.workspace:
        mode = _WORKSPACE_MODES.get(what.workspace_mode, agents_pb2.WORKSPACE_MODE_READ_ONLY)
        message.workspace.CopyFrom(agents_pb2.Workspace(path=what.workspace, mode=mode))
    if value.exit is not None:
        if value.exit.code is not None:
            message.exit_code = value.exit.code
        if value.exit.signal is not None:
            message.exit_signal = value.exit.signal
        message.out_of_memory = value.exit.out_of_memory
    if usage is not None:
        message.memory_bytes = max(int(usage.get("memory_bytes", 0)), 0)
        message.pids = max(int(usage.get("pids", 0)), 0)
        message.cpu_seconds = max(int(usage.get("cpu_usec", 0)), 0) / 1_000_000
    return message


def budget_use(value: Use) -> agents_pb2.BudgetUse:
    return agents_pb2.BudgetUse(
        bound=value.bound,
        spent=in_units(value.bound, value.spent),
        limit=in_units(value.bound, value.limit),
        reserved=in_units(value.bound, value.reserved),
        label=value.label,
        since=value.since,
    )


def effective(message: agents_pb2.Agent, found: dict[str, Any]) -> None:
    """Put what was read from the kernel into an agent's message."""
    json_format.ParseDict(found, message.effective)


def exit_status(value: core.Exit | None) -> agents_pb2.ExitStatus:
    message = agents_pb2.ExitStatus()
    if value is None:
        message.signal = 9
        return message
    if value.code is not None:
        message.code = value.code
    if value.signal is not None:
        message.signal = value.signal
    message.out_of_memory = value.out_of_memory
    return message


def receipt(value: Receipt) -> agents_pb2.Receipt:
    return agents_pb2.Receipt(
        receipt_id=value.receipt_id,
        agent_id=value.agent_id,
        name=value.name,
        verified_empty=value.verified_empty,
        processes_killed=value.processes_killed,
        egress_cut_ms=value.egress_cut_ms,
        dead_ms=value.dead_ms,
        reason=value.reason,
        killed_by=value.killed_by,
        time=timestamp(value.time_ns),
        already_dead=value.already_dead,
        left_pids=value.left_pids,
        statement=value.statement,
        signature=value.signature,
        relays_cut=value.relays_cut,
        grants_revoked=value.grants_revoked,
        bytes_cut=value.bytes_cut,
    )


def hold(value: Hold) -> agents_pb2.HoldOrder:
    target = agents_pb2.HoldTarget()
    setattr(target, value.kind, value.subject)
    return agents_pb2.HoldOrder(
        hold_id=value.hold_id,
        target=target,
        reason=value.reason,
        held_by=value.held_by,
        held_at=timestamp(value.held_at_ns),
        ticket=value.ticket,
    )


def grant(value: Grant, agent_name_: str) -> grants_pb2.ScopeGrant:
    message = grants_pb2.ScopeGrant(
        grant_id=value.grant_id,
        agent_id=value.agent_id,
        agent_name=agent_name_,
        scope=format_scope(value.scope),
        state=_GRANT_STATES[value.ended],
        granted_at=timestamp(int(value.created_at * 1e9)),
        expires_at=None if value.expires_at is None else timestamp(int(value.expires_at * 1e9)),
        uses=value.uses + value.reserved,
        granted_by=value.by,
        reason=value.reason,
        bytes_used=value.bytes_used,
        cost_usd=value.cost_microusd / MICROUSD_PER_USD,
        ticket=value.ticket,
    )
    if value.uses_left is not None:
        message.uses_left = value.uses_left
    if value.bytes_left is not None:
        message.bytes_left = value.bytes_left
    if value.cost_left_microusd is not None:
        message.cost_usd_left = value.cost_left_microusd / MICROUSD_PER_USD
    return message


def request(value: Request) -> requests_pb2.ScopeRequest:
    return requests_pb2.ScopeRequest(
        request_id=value.request_id,
        agent_id=value.agent_id,
        agent_name=value.agent_name,
        scope=format_scope(value.scope),
        reason=value.reason,
        state=_REQUEST_STATES[value.state],
        asked_at=timestamp(value.asked_at_ns),
        decided_at=timestamp(value.decided_at_ns),
        decided_by=value.decided_by,
        grant_id=value.grant_id,
        digest=value.digest,
        approved_by=value.approved_by,
        approvers=value.approvers,
        answer=value.answer,
    )


def action(entry: Entry) -> actions_pb2.Action:
    what = entry.action
    return actions_pb2.Action(
        seq=entry.seq,
        time_unix_nanos=entry.time_ns,
        agent_id=printable(what.agent_id),
        actor=printable(what.actor),
        verb=printable(what.verb),
        object=printable(what.object),
        verdict=printable(what.verdict),
        reason=printable(what.reason),
        details_json=json.dumps(what.details, separators=(",", ":"), sort_keys=True).encode(),
    )


def printable(value: str) -> str:
    """The text as protobuf takes it: bytes that were no UTF-8 are shown as escapes."""
    return value.encode("utf-8", "backslashreplace").decode()


def change(value: Change) -> changes_pb2.Change:
    return changes_pb2.Change(
        path=value.path,
        kind=_CHANGES[value.kind],
        type=value.type,
        size_bytes=value.size,
        mode=value.mode,
        sha256=value.sha256,
        link=value.link,
        notes=[printable(note) for note in value.notes],
        conflict=printable(value.conflict),
        refused=printable(value.refused),
        patch=value.patch,
    )


def applied(value: Change) -> changes_pb2.AppliedChange:
    return changes_pb2.AppliedChange(change=change(value), outcome=_OUTCOMES[value.outcome], why=printable(value.why))


def changes_summary(value: Outcome) -> changes_pb2.ChangesSummary:
    layer = value.layer
    return changes_pb2.ChangesSummary(
        agent_id=layer.agent_id,
        agent_name=layer.name,
        workspace=layer.workspace,
        digest=value.digest,
        kept=value.kept,
    )


def report(value: Report, root: bytes) -> actions_pb2.VerifyLogResponse:
    return actions_pb2.VerifyLogResponse(
        ok=value.ok, size=value.size, root=root, problem=value.problem, redacted=value.redacted
    )


def policy(value: Policy) -> policies_pb2.Policy:
    return policies_pb2.Policy(
        name=value.name,
        version=value.version,
        digest=value.digest,
        risk=value.risk.value,
        extends=value.extends or "",
        filename=value.source,
        scopes=[format_scope(scope) for scope in value.scopes],
    )


def broken_policy(value: Broken) -> policies_pb2.Policy:
    return policies_pb2.Policy(name=value.name, filename=value.source, problem=value.error.message)


def explanation(value: Explanation) -> policies_pb2.ExplainResponse:
    return policies_pb2.ExplainResponse(
        allowed=value.allowed,
        reason=value.because,
        grant_id=value.grant_id or "",
        steps=value.steps,
        remedy=value.remedy,
    )


def findings(values: Iterable[Finding]) -> system_pb2.DoctorResponse:
    listed = list(values)
    return system_pb2.DoctorResponse(
        ok=all(finding.present or not finding.required for finding in listed),
        findings=[
            system_pb2.Finding(
                control=finding.control,
                present=finding.present,
                how=finding.how,
                remedy=finding.remedy,
                required=finding.required,
                source=finding.source,
                protects=finding.protects,
                absence=finding.absence,
            )
            for finding in listed
        ],
    )
