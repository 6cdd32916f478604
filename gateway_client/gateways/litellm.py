"""Adapter for a LiteLLM proxy: who the agent is goes into headers that agents may not set themselves.

Read from LiteLLM 1.106: `x-litellm-customer-id` is looked at before anything in the body and is what budgets and spend
are kept by; `x-litellm-session-id` groups the calls of one agent; tags reach the spend log. The cost of an answer that
is not streamed is in `x-litellm-response-cost`; of a stream it is in the last chunk's `usage.cost`, where LiteLLM is
configured with `include_cost_in_streaming_usage`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

from gateway_client.egress.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress.upstream import Identity

TAGS_MAX: Final = 32
TAG_CHARS_MAX: Final = 128
COST_HEADER: Final = "x-litellm-response-cost"
GUARDRAILS_HEADER: Final = "x-litellm-applied-guardrails"  # names of those that ran, joined by commas

# A comma ends a tag and a line end ends a header: an agent's label may hold either.
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._:/@=+-]")


class LiteLLM:
    def request_headers(self, identity: Identity, credential: str) -> list[tuple[str, str]]:
        name = _plain(identity.name or identity.agent_id)
        labels = [f"{key}={value}" for key, value in sorted(identity.labels.items())]
        tags = ["stockade", f"agent:{name}", *(_plain(f"label:{label}") for label in labels)][:TAGS_MAX]
        headers = [
            ("x-litellm-customer-id", name),
            ("x-litellm-agent-id", _plain(identity.agent_id)),
            ("x-litellm-session-id", _plain(identity.agent_id)),
            ("x-litellm-tags", ",".join(tags)),
        ]
        if credential:
            # x-api-key too, where the Anthropic SDKs put it: what an agent wrote there must not be what is read.
            headers += [("authorization", f"Bearer {credential}"), ("x-api-key", credential)]
        return headers

    def map_path(self, path: str) -> str:
        return path

    def usage_from(self, headers: Sequence[tuple[str, str]]) -> Usage | None:
        return reported_cost(headers, COST_HEADER)

    def guardrails_from(self, headers: Sequence[tuple[str, str]]) -> str:
        return next((_list(value) for key, value in headers if key.lower() == GUARDRAILS_HEADER), "")


def reported_cost(headers: Sequence[tuple[str, str]], name: str, *, estimated: bool = False) -> Usage | None:
    """Return the cost a header names; None where it is absent or no amount."""
    for key, value in headers:
        if key.lower() == name:
            try:
                cost = float(value)
            except ValueError:
                return None
            return Usage(cost_usd=cost, estimated=estimated) if math.isfinite(cost) and cost >= 0 else None
    return None


def _list(text: str) -> str:
    return ",".join(_plain(name.strip()) for name in text.split(",") if name.strip())


def _plain(text: str) -> str:
    return _UNSAFE.sub("_", text)[:TAG_CHARS_MAX]
