"""The events of a streamed answer, looked through as they pass: texts that come in pieces are put together. Pure.

Each text of an answer (a choice, a block, the arguments of a call) has a window of its own. An event whose text is held
back still passes, empty; what is left when its text ends comes in an event of its own, before the one that ends it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from gateway_client.egress.request import Dialect
from gateway_client.gateways import sse
from gateway_client.gateways.guardrails import document
from gateway_client.gateways.guardrails.window import JsonText, PlainText, Window

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from gateway_client.gateways.guardrails.window import Patterns

Json = dict[str, Any]
TEXTS_OPEN_MAX: Final = 1024
_DONE: Final = b"[DONE]"


class TooMany(ValueError):  # noqa: N818 - named for what it says
    """A stream that cannot be looked through: it is not passed on."""


class Events(ABC):
    """The events of one answer."""

    def __init__(self, patterns: Patterns) -> None:
        self._patterns = patterns
        self._texts: dict[Hashable, tuple[Window, Json]] = {}
        self._again: Counter[str] = Counter()
        """What whole events held: at the end they repeat what came in pieces."""
        self._ended: Counter[str] = Counter()
        self.text_chars = 0

    @property
    def found(self) -> Counter[str]:
        pieces = sum((window.found for window, _ in self._texts.values()), self._ended)
        return pieces | self._again

    def event(self, event: sse.Event) -> bytes:
        """Return the event as it may pass, with what comes before it."""
        if event.cut:
            raise TooMany("cannot look through the answer: an event is too large")
        if not event.data:
            return event.raw
        if event.data == _DONE:
            return self.end() + event.raw
        try:
            value: Any = json.loads(event.data)
        except (ValueError, RecursionError) as error:
            raise TooMany("cannot look through the answer: an event is no JSON") from error
        if not isinstance(value, dict):
            raise TooMany("cannot look through the answer: an event is no object")
        return b"".join(self._encoded(each, event.name) for each in self._shown(value))

    def end(self) -> bytes:
        """Return what is still held back, as events."""
        return b"".join(self._encoded(each, each.get("type", "")) for each in self._rest(list(self._texts)))

    @abstractmethod
    def _shown(self, value: Json) -> Iterable[Json]: ...

    def _encoded(self, value: Json, name: str) -> bytes:
        shown = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
        return sse.encode(shown, name=value.get("type", name) if name else "")

    def _piece(self, key: Hashable, text: str, like: Json, *, is_json: bool) -> str:
        """Feed a piece of the text `key`; `like` is an event with nothing in it, for what is left at the end."""
        if key not in self._texts:
            if len(self._texts) >= TEXTS_OPEN_MAX:
                raise TooMany("cannot look through the answer: too many texts at once")
            self._texts[key] = (Window(self._patterns, JsonText() if is_json else PlainText()), like)
        self.text_chars += len(text)
        return self._texts[key][0].feed(text)

    def _rest(self, keys: Iterable[Hashable]) -> list[Json]:
        events = []
        for key in keys:
            window, like = self._texts.pop(key)
            rest = window.end()
            self._ended.update(window.found)
            if rest:
                events.append(self._filled(like, rest))
        return events

    @abstractmethod
    def _filled(self, like: Json, text: str) -> Json: ...

    def _whole(self, value: Any) -> Any:
        found: Counter[str] = Counter()
        value = document.mask(value, self._patterns, found)
        self._again |= found
        return value


class ChatEvents(Events):
    """Chunks of chat completions."""

    def _shown(self, value: Json) -> Iterable[Json]:
        choices = value.get("choices")
        if not isinstance(choices, list):
            return (self._whole(value),)
        rest: list[Json] = []
        head = {key: each for key, each in value.items() if key not in ("choices", "usage")}
        for choice in choices:
            if not isinstance(choice, dict):
                raise TooMany("cannot look through the answer: a choice is no object")
            number = choice.get("index", 0)
            choice.pop("logprobs", None)  # they say the text again, token by token
            delta = choice.get("delta")
            if isinstance(delta, dict):
                self._delta(delta, number, head)
            if choice.get("finish_reason"):
                rest += self._rest([key for key in self._texts if isinstance(key, tuple) and key[0] == number])
        return (*rest, value)

    def _delta(self, delta: Json, number: Any, head: Json) -> None:
        for name, piece in delta.items():
            if isinstance(piece, str) and name != "role":
                like = {**head, "choices": [{"index": number, "delta": {name: ""}, "finish_reason": None}]}
                delta[name] = self._piece((number, name), piece, like, is_json=False)
            elif name == "tool_calls" and isinstance(piece, list):
                for call in piece:
                    self._call(call, number, head)
            elif name == "function_call" and isinstance(piece, dict):
                self._call({"index": -1, "function": piece}, number, head)
            elif not isinstance(piece, str):
                delta[name] = self._whole(piece)

    def _call(self, call: Any, number: Any, head: Json) -> None:
        if not isinstance(call, dict):
            raise TooMany("cannot look through the answer: a call is no object")
        index = call.get("index", 0)
        for kind, field in (("function", "arguments"), ("custom", "input")):
            inner = call.get(kind)
            if isinstance(inner, dict) and isinstance(inner.get(field), str):
                piece = {"index": index, kind: {field: ""}}
                named = {"function_call": {field: ""}} if index == -1 else {"tool_calls": [piece]}
                like = {**head, "choices": [{"index": number, "delta": named, "finish_reason": None}]}
                inner[field] = self._piece((number, kind, index), inner[field], like, is_json=kind == "function")

    def _filled(self, like: Json, text: str) -> Json:
        choice = like["choices"][0]
        match choice["delta"]:
            case {"tool_calls": [{"function": inner}]} | {"tool_calls": [{"custom": inner}]} | {"function_call": inner}:
                pass
            case inner:
                pass
        inner[next(iter(inner))] = text
        return like


class MessagesEvents(Events):
    """Events of messages."""

    def _shown(self, value: Json) -> Iterable[Json]:
        index = value.get("index")
        match value:
            case {"type": "content_block_delta", "delta": dict(delta)}:
                for name, piece in delta.items():
                    if isinstance(piece, str) and name not in document.UNTOUCHED:
                        like = {**value, "delta": {"type": delta.get("type"), name: ""}}
                        json_text = name in document.JSON_TEXTS
                        delta[name] = self._piece((index, name), piece, like, is_json=json_text)
                    elif not isinstance(piece, str):
                        delta[name] = self._whole(piece)
                return (value,)
            case {"type": "content_block_stop"}:
                ending = [key for key in self._texts if isinstance(key, tuple) and key[0] == index]
                return (*self._rest(ending), value)
            case {"type": "message_stop" | "message_delta"}:
                return (*self._rest(list(self._texts)), self._whole(value))
            case _:
                return (self._whole(value),)

    def _filled(self, like: Json, text: str) -> Json:
        like["delta"][list(like["delta"])[-1]] = text
        return like


class ResponsesEvents(Events):
    """Events of responses, which are numbered: one more moves the numbers of all that follow."""

    def __init__(self, patterns: Patterns) -> None:
        super().__init__(patterns)
        self._more = 0

    def _shown(self, value: Json) -> Iterable[Json]:
        kind = value.get("type")
        if not isinstance(kind, str):
            return (self._whole(value),)
        if kind.endswith(".delta") and isinstance(value.get("delta"), str):
            key = self._key(kind.removesuffix(".delta"), value)
            if "logprobs" in value:
                value["logprobs"] = []
            like = {**value, "delta": ""}
            is_json = "arguments" in kind
            value["delta"] = self._piece(key, value["delta"], like, is_json=is_json)
            return (self._numbered(value),)
        rest = []
        if kind.endswith(".done"):
            key = self._key(kind.removesuffix(".done"), value)
            rest = self._rest([key] if key in self._texts else [])
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            rest = self._rest(list(self._texts))
        first = value.get("sequence_number")
        shown = []
        for each in rest:
            shown.append(self._numbered({**each, "sequence_number": first}))
            self._more += 1
        _without_logprobs(value)
        response = value.get("response")
        if isinstance(response, dict):
            # Instructions, tools and metadata come from the agent: they are its own words, said back to it.
            for name in ("output", "error"):
                if response.get(name):
                    response[name] = self._whole(response[name])
        else:
            value = self._whole(value)
        return (*shown, self._numbered(value))

    def _numbered(self, value: Json) -> Json:
        number = value.get("sequence_number")
        return {**value, "sequence_number": number + self._more} if isinstance(number, int) else value

    def _key(self, kind: str, value: Json) -> Hashable:
        return (kind, *(str(value.get(name)) for name in ("item_id", "output_index", "content_index", "summary_index")))

    def _filled(self, like: Json, text: str) -> Json:
        return {**like, "delta": text}


def _without_logprobs(value: Any) -> None:
    todo = [value]
    while todo:
        match todo.pop():
            case dict(fields):
                if fields.get("logprobs"):
                    fields["logprobs"] = []
                todo.extend(fields.values())
            case list(items):
                todo.extend(items)


def whole_answer(value: Any, patterns: Patterns, found: Counter[str]) -> Any:
    """Return an answer that is one object with matches masked, and count them."""
    if isinstance(value, dict) and value.get("object") == "response":
        for name in ("output", "error"):
            if value.get(name):
                _without_logprobs(value[name])
                value[name] = document.mask(value[name], patterns, found)
        return value
    for choice in value.get("choices") or () if isinstance(value, dict) else ():
        if isinstance(choice, dict):
            choice["logprobs"] = None
    return document.mask(value, patterns, found)


KINDS: Final[dict[Dialect, type[Events]]] = {
    Dialect.OPENAI_CHAT: ChatEvents,
    Dialect.OPENAI_RESPONSES: ResponsesEvents,
    Dialect.ANTHROPIC_MESSAGES: MessagesEvents,
}
