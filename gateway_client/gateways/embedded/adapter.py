"""Adapter for the embedded gateway: the dialer's preface says who calls, so no header does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway_client.gateways.litellm import reported_cost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress.messages import Usage
    from gateway_client.egress.upstream import Identity


class Embedded:
    def request_headers(self, identity: Identity, credential: str) -> list[tuple[str, str]]:  # noqa: ARG002 - not needed
        return []

    def map_path(self, path: str) -> str:
        return path

    def usage_from(self, headers: Sequence[tuple[str, str]]) -> Usage | None:
        estimated = any(key.lower() == "x-stockade-cost-estimated" and value == "true" for key, value in headers)
        return reported_cost(headers, "x-stockade-cost-usd", estimated=estimated)

    def guardrails_from(self, headers: Sequence[tuple[str, str]]) -> str:  # noqa: ARG002 - told to the daemon itself
        return ""
