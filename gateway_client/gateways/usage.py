"""How many tokens a model call used and what it cost, read from the answer as it streams past. Pure, bounded memory.

The worker cannot trust an agent to say, and some answers do not say either: then bytes are counted instead, and the
result is marked estimated. Four bytes are taken for a token, which is more tokens than English text has: a budget errs
on the safe side.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from gateway_client.egress.messages import Usage
from gateway_client.egress.request import Dialect
from gateway_client.gateways import sse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway_client.gateways.prices import PriceTable

BODY_BYTES_MAX: Final = 4 * 1024 * 1024
BYTES_PER_TOKEN: Final = 4
TOKENS_MAX: Final = 10**9
MODEL_CHARS_MAX: Final = 200

# These answer without a model: nothing is used.
_FREE: Final = frozenset({Dialect.MODELS, Dialect.ANTHROPIC_COUNT_TOKENS})
_DONE: Final = b"[DONE]"
_LAST: Final = ("message_stop", "response.completed", "response.failed", "response.incomplete")
_OUTPUTS_TEXT: Final = frozenset(Dialect) - _FREE - {Dialect.OPENAI_EMBEDDINGS}


def tokens_in(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Return input and output tokens of a usage object of any dialect; cached input counts as input."""
    cached = _count(usage, "cache_creation_input_tokens") + _count(usage, "cache_read_input_tokens")
    given = (
        _count(usage, "prompt_tokens") or _count(usage, "promptTokenCount") or _count(usage, "input_tokens") + cached
    )
    taken = (
        _count(usage, "completion_tokens")
        or _count(usage, "output_tokens")
        or _count(usage, "candidatesTokenCount") + _count(usage, "thoughtsTokenCount")
    )
    return given, taken


def _count(usage: Mapping[str, Any], key: str) -> int:
    value = usage.get(key)
    return min(value, TOKENS_MAX) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


class UsageMeter:
    """Fed the body of a response as it passes; `result()` at its end, also where it was cut off.

    `request_bytes` and `model` are what the request said, for answers that say nothing; `cost_usd` is what the
    gateway's headers said.
    """

    def __init__(
        self,
        dialect: Dialect | None,
        streaming: bool,  # noqa: FBT001 - the second of two plain facts about the answer
        *,
        model: str = "",
        request_bytes: int = 0,
        prices: PriceTable | None = None,
    ) -> None:
        self._dialect = dialect
        self._model = model
        self._answered = ""
        self._request_bytes = request_bytes
        self._prices = prices
        self._splitter = sse.Splitter(event_bytes_max=BODY_BYTES_MAX) if streaming else None
        self._body = bytearray()
        self._bytes = 0
        self._text_bytes = 0
        self._unread_bytes = 0
        self._input: int | None = None
        self._output: int | None = None
        self._cost: float | None = None
        self._cost_estimated = False
        self.output_at_least = 0
        """What an answer counts as that says nothing of what it used: a model may think long and write little."""
        self.ended = False
        """Whether a stream said that it is complete: what follows, if anything, uses nothing more."""

    def feed(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._dialect is None or self._dialect in _FREE:
            return
        if self._splitter is not None and self._bytes == len(data) and data.lstrip()[:1] in (b"{", b"["):
            self._splitter = None  # asked to stream, it answered with one object, an error; or with an array of events
        if self._splitter is None:
            if len(self._body) <= BODY_BYTES_MAX:
                self._body += data[: BODY_BYTES_MAX + 1 - len(self._body)]
            return
        for event in self._splitter.feed(data):
            self._event(event)

    def result(self, *, cost_usd: float | None = None, cost_estimated: bool = False) -> Usage | None:
        """Return what was used; None where the endpoint uses nothing. The arguments are what headers said."""
        if self._dialect is None or self._dialect in _FREE:
            return None
        self._finish()
        given = self._request_bytes // BYTES_PER_TOKEN if self._input is None else self._input
        taken = self._output
        if taken is None:
            text = self._text_bytes + self._unread_bytes
            taken = max(-(-text // BYTES_PER_TOKEN), self.output_at_least) if self._dialect in _OUTPUTS_TEXT else 0
        estimated = self._input is None or self._output is None
        cost, cost_estimated = (self._cost, self._cost_estimated) if cost_usd is None else (cost_usd, cost_estimated)
        if cost is None and self._prices is not None and (price := self._prices.find(self._model)) is not None:
            cost, cost_estimated = price.cost(given, taken), True
        return Usage(
            self._model, given, taken, cost, estimated=estimated or cost_estimated, answered_model=self._answered
        )

    def _finish(self) -> None:
        if self._splitter is not None:
            for event in self._splitter.finish():
                self._event(event)
            self._splitter = sse.Splitter(event_bytes_max=BODY_BYTES_MAX)
        elif len(self._body) > BODY_BYTES_MAX:
            self._unread_bytes = self._bytes
        elif self._body:
            values = _objects(bytes(self._body))
            if not values:
                self._unread_bytes = self._bytes
            for value in values:
                self._text_bytes += _text_bytes(value) if len(values) > 1 else 0
                self._take(value)
        self._body.clear()

    def _event(self, event: sse.Event) -> None:
        if event.cut:
            self._unread_bytes = self._bytes
            return
        if event.data == _DONE:
            self.ended = True
        values = _objects(event.data)
        if not values:
            return
        value = values[0]
        self.ended |= value.get("type") in _LAST
        # Without a usage object the deltas are all there is to count. Escapes and wrapping stay uncounted.
        self._text_bytes += _text_bytes(value)
        self._take(value)

    def _take(self, value: dict[str, Any]) -> None:
        inner = next((value[key] for key in ("response", "message") if isinstance(value.get(key), dict)), value)
        model = inner.get("model") or inner.get("modelVersion")
        if isinstance(model, str) and model:
            self._answered = model[:MODEL_CHARS_MAX]
            self._model = self._model or self._answered
        usage = inner.get("usage") or inner.get("usageMetadata") or value.get("usage")
        if not isinstance(usage, dict):
            if inner.get("error") and not self._text_bytes:
                self._input, self._output, self._cost = self._input or 0, self._output or 0, 0.0
            return
        given, taken = tokens_in(usage)
        # The messages dialect says the input at the start and may leave it out of the end.
        self._input = max(given, self._input or 0)
        if value.get("type") != "message_start":
            self._output = max(taken, self._output or 0)
        cost = usage.get("cost")
        if isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost < TOKENS_MAX:
            self._cost = float(cost)
            self._cost_estimated = usage.get("cost_estimated") is True


def _objects(data: bytes) -> list[dict[str, Any]]:
    """Read an object, or an array of them as Gemini streams without `alt=sse`."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return []
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict)]


def _text_bytes(event: dict[str, Any]) -> int:
    match event:
        case {"type": str(kind), "delta": str(text)} if kind.endswith(".delta"):
            return len(text.encode("utf-8", "replace"))
        case {"type": "content_block_delta", "delta": dict(delta)}:
            return sum(len(text.encode("utf-8", "replace")) for text in delta.values() if isinstance(text, str))
        case {"choices": list(choices)}:
            return sum(
                _strings(choice.get("delta") or choice.get("text")) for choice in choices if isinstance(choice, dict)
            )
        case {"candidates": list(candidates)}:
            return _strings(candidates)
        case _:
            return 0


def _strings(value: object) -> int:
    """Count the bytes of all strings inside a value."""
    count = 0
    todo = [value]
    while todo:
        match todo.pop():
            case str(text):
                count += len(text.encode("utf-8", "replace"))
            case list(items):
                todo.extend(items)
            case dict(items):
                todo.extend(items.values())
    return count
