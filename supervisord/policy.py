"""Policies and agents as typed values, and how one policy compares with another (pure)."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePosixPath
from typing import Final

import yaml

from gateway_client.egress.scope import Scope, format_scope, includes
from sandbox.plan import NO_RATE, Record
from supervisord.budgets import NO_BUDGET, STRICTNESS, Budget, OnExhausted
from supervisord.sizes import format_duration, format_size


class Risk(Enum):
    MINIMAL = "minimal"
    LIMITED = "limited"
    HIGH = "high"


class OnDeny(Enum):
    DENY = "deny"
    ASK = "ask"


class Worker(Enum):
    SHARED = "shared"
    DEDICATED = "dedicated"


class OnLoss(Enum):
    CONTAIN = "contain"
    KILL = "kill"


class Home(Enum):
    EPHEMERAL = "ephemeral"
    PERSISTENT = "persistent"


class User(Enum):
    AGENT = "agent"
    ROOT = "root"


class Demand(Enum):
    REQUIRED = "required"
    PREFERRED = "preferred"


class Registered(Enum):
    OPTIONAL = "optional"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Limits:
    memory_bytes: int = 1 << 30
    cpus: float = 1.0
    pids: int = 256
    disk_bytes: int = 1 << 30
    open_files: int = 4096
    output_bytes: int = 64 << 20
    swap_bytes: int = 0
    io_read_bytes_per_second: int = NO_RATE
    io_write_bytes_per_second: int = NO_RATE


@dataclass(frozen=True, slots=True)
class LimitsWanted:
    """The limits a launch or an agent file asks for; None keeps the policy's."""

    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None
    disk_bytes: int | None = None
    open_files: int | None = None
    output_bytes: int | None = None
    swap_bytes: int | None = None
    io_read_bytes_per_second: int | None = None
    io_write_bytes_per_second: int | None = None


@dataclass(frozen=True, slots=True)
class EgressRules:
    on_deny: OnDeny = OnDeny.DENY
    transparent: bool = False
    worker: Worker = Worker.SHARED
    hold_seconds: float = 300.0
    """How long a denied call waits for a human with `on_deny: ask`."""


@dataclass(frozen=True, slots=True)
class GrantRules:
    """What it takes to be granted more: how many people, and how often an agent may bother them.

    With `separation` nobody who launched the agent is one of those people. `ask_again_seconds` is how long a scope that
    was denied is denied again without asking.
    """

    approvers: int = 1
    separation: bool = False
    asks_per_minute: int = 12
    ask_again_seconds: float = 600.0

    @property
    def second_person(self) -> bool:
        """Whether nobody can give an agent of this policy anything alone."""
        return self.separation or self.approvers > 1


@dataclass(frozen=True, slots=True)
class RootfsName:
    """A root file system other than the host's: a path on the host, and which image of it where it has several."""

    path: PurePosixPath
    selector: str = ""
    """A tag, a full name, or `sha256:…`; empty where there is one image, or none at all (a plain directory)."""

    @classmethod
    def parse(cls, text: str) -> "RootfsName":
        found = _SELECTOR.fullmatch(text)
        if found is None:
            return cls(PurePosixPath(text))
        return cls(PurePosixPath(found["path"]), found["tag"] or found["digest"])

    def __str__(self) -> str:
        mark = "@" if self.selector.startswith("sha256:") else "#"
        return f"{self.path}{mark}{self.selector}" if self.selector else str(self.path)


