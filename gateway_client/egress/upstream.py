"""What goes to the gateway and what comes back from it, as values: the outgoing head, the returned headers. Pure.

The outgoing request is written from the parsed value; no byte of an agent's head is copied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from gateway_client.egress.modelapi import clean_query, may_send_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress.messages import Configure, Usage
    from gateway_client.egress.modelapi import Endpoint
    from gateway_client.egress.wire import Head, Headers

HeaderList = list[tuple[bytes, bytes]]

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NEVER_OUT: Final = frozenset({b"host", b"content-length", b"expect", b"forwarded", b"via", b"x-real-ip", b"alt-used"})
_NEVER_OUT_PREFIXES: Final = (b"x-forwarded-", b"x-litellm-", b"x-stockade-", b"proxy-")
_NEVER_BACK: Final = frozenset({b"set-cookie", b"alt-svc", b"authorization", b"x-api-key", b"x-goog-api-key"})
_NEVER_BACK_PREFIXES: Final = (b"x-litellm-", b"proxy-")
_TOKEN: Final = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~-]+")


@dataclass(frozen=True, slots=True)
class Identity:
    """In whose name the gateway is called."""

    agent_id: str
    name: str
    labels: dict[str, str] = field(default_factory=dict)


class GatewayAdapter(Protocol):
    """What one kind of gateway wants: pure functions, one module a kind in gateway_client/gateways/."""

    def request_headers(self, identity: Identity, credential: str) -> list[tuple[str, str]]:
        """Give the headers that carry credential and identity; they replace an agent's of the same name."""
        ...

    def map_path(self, path: str) -> str:
        """Give the gateway's path for `/v1/...` or `/v1beta/...`."""
        ...

    def usage_from(self, headers: Sequence[tuple[str, str]]) -> Usage | None:
        """Read model and cost from response headers, if this gateway puts them there."""
        ...

    def guardrails_from(self, headers: Sequence[tuple[str, str]]) -> str:
        """Read what the gateway's own guardrails did, if it says so in headers."""
        ...


def model_head(
    head: Head, where: Endpoint, *, body: bytes, adapter: GatewayAdapter, identity: Identity, configuration: Configure
) -> tuple[bytes, HeaderList]:
    """Give target and headers of a model call."""
    query = clean_query(head.query)
    target = configuration.base_path + adapter.map_path(where.path) + (f"?{query}" if query else "")
    headers: HeaderList = [(b"host", configuration.host.encode("ascii"))]
    ours = [
        (name.lower().encode("ascii"), value.encode("utf-8"))
        for name, value in adapter.request_headers(identity, configuration.credential)
    ]
    replaced = {name for name, _ in ours}
    headers += [(name, value) for name, value in head.headers if may_send_header(name) and name not in replaced]
    headers += ours
    headers.append((b"accept-encoding", b"identity"))  # usage is read from the answer, and the credential looked for
    if head.method == "POST":
        headers.append((b"content-type", b"application/json"))
    if head.has_body or body:
        headers.append((b"content-length", b"%d" % len(body)))
    headers.append((b"connection", b"close"))
    return target.encode("ascii"), headers


def forward_head(head: Head, *, absolute: bool) -> tuple[bytes, HeaderList]:
    """Give target and headers of a request to another host; `absolute` for a forward proxy behind us, in plain HTTP."""
    path = head.path + (f"?{head.query}" if head.query else "")
    authority = head.authority.url_form(head.scheme)
    target = f"http://{authority}{path}" if absolute else path
    named = _named_by_connection(head.headers)
    headers: HeaderList = [(b"host", authority.encode("ascii"))]
    headers += [
        (name, value)
        for name, value in head.headers
        if name not in _HOP_BY_HOP
        and name not in _NEVER_OUT
        and name not in named
        and not name.startswith(_NEVER_OUT_PREFIXES)
    ]
    if head.content_length is None:
        headers.append((b"transfer-encoding", b"chunked"))
    elif head.content_length or head.method in ("POST", "PUT", "PATCH"):
        headers.append((b"content-length", b"%d" % head.content_length))
    if head.upgrade:
        headers += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
    else:
        headers.append((b"connection", b"close"))
    return target.encode("ascii"), headers


def returned_headers(headers: Headers, *, credential: str, keep_cookies: bool) -> HeaderList:
    """Give what the agent gets of a response's headers: nothing hop-by-hop or of the gateway's own, no credential."""
    secret = credential.encode("utf-8")
    named = _named_by_connection(headers)
    return [
        (name, value)
        for name, value in headers
        if name not in _HOP_BY_HOP
        and name not in named
        and (keep_cookies or (name not in _NEVER_BACK and not name.startswith(_NEVER_BACK_PREFIXES)))
        and not (secret and secret in value)
    ]


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Give the headers that a Connection header names; those that frame the message it may not name away."""
    words = {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    return frozenset(word for word in words if _TOKEN.fullmatch(word)) - {b"content-length", b"content-type", b"host"}


class Redactor:
    """Blots the credential out of a stream, length for length, and holds back only what may be its beginning."""

    __slots__ = ("_held", "_secret")

    def __init__(self, credential: str) -> None:
        self._secret = credential.encode("utf-8")
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        secret = self._secret
        if not secret:
            return data
        data = self._held + data
        if secret in data:
            data = data.replace(secret, b"*" * len(secret))
        first = secret[:1]
        keep = 0
        start = data.find(first, max(0, len(data) - len(secret) + 1))
        while start >= 0:
            if secret.startswith(data[start:]):
                keep = len(data) - start
                break
            start = data.find(first, start + 1)
        self._held = data[len(data) - keep :] if keep else b""
        return data[: len(data) - keep]

    def end(self) -> bytes:
        held, self._held = self._held, b""
        return held
