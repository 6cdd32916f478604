"""What goes over the API, as plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime, timedelta

    Stream = Literal["stdout", "stderr"]
    JsonObject = Mapping[str, object]

SIGNAL_EXIT_BASE: Final = 128
KILLED_EXIT_CODE: Final = 137


class State(enum.StrEnum):
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    FROZEN = "FROZEN"
    KILLING = "KILLING"
    KILLED = "KILLED"
    EXITED = "EXITED"
    FAILED = "FAILED"

    @property
    def ended(self) -> bool:
        return self in {State.KILLED, State.EXITED, State.FAILED}


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a program ended: one of `code` and `signal` is set, or neither where it never ran."""

    code: int | None
    signal: int | None
    out_of_memory: bool = False

    @property
    def shell_code(self) -> int | None:
        """As a shell tells it: 128 + n for signal n."""
        return SIGNAL_EXIT_BASE + self.signal if self.signal is not None else self.code


@dataclass(frozen=True, slots=True)
class Spend:
    input_tokens: int
    output_tokens: int
    cost_usd: float
    estimated: bool


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """How much of one bound is used: tokens, US dollars, calls or seconds.

    `label` is set where all agents of that label spend it together; `since` is its day or month, in UTC.
    """

    bound: str
    spent: float
    limit: float
    reserved: float
    label: str = ""
    since: str = ""


@dataclass(frozen=True, slots=True)
class Workspace:
    """A directory of the host that the agent finds at /workspace."""

    path: str
    mode: Literal["ro", "rw", "overlay"] = "ro"


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """An agent as it was at one moment."""

    agent_id: str
    name: str
    state: State
    policy: str
    exit_code: int | None
    started_at: datetime | None
    memory_bytes: int | None
    pids: int | None
    posture: JsonObject
    policy_digest: str
    labels: Mapping[str, str]
    exit_signal: int | None
    out_of_memory: bool
    ended_at: datetime | None
    launched_by: str
    owner: str
    purpose: str
    command: tuple[bytes, ...]
    workspace: Workspace | None
    spend: Spend
    failure: str
    effective: JsonObject = field(default_factory=dict)  # only where an examination was asked for
    counters: Mapping[str, int] = field(default_factory=dict)
    """How often it met its limits; only there when one agent is asked for."""
    changes_kept: bool = False
    definition: str = ""
    """Of the registry, `NAME@VERSION`; empty where it was launched by none."""
    definition_digest: str = ""
    budget: tuple[BudgetUse, ...] = ()
    """Every bound that holds it while it lives."""
    cpu_seconds: float | None = None
    lease_left: float | None = None
    """Seconds until it is frozen, or killed where it is frozen for that already; None without a lease."""


@dataclass(frozen=True, slots=True)
class KilledExec:
    """What ending the processes of one exec found."""

    processes_killed: int
    verified_empty: bool
    left_pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """One path of an overlay workspace that an agent made another; `outcome` and `why` are set by an apply.

    `path` is relative to the workspace; bytes that are no UTF-8 are surrogate escapes in it, as os.fsdecode() has them.
    """

    path: str
    kind: str  # added, modified, deleted
    type: str
    size_bytes: int
    mode: int
    sha256: str
    link: str
    notes: tuple[str, ...]
    conflict: str
    refused: str
    patch: bytes = b""
    outcome: str = ""  # applied, conflict, refused, failed
    why: str = ""


@dataclass(frozen=True, slots=True)
class Changes:
    """What an agent changed; `digest` names all of it, and `kept` says whether it is still there."""

    agent_id: str
    agent_name: str
    workspace: str
    digest: str
    kept: bool
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Selector:
    """Which agents: those named, with all these labels, of this policy or owner, or all that live."""

    agents: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    policy: str = ""
    owner: str = ""
    all: bool = False


