"""The messages between daemon and egress worker, daemon and dialer, dialer and worker. No I/O.

Every channel is a SOCK_SEQPACKET pair with one frame a packet and at most one descriptor beside it; `encode` and
`decode` make and read the frames. Descriptors travel with `Listen`, `Gate`, `Listener`, `AttachWorker` and
`UpstreamReady`.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from gateway_client.egress.codec import BadFrame, decode, encode, frame_bytes_max
from gateway_client.egress.decide import Allow, Refuse, Reply, Upstream, Verdict
from gateway_client.egress.request import EgressRequest

__all__ = [
    "CUT",
    "FROM_DAEMON_TO_DIALER",
    "FROM_DAEMON_TO_WORKER",
    "FROM_DIALER_TO_DAEMON",
    "FROM_DIALER_TO_WORKER",
    "FROM_WORKER_TO_DAEMON",
    "FROM_WORKER_TO_DIALER",
    "Allow",
    "Answer",
    "Ask",
    "AttachWorker",
    "Authority",
    "BadFrame",
    "Configure",
    "ConfigureDialer",
    "Cut",
    "CutDone",
    "CutExchanges",
    "CutUpstreams",
    "Dial",
    "Dialed",
    "DialerReady",
    "Done",
    "EgressRequest",
    "ExchangesCut",
    "Forget",
    "ForwardMode",
    "Freeze",
    "Gate",
    "HttpVersion",
    "Lend",
    "Limits",
    "Listen",
    "Listener",
    "Moved",
    "Outcome",
    "Preface",
    "Ready",
    "Refuse",
    "Rejected",
    "Reply",
    "Thaw",
    "Unlisten",
    "Upstream",
    "UpstreamFailed",
    "UpstreamReady",
    "Usage",
    "Verdict",
    "decode",
    "encode",
    "frame_bytes_max",
    "xs_per_cut_max",
]


xs_per_cut_max: Final = 2048
"""Exchanges that one `Cut` or `CutExchanges` names at most, so that its frame fits (an x has up to 20 digits)."""


class ForwardMode(StrEnum):
    """How a connection to a host other than the gateway's API is opened."""

    NONE = "none"
    PREFACE = "preface"
    """The embedded gateway: the dialer's preface names the destination; the gateway answers a byte, then it is raw."""
    PROXY = "proxy"
    """A forward proxy of the operator's: absolute-form and CONNECT."""


class HttpVersion(StrEnum):
    """What a host speaks, by its name in ALPN (RFC 7301)."""

    HTTP11 = "http/1.1"
    HTTP2 = "h2"


CUT: Final = "cut"
"""The error of a `Dialed` and of an `Outcome` that was ordered to end, and failed nowhere."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker takes from an agent at most; times are seconds."""

    connections_per_agent_max: int = 256
    exchanges_per_worker_max: int = 4096
    header_bytes_max: int = 64 * 1024
    header_count_max: int = 128
    request_line_bytes_max: int = 16 * 1024
    model_body_bytes_max: int = 16 * 1024 * 1024
    buffered_bytes_per_agent_max: int = 64 * 1024 * 1024
    """Of all bodies that are held whole at one time."""
    head_seconds_max: float = 15.0
    """From the first byte of a head to its last; a connection that sends nothing has `idle_seconds_max`."""
    body_seconds_max: float = 60.0
    """Between two reads of a body."""
    idle_seconds_max: float = 120.0
    """Without a request on a kept connection."""
    answer_seconds_max: float = 30.0
    """For the daemon to answer an ask (it may set this higher where humans answer)."""
    dial_seconds_max: float = 15.0
    response_idle_seconds_max: float = 600.0
    """Without a byte from the gateway: a model may think for minutes."""
    tunnel_idle_seconds_max: float = 3600.0


# --- daemon -> worker


@dataclass(frozen=True, slots=True)
class Configure:
    """How to talk to the gateway. Sent once, before the first `Listen`; the credential is in no other message."""

    gateway: str
    """The kind: embedded, litellm or openai."""
    host: str
    """The value of the Host header to the gateway."""
    base_path: str = ""
    """Prefix of every path at the gateway, without a trailing slash; `/v1` is not part of it."""
    credential: str = ""
    tls_server_name: str | None = None
    """Not None: speak TLS to the gateway and verify this name."""
    forward_mode: ForwardMode = ForwardMode.NONE
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Authority:
    """What certificates for one agent are signed with, both PEM. That agent trusts it, and nobody else does."""

    certificate: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Listen:
    """Serve the listening socket that comes with it: whoever connects there is this agent."""

    agent_id: str
    name: str
    labels: dict[str, str] = field(default_factory=dict)
    authority: Authority | None = None
    """None: TLS of this agent cannot be looked into."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Serve one more socket of an agent whose network is transparent, after its `Listen`; the socket comes with it.

    `port` is what its connections are for; 0: it is the datagram socket of the name server, and connections to the gate
    at 53 are for that too.
    """

    agent_id: str
    port: int


@dataclass(frozen=True, slots=True)
class Unlisten:
    """Stop accepting for an agent and reset what it has open."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The daemon's word on the ask with this `x`."""

    x: int
    verdict: Allow | Refuse | Reply


