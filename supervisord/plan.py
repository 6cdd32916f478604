"""What one launch comes to: an order and a policy in, a `SandboxPlan` out (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from gateway_client.egress.scope import FsScope, Scope, format_scope
from sandbox import plan as sandbox_plan
from sandbox.decoding import InvalidPlan
from sandbox.plan import (
    AGENT_INSIDE,
    IDS_PER_AGENT,
    RESERVED_TOPS,
    ROOT_INSIDE,
    EtcFile,
    IdRange,
    SandboxPlan,
    Scratch,
    Tty,
    check_bind,
)
from supervisord.budgets import Budget
from supervisord.errors import InvalidInput, PermissionDenied
from supervisord.ids import shown
from supervisord.policy import Demand, Home, Limits, LimitsWanted, Policy, RegisteredAs, User, Workspace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GATEWAY_NAME: Final = "gateway.internal"
PLACEHOLDER_KEY: Final = "stockade-placeholder-the-gateway-has-the-key"
COMMAND_BYTES_MAX: Final = 256 << 10
ENVIRONMENT_BYTES_MAX: Final = 256 << 10
SCOPES_MAX: Final = 256
CA_BUNDLE: Final = "/etc/stockade/ca-bundle.pem"
CA_CERTIFICATE: Final = "/etc/stockade/ca.pem"
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What the sandbox says of itself; a caller may set anything else.
RESERVED_VARIABLES: Final = frozenset({"STOCKADE_AGENT_ID", "STOCKADE_GATEWAY_URL"})


@dataclass(frozen=True, slots=True)
class LaunchOrder:
    """What a caller asks for, decoded and checked; None and empty mean: as the policy says."""

    command: tuple[str, ...]
    name: str = ""
    policy: str = "default"
    workspace: Workspace | None = None
    scopes: tuple[Scope, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    limits: LimitsWanted = field(default_factory=LimitsWanted)
    budget: Budget = field(default_factory=Budget)
    env: Mapping[str, str] = field(default_factory=dict)
    tty: Tty | None = None
    stdin: bool = False
    owner: str = ""
    purpose: str = ""
    registered: RegisteredAs | None = None
    lease_seconds: float = 0.0  # 0: it has none


@dataclass(frozen=True, slots=True)
class Root:
    """A root file system other than the host's, opened: what it is, and its index among the descriptors.

    `path` is the search path that an image asks for; empty where it does not.
    """

    index: int
    form: str
    source: str
    digest: str = ""
    path: str = ""


WORKSPACE: Final = PurePosixPath("/workspace")


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A host path that the sandbox shows, before it is opened; `why` is for messages."""

    path: PurePosixPath
    target: PurePosixPath
    writable: bool
    why: str
    by_policy: bool
    layer: bool = False


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """The same after it was opened: its owner on disk, and its index among the descriptors."""

    wanted: WantedFile
    index: int
    owner_uid: int
    owner_gid: int


def wanted_files(order: LaunchOrder, policy: Policy) -> tuple[WantedFile, ...]:
    """Every host path the launch needs, the policy's own first; raises InvalidInput where two claim one place."""
    files = [_wanted(scope, by_policy=True) for scope in policy.scopes if isinstance(scope, FsScope)]
    files += [_wanted(scope, by_policy=False) for scope in order.scopes if isinstance(scope, FsScope)]
    if order.workspace is not None:
        files.append(
            WantedFile(
                order.workspace.path,
                WORKSPACE,
                order.workspace.writable,
                "workspace",
                by_policy=False,
                layer=order.workspace.overlay,
            )
        )
    seen: dict[PurePosixPath, WantedFile] = {}
    for file in files:
        other = seen.setdefault(file.target, file)
        if other is not file and other.path != file.path:
            raise InvalidInput(
                f"cannot show {file.path} at {file.target}: {other.path} is there",
                remedy="give one of them another place: fs:ro:/host/path=/in/agent",
            )
    return tuple(seen.values())


GRANTS: Final = PurePosixPath("/grants")
# Where an agent has files of its own: what it may move about is no place for a bind into a running sandbox.
_AGENTS_OWN: Final = (PurePosixPath("/home/agent"), WORKSPACE, GRANTS)
_LINKS: Final = frozenset({"lib32", "libx32"})


def live_scope(scope: FsScope) -> FsScope:
    """The scope with the place in a running sandbox where its path will be, written out where it is another one.

    The host's path itself, or below /grants where that would cover a part of the sandbox or be in a directory of the
    agent's own. Raises InvalidInput for a place that cannot be.
    """
    target = scope.inside
    if target is None:
        path = scope.host_path
        top = path.parts[1] if len(path.parts) > 1 else ""
        covered = top in RESERVED_TOPS | _LINKS or any(path.is_relative_to(own) for own in _AGENTS_OWN)
        target = GRANTS.joinpath(*path.parts[1:]) if covered else path
    try:
        check_bind("scope", sandbox_plan.Bind(0, str(target), writable=False, owner_uid=0, owner_gid=0))
    except InvalidPlan as error:
        raise InvalidInput(f"cannot grant {format_scope(scope)}: {error}", remedy=_ELSEWHERE) from error
    if target == GRANTS or any(target.is_relative_to(own) for own in _AGENTS_OWN[:2]):
        raise InvalidInput(
            f"cannot grant {format_scope(scope)}: {target} belongs to the agent or to the sandbox", remedy=_ELSEWHERE
        )
    return replace(scope, inside=None if target == scope.host_path else target)


