"""Why an agent or a policy may or may not use a scope, and what would change the answer (pure)."""

from dataclasses import dataclass

from gateway_client.egress.scope import Scope, format_scope, includes
from supervisord.config import GatewayConfig
from supervisord.errors import InvalidInput, PermissionDenied
from supervisord.ids import GrantId
from supervisord.policy import Policy
from supervisord.scopes import Grant, check_ceiling, check_scopes_reachable


@dataclass(frozen=True, slots=True)
class Explanation:
    """Whether a scope is covered now, by what or why not, what was looked at in order, and what changes the answer."""

    allowed: bool
    because: str
    grant_id: GrantId | None
    remedy: str
    steps: tuple[str, ...] = ()


def explain(
    policy: Policy, grants: tuple[Grant, ...], scope: Scope, *, gateway: GatewayConfig | None = None, agent: str = ""
) -> Explanation:
    """Gives the answer to "may it, and why": from the grants of an agent, or from the policy where `agent` is empty.

    A live agent has what its grants say: those of the policy became grants at launch and may have been revoked since.
    """
    text = format_scope(scope)
    steps: list[str] = []
    if gateway is not None:
        try:
            check_scopes_reachable((scope,), gateway)
        except InvalidInput as error:
            return Explanation(allowed=False, because=error.message, grant_id=None, remedy=error.remedy)
    if agent:
        for grant in grants:
            held = format_scope(grant.scope)
            if grant.ended or grant.uses_left == 0 or not includes(grant.scope, scope):
                steps.append(f"grant {grant.grant_id} ({held}): does not cover it")
                continue
            steps.append(f"grant {grant.grant_id} ({held}): covers it")
            because = f"grant {grant.grant_id} by {grant.by} covers it: {held}"
            return Explanation(allowed=True, because=because, grant_id=grant.grant_id, remedy="", steps=tuple(steps))
        lacking = f"{agent} has no grant that covers {text}"
    else:
        for own in policy.scopes:
            held = format_scope(own)
            if includes(own, scope):
                steps.append(f"scope {held} of policy {policy.name}: covers it")
                because = f"policy {policy.name} gives {held} at start"
                return Explanation(allowed=True, because=because, grant_id=None, remedy="", steps=tuple(steps))
            steps.append(f"scope {held} of policy {policy.name}: does not cover it")
        lacking = f"policy {policy.name} gives no scope that covers {text}"
    try:
        check_ceiling(scope, policy.ceiling)
    except PermissionDenied as error:
        steps.append(f"ceiling of policy {policy.name}: forbids it")
        return Explanation(
            allowed=False,
            because=f"{lacking}, and the policy's ceiling forbids one",
            grant_id=None,
            remedy=error.remedy,
            steps=tuple(steps),
        )
    remedy = f"stockadectl grant {agent} '{text}'" if agent else f"launch with --scope '{text}'"
    return Explanation(allowed=False, because=lacking, grant_id=None, remedy=remedy, steps=tuple(steps))
