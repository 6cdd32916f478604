"""Another provider's models: passed through in its own dialects, translated from the others."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from gateway_client.egress.request import Dialect
from gateway_client.gateways import sse
from gateway_client.gateways.embedded import http_client
from gateway_client.gateways.embedded.conversation import RequestError, Usage
from gateway_client.gateways.embedded.dialects.fields import compact, with_cost
from gateway_client.gateways.embedded.models import translate
from gateway_client.gateways.embedded.models.scripted import count_tokens
from gateway_client.gateways.usage import tokens_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway_client.gateways.embedded.conversation import Ask, Delta
    from gateway_client.gateways.embedded.dialects.fields import Json
    from gateway_client.gateways.embedded.http import Answering, Headers, Request

ANSWER_BYTES_MAX: Final = 32 * 1024 * 1024
ERROR_CHARS_MAX: Final = 2_000

_PATHS: Final = {
    ("openai", Dialect.OPENAI_CHAT): "/chat/completions",
    ("openai", Dialect.OPENAI_RESPONSES): "/responses",
    ("anthropic", Dialect.ANTHROPIC_MESSAGES): "/v1/messages",
}
# Nothing else of the agent's headers reaches a provider.
_PASSED_UP: Final = frozenset({b"accept", b"anthropic-version", b"anthropic-beta", b"openai-beta"})
_PASSED_DOWN: Final = frozenset({b"content-type", b"retry-after", b"request-id", b"x-request-id"})


@dataclass(frozen=True, slots=True)
class ProviderModel:
    """A provider by URL and key. `model` replaces the name asked for; empty: the name is passed on."""

    kind: Literal["openai", "anthropic"]
    url: http_client.Url
    key: str = field(repr=False)
    model: str = ""
    responses: bool = True
    """Whether an OpenAI-compatible provider has /responses; many have chat completions only."""

    def speaks(self, dialect: Dialect) -> bool:
        if dialect is Dialect.OPENAI_RESPONSES and not self.responses:
            return False
        return (self.kind, dialect) in _PATHS

    async def answer(self, ask: Ask) -> AsyncIterator[Delta]:
        """Yield the answer to a question in a dialect the provider does not speak."""
        name = self.model or ask.model
        reader: translate.ChatReader | translate.MessagesReader
        if self.kind == "openai":
            path, body = "/chat/completions", translate.chat_body(ask, name)
            reader = translate.ChatReader(count_tokens(ask))
        else:
            path, body = "/v1/messages", translate.messages_body(ask, name)
            reader = translate.MessagesReader(count_tokens(ask))
        async with self._post(path, (), compact(body)) as response:
            if response.status != 200:  # noqa: PLR2004 - the one status with an answer
                text = (await response.read(bytes_max=ANSWER_BYTES_MAX)).decode("utf-8", "replace")
                raise RequestError(_message(text), status=response.status)
            splitter = sse.Splitter()
            async for piece in response.pieces():
                for event in splitter.feed(piece):
                    for delta in reader.read(event):
                        yield delta
            for event in splitter.finish():
                for delta in reader.read(event):
                    yield delta
        yield reader.done()

    async def relay(self, ask: Ask, request: Request, respond: Answering, *, priced: Callable[[Usage], Usage]) -> None:
        """Pass the question and the answer on, changing the model's name and adding the cost."""
        body = {**ask.body, "model": self.model or ask.model}
        merge_usage = ask.dialect is Dialect.OPENAI_CHAT and ask.stream and not ask.include_usage
        if merge_usage:
            # A stream without usage cannot be charged to a budget: ask for it, and fold it into the last chunk.
            body["stream_options"] = {"include_usage": True}
        passed = tuple((name, value) for name, value in request.headers if name in _PASSED_UP)
        path = _PATHS[(self.kind, ask.dialect)] + ("/count_tokens" if request.path.endswith("/count_tokens") else "")
        async with self._post(path, passed, compact(body)) as response:
            headers = tuple((name, value) for name, value in response.headers if name in _PASSED_DOWN)
            if (response.header(b"content-type") or b"").startswith(b"text/event-stream"):
                await respond.start(response.status, headers)
                await _relay_events(response, respond, _Passing(ask.dialect, priced, merge_usage=merge_usage))
                await respond.end()
                return
            whole = await response.read(bytes_max=ANSWER_BYTES_MAX)
            usage, shown = _with_cost(whole, ask.dialect, priced)
            if usage is not None and usage.cost_usd is not None:
                headers += (
                    (b"x-stockade-cost-usd", f"{usage.cost_usd:.10f}".encode()),
                    (b"x-stockade-cost-estimated", b"true" if usage.cost_estimated else b"false"),
                )
            await respond.whole(response.status, headers, shown)

    @asynccontextmanager
    async def _post(self, path: str, passed: Headers, body: bytes) -> AsyncIterator[http_client.Response]:
        key = self.key.encode()
        own: Headers = ((b"content-type", b"application/json"), (b"user-agent", b"stockade"))
        if self.kind == "anthropic":
            own += ((b"x-api-key", key),)
            if not any(name == b"anthropic-version" for name, _ in passed):
                own += ((b"anthropic-version", b"2023-06-01"),)
        elif key:
            own += ((b"authorization", b"Bearer " + key),)
        try:
            async with http_client.post(self.url, path, own + passed, body) as response:
                yield response
        except http_client.ProviderError as error:
            raise RequestError(f"cannot reach the provider of the model: {error}", status=502) from error