_ELSEWHERE: Final = "choose another place: fs:ro:/host/path=/grants/name"


def live_bind(file: OpenedFile, policy: Policy) -> sandbox_plan.Bind:
    """What the launcher is to bind into a running sandbox; raises PermissionDenied as a launch would."""
    return _bind(file, policy)


def wanted_file(scope: FsScope) -> WantedFile:
    """What somebody wants an agent to see; it is theirs to give, or not."""
    return _wanted(scope, by_policy=False)


def place_of(scope: FsScope) -> PurePosixPath:
    """Where the agent finds it."""
    return scope.inside or scope.host_path


def effective_limits(policy: Policy, wanted: LimitsWanted) -> Limits:
    """The limits in force; raises PermissionDenied for more than the policy gives, InvalidInput for too little."""
    chosen: dict[str, int | float] = {}
    for name in Limits.__slots__:
        ours, theirs = getattr(policy.limits, name), getattr(wanted, name)
        if theirs is not None and theirs > ours:
            raise PermissionDenied(
                f"cannot launch with {name} {theirs}: policy {policy.name} gives {ours} at most",
                remedy="ask for less, or choose a policy with a higher limit (`stockadectl policy list`)",
            )
        least = sandbox_plan.LIMIT_RANGES[name][0]
        if theirs is not None and not theirs >= least:  # so that what is no number is refused too
            raise InvalidInput(f"cannot launch with {name} {theirs}: {least} is the least", remedy="ask for more")
        chosen[name] = ours if theirs is None else theirs
    return Limits(**chosen)  # type: ignore[arg-type]


def check_order(order: LaunchOrder) -> None:
    """Hold the order against the limits of what a caller may send; raises InvalidInput."""
    if not order.command or not order.command[0]:
        raise InvalidInput("cannot launch: there is no command", remedy="write it after --, say `-- python3 agent.py`")
    if sum(len(part.encode("utf-8", "surrogateescape")) + 1 for part in order.command) > COMMAND_BYTES_MAX:
        raise InvalidInput(
            f"cannot launch: the command is longer than {COMMAND_BYTES_MAX} bytes",
            remedy="put what is long into a file of the workspace",
        )
    if sum(len(key) + len(value) + 2 for key, value in order.env.items()) > ENVIRONMENT_BYTES_MAX:
        raise InvalidInput(
            f"cannot launch: the environment is longer than {ENVIRONMENT_BYTES_MAX} bytes", remedy="shorten it"
        )
    for key, value in order.env.items():
        if key in RESERVED_VARIABLES or not key or "=" in key or "\0" in key + value:
            raise InvalidInput(
                f"cannot set variable {shown(key)}: it is the sandbox's own, or no name of a variable",
                remedy="choose another name",
            )
    if any("\0" in part for part in order.command):
        raise InvalidInput("cannot launch: the command has a NUL byte", remedy="leave it out")
    if len(order.scopes) > SCOPES_MAX:
        raise InvalidInput(f"cannot launch with {len(order.scopes)} scopes: {SCOPES_MAX} at most", remedy="use globs")


def build(
    order: LaunchOrder,
    policy: Policy,
    *,
    agent_id: str,
    name: str,
    instance: str,
    id_first: int,
    slot: int,
    files: Sequence[OpenedFile],
    filter_digest: str,
    root: Root | None = None,
    ca_certificate: str | None = None,
) -> SandboxPlan:
    """Gives the plan of the launch; raises PermissionDenied or InvalidInput with the remedy."""
    limits = effective_limits(policy, order.limits)
    inside = ROOT_INSIDE if policy.user is User.ROOT else AGENT_INSIDE
    return SandboxPlan(
        agent_id=agent_id,
        instance=instance,
        hostname=name.replace(".", "-").replace("_", "-")[:63].strip("-") or "agent",
        argv=order.command,
        env=_environment(order, policy, agent_id=agent_id, path="" if root is None else root.path),
        ids=IdRange(id_first + slot * IDS_PER_AGENT),
        uid=inside,
        gid=inside,
        rootfs=_rootfs(root),
        binds=tuple(_bind(file, policy) for file in files),
        hide=tuple(str(path) for path in policy.hide),
        scratch=_scratch(limits, required=_needs_disk(policy, files)),
        home=name if policy.home is Home.PERSISTENT else None,
        ca_certificate=ca_certificate,
        network=sandbox_plan.Network(transparent=policy.egress.transparent),
        etc=tuple(EtcFile(name, text) for name, text in policy.etc.items()),
        limits=sandbox_plan.Limits(**{key: getattr(limits, key) for key in Limits.__slots__}),
        filter_digest=filter_digest,
        landlock="required" if policy.landlock is Demand.REQUIRED else "if-present",
        require=tuple(sorted(policy.require)),
        degraded_ok=tuple(sorted(policy.degraded_ok)),
        canary=policy.canary,
        tty=order.tty,
        stdin=order.stdin,
        record=policy.record,
    )