@dataclass(frozen=True, slots=True)
class Lend:
    """So many more bytes of an agent's budget may pass: they are set aside. `last`: that was all there is now."""

    agent_id: str
    count: int
    last: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """Reset open exchanges and relays at once: all of an agent, or those named by `xs`."""

    agent_id: str = ""
    xs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Freeze:
    """Answer 503 to new requests of an agent and stop relaying what is open, until `Thaw`."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class Thaw:
    agent_id: str


# --- worker -> daemon


@dataclass(frozen=True, slots=True)
class Ready:
    """Sent once, after the process has given up everything it gives up."""

    pid: int
    uid: int
    posture: tuple[str, ...]
    """Facts such as `netns`, `seccomp`, `no_new_privs`, `capabilities=0`."""


@dataclass(frozen=True, slots=True)
class Ask:
    """May this be done? Nothing goes upstream before the answer."""

    x: int
    agent_id: str
    request: EgressRequest


@dataclass(frozen=True, slots=True)
class Usage:
    """What a model call used; `cost_usd` None where nobody said, `estimated` where it was computed, not reported."""

    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None
    estimated: bool = False
    answered_model: str = ""
    """What the answer says it comes from: a gateway may have sent the call elsewhere."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an exchange that was asked about ended. Sent exactly once for every `Ask`, also refused ones."""

    x: int
    agent_id: str
    status: int
    """What the agent got; 0 where it got no status (reset, cut, tunnel)."""
    bytes_up: int
    bytes_down: int
    duration_ms: int
    usage: Usage | None = None
    request_sha256: str = ""
    response_sha256: str = ""
    error: str = ""
    grant_spent: bool = False
    """Whether it met the end of the bytes that its grant lets pass."""
    first_byte_ms: int | None = None
    """From the question to the first byte of the answer's body."""
    guardrails: str = ""
    """What the gateway's headers say its own guardrails did."""
    protocol: HttpVersion | None = None
    """What was spoken with a host in TLS that ended here."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What passed of the bytes lent since it was last told, what is given back, and how many more are asked for."""

    agent_id: str
    used: int
    back: int
    want: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The worker alone answered malformed input. At most one a second for an agent; it stands for `count`."""

    agent_id: str
    status: int
    reason_code: str
    detail: str
    count: int


# --- daemon -> dialer


@dataclass(frozen=True, slots=True)
class ConfigureDialer:
    """The one or two destinations, fixed from the first message on: `unix:/path` or `host:port`."""

    gateway: str
    forward_proxy: str = ""
    connect_seconds_max: float = 10.0


@dataclass(frozen=True, slots=True)
class AttachWorker:
    """The dialer's end of a worker's channel comes with it."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Preface:
    """What the embedded gateway is told about a connection, on the daemon's word (PROXY v2, TLV 0xE0, JSON)."""

    agent_id: str
    name: str
    x: int
    allow: str
    """`api`, `http://host:port` or `tcp:host:port`."""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect and pass the socket to the worker, tagged with `x`."""

    worker_id: str
    x: int
    agent_id: str
    upstream: Upstream
    preface: Preface | None = None


@dataclass(frozen=True, slots=True)
class CutUpstreams:
    """shutdown(2) every upstream socket and every listener of an agent, with no co-operation of a worker."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class CutExchanges:
    """shutdown(2) the upstream sockets of these exchanges of a worker, with no co-operation of the worker.

    Answered by `ExchangesCut` with the same `token` once none of them can carry a byte any more.
    """

    worker_id: str
    xs: tuple[int, ...]
    token: int


@dataclass(frozen=True, slots=True)
class Listener:
    """A duplicate of an agent's listening socket comes with it, for `CutUpstreams`."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop what is kept of an agent; implies nothing is open any more."""

    agent_id: str


# --- dialer -> daemon


@dataclass(frozen=True, slots=True)
class DialerReady:
    pid: int
    uid: int
    posture: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dialed:
    worker_id: str
    x: int
    ok: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class CutDone:
    """`bytes_waiting` had come for the agent and had not been taken further."""

    agent_id: str
    relays: int
    bytes_waiting: int
    listeners: int
    ms: float


@dataclass(frozen=True, slots=True)
class ExchangesCut:
    token: int
    relays: int


# --- dialer <-> worker


@dataclass(frozen=True, slots=True)
class UpstreamReady:
    """The connected socket comes with it."""

    x: int


@dataclass(frozen=True, slots=True)
class UpstreamFailed:
    x: int
    error: str


@dataclass(frozen=True, slots=True)
class Done:
    """The worker has closed its upstream socket: the dialer may drop the duplicate."""

    x: int


FromDaemonToWorker = Configure | Listen | Gate | Unlisten | Answer | Lend | Cut | Freeze | Thaw
FromWorkerToDaemon = Ready | Ask | Outcome | Moved | Rejected
FromDaemonToDialer = ConfigureDialer | AttachWorker | Dial | CutUpstreams | CutExchanges | Listener | Forget
FromDialerToDaemon = DialerReady | Dialed | CutDone | ExchangesCut
FromDialerToWorker = UpstreamReady | UpstreamFailed
FromWorkerToDialer = Done

FROM_DAEMON_TO_WORKER: Final[tuple[type[Any], ...]] = typing.get_args(FromDaemonToWorker)
FROM_WORKER_TO_DAEMON: Final[tuple[type[Any], ...]] = typing.get_args(FromWorkerToDaemon)
FROM_DAEMON_TO_DIALER: Final[tuple[type[Any], ...]] = typing.get_args(FromDaemonToDialer)
FROM_DIALER_TO_DAEMON: Final[tuple[type[Any], ...]] = typing.get_args(FromDialerToDaemon)
FROM_DIALER_TO_WORKER: Final[tuple[type[Any], ...]] = typing.get_args(FromDialerToWorker)
FROM_WORKER_TO_DIALER: Final[tuple[type[Any], ...]] = (Done,)
