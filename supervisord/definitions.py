"""Definitions of the registry as values: what one says, what it may reach, what a launch by it may change (pure)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway_client.egress.scope import FsScope, HttpScope, LlmScope, McpScope, Scope, TlsScope, format_scope, includes
from supervisord.errors import InvalidInput, NotFound, PermissionDenied
from supervisord.ids import shown
from supervisord.policy import AgentSpec, LimitsWanted, Policy, Registered, RegisteredAs, Workspace

if TYPE_CHECKING:
    from supervisord.plan import LaunchOrder

_REFERENCE: Final = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]{0,62})(?:@(?P<version>[1-9][0-9]{0,9}))?", re.ASCII)
_LIMITS: Final = tuple(LimitsWanted.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class DefinitionRow:
    """A definition as it is kept: its text, where that was, and who put it there. Times are ns since 1970."""

    name: str
    version: int
    digest: str
    text: str
    directory: str
    registered_by: str
    registered_at_ns: int
    deprecated: str = ""
    deprecated_by: str = ""
    deprecated_at_ns: int | None = None

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Definition:
    """A kept definition and what its text says; `problem` is why it cannot be read by this version of the program."""

    row: DefinitionRow
    spec: AgentSpec
    problem: str = ""

    @property
    def reference(self) -> str:
        return self.row.reference


@dataclass(frozen=True, slots=True)
class Reach:
    """What an agent may reach by its definition and policy, in words for people."""

    files: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()


def read_reference(text: str) -> tuple[str, int | None]:
    """Gives name and version of `NAME[@VERSION]`; raises InvalidInput."""
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise InvalidInput(
            f"cannot find definition {shown(text)}: it is not of the form NAME or NAME@VERSION",
            remedy="see `stockadectl registry list`",
        )
    return found["name"], int(found["version"]) if found["version"] else None


def choose(versions: Sequence[DefinitionRow], name: str, version: int | None) -> DefinitionRow:
    """Gives the version that is meant; without one the newest not deprecated, else the newest. Raises NotFound."""
    if version is not None:
        for row in versions:
            if row.version == version:
                return row
    elif versions:
        current = [row for row in versions if not row.deprecated]
        return max(current or versions, key=lambda row: row.version)
    what = name if version is None else f"{name}@{version}"
    known = ", ".join(row.reference for row in versions)
    raise NotFound(
        f"cannot find definition {what}: the registry has none",
        remedy=f"it has {known}" if known else "`stockadectl registry add -f agent.yaml`, or see `registry list`",
    )


def reach(spec: AgentSpec, policy: Policy | None) -> Reach:
    """Gives what the scopes of a definition and its policy, and its workspace, let it reach."""
    files: dict[str, None] = {}
    hosts: dict[str, None] = {}
    models: dict[str, None] = {}
    tools: dict[str, None] = {}
    if spec.workspace is not None:
        files[f"{spec.workspace.mode}:{spec.workspace.path}"] = None
    for scope in (*(policy.scopes if policy else ()), *spec.scopes):
        match scope:
            case FsScope():
                files[f"{'rw' if scope.writable else 'ro'}:{scope.host_path}"] = None
            case HttpScope() | TlsScope():
                hosts[f"{scope.host}:{scope.port}"] = None
            case LlmScope():
                models[scope.model_glob] = None
            case McpScope():
                tools[f"{scope.server}/{scope.tool_glob}"] = None
    return Reach(tuple(files), tuple(hosts), tuple(models), tuple(tools))


def beyond(scopes: Sequence[Scope], allowed: Sequence[Scope]) -> tuple[str, ...]:
    """Names the scopes that none of the allowed ones includes."""
    return tuple(format_scope(scope) for scope in scopes if not any(includes(wide, scope) for wide in allowed))


def registered_as(definition: Definition, order: "LaunchOrder", policy: Policy) -> RegisteredAs:
    """Gives what a launch by this definition is; raises PermissionDenied where it would be another agent."""
    spec, row = definition.spec, definition.row
    if definition.problem:
        raise InvalidInput(
            f"cannot launch {definition.reference}: {definition.problem}", remedy="register a version that can be read"
        )
    same = {
        "command": order.command == spec.command,
        "policy": order.policy == spec.policy,
        "env": dict(order.env) == dict(spec.env),
        "owner": order.owner == spec.owner,
        "purpose": order.purpose == spec.purpose,
    }
    changed = [key for key, is_same in same.items() if not is_same]
    if changed:
        raise PermissionDenied(
            f"cannot launch {definition.reference} with another {', '.join(changed)}: that would be another agent",
            remedy="register it as a version of its own, or launch it without --agent",
        )
    more = [f"scope {scope}" for scope in beyond(order.scopes, (*policy.scopes, *spec.scopes))]
    more += [
        f"limit {key}"
        for key in _LIMITS
        if (most := getattr(spec.limits, key)) is not None and (getattr(order.limits, key) or 0) > most
    ]
    if not _within(order.workspace, spec.workspace):
        more.append("workspace")
    return RegisteredAs(row.name, row.version, row.digest, row.deprecated, tuple(more))


def check_registered(definition: RegisteredAs | None, policy: Policy) -> None:
    """Raises PermissionDenied where the policy takes only what is registered, and this is not, or is more than that."""
    if policy.registered is not Registered.REQUIRED:
        return
    if definition is None:
        raise PermissionDenied(
            f"cannot launch with policy {policy.name}: it takes registered agents only",
            remedy="an admin registers it with `stockadectl registry add -f agent.yaml`; then `launch --agent NAME`",
        )
    if definition.deprecated:
        raise PermissionDenied(
            f"cannot launch {definition.reference} with policy {policy.name}: it is deprecated: "
            f"{shown(definition.deprecated)}",
            remedy=f"launch another version: `stockadectl registry list {definition.name}`",
        )
    if definition.beyond:
        raise PermissionDenied(
            f"cannot launch {definition.reference} with policy {policy.name}: "
            f"it asks for more than its definition: {', '.join(definition.beyond)}",
            remedy="leave that out, or register a version that has it",
        )


def _within(wanted: Workspace | None, declared: Workspace | None) -> bool:
    if wanted is None or wanted == declared:
        return True
    # To read what one may write is less; an overlay of what one may write too.
    return declared is not None and wanted.path == declared.path and declared.writable and not declared.overlay