def _rootfs(root: Root | None) -> sandbox_plan.Rootfs:
    if root is None:
        return sandbox_plan.Rootfs()
    return sandbox_plan.Rootfs("directory", root.index, form=root.form, source=root.source, digest=root.digest)


def _environment(order: LaunchOrder, policy: Policy, *, agent_id: str, path: str) -> tuple[tuple[str, str], ...]:
    gateway = f"http://{GATEWAY_NAME}:3128"
    own = {
        "PATH": path or PATH,
        "HOME": "/home/agent",
        "USER": "root" if policy.user is User.ROOT else "agent",
        "LOGNAME": "root" if policy.user is User.ROOT else "agent",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",  # noqa: S108 - the sandbox's own
        "HTTP_PROXY": gateway,
        "HTTPS_PROXY": gateway,
        "http_proxy": gateway,
        "https_proxy": gateway,
        "NO_PROXY": f"{GATEWAY_NAME},localhost,127.0.0.1",
        "no_proxy": f"{GATEWAY_NAME},localhost,127.0.0.1",
        "NODE_USE_ENV_PROXY": "1",
        "OPENAI_BASE_URL": f"{gateway}/v1",
        "ANTHROPIC_BASE_URL": gateway,
        "OPENAI_API_KEY": PLACEHOLDER_KEY,
        "ANTHROPIC_API_KEY": PLACEHOLDER_KEY,
    }
    own |= dict.fromkeys(_BUNDLE_VARIABLES, CA_BUNDLE)
    own["NODE_EXTRA_CA_CERTS"] = CA_CERTIFICATE  # beside those it has built in
    own["JAVA_TOOL_OPTIONS"] = _JAVA_OPTIONS
    if order.tty is not None:
        own["TERM"] = "xterm-256color"
    fixed = {"STOCKADE_AGENT_ID": agent_id, "STOCKADE_GATEWAY_URL": gateway}
    return tuple((own | dict(policy.env) | dict(order.env) | fixed).items())


# Java knows none of these variables, neither for proxies nor for authorities.
_JAVA_OPTIONS: Final = " ".join(
    (
        "-Djavax.net.ssl.trustStore=/etc/stockade/ca.jks",
        "-Djavax.net.ssl.trustStoreType=JKS",
        *(f"-D{scheme}.proxyHost={GATEWAY_NAME} -D{scheme}.proxyPort=3128" for scheme in ("http", "https")),
        f"-Dhttp.nonProxyHosts={GATEWAY_NAME}|localhost|127.*",
    )
)
# Which authorities to trust, as OpenSSL and with it Python and Go, requests, curl and git, Cargo and Deno read it.
_BUNDLE_VARIABLES: Final = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
    "DENO_CERT",
)


def _needs_disk(policy: Policy, files: Sequence[OpenedFile]) -> bool:
    """Whether memory will not do: what is kept when the agent has ended is on disk."""
    kept = policy.home is Home.PERSISTENT or any(file.wanted.layer for file in files)
    return kept or policy.disk_quota is Demand.REQUIRED


def _scratch(limits: Limits, *, required: bool) -> Scratch:
    """Share the disk limit out, for where it cannot be on disk: what is on tmpfs counts as memory too."""
    total = min(limits.disk_bytes, limits.memory_bytes)
    return Scratch(
        "required" if required else "preferred",
        tmp_bytes=total,
        home_bytes=total,
        shm_bytes=max(total // 2, 1 << 16),
        workspace_bytes=total,
    )


def _bind(file: OpenedFile, policy: Policy) -> sandbox_plan.Bind:
    if file.wanted.writable and file.owner_uid == 0 and not policy.allow_root_owned:
        raise PermissionDenied(
            f"cannot give {file.wanted.path} writable: it is owned by root, and what an agent writes there runs as root"
            " all too easily",
            remedy=f"chown it to the person it belongs to, use :ro, or set allow_root_owned in policy {policy.name}",
        )
    return sandbox_plan.Bind(
        fd=file.index,
        target=str(file.wanted.target),
        writable=file.wanted.writable,
        owner_uid=file.owner_uid,
        owner_gid=file.owner_gid,
        allow_root_owned=policy.allow_root_owned,
        without_idmap="read-only" if "idmap" in policy.degraded_ok and not file.wanted.layer else "refuse",
        layer=file.wanted.layer,
        name=file.wanted.why,
    )


def _wanted(scope: FsScope, *, by_policy: bool) -> WantedFile:
    return WantedFile(
        scope.host_path,
        scope.inside or scope.host_path,
        scope.writable,
        format_scope(scope),
        by_policy=by_policy,
    )