_SELECTOR: Final = re.compile(
    r"(?P<path>/.*)(?:#(?P<tag>[A-Za-z0-9_][A-Za-z0-9._/:-]{0,255})|@(?P<digest>sha256:[0-9a-f]{64}))",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy after `extends` was followed.

    `digest` is `sha256:…` over everything that has an effect, so two policies with one digest contain alike.
    `rootfs` is None for the host's own, else a directory, OCI layout or archive on the host. `ceiling` bounds what may
    ever be granted; None is no bound. `require` names controls that a host must have, `degraded_ok` those it may lack;
    what is in both must be there.
    """

    name: str
    version: int = 1
    description: str = ""
    risk: Risk = Risk.LIMITED
    extends: str | None = None
    widen: Mapping[str, str] = field(default_factory=dict)
    user: User = User.AGENT
    rootfs: RootfsName | None = None
    hide: tuple[PurePosixPath, ...] = ()
    home: Home = Home.EPHEMERAL
    allow_root_owned: bool = False
    allow_sockets: bool = False
    shared_workspace: bool = False
    limits: Limits = Limits()
    budget: Budget = NO_BUDGET
    on_exhausted: OnExhausted = OnExhausted.DENY
    scopes: tuple[Scope, ...] = ()
    ceiling: tuple[Scope, ...] | None = None
    grants: GrantRules = GrantRules()
    egress: EgressRules = EgressRules()
    env: Mapping[str, str] = field(default_factory=dict)
    etc: Mapping[str, str] = field(default_factory=dict)
    seccomp: str = "default"
    landlock: Demand = Demand.PREFERRED
    disk_quota: Demand = Demand.PREFERRED
    on_supervisor_loss: OnLoss = OnLoss.CONTAIN
    require: frozenset[str] = frozenset()
    degraded_ok: frozenset[str] = frozenset()
    canary: bool = False
    registered: Registered = Registered.OPTIONAL
    record: Record = field(default_factory=Record)
    digest: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Workspace:
    """`overlay`: the agent writes to a layer, and the directory stays as it is until somebody applies that."""

    path: PurePosixPath
    writable: bool
    overlay: bool = False

    @property
    def mode(self) -> str:
        return "overlay" if self.overlay else "rw" if self.writable else "ro"


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent as its owner declares it; what it asks for is still bounded by its policy.

    `risk` is its class as in the EU AI Act (Regulation 2024/1689), None where nobody has said; `models` and `data` say
    what it is meant to use and reach, `deprecated` why it should not be launched any more (empty: it may be).
    """

    name: str
    version: int = 1
    owner: str = ""
    purpose: str = ""
    policy: str = "default"
    command: tuple[str, ...] = ()
    workspace: Workspace | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    limits: LimitsWanted = LimitsWanted()
    budget: Budget = NO_BUDGET
    scopes: tuple[Scope, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    risk: Risk | None = None
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    contact: str = ""
    deprecated: str = ""
    digest: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class RegisteredAs:
    """Which definition of the registry a launch follows; `beyond` names in what it asks for more than that."""

    name: str
    version: int
    digest: str
    deprecated: str = ""
    beyond: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


NO_RATE_WORD: Final = "none"
RISKS: Final = (Risk.MINIMAL, Risk.LIMITED, Risk.HIGH)
_LIMIT_KEYS: Final = {
    "memory_bytes": "memory",
    "cpus": "cpus",
    "pids": "pids",
    "disk_bytes": "disk",
    "open_files": "open_files",
    "output_bytes": "output",
    "swap_bytes": "swap",
    "io_read_bytes_per_second": "io_read",
    "io_write_bytes_per_second": "io_write",
}


def policy_yaml(policy: Policy) -> str:
    """Gives the policy in force as YAML, with everything that was inherited or left to a default written out."""
    shown = {"kind": "Policy", **effect(policy)}
    if policy.description:
        shown["description"] = policy.description
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=False)


def wider(policy: Policy, base: Policy) -> Iterator[str]:
    """Names every key by which a policy gives more than another."""
    for limit, key in _LIMIT_KEYS.items():
        if getattr(policy.limits, limit) > getattr(base.limits, limit):
            yield f"limits.{key}"
    within = base.ceiling is None or (
        policy.ceiling is not None and all(any(includes(wide, own) for wide in base.ceiling) for own in policy.ceiling)
    )
    checks = {
        "risk": RISKS.index(policy.risk) < RISKS.index(base.risk),
        "user": (policy.user, base.user) == (User.ROOT, User.AGENT),
        "rootfs": policy.rootfs != base.rootfs,
        "hide": not set(base.hide) <= set(policy.hide),
        "home": (policy.home, base.home) == (Home.PERSISTENT, Home.EPHEMERAL),
        "allow_root_owned": policy.allow_root_owned and not base.allow_root_owned,
        "allow_sockets": policy.allow_sockets and not base.allow_sockets,
        "shared_workspace": policy.shared_workspace and not base.shared_workspace,
        "budget": not policy.budget.narrows(base.budget),
        "budget.on_exhausted": STRICTNESS.index(policy.on_exhausted) < STRICTNESS.index(base.on_exhausted),
        "scopes": not all(any(includes(wide, own) for wide in base.scopes) for own in policy.scopes),
        "grants.ceiling": not within,
        "grants.approvers": policy.grants.approvers < base.grants.approvers,
        "grants.separation": base.grants.separation and not policy.grants.separation,
        "grants.asks_per_minute": policy.grants.asks_per_minute > base.grants.asks_per_minute,
        "grants.ask_again_after": policy.grants.ask_again_seconds < base.grants.ask_again_seconds,
        "egress.on_deny": (policy.egress.on_deny, base.egress.on_deny) == (OnDeny.ASK, OnDeny.DENY),
        "egress.transparent": policy.egress.transparent and not base.egress.transparent,
        "egress.worker": (policy.egress.worker, base.egress.worker) == (Worker.SHARED, Worker.DEDICATED),
        "seccomp": policy.seccomp != base.seccomp,
        "landlock": (policy.landlock, base.landlock) == (Demand.PREFERRED, Demand.REQUIRED),
        "disk_quota": (policy.disk_quota, base.disk_quota) == (Demand.PREFERRED, Demand.REQUIRED),
        "on_supervisor_loss": (policy.on_supervisor_loss, base.on_supervisor_loss) == (OnLoss.CONTAIN, OnLoss.KILL),
        "require": not base.require <= policy.require,
        "degraded_ok": not policy.degraded_ok <= base.degraded_ok,
        "canary": base.canary and not policy.canary,
        "registered": (policy.registered, base.registered) == (Registered.OPTIONAL, Registered.REQUIRED),
        "record.execs": base.record.execs and not policy.record.execs,
        "record.refusals": base.record.refusals and not policy.record.refusals,
        "record.arguments": base.record.execs and policy.record.arguments < base.record.arguments,
    }
    yield from (key for key, is_wider in checks.items() if is_wider)


def effect(policy: Policy) -> dict[str, object]:
    """Gives everything of a policy that has an effect, in the words of the file."""
    limits = {
        key: NO_RATE_WORD if value == NO_RATE else format_size(value) if "_bytes" in name else value
        for name, key in _LIMIT_KEYS.items()
        for value in [getattr(policy.limits, name)]
    }
    words: dict[str, object] = {
        "name": policy.name,
        "version": policy.version,
        "risk": policy.risk.value,
        "user": policy.user.value,
        "rootfs": "host" if policy.rootfs is None else str(policy.rootfs),
        "hide": [str(path) for path in policy.hide],
        "home": policy.home.value,
        "allow_root_owned": policy.allow_root_owned,
        "allow_sockets": policy.allow_sockets,
        "shared_workspace": policy.shared_workspace,
        "limits": limits,
        "budget": {**policy.budget.words(), "on_exhausted": policy.on_exhausted.value},
        "scopes": [format_scope(scope) for scope in policy.scopes],
        "egress": {
            "on_deny": policy.egress.on_deny.value,
            "transparent": policy.egress.transparent,
            "worker": policy.egress.worker.value,
            "hold": format_duration(policy.egress.hold_seconds),
        },
        "grants": {
            "approvers": policy.grants.approvers,
            "separation": policy.grants.separation,
            "asks_per_minute": policy.grants.asks_per_minute,
            "ask_again_after": format_duration(policy.grants.ask_again_seconds),
            **({} if policy.ceiling is None else {"ceiling": [format_scope(scope) for scope in policy.ceiling]}),
        },
        "env": dict(sorted(policy.env.items())),
        "etc": dict(sorted(policy.etc.items())),
        "seccomp": policy.seccomp,
        "landlock": policy.landlock.value,
        "disk_quota": policy.disk_quota.value,
        "on_supervisor_loss": policy.on_supervisor_loss.value,
        "require": sorted(policy.require),
        "degraded_ok": sorted(policy.degraded_ok),
        "canary": policy.canary,
        "registered": policy.registered.value,
        "record": {
            "execs": policy.record.execs,
            "refusals": policy.record.refusals,
            "arguments": policy.record.arguments,
        },
    }
    return words


def digest(words: Mapping[str, object]) -> str:
    text = json.dumps(words, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