@dataclass(frozen=True, slots=True)
class Hold:
    """A durable order that nothing of this name, label (`key=value`), policy or image (its digest) may run."""

    hold_id: str
    kind: Literal["name", "label", "policy", "rootfs_digest"]
    value: str
    reason: str
    held_by: str
    held_at: datetime | None
    ticket: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The signed statement that a kill left nothing alive. Times count from the order."""

    receipt_id: str
    agent_id: str
    name: str
    verified_empty: bool
    processes_killed: int
    egress_cut_ms: float
    dead_ms: float
    reason: str
    killed_by: str
    time: datetime | None
    already_dead: bool
    left_pids: tuple[int, ...]
    statement: bytes
    signature: bytes
    relays_cut: int = 0
    grants_revoked: int = 0
    bytes_cut: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    grant_id: str
    agent_id: str
    agent_name: str
    scope: str
    state: str
    granted_at: datetime | None
    expires_at: datetime | None
    uses_left: int | None
    uses: int
    granted_by: str
    reason: str
    warning: str = ""
    bytes_left: int | None = None
    bytes_used: int = 0
    cost_usd_left: float | None = None
    cost_usd: float = 0.0
    ticket: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """An agent's question for a scope it lacks. `reason` is in its own words: escape it when you show it.

    `digest` stands for what of it an approver judges by: pass it on when you approve what you were shown.
    """

    request_id: str
    agent_id: str
    agent_name: str
    scope: str
    reason: str
    state: str
    asked_at: datetime | None
    decided_at: datetime | None
    decided_by: str
    grant_id: str
    digest: str = ""
    approved_by: tuple[str, ...] = ()
    approvers: int = 1
    answer: str = ""


class Terms(TypedDict, total=False):
    """The bounds of a grant, and why it is given. `ttl` in seconds or as `10m`; what is left out does not bound it."""

    ttl: float | timedelta | str | None
    max_uses: int | None
    max_bytes: int | None
    max_cost_usd: float | None
    reason: str
    ticket: str


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of the action log."""

    seq: int
    time: datetime
    agent_id: str
    actor: str
    verb: str
    object: str
    verdict: str
    reason: str
    details: JsonObject


@dataclass(frozen=True, slots=True)
class Output:
    """What an agent wrote; `offset` is where it begins in its stream."""

    stream: Stream
    data: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that was run inside an agent's sandbox to its end."""

    status: ExitStatus
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class Verification:
    ok: bool
    size: int
    root: bytes
    problem: str
    redacted: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    version: int
    digest: str
    risk: str
    extends: str
    filename: str
    scopes: tuple[str, ...]
    problem: str = ""  # why its file is no usable policy


@dataclass(frozen=True, slots=True)
class PolicyProblem:
    filename: str
    line: int
    column: int
    key: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Explanation:
    allowed: bool
    reason: str
    grant_id: str
    steps: tuple[str, ...]
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    control: str
    present: bool
    required: bool
    how: str
    remedy: str
    source: str
    protects: str
    absence: str


@dataclass(frozen=True, slots=True)
class Proof:
    """That an entry is in the tree of a checkpoint (RFC 6962 §2.1.1)."""

    entry: bytes
    leaf_index: int
    audit_path: tuple[bytes, ...]
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Consistency:
    """That the log of `size` entries is the continuation of that of `old_size` (RFC 6962 section 2.1.2)."""

    old_size: int
    old_root: bytes
    size: int
    root: bytes
    path: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Reach:
    """What an agent may reach by definition and policy: `ro:/path`, `host:port`, models, `server/tool`."""

    files: tuple[str, ...]
    hosts: tuple[str, ...]
    models: tuple[str, ...]
    tools: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Definition:
    """One version of an agent in the registry. `risk` is high, limited, minimal, or empty where nobody said."""

    name: str
    version: int
    digest: str
    owner: str
    purpose: str
    risk: str
    contact: str
    policy: str
    models: tuple[str, ...]
    data: tuple[str, ...]
    scopes: tuple[str, ...]
    reach: Reach
    labels: Mapping[str, str]
    registered_by: str
    registered_at: datetime | None
    deprecated: str
    deprecated_by: str
    deprecated_at: datetime | None
    problem: str

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class ReviewFinding:
    """Something to look at; `kind` is a stable word such as `unused-grant`."""

    kind: str
    subject: str
    agent_id: str
    owner: str
    detail: str
    remedy: str


@dataclass(frozen=True, slots=True)
class RunningAgent:
    """A live agent and what it can do now. What `budget` does not name is not bounded."""

    agent: AgentInfo
    risk: str
    policy_risk: str
    contact: str
    deprecated: str
    grants: tuple[Grant, ...]
    budget: Mapping[str, float]
    budget_left: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class DaemonVersion:
    version: str
    instance: str
    kernel: str
    python: str
    started_at: datetime | None
