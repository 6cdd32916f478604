"""One module a dialect: bytes to `Ask`, deltas to JSON or events, errors in the shape its SDKs expect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from gateway_client.egress.request import Dialect
from gateway_client.gateways.embedded.dialects import chat, messages, responses

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway_client.gateways.embedded.conversation import Answer, Ask, Delta, RequestError
    from gateway_client.gateways.embedded.dialects.fields import Json

    class Renderer(Protocol):
        """Turns deltas into the bytes of server-sent events; one for each answer."""

        def events(self, delta: Delta) -> bytes: ...

        def failure(self, message: str) -> bytes: ...

    class DialectModule(Protocol):
        """What each module of this package offers."""

        @property
        def parse(self) -> Callable[[Json], Ask]: ...

        @property
        def render(self) -> Callable[[Ask, Answer, str, int], Json]: ...

        @property
        def error(self) -> Callable[[RequestError], Json]: ...

        @property
        def Renderer(self) -> Callable[[Ask, str, int], Renderer]: ...  # noqa: N802 - a class, seen as a member


MODULES: Final[dict[Dialect, DialectModule]] = {
    Dialect.OPENAI_CHAT: chat,
    Dialect.OPENAI_RESPONSES: responses,
    Dialect.ANTHROPIC_MESSAGES: messages,
}
