"""The model endpoints an `llm:` scope reaches, and what of a call to them may go to the gateway. Pure.

A gateway believes more than it should: headers and body fields that choose another upstream, key, tag or user would let
an agent act in another's name. So headers, query and body fields (`callfields.py`) pass by an allow-list, and the
content type is written, not copied: to a gateway that reads forms, the same bytes are another call.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway_client.egress.bodyjson import BadCall, read_object, write_object
from gateway_client.egress.callfields import clean
from gateway_client.egress.request import MODEL_NAME, Dialect
from gateway_client.egress.weight import choices_of, input_tokens_of, output_tokens_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from gateway_client.egress.wire import Headers

__all__ = [
    "BadCall",
    "Call",
    "Endpoint",
    "check_type",
    "clean_query",
    "endpoint",
    "may_send_header",
    "read_call",
    "reading",
]

_POST: Final = {
    "/chat/completions": Dialect.OPENAI_CHAT,
    "/responses": Dialect.OPENAI_RESPONSES,
    "/completions": Dialect.OPENAI_COMPLETIONS,
    "/embeddings": Dialect.OPENAI_EMBEDDINGS,
    "/messages": Dialect.ANTHROPIC_MESSAGES,
    "/messages/count_tokens": Dialect.ANTHROPIC_COUNT_TOKENS,
}
_MODELS: Final = re.compile(r"/models(?:/([A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}))?")
_GEMINI: Final = re.compile(
    r"/v1beta/models/([A-Za-z0-9][A-Za-z0-9._-]{0,199}):(generateContent|streamGenerateContent)"
)

_HEADERS: Final = frozenset(
    {
        b"accept",
        b"anthropic-beta",
        b"anthropic-dangerous-direct-browser-access",
        b"anthropic-version",
        b"idempotency-key",
        b"openai-beta",
        b"user-agent",
        b"x-client-request-id",
        b"x-goog-api-client",
    }
)
_STAINLESS: Final = re.compile(
    rb"x-stainless-(?:arch|async|custom-event-handler|custom-poll-interval|helper|helper-method|lang|os|package-version"
    rb"|poll-helper|raw-response|read-timeout|retry-count|runtime|runtime-version|stream-helper|timeout)"
)
"""What the SDKs say of themselves."""
_QUERY: Final = frozenset({"beta", "alt", "limit", "after_id", "before_id", "after", "order"})
_ALT: Final = frozenset({"alt=sse", "alt=json"})
"""Forms of an answer that are metered; `alt=proto` and `alt=media` are not."""
_QUERY_VALUE: Final = re.compile(r"[A-Za-z0-9._:-]*")
"""Nothing that is encoded: decoded once more than it should be it would be another parameter."""
_JSON: Final = re.compile(rb"application/json[ \t]*(?:;[ \t]*charset=\"?utf-?8\"?[ \t]*)?;?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Endpoint:
    dialect: Dialect
    path: str
    """As the gateway has it: `/v1/...` or `/v1beta/...`, whatever base URL the client took."""
    model: str = ""
    """Where the path names it."""
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A model call as parsed, with the body to send."""

    model: str
    stream: bool
    max_tokens: int | None
    """What it may put out at most, over all its choices; None where it does not say."""
    body: bytes
    choices: int = 1
    """How many answers it asks for."""
    input_tokens: int = 0
    """An upper estimate of what it puts in."""
    dropped: tuple[str, ...] = ()
    """Fields and tools that were taken out."""


def endpoint(method: str, path: str) -> Endpoint | None:
    """Give the model endpoint of a request, or None if it is none of them."""
    gemini = _GEMINI.fullmatch(path)
    if gemini:
        if method != "POST":
            return None
        return Endpoint(
            Dialect.GEMINI_GENERATE, path, model=gemini.group(1), stream=gemini.group(2) == "streamGenerateContent"
        )
    tail = path.removeprefix("/v1")
    if method == "POST" and tail in _POST:
        return Endpoint(_POST[tail], "/v1" + tail)
    models = _MODELS.fullmatch(tail)
    if method in ("GET", "HEAD") and models:
        return Endpoint(Dialect.MODELS, "/v1" + tail, model=models.group(1) or "")
    return None


def check_type(headers: Headers) -> None:
    """Raise BadCall for a body that says it is no JSON, or that is compressed: gateways would read it otherwise."""
    for name, value in headers:
        if name == b"content-type" and value and not _JSON.fullmatch(value):
            raise BadCall("content_type_refused", "the body of a model call is application/json in UTF-8", status=415)
        if name == b"content-encoding" and value.lower() != b"identity":
            raise BadCall("content_encoding_refused", "the body of a model call is not compressed", status=415)


def read_call(where: Endpoint, body: bytes) -> Call:
    """Read a whole body: which model, streaming or not, how many tokens at most; raise BadCall with what is wrong."""
    steps = reading(where, body)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            call: Call = end.value
            return call


def reading(where: Endpoint, body: bytes) -> Generator[None, None, Call]:
    """Do what `read_call` does in steps, between which others can be served; `body` was weighed (`Scales`)."""
    document = read_object(body)
    yield
    model = where.model or document.get("model")
    if not isinstance(model, str) or not MODEL_NAME.fullmatch(model):
        raise BadCall("model_malformed", "the body names no model, or one with characters a model name may not have")
    stream = document.get("stream", False) if where.dialect is not Dialect.GEMINI_GENERATE else where.stream
    if stream is None:
        stream = False
    if not isinstance(stream, bool):
        raise BadCall("body_malformed", "stream is neither true nor false")
    cleaned = clean(where.dialect, document)
    yield
    choices = choices_of(where.dialect, cleaned.document)
    most = output_tokens_of(where.dialect, cleaned.document)
    given = input_tokens_of(cleaned.document, len(body))
    yield
    return Call(
        model=model,
        stream=stream,
        max_tokens=None if most is None else most * choices,
        body=write_object(cleaned.document),
        choices=choices,
        input_tokens=given,
        dropped=tuple(cleaned.dropped),
    )


def may_send_header(name: bytes) -> bool:
    """Whether an agent's header goes to the gateway with a model call; names are in lower case."""
    return name in _HEADERS or _STAINLESS.fullmatch(name) is not None


def clean_query(query: str) -> str:
    """Keep the parameters model endpoints know: others carry keys (`?key=`) or routing."""
    return "&".join(
        part
        for part in query.split("&")
        if part.partition("=")[0] in _QUERY
        and _QUERY_VALUE.fullmatch(part.partition("=")[2])
        and (not part.startswith("alt") or part in _ALT)
    )
