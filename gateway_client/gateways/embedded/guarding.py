"""Guardrails on one call: its question before a model sees it, its answer before the agent does, the verdicts told.

A verdict is told before what it is about goes on; that of a masked stream before its end, however it ends.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from gateway_client.egress.request import Dialect
from gateway_client.gateways import sse
from gateway_client.gateways.embedded.conversation import RequestError
from gateway_client.gateways.embedded.dialects.fields import compact
from gateway_client.gateways.guardrails import document
from gateway_client.gateways.guardrails.events import KINDS, TooMany, whole_answer
from gateway_client.gateways.guardrails.rules import REASON, Action, Direction
from gateway_client.gateways.guardrails.window import masked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway_client.gateways.embedded.dialects.fields import Json
    from gateway_client.gateways.embedded.http import Headers, Responder
    from gateway_client.gateways.guardrails.events import Events
    from gateway_client.gateways.guardrails.rules import Guard, Rules, Verdict

    Tell = Callable[[Verdict], Awaitable[None]]

TURN_CHARS: Final = 64 * 1024
CHARS_PER_TOKEN: Final = 4


class AnswerBlockedError(Exception):
    """The answer was ended with an error of the dialect; there is nothing left to send."""


async def check_request(value: Json, rules: Rules, tell: Tell) -> Json:
    """Return the body with matches masked; RequestError where a rule blocks it."""
    model = value.get("model")
    guard = rules.guard(model if isinstance(model, str) else "", Direction.REQUEST)
    if guard is None:
        return value
    found: Counter[str] = Counter()
    holder: list[Any] = [value]
    read = 0
    for count in document.steps(holder, guard.patterns, found):
        read += count
        if read >= TURN_CHARS:  # megabytes take a while: other agents' calls are served in between
            read = 0
            await asyncio.sleep(0)
    verdict = guard.verdict(found)
    if verdict is not None:
        await tell(verdict)
        if verdict.action is Action.BLOCK:
            raise RequestError(verdict.message, status=400, code=REASON)
    changed = holder[0]
    return changed if isinstance(changed, dict) else value


class GuardedResponder:
    """A responder that lets pass what the guard lets pass."""

    def __init__(self, respond: Responder, guard: Guard, tell: Tell, *, dialect: Dialect, input_tokens: int) -> None:
        self._respond = respond
        self._guard = guard
        self._tell = tell
        self._dialect = dialect
        self._input_tokens = input_tokens
        self._events: Events | None = None
        self._splitter = sse.Splitter()
        self._told = False

    @property
    def started(self) -> bool:
        return self._respond.started

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        found: Counter[str] = Counter()
        usage = None
        try:
            value: Any = json.loads(body)
        except (ValueError, RecursionError):
            shown = masked(self._guard.patterns, body.decode("utf-8", "replace"), found).encode()
        else:
            usage = value.get("usage") if isinstance(value, dict) else None
            shown = compact(whole_answer(value, self._guard.patterns, found))
        verdict = self._guard.verdict(found)
        if verdict is not None:
            await self._tell(verdict)
            if verdict.action is Action.BLOCK:
                # The tokens are used all the same: the usage stays, so that a budget is charged with them.
                error = self._error(verdict.message)
                await self._respond.whole(400, headers, compact({**error, "usage": usage} if usage else error))
                return
        await self._respond.whole(status, headers, shown)

    async def start(self, status: int, headers: Headers) -> None:
        self._events = KINDS[self._dialect](self._guard.patterns)
        await self._respond.start(status, headers)

    async def send(self, data: bytes) -> None:
        for event in self._splitter.feed(data):
            await self._pass(event)

    async def end(self) -> None:
        for event in self._splitter.finish():
            await self._pass(event)
        if self._events is not None:
            rest = self._events.end()
            await self._stop_if_blocked()
            await self.close()  # before the end is seen: the outcome is told then, and this belongs to it
            await self._respond.send(rest)
        await self._respond.end()

    async def close(self) -> None:
        """Tell what was masked in a stream that has ended, or was cut off."""
        verdict = self._guard.verdict(self._events.found) if self._events is not None and not self._told else None
        if verdict is not None:
            self._told = True
            await self._tell(verdict)

    async def _pass(self, event: sse.Event) -> None:
        assert self._events is not None  # noqa: S101 - start() comes first
        try:
            shown = self._events.event(event)
        except TooMany as error:
            raise RequestError(str(error), status=502) from error
        await self._stop_if_blocked()
        await self._respond.send(shown)

    async def _stop_if_blocked(self) -> None:
        """End the answer with an error where something was found that may not pass; nothing of it has left."""
        assert self._events is not None  # noqa: S101 - start() comes first
        found = self._events.found
        if not self._guard.blocks(found):
            return
        verdict = self._guard.verdict(found)
        assert verdict is not None  # noqa: S101 - something was found
        self._told = True
        await self._tell(verdict)
        output_tokens = -(-self._events.text_chars // CHARS_PER_TOKEN)
        await self._respond.send(self._failure(verdict.message, output_tokens))
        await self._respond.end()
        raise AnswerBlockedError

    def _error(self, message: str) -> Json:
        if self._dialect is Dialect.ANTHROPIC_MESSAGES:
            return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": REASON}
        return {"error": error}

    def _failure(self, message: str, output_tokens: int) -> bytes:
        match self._dialect:
            case Dialect.ANTHROPIC_MESSAGES:
                return sse.encode(
                    compact({**self._error(message), "usage": {"output_tokens": output_tokens}}), name="error"
                )
            case Dialect.OPENAI_RESPONSES:
                error = {"type": "error", "code": REASON, "message": message, "param": None}
                usage = {"input_tokens": self._input_tokens, "output_tokens": output_tokens}
                return sse.encode(compact({**error, "usage": usage}), name="error")
            case _:
                usage = {"prompt_tokens": self._input_tokens, "completion_tokens": output_tokens}
                return sse.encode(compact({**self._error(message), "usage": usage}))