def _message(text: str) -> str:
    try:
        match json.loads(text):
            case {"error": {"message": str(message)}}:
                return f"the provider refused: {message[:ERROR_CHARS_MAX]}"
    except ValueError:
        pass
    return "the provider refused without saying why"


def _with_cost(whole: bytes, dialect: Dialect, priced: Callable[[Usage], Usage]) -> tuple[Usage | None, bytes]:
    """Return what a whole answer used and the answer with its cost inside; unchanged where it says nothing."""
    try:
        value: Any = json.loads(whole)
    except (ValueError, RecursionError):
        return None, whole
    return _put_cost(value, dialect, priced, whole)


def _put_cost(value: Any, dialect: Dialect, priced: Callable[[Usage], Usage], raw: bytes) -> tuple[Usage | None, bytes]:
    holder = usage_holder(value, dialect)
    if holder is None:
        return None, raw
    input_tokens, output_tokens = tokens_in(holder)
    usage = priced(Usage(input_tokens, output_tokens))
    if usage.cost_usd is None:
        return usage, raw
    with_cost(holder, usage)
    return usage, compact(value)


def usage_holder(value: Any, dialect: Dialect) -> Json | None:
    """Return the usage object inside an answer or an event, where there is one that is final."""
    match dialect, value:
        case Dialect.OPENAI_RESPONSES, {"response": {"usage": dict(usage)}}:
            return usage
        case Dialect.ANTHROPIC_MESSAGES, {"type": "message_start"}:
            return None
        case _, {"usage": dict(usage)}:
            return usage
        case _:
            return None


class _Passing:
    """Changes what must change in passing events: cost goes in, usage nobody asked for goes into the last chunk."""

    def __init__(self, dialect: Dialect, priced: Callable[[Usage], Usage], *, merge_usage: bool) -> None:
        self._dialect = dialect
        self._priced = priced
        self._merge_usage = merge_usage
        self._held: Json | None = None  # the chunk that finishes, waiting for the usage that follows it

    def event(self, event: sse.Event) -> bytes:
        if event.cut:
            raise RequestError("cannot pass on the answer: an event is too large", status=502)
        value = _event_value(event)
        if value is None:
            return self.end() + event.raw
        if self._merge_usage and _finishes(value) and not value.get("usage"):
            before, self._held = self.end(), value
            return before
        changed = self._held is not None and value.get("choices") == []
        if changed:
            value, self._held = {**(self._held or {}), "usage": value.get("usage")}, None
        _, data = _put_cost(value, self._dialect, self._priced, compact(value) if changed else b"")
        return self.end() + (sse.encode(data, name=event.name) if data else event.raw)

    def end(self) -> bytes:
        held, self._held = self._held, None
        return b"" if held is None else sse.encode(compact(held))


async def _relay_events(response: http_client.Response, respond: Answering, passing: _Passing) -> None:
    splitter = sse.Splitter()
    async for piece in response.pieces():
        for event in splitter.feed(piece):
            await respond.send(passing.event(event))
    for event in splitter.finish():
        await respond.send(passing.event(event))
    await respond.send(passing.end())


def _event_value(event: sse.Event) -> Json | None:
    if b'"usage"' not in event.data and b'"finish_reason"' not in event.data:
        return None
    try:
        value: Any = json.loads(event.data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _finishes(value: Json) -> bool:
    choices = value.get("choices")
    return isinstance(choices, list) and any(isinstance(c, dict) and c.get("finish_reason") for c in choices)
