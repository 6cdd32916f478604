"""The gateway's own HTTP API: one table of endpoints, each a question to a model or a list of them."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any, Final

import h11
import structlog

from gateway_client.egress.request import Dialect
from gateway_client.gateways.embedded.conversation import Begin, Done, RequestError, collect
from gateway_client.gateways.embedded.dialects import MODULES, messages
from gateway_client.gateways.embedded.dialects.fields import Json, compact
from gateway_client.gateways.embedded.guarding import AnswerBlockedError, GuardedResponder, check_request
from gateway_client.gateways.embedded.models.provider import ProviderModel
from gateway_client.gateways.embedded.models.scripted import count_tokens
from gateway_client.gateways.guardrails.rules import Direction, Rules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway_client.gateways.embedded.conversation import Ask, Delta, Usage
    from gateway_client.gateways.embedded.guarding import Tell
    from gateway_client.gateways.embedded.http import Answering, Headers, Request, Responder
    from gateway_client.gateways.embedded.routes import Route, Routes
    from gateway_client.gateways.guardrails.rules import Verdict

    TellDaemon = Callable[[str, int, Verdict], Awaitable[None]]

DIALECT_OF_PATH: Final = {
    "/v1/chat/completions": Dialect.OPENAI_CHAT,
    "/v1/responses": Dialect.OPENAI_RESPONSES,
    "/v1/messages": Dialect.ANTHROPIC_MESSAGES,
}
COUNT_TOKENS_PATH: Final = "/v1/messages/count_tokens"
MODELS_PATH: Final = "/v1/models"
_JSON: Final = (b"content-type", b"application/json")
_SSE: Final = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
# A date for models that have none: both SDKs demand the field.
_CREATED_AT: Final = "2026-01-01T00:00:00Z"
_CREATED: Final = 1_767_225_600

SHOWN_CHARS_MAX: Final = 300  # of what an agent sent, in a log line or an error

_log = structlog.get_logger()


async def nobody(_agent_id: str, _x: int, _verdict: Verdict) -> None:
    """Where there is no daemon to be told: the scripted server of tests."""


class Api:
    """Answers requests; knows nothing of sockets."""

    def __init__(
        self, routes: Routes, *, now: Callable[[], float], rules: Rules | None = None, tell: TellDaemon | None = None
    ) -> None:
        self._routes = routes
        self._now = now
        self._rules = Rules() if rules is None else rules
        self._tell: TellDaemon = tell or nobody

    async def handle(self, request: Request, respond: Responder, *, agent_id: str = "", x: int = 0) -> None:
        """Answer one request; every failure becomes an error in the shape of the request's dialect."""

        async def told(verdict: Verdict) -> None:
            await self._tell(agent_id, x, verdict)

        try:
            await self._dispatch(request, respond, told)
        except RequestError as failure:
            _log.info(
                "refused",
                agent_id=agent_id,
                path=request.path[:SHOWN_CHARS_MAX],
                status=failure.status,
                reason=failure.message[:SHOWN_CHARS_MAX],
            )
            if respond.started:
                raise
            await _fail(request, respond, failure)
        except (OSError, TimeoutError, h11.LocalProtocolError):
            raise  # whoever asked has gone away
        except Exception:
            _log.exception("broken", agent_id=agent_id, path=request.path[:SHOWN_CHARS_MAX])
            if respond.started:
                raise
            await _fail(
                request, respond, RequestError("cannot answer: a fault in the gateway; see its log", status=500)
            )

    async def _dispatch(self, request: Request, respond: Responder, tell: Tell) -> None:
        path = request.path.rstrip("/") or "/"
        match "GET" if request.method == "HEAD" else request.method, path:
            case "GET", "/v1/models":
                await respond.whole(200, (_JSON,), compact(_listed(self._routes.names())))
            case "GET", _ if path.startswith(MODELS_PATH + "/"):
                name = path.removeprefix(MODELS_PATH + "/")
                self._routes.find(name)
                await respond.whole(200, (_JSON,), compact(_listed([name])["data"][0]))
            case "GET", "/health":
                await respond.whole(200, (_JSON,), b'{"status":"ok"}')
            case "POST", "/v1/messages/count_tokens":
                await self._count(request, respond, tell)
            case "POST", _ if path in DIALECT_OF_PATH:
                await self._answer(DIALECT_OF_PATH[path], request, respond, tell)
            case method, _ if path in (*DIALECT_OF_PATH, COUNT_TOKENS_PATH, MODELS_PATH):
                raise RequestError(f"cannot {method} {path}: the method is not known here", status=405)
            case _:
                served = ", ".join((*DIALECT_OF_PATH, COUNT_TOKENS_PATH, MODELS_PATH))
                raise RequestError(f"cannot find {path[:SHOWN_CHARS_MAX]}: this gateway serves {served}", status=404)

    async def _count(self, request: Request, respond: Responder, tell: Tell) -> None:
        ask = messages.parse(await check_request(read_json(request), self._rules, tell), counting=True)
        route = self._routes.find(ask.model)
        if isinstance(route.model, ProviderModel) and route.model.speaks(ask.dialect):
            await route.model.relay(ask, request, respond, priced=lambda usage: usage)
            return
        await respond.whole(200, (_JSON,), compact({"input_tokens": count_tokens(ask)}))

    async def _answer(self, dialect: Dialect, request: Request, respond: Responder, tell: Tell) -> None:
        ask = MODULES[dialect].parse(await check_request(read_json(request), self._rules, tell))
        route = self._routes.find(ask.model)
        guard = self._rules.guard(ask.model, Direction.RESPONSE)
        if guard is None:
            await self._ask(ask, route, request, respond)
            return
        guarded = GuardedResponder(respond, guard, tell, dialect=dialect, input_tokens=count_tokens(ask))
        try:
            await self._ask(ask, route, request, guarded)
        except AnswerBlockedError:
            _log.info("answer blocked", model=ask.model[:SHOWN_CHARS_MAX])
        finally:
            await guarded.close()

    async def _ask(self, ask: Ask, route: Route, request: Request, respond: Answering) -> None:
        dialect = ask.dialect

        def priced(usage: Usage) -> Usage:
            return self._routes.priced(usage, route, ask.model)

        if isinstance(route.model, ProviderModel) and route.model.speaks(dialect):
            await route.model.relay(ask, request, respond, priced=priced)
        elif ask.stream:
            await self._stream(ask, route, respond)
        else:
            answer = await collect(self._deltas(ask, route))
            shown = MODULES[dialect].render(ask, answer, secrets.token_hex(12), int(self._now()))
            await respond.whole(200, (_JSON, *cost_headers(answer.usage)), compact(shown))

    async def _stream(self, ask: Ask, route: Route, respond: Answering) -> None:
        renderer = MODULES[ask.dialect].Renderer(ask, secrets.token_hex(12), int(self._now()))
        try:
            async for delta in self._deltas(ask, route):
                if isinstance(delta, Begin):  # only now is it certain that there is an answer: errors keep their status
                    await respond.start(200, _SSE)
                await respond.send(renderer.events(delta))
        except RequestError as failure:
            if not respond.started:
                raise
            await respond.send(renderer.failure(failure.message))
        await respond.end()

    async def _deltas(self, ask: Ask, route: Route) -> AsyncIterator[Delta]:
        async for delta in route.model.answer(ask):
            if isinstance(delta, Done):
                yield Done(delta.stop, self._routes.priced(delta.usage, route, ask.model))
            else:
                yield delta


