"""What the worker itself answers: problem+json (RFC 9457) for every refusal, JSON for self-service. Pure."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from gateway_client.egress.decide import Refuse

if TYPE_CHECKING:
    from gateway_client.egress.wire import Reject

REQUESTS_URL: Final = "http://gateway.internal:3128/.stockade/v1/requests"
TYPE_PREFIX: Final = "https://stockade.dev/problems/"

_TITLES: Final = {
    400: "Malformed request",
    413: "Too large",
    415: "Not JSON",
    403: "Not granted",
    429: "Budget used up",
    502: "The gateway could not be reached",
    503: "Nothing may leave now",
}


def problem(refusal: Refuse | Reject, *, request: str = "") -> tuple[int, bytes]:
    """Give status and body of a refusal: what was asked, which scope was missing, and where to ask for it."""
    status = refusal.status
    scope = refusal.scope if isinstance(refusal, Refuse) else ""
    document: dict[str, Any] = {
        "type": TYPE_PREFIX + refusal.reason_code,
        "title": _TITLES.get(status) or phrase(status),
        "status": status,
        "detail": refusal.detail,
        "reason_code": str(refusal.reason_code),
    }
    if request:
        document["request"] = request
    if scope:
        document["scope"] = scope
        document["ask"] = {"url": REQUESTS_URL, "method": "POST", "body": {"scope": scope, "reason": "..."}}
    # What the OpenAI and Anthropic SDKs show to people is error.message.
    document["error"] = {"type": str(refusal.reason_code), "message": refusal.detail}
    return status, json.dumps(document).encode()


def phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def response(
    status: int, body: bytes, *, content_type: str, keep_alive: bool, head_only: bool = False, extra: str = ""
) -> bytes:
    """Give the bytes of a whole answer with a length."""
    head = (
        f"HTTP/1.1 {status} {phrase(status)}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\nCache-Control: no-store\r\n{extra}"
        f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
    )
    return head.encode("ascii") + (b"" if head_only else body)
