"""What the three dialects have in common: a question to a model and the pieces of its answer. Values only.

A dialect parses bytes into an `Ask` and renders `Delta`s; a model turns the one into the other. So every model speaks
every dialect, and none of the pairs is written by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from gateway_client.egress.request import Dialect

Role = Literal["system", "user", "assistant", "tool"]


class RequestError(Exception):
    """A request the gateway answers with an error in the dialect's own shape."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON text, or free text where `custom`."""

    call_id: str
    name: str
    arguments: str
    custom: bool = False


@dataclass(frozen=True, slots=True)
class ToolResult:
    call_id: str
    text: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Other:
    """A part this gateway passes through but does not translate: an image, a document, a thought."""

    kind: str


Part = Text | ToolCall | ToolResult | Other


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str
    schema: Mapping[str, Any]
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """One question. `tool_choice` is auto, none, required or the name of a tool; `body` is the JSON as it came."""

    dialect: Dialect
    model: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    max_tokens: int | None = None
    temperature: float | None = None
    stream: bool = False
    include_usage: bool = False
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)


class Stop(Enum):
    END = "end"
    TOOL = "tool"
    LENGTH = "length"
    REFUSAL = "refusal"


@dataclass(frozen=True, slots=True)
class Usage:
    input_tokens: int
    output_tokens: int
    cost_usd: float | None = None
    cost_estimated: bool = True


@dataclass(frozen=True, slots=True)
class Begin:
    """Comes first; what is known before the first word."""

    input_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    call_id: str
    name: str
    custom: bool = False


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of the arguments of the call that started last."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """Comes last."""

    stop: Stop
    usage: Usage


Delta = Begin | TextDelta | CallStart | CallDelta | Done


class Model(Protocol):
    def answer(self, ask: Ask) -> AsyncIterator[Delta]:
        """Yield Begin, pieces, Done; raise RequestError before the first piece where the question cannot be put."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: parts in order, calls complete."""

    parts: tuple[Text | ToolCall, ...]
    stop: Stop
    usage: Usage


async def collect(deltas: AsyncIterator[Delta]) -> Answer:
    """Gather the pieces of an answer that is not streamed."""
    parts: list[Text | ToolCall] = []
    done = Done(Stop.END, Usage(0, 0))
    async for delta in deltas:
        last = parts[-1] if parts else None
        match delta, last:
            case TextDelta(text), Text(before):
                parts[-1] = Text(before + text)
            case TextDelta(text), _:
                parts.append(Text(text))
            case CallStart(call_id, name, custom), _:
                parts.append(ToolCall(call_id, name, "", custom=custom))
            case CallDelta(text), ToolCall():
                parts[-1] = replace(last, arguments=last.arguments + text)
            case Done(), _:
                done = delta
            case _:
                pass
    return Answer(tuple(parts), done.stop, done.usage)


def merge(messages: list[Message]) -> tuple[Message, ...]:
    """Join neighbours of one role, so that a turn is a turn in every dialect."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            merged[-1] = Message(message.role, merged[-1].parts + message.parts)
        else:
            merged.append(message)
    return tuple(merged)
