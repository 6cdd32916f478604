"""The configuration as a frozen value; config_reader.py makes it out of stockade.toml (pure)."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from sandbox.images.limits import ImageLimits
from supervisord.budgets import LabelBudget

# Clear of the ranges systemd gives to containers, dynamic users and homes (systemd.io/UIDS-GIDS).
UID_FIRST: Final = 1879048192
UID_LAST: Final = 2147352575
UIDS_PER_AGENT: Final = 65536

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class GatewayKind(Enum):
    EMBEDDED = "embedded"
    LITELLM = "litellm"
    OPENAI = "openai"


class ModelKind(Enum):
    SCRIPTED = "scripted"
    LOCAL = "local"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class GuardrailAction(Enum):
    BLOCK = "block"
    MASK = "mask"


class GuardrailDirection(Enum):
    REQUEST = "request"
    RESPONSE = "response"
    BOTH = "both"


class Durability(Enum):
    BATCHED = "batched"
    STRICT = "strict"


class SinkKind(Enum):
    JSONL = "jsonl"
    OCSF = "ocsf"
    SYSLOG = "syslog"
    OTLP = "otlp"


class OnStop(Enum):
    LEAVE = "leave"
    KILL = "kill"


class Role(Enum):
    """What a caller may do: READER looks, OPERATOR also acts, ADMIN may also go beyond a policy's limits."""

    READER = "reader"
    OPERATOR = "operator"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """Where the embedded gateway sends the calls to models whose name the glob `name` matches.

    `listed` are the names shown by /models, `model` is the name the provider knows (empty: the same), `responses` says
    whether an OpenAI-compatible provider has /responses, `path` and `context_tokens` are for kind local. Prices are US
    dollars for a million tokens; None is unknown.
    """

    name: str
    kind: ModelKind
    url: str = ""
    model: str = ""
    key_file: Path | None = None
    script: Path | None = None
    listed: tuple[str, ...] = ()
    responses: bool = True
    path: Path | None = None
    context_tokens: int = 4096
    input_usd_per_mtok: float | None = None
    output_usd_per_mtok: float | None = None


@dataclass(frozen=True, slots=True)
class Guardrail:
    """What the embedded gateway looks for in questions or answers. `own` are an operator's patterns."""

    name: str
    action: GuardrailAction = GuardrailAction.BLOCK
    direction: GuardrailDirection = GuardrailDirection.BOTH
    patterns: tuple[str, ...] = ()
    own: Mapping[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True)
class McpServer:
    """An MCP server behind the embedded gateway, which sends it the key."""

    name: str
    url: str
    credential_file: Path | None = None


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """`hosts` pins names to `ip` or `ip:port`; `allow_networks` opens private destinations to granted names.

    `ca_file` has authorities beside the host's that the gateway and hosts of https scopes are verified with.
    """

    kind: GatewayKind = GatewayKind.EMBEDDED
    url: str = "http://127.0.0.1:4000"
    credential_file: Path | None = None
    forward_proxy: str = ""
    models: tuple[ModelRoute, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    mcp: tuple[McpServer, ...] = ()
    probe_seconds: float = 5.0
    hosts: Mapping[str, str] = field(default_factory=dict)
    allow_networks: tuple[Network, ...] = ()
    ca_file: Path | None = None


@dataclass(frozen=True, slots=True)
class SinkConfig:
    """Where entries of the log go, too: `path` of a file, `address` of a syslog, or `url` of an OTLP collector.

    Over TLS the receiver is always verified: by `ca_file` alone where there is one, else by the host's authorities.
    `cert_file` and `key_file` are what it is shown.
    """

    name: str
    kind: SinkKind
    path: Path | None = None
    address: str = ""
    url: str = ""
    header_file: Path | None = None
    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Sealed segments are kept `keep_days` and up to `keep_bytes` together; 0 is for ever."""

    durability: Durability = Durability.BATCHED
    checkpoint_entries: int = 1000
    checkpoint_seconds: float = 60.0
    witness_dir: Path | None = None
    keep_days: int = 0
    keep_bytes: int = 0
    sinks: tuple[SinkConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """`roles` maps `cn:NAME` or a SPIFFE URI of a client certificate to what it may do."""

    group: str = "stockade"
    read_only_others: bool = False
    tcp_listen: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestsConfig:
    """Where each request of an agent's, and what becomes of it, is told; empty: nowhere."""

    webhook_url: str = ""
    webhook_secret_file: Path | None = None


@dataclass(frozen=True, slots=True)
class UsersConfig:
    egress: str = "stockade-egress"
    dialer: str = "stockade-dialer"
    gateway: str = "stockade-gateway"
    images: str = "stockade-images"
    webhook: str = "stockade-webhook"
    sinks: str = "stockade-sinks"


@dataclass(frozen=True, slots=True)
class AgentsConfig:
    """`uid_first` and `uid_last` bound the ids that agents get, both inclusive.

    Output of ended agents is kept up to `output_keep_bytes` together and `output_days` each.
    """

    on_stop: OnStop = OnStop.LEAVE
    uid_first: int = UID_FIRST
    uid_last: int = UID_LAST
    output_keep_bytes: int = 256 << 20
    output_days: int = 30


@dataclass(frozen=True, slots=True)
class ScratchConfig:
    """Images for what agents write (`<state_dir>/scratch`): what stays free there, and how long a layer is kept."""

    reserve_bytes: int = 256 << 20
    preallocate: bool = False
    keep_layers_seconds: float = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Config:
    instance: str = "default"
    state_dir: Path = Path("/var/lib/stockade")
    run_dir: Path = Path("/run/stockade")
    policy_dirs: tuple[Path, ...] = (Path("/etc/stockade/policies"),)
    gateway: GatewayConfig = GatewayConfig()
    log: LogConfig = LogConfig()
    control: ControlConfig = ControlConfig()
    requests: RequestsConfig = RequestsConfig()
    users: UsersConfig = UsersConfig()
    agents: AgentsConfig = AgentsConfig()
    scratch: ScratchConfig = ScratchConfig()
    images: ImageLimits = field(default_factory=ImageLimits)
    budgets: tuple[LabelBudget, ...] = ()
    pool_netns: int = 4
    pool_images: int = 2
    egress_workers: int = 1
    source: str = ""

    @property
    def scratch_dir(self) -> Path:
        return self.state_dir / "scratch"
