"""Policies and agents: typed values out of checked YAML documents (pure: the text and the schema are passed in)."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import PurePosixPath
from typing import Final, TypeVar

from jsonschema import Draft202012Validator

from gateway_client.egress.scope import Scope, parse_scope
from supervisord import budgets, ids, sizes
from supervisord.budgets import NO_BUDGET, Budget
from supervisord.documents import Document, InvalidDocument, Path, Problem, check_schema, parse_document
from supervisord.errors import InvalidInput

MEMORY_BYTES_MIN: Final = 16 << 20
OUTPUT_BYTES_MIN: Final = 64 << 10


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


@dataclass(frozen=True, slots=True)
class Limits:
    memory_bytes: int = 1 << 30
    cpus: float = 1.0
    pids: int = 256
    disk_bytes: int = 1 << 30
    open_files: int = 4096
    output_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class LimitsWanted:
    """The limits a launch or an agent file asks for; None keeps the policy's."""

    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None
    disk_bytes: int | None = None
    open_files: int | None = None
    output_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class EgressRules:
    on_deny: OnDeny = OnDeny.DENY
    transparent: bool = False
    worker: Worker = Worker.SHARED


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy after `extends` was followed.

    `digest` is `sha256:…` over everything that has an effect, so two policies with one digest contain alike.
    `rootfs` is None for the host's own, else a directory, OCI layout or archive on the host. `ceiling` bounds what may
    ever be granted; None is no bound. `degraded_ok` names controls a host may lack.
    """

    name: str
    version: int = 1
    description: str = ""
    risk: Risk = Risk.LIMITED
    extends: str | None = None
    widen: Mapping[str, str] = field(default_factory=dict)
    user: User = User.AGENT
    rootfs: PurePosixPath | None = None
    hide: tuple[PurePosixPath, ...] = ()
    home: Home = Home.EPHEMERAL
    allow_root_owned: bool = False
    limits: Limits = Limits()
    budget: Budget = NO_BUDGET
    scopes: tuple[Scope, ...] = ()
    ceiling: tuple[Scope, ...] | None = None
    egress: EgressRules = EgressRules()
    env: Mapping[str, str] = field(default_factory=dict)
    seccomp: str = "default"
    landlock: Demand = Demand.PREFERRED
    on_supervisor_loss: OnLoss = OnLoss.CONTAIN
    degraded_ok: frozenset[str] = frozenset()
    canary: bool = False
    digest: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Workspace:
    path: PurePosixPath
    writable: bool


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent as its owner declares it; what it asks for is still bounded by its policy."""

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
    digest: str = ""
    source: str = ""
