"""Adapter for any gateway that speaks the OpenAI or Anthropic API and knows no agents: one key, no identity."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress.messages import Usage
    from gateway_client.egress.upstream import Identity


class OpenAICompatible:
    def request_headers(self, identity: Identity, credential: str) -> list[tuple[str, str]]:  # noqa: ARG002 - not told
        # Both spellings: which one a gateway reads depends on the dialect of the call, and it ignores the other.
        return [("authorization", f"Bearer {credential}"), ("x-api-key", credential)] if credential else []

    def map_path(self, path: str) -> str:
        return path

    def usage_from(self, headers: Sequence[tuple[str, str]]) -> Usage | None:  # noqa: ARG002 - it puts nothing there
        return None

    def guardrails_from(self, headers: Sequence[tuple[str, str]]) -> str:  # noqa: ARG002 - it puts nothing there
        return ""
