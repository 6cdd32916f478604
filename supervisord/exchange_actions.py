"""What the log says of an exchange: its request, its outcome and what guardrails found in it. Pure.

Model calls also carry the names of OpenTelemetry's semantic conventions for generative AI (v1.37.0, `gen_ai.*`,
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/), so that the log can be read by what reads spans. A
prompt or an answer is never in it: only digests, sizes, names and counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway_client.egress import messages
from gateway_client.egress.request import Dialect
from supervisord.actions.types import Action

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress.request import EgressRequest
    from supervisord.actions.types import JSON
    from supervisord.gateway_process import GuardrailVerdict

_OPERATIONS: Final = {
    Dialect.OPENAI_CHAT: "chat",
    Dialect.OPENAI_RESPONSES: "chat",
    Dialect.ANTHROPIC_MESSAGES: "chat",
    Dialect.OPENAI_COMPLETIONS: "text_completion",
    Dialect.OPENAI_EMBEDDINGS: "embeddings",
    Dialect.GEMINI_GENERATE: "generate_content",
}


def request_action(agent_id: str, x: int, request: EgressRequest, verdict: messages.Allow | messages.Refuse) -> Action:
    """Give the entry of a request that was judged."""
    details: dict[str, JSON] = {"form": request.form.value, "x": x}
    if request.model:
        details["model"] = request.model
        details["stream"] = request.stream
    if request.dropped:
        details["dropped"] = list(request.dropped)
    if isinstance(verdict, messages.Allow):
        details["grant_id"] = verdict.grant_id
        said, reason = "allowed", ""
    else:
        details["status"] = verdict.status
        said, reason = "denied", f"{verdict.reason_code}: {verdict.detail}"
    details["scope"] = verdict.scope
    return Action(agent_id, f"agent:{agent_id}", "egress.request", request.object, said, reason, details)


def rejected_action(rejected: messages.Rejected) -> Action:
    """Give the entry of what was no request at all."""
    details: dict[str, JSON] = {"status": rejected.status, "count": rejected.count}
    reason = f"{rejected.reason_code}: {rejected.detail}"
    actor = f"agent:{rejected.agent_id}"
    return Action(rejected.agent_id, actor, "egress.request", "malformed request", "denied", reason, details)


def outcome_details(
    request: EgressRequest, outcome: messages.Outcome, *, grant_id: str, gateway: str, guardrails: Sequence[JSON]
) -> dict[str, JSON]:
    """Give the facts of an outcome; what the gateway's guardrails found was told by the gateway itself."""
    details: dict[str, JSON] = {
        "x": outcome.x,
        "status": outcome.status,
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
        "duration_ms": outcome.duration_ms,
        "grant_id": grant_id,
        "request_sha256": outcome.request_sha256,
        "response_sha256": outcome.response_sha256,
    }
    if outcome.first_byte_ms is not None:
        details["first_byte_ms"] = outcome.first_byte_ms
    if outcome.protocol is not None:
        details["protocol"] = outcome.protocol.value
    if guardrails:
        details["guardrails"] = list(guardrails)
    elif outcome.guardrails:
        details["guardrails"] = outcome.guardrails
    operation = _OPERATIONS.get(request.dialect) if request.dialect is not None else None
    if operation is not None:
        details |= {
            "gateway": gateway,
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": request.model,
        }
    usage = outcome.usage
    if usage is not None:
        details |= {
            "model": usage.model,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cost_usd": usage.cost_usd,
            "cost_estimated": usage.estimated,
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
        }
        if usage.answered_model:
            details["gen_ai.response.model"] = usage.answered_model
    return details


def guardrail_facts(verdict: GuardrailVerdict) -> dict[str, JSON]:
    """Give what is told of a verdict: which rules and patterns, how often; never what was found."""
    patterns: dict[str, JSON] = dict(verdict.patterns)
    return {
        "x": verdict.x,
        "direction": verdict.direction,
        "action": verdict.action,
        "rules": list(verdict.rules),
        "patterns": patterns,
    }


def guardrail_action(verdict: GuardrailVerdict) -> Action:
    blocked = verdict.action == "block"
    return Action(
        verdict.agent_id,
        f"agent:{verdict.agent_id}",
        "gateway.guardrail",
        ", ".join(verdict.rules),
        "denied" if blocked else "done",
        f"guardrail_blocked: {', '.join(verdict.patterns)}" if blocked else "",
        guardrail_facts(verdict),
    )
