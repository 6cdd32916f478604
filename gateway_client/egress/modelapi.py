"""The model endpoints an `llm:` scope reaches, and what of a call to them may go to the gateway. Pure.

A gateway believes more than it should: headers and body fields that choose another upstream, key, tag or user would let
an agent act in another's name. So headers and query pass by an allow-list, and body fields that route or identify are
dropped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from gateway_client.egress.request import MODEL_NAME, Dialect

max_tokens_max: Final = 100_000_000

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
        b"content-type",
        b"idempotency-key",
        b"openai-beta",
        b"user-agent",
        b"x-client-request-id",
        b"x-goog-api-client",
    }
)
_HEADER_PREFIXES: Final = (b"x-stainless-",)
_QUERY: Final = frozenset({"beta", "alt", "limit", "after_id", "before_id", "after", "order"})

_FIELDS: Final = frozenset(
    {
        "api_base",
        "api_key",
        "api_type",
        "api_version",
        "base_url",
        "cache",
        "context_window_fallback_dict",
        "context_window_fallbacks",
        "content_policy_fallbacks",
        "custom_llm_provider",
        "default_headers",
        "deployment_id",
        "extra_body",
        "extra_headers",
        "extra_query",
        "fallbacks",
        "guardrail_config",
        "guardrails",
        "headers",
        "hf_model_name",
        "mock_response",
        "mock_timeout",
        "mock_tool_calls",
        "model_id",
        "model_info",
        "model_list",
        "no-log",
        "num_retries",
        "organization",
        "policies",
        "project_id",
        "proxy_server_request",
        "region_name",
        "router_settings",
        "secret_fields",
        "session_id",
        "ssl_verify",
        "tags",
        "team",
        "team_id",
        "ttl",
        "use_in_pass_through",
        "user",
        "user_config",
        "user_id",
        "wandb_api_key",
    }
)
_FIELD_PREFIXES: Final = (
    "litellm",
    "aws_",
    "azure_",
    "vertex_",
    "mock_",
    "user_api_key",
    "langfuse",
    "langsmith",
    "input_cost",
    "output_cost",
)


class BadCall(ValueError):  # noqa: N818 - named for what it says
    """A body that is no call of its dialect; `reason` is a stable code."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


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
    body: bytes


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


def read_call(where: Endpoint, body: bytes) -> Call:
    """Read a whole body: which model, streaming or not, how many tokens at most; raise BadCall with what is wrong."""
    document = _document(body)
    model = where.model or document.get("model")
    if not isinstance(model, str) or not MODEL_NAME.fullmatch(model):
        raise BadCall("model_malformed", "the body names no model, or one with characters a model name may not have")
    stream = document.get("stream", False) if where.dialect is not Dialect.GEMINI_GENERATE else where.stream
    if stream is None:
        stream = False
    if not isinstance(stream, bool):
        raise BadCall("body_malformed", "stream is neither true nor false")
    cleaned = {key: value for key, value in document.items() if _may_pass(key)}
    metadata = cleaned.pop("metadata", None)
    if where.dialect is Dialect.ANTHROPIC_MESSAGES and isinstance(metadata, dict) and "user_id" in metadata:
        cleaned["metadata"] = {"user_id": metadata["user_id"]}
    return Call(model=model, stream=stream, max_tokens=_max_tokens(document), body=_bytes_of(cleaned))


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadCall("body_malformed", "the body is no JSON") from error
    if not isinstance(document, dict):
        raise BadCall("body_malformed", "the body is no JSON object")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _may_pass(key: str) -> bool:
    plain = key.lower()
    return plain not in _FIELDS and not plain.startswith(_FIELD_PREFIXES)


def _max_tokens(document: dict[str, Any]) -> int | None:
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        value = document.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= max_tokens_max:
            return value
        if value is not None:
            raise BadCall("body_malformed", f"{name} is no number of tokens")
    return None


def _bytes_of(document: dict[str, Any]) -> bytes:
    try:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: only its escape can carry it
        return json.dumps(document, separators=(",", ":")).encode("ascii")
    except RecursionError as error:
        raise BadCall("body_malformed", "the body is nested too deeply") from error


def may_send_header(name: bytes) -> bool:
    """Whether an agent's header goes to the gateway with a model call; names are in lower case."""
    return name in _HEADERS or name.startswith(_HEADER_PREFIXES)


def clean_query(query: str) -> str:
    """Keep the parameters model endpoints know: others carry keys (`?key=`) or routing."""
    return "&".join(part for part in query.split("&") if part.partition("=")[0] in _QUERY)
