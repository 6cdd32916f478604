"""The access review: what somebody should look at in definitions, launches and grants (pure; times are passed in)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gateway_client.egress.scope import FsScope, LlmScope, format_scope
from supervisord.agents import Agent
from supervisord.definitions import Definition, beyond
from supervisord.errors import StockadeError
from supervisord.policy import RISKS, Policy
from supervisord.policy_reader import within_models
from supervisord.scopes import Grant
from supervisord.sizes import format_size

FINDINGS_MAX: Final = 5000
NS_PER_SECOND: Final = 10**9
SECONDS_PER_DAY: Final = 86400


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to look at; `subject` is an agent's name or a definition."""

    kind: str
    subject: str
    detail: str
    remedy: str
    agent_id: str = ""
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a review looks at.

    `used` are ids of grants that were used since `since_ns`, `unknown` of those that nobody can tell of.
    """

    definitions: Sequence[Definition]
    agents: Sequence[Agent]
    policy: Callable[[str], Policy]
    grants: Callable[[Agent], Sequence[Grant]]
    used: frozenset[str]
    unknown: frozenset[str]
    since_ns: int
    now_ns: int


def review(inventory: Inventory) -> list[Finding]:
    """Every finding: first of definitions, then of agents."""
    found = [finding for definition in inventory.definitions for finding in _of_definition(definition, inventory)]
    by_reference = {definition.reference: definition for definition in inventory.definitions}
    for agent in inventory.agents:
        found.extend(_of_agent(agent, by_reference, inventory))
    return found


def asked_for_use(grants: Sequence[Grant], since_ns: int) -> frozenset[str]:
    """Names the grants that are old enough to have gone unused and were used ever; the others need no asking."""
    return frozenset(grant.grant_id for grant in grants if _can_go_unused(grant, since_ns) and grant.uses)


def _of_definition(definition: Definition, inventory: Inventory) -> Iterator[Finding]:
    spec, subject = definition.spec, definition.reference
    if definition.row.deprecated:
        return
    if definition.problem:
        yield Finding("unusable", subject, definition.problem, "register a version that can be read, or deprecate it")
        return
    add = "register a version that says so"
    if not spec.owner:
        yield Finding("no-owner", subject, "nobody answers for it", add)
    if not spec.purpose:
        yield Finding("no-purpose", subject, "nobody said what it is for", add, owner=spec.owner)
    if spec.risk is None:
        yield Finding("no-risk-class", subject, "nobody classified it", add, owner=spec.owner)
    try:
        policy = inventory.policy(spec.policy)
    except StockadeError as error:
        yield Finding("unusable", subject, error.message, error.remedy, owner=spec.owner)
        return
    if spec.risk is None or spec.risk is policy.risk:
        return
    classes = f"it is of class {spec.risk.value}, and policy {policy.name} is for {policy.risk.value}"
    if RISKS.index(spec.risk) > RISKS.index(policy.risk):
        remedy = f"give it a policy with risk: {spec.risk.value}"
        yield Finding("policy-too-lax", subject, classes, remedy, owner=spec.owner)
    else:
        remedy = "correct its class, or give it a policy of its own class"
        yield Finding("policy-too-strict", subject, classes, remedy, owner=spec.owner)


def _of_agent(agent: Agent, definitions: Mapping[str, Definition], inventory: Inventory) -> Iterator[Finding]:
    what = agent.what
    if not agent.live and what.launched_at_ns < inventory.since_ns:
        return

    def finding(kind: str, detail: str, remedy: str) -> Finding:
        return Finding(kind, agent.name, detail, remedy, agent_id=agent.agent_id, owner=what.owner)

    if not what.definition:
        verb = "runs" if agent.live else "was launched"
        detail = f"it {verb} by no definition, by order of {what.launched_by}, with policy {what.policy}"
        yield finding("unregistered", detail, "register it; `registered: required` in the policy refuses such launches")
    if not agent.live:
        return
    yield from _unused(agent, inventory, finding)
    definition = definitions.get(what.definition)
    if definition is None:
        if what.definition:
            yield finding("unregistered", f"the registry has no {what.definition}", "register that version again")
        return
    if definition.row.deprecated:
        detail = f"{definition.reference} is deprecated: {definition.row.deprecated}"
        yield finding("deprecated-running", detail, f"`stockadectl kill {agent.name}`, then launch another version")
    yield from _over(agent, definition, inventory, finding)


def _unused(agent: Agent, inventory: Inventory, finding: Callable[[str, str, str], Finding]) -> Iterator[Finding]:
    for grant in inventory.grants(agent):
        if _can_go_unused(grant, inventory.since_ns) and grant.grant_id not in inventory.used:
            if grant.grant_id in inventory.unknown:
                detail = (
                    f"{format_scope(grant.scope)}: not in its first requests, and there are too many to look at all"
                )
                yield finding("use-unknown", detail, f"`stockadectl actions {agent.name}` tells")
                continue
            days = int((inventory.now_ns / NS_PER_SECOND - grant.created_at) // SECONDS_PER_DAY)
            since = "never used" if not grant.uses else "not used in the time of this review"
            detail = f"{format_scope(grant.scope)}, given by {grant.by} {days} days ago, was {since}"
            yield finding("unused-grant", detail, f"`stockadectl revoke {grant.grant_id}`")


def _can_go_unused(grant: Grant, since_ns: int) -> bool:
    # Nobody counts how often files are opened: a grant of files says nothing here.
    return not isinstance(grant.scope, FsScope) and grant.created_at * NS_PER_SECOND <= since_ns


def _over(
    agent: Agent, definition: Definition, inventory: Inventory, finding: Callable[[str, str, str], Finding]
) -> Iterator[Finding]:
    """What an agent has now beyond what its definition says."""
    spec, what = definition.spec, agent.what
    try:
        given = inventory.policy(what.policy).scopes
    except StockadeError:
        given = ()
    held = inventory.grants(agent)
    by_scope = {format_scope(grant.scope): grant for grant in held}
    for text in beyond([grant.scope for grant in held], (*given, *spec.scopes)):
        grant = by_scope[text]
        detail = f"it holds {text}, given by {grant.by}, which {definition.reference} has not"
        yield finding("over-scope", detail, f"`stockadectl revoke {grant.grant_id}`, or register a version that has it")
    for grant in held:
        if spec.models and isinstance(grant.scope, LlmScope) and not within_models(grant.scope, spec.models):
            detail = f"it may use {format_scope(grant.scope)}, but {definition.reference} has {', '.join(spec.models)}"
            yield finding("over-model", detail, f"`stockadectl revoke {grant.grant_id}`, or narrow the policy")
    limits = spec.limits
    most = (limits.memory_bytes, limits.cpus, limits.pids)
    has = (what.memory_bytes, what.cpus, what.pids)
    shown: tuple[Callable[[float], str], ...] = (lambda size: format_size(int(size)), _number, _number)
    for key, bound, value, show in zip(("memory", "cpus", "pids"), most, has, shown, strict=True):
        if bound is not None and value > bound:
            detail = f"limits.{key} is {show(value)}, and {definition.reference} says {show(bound)}"
            yield finding("over-limit", detail, "launch it again without the wider limit")


def _number(value: float) -> str:
    return f"{value:g}"
