"""Reading fields of untrusted JSON, with errors that name the field."""

from __future__ import annotations

import json
from typing import Any, Final

from gateway_client.gateways.embedded.conversation import RequestError, Usage

Json = dict[str, Any]

NAME_CHARS_MAX: Final = 256
MESSAGES_MAX: Final = 10_000
TOOLS_MAX: Final = 1_024


def compact(value: object) -> bytes:
    """Return `value` as JSON without a space or a line end."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def bad(param: str, expected: str) -> RequestError:
    return RequestError(f"cannot read {param}: expected {expected}", param=param, code="invalid_value")


def text(body: Json, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise bad(name, "a string")
    return value


def model_name(body: Json) -> str:
    value = text(body, "model")
    if not value or len(value) > NAME_CHARS_MAX or not value.isprintable():
        raise bad("model", f"a name of 1 to {NAME_CHARS_MAX} printable characters")
    return value


def optional_int(body: Json, name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise bad(name, "a positive integer")
    return value


def optional_number(body: Json, name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise bad(name, "a number")
    return float(value)


def flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(name, "true or false")
    return bool(value)


def objects(body: Json, name: str, *, most: int) -> list[Json]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise bad(name, "a list of objects")
    if len(value) > most:
        raise bad(name, f"at most {most} items")
    return value


def mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def string(value: object) -> str:
    return value if isinstance(value, str) else ""


def with_cost(shown: Json, usage: Usage) -> Json:
    """Add the cost where LiteLLM and OpenRouter put it too: inside `usage`, which reaches streams as well."""
    if usage.cost_usd is not None:
        shown["cost"] = round(usage.cost_usd, 10)
        shown["cost_estimated"] = usage.cost_estimated
    return shown
