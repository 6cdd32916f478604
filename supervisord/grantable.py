"""Which scopes anybody can grant to agents of a policy at all (pure)."""

from gateway_client.egress.scope import FsScope, McpScope, Scope, format_scope
from supervisord.config import GatewayConfig
from supervisord.errors import InvalidInput, PermissionDenied
from supervisord.plan import live_scope
from supervisord.policy import Policy
from supervisord.scopes import check_ceiling, check_scopes_reachable, within


def check_grantable(scope: Scope, policy: Policy, gateway: GatewayConfig) -> None:
    """Raise InvalidInput or PermissionDenied for a scope that is not served, out of reach, or beyond the ceiling."""
    if isinstance(scope, McpScope) and scope.server not in {server.name for server in gateway.mcp}:
        raise InvalidInput(
            f"cannot grant {format_scope(scope)}: there is no MCP server {scope.server} behind the gateway",
            remedy="add it as [[gateway.mcp]] to stockade.toml",
        )
    if isinstance(scope, FsScope):
        scope = live_scope(scope)
    check_ceiling(scope, policy.ceiling)
    check_scopes_reachable((scope,), gateway)


def check_launched_with(scope: Scope, policy: Policy) -> None:
    """Raise PermissionDenied for a scope that a launcher may not add: one beyond the ceiling, or any at all.

    Where a policy wants a second person, a scope given at launch would be granted by one.
    """
    check_ceiling(scope, policy.ceiling)
    if policy.grants.second_person and not within(scope, policy.scopes):
        raise PermissionDenied(
            f"cannot launch with {format_scope(scope)}: policy {policy.name} wants a second person for every grant",
            remedy="launch without it, and have the agent ask for it",
        )
