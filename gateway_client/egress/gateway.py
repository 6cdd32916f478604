"""The adapters of the known kinds of gateway, imported before the worker gives everything up."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress.messages import Usage
    from gateway_client.egress.upstream import GatewayAdapter, Identity


class Bare:
    """A gateway that knows no identities: the credential alone."""

    def request_headers(self, identity: Identity, credential: str) -> list[tuple[str, str]]:  # noqa: ARG002
        return [("authorization", f"Bearer {credential}")] if credential else []

    def map_path(self, path: str) -> str:
        return path

    def usage_from(self, headers: Sequence[tuple[str, str]]) -> Usage | None:  # noqa: ARG002
        return None


def adapters() -> dict[str, GatewayAdapter]:
    bare = Bare()
    return {"embedded": bare, "litellm": bare, "openai": bare}
