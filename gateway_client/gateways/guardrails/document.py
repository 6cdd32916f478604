"""The texts in a JSON document of any dialect, looked through and masked in place. Pure.

All strings and whole numbers are looked at, names of fields too, but for what only joins parts together (ids, types) or
is sealed by a provider: a changed id or signature would make the whole document worthless, and no model writes there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from gateway_client.gateways.guardrails.window import JsonText, PlainText, Window

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from gateway_client.gateways.guardrails.window import Patterns

CHUNK_CHARS: Final = 64 * 1024
UNTOUCHED: Final = frozenset(
    {"call_id", "encrypted_content", "event_id", "id", "item_id", "model", "object", "obfuscation",
     "previous_response_id", "role", "signature", "system_fingerprint", "tool_call_id", "tool_use_id", "type"}
)  # fmt: skip
JSON_TEXTS: Final = frozenset({"arguments", "partial_json"})
_DIGITS_MIN: Final = 8


def mask(value: Any, patterns: Patterns, found: Counter[str]) -> Any:
    """Return the document with matches masked, and count them."""
    holder = [value]
    for _ in steps(holder, patterns, found):
        pass
    return holder[0]


def steps(holder: list[Any], patterns: Patterns, found: Counter[str]) -> Iterator[int]:
    """Mask the document in `holder[0]`; yields how many characters were read since, so that others get their turn."""
    todo: list[tuple[Any, Any]] = [(holder, 0)]
    while todo:
        container, key = todo.pop()
        match container[key]:
            case str(text):
                window = Window(patterns, JsonText() if key in JSON_TEXTS else PlainText())
                shown = []
                for at in range(0, len(text), CHUNK_CHARS):
                    shown.append(window.feed(text[at : at + CHUNK_CHARS]))
                    yield min(CHUNK_CHARS, len(text) - at)
                shown.append(window.end())
                if window.found:
                    container[key] = "".join(shown)
                    found.update(window.found)
            case bool():
                pass
            case int(number) if abs(number) >= 10**_DIGITS_MIN:
                container[key] = _number(number, patterns, found)
                yield _DIGITS_MIN
            case list(items):
                todo.extend((items, index) for index in range(len(items)))
            case dict(fields):
                _names(fields, patterns, found)
                todo.extend((fields, name) for name in fields if name not in UNTOUCHED)
                yield sum(map(len, fields))
            case _:
                pass


def _number(number: int, patterns: Patterns, found: Counter[str]) -> Any:
    window = Window(patterns)
    shown = window.feed(str(number)) + window.end()
    found.update(window.found)
    return shown if window.found else number


def _names(fields: dict[str, Any], patterns: Patterns, found: Counter[str]) -> None:
    if not any(patterns.spans(name) for name in fields):
        return
    renamed = {}
    for name, value in fields.items():
        window = Window(patterns)
        shown = window.feed(name) + window.end()
        found.update(window.found)
        while shown in renamed:
            shown += "'"
        renamed[shown] = value
    fields.clear()
    fields.update(renamed)