def read_json(request: Request) -> Json:
    try:
        value: Any = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"cannot read body: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError("cannot read body: expected a JSON object", code="invalid_json")
    return value


def cost_headers(usage: Usage) -> Headers:
    if usage.cost_usd is None:
        return ()
    return (
        (b"x-stockade-cost-usd", f"{usage.cost_usd:.10f}".encode()),
        (b"x-stockade-cost-estimated", b"true" if usage.cost_estimated else b"false"),
    )


async def _fail(request: Request, respond: Responder, failure: RequestError) -> None:
    headers, body = error_response(request, failure)
    await respond.whole(failure.status, headers, body)


def error_response(request: Request, failure: RequestError) -> tuple[Headers, bytes]:
    """Render an error the way the SDK that asked will read it."""
    anthropic = request.path.startswith("/v1/messages") or request.header(b"anthropic-version") is not None
    dialect = Dialect.ANTHROPIC_MESSAGES if anthropic else Dialect.OPENAI_CHAT
    return (_JSON,), compact(MODULES[dialect].error(failure))


def malformed(status: int, message: str) -> tuple[Headers, bytes]:
    """Render the answer to bytes that are no request, so of no dialect."""
    return (_JSON,), compact(MODULES[Dialect.OPENAI_CHAT].error(RequestError(message, status=status)))


def _listed(names: list[str]) -> Json:
    """Return a list both SDKs read: the fields of OpenAI's and of Anthropic's side by side."""
    data = [
        {
            "id": name,
            "object": "model",
            "created": _CREATED,
            "owned_by": "stockade",
            "type": "model",
            "display_name": name,
            "created_at": _CREATED_AT,
        }
        for name in names
    ]
    return {
        "object": "list",
        "data": data,
        "has_more": False,
        "first_id": names[0] if names else None,
        "last_id": names[-1] if names else None,
    }
