"""A deterministic model: answers from a script, and where no rule holds from the conversation itself.

Three things make it useful without a script:
- Lines `@call NAME {JSON}` in the prompt are called one a turn, in order; then the results are summarised.
- Lines `@say TEXT` are the answer, `@fail STATUS TEXT` an error.
- Where tools are offered and nothing else is asked for, one that needs no argument it could not name is called once,
  then its result is summarised; without tools the prompt is echoed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, Final

from gateway_client.gateways.embedded.conversation import (
    Ask,
    Begin,
    CallDelta,
    CallStart,
    Delta,
    Done,
    RequestError,
    Stop,
    Text,
    TextDelta,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
)
from gateway_client.gateways.embedded.models import script as scripts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway_client.gateways.embedded.models.script import Script, Situation, Spoken

BYTES_PER_TOKEN: Final = 4
ECHO_CHARS_MAX: Final = 2_000
DIRECTIVES_MAX: Final = 1_000

_DIRECTIVE: Final = re.compile(r"^\s*@(call|say|fail)\s+(\S+)[ \t]*(.*)$", re.MULTILINE)


class ScriptedModel:
    """Answers from the conversation alone: the same question gets the same answer, byte for byte."""

    def __init__(self, script: Script | None = None) -> None:
        self._script = script

    async def answer(self, ask: Ask) -> AsyncIterator[Delta]:
        spoken = speak(ask, self._script)
        step = spoken.step
        await asyncio.sleep(step.delay_ms / 1000)
        input_tokens = count_tokens(ask)
        output_tokens = 0
        yield Begin(input_tokens)
        stop = step.stop
        for part in spoken.parts:
            text = part.text if isinstance(part, Text) else part.arguments
            if isinstance(part, ToolCall):
                stop = Stop.TOOL
                yield CallStart(part.call_id, part.name, part.custom)
                output_tokens += tokens(part.name)
            output_tokens += tokens(text)
            pieces = [text[at : at + step.chunk_chars] for at in range(0, len(text), step.chunk_chars)]
            if ask.max_tokens is not None and output_tokens > ask.max_tokens and isinstance(part, Text):
                output_tokens = ask.max_tokens
                pieces, stop = [_cut(text, ask.max_tokens)], Stop.LENGTH
            for piece in pieces:
                await asyncio.sleep(step.chunk_delay_ms / 1000)
                yield TextDelta(piece) if isinstance(part, Text) else CallDelta(piece)
            if stop is Stop.LENGTH:
                break
        yield Done(stop, Usage(input_tokens, output_tokens))


def _cut(text: str, tokens_max: int) -> str:
    return text.encode()[: tokens_max * BYTES_PER_TOKEN].decode("utf-8", "ignore")


def tokens(text: str) -> int:
    """Count four bytes as a token, rounded up: crude, but the same everywhere."""
    return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


def count_tokens(ask: Ask) -> int:
    total = 0
    for message in ask.messages:
        for part in message.parts:
            match part:
                case Text(text) | ToolResult(_, text):
                    total += tokens(text)
                case ToolCall(_, name, arguments):
                    total += tokens(name) + tokens(arguments)
                case _:
                    total += 1
    for tool in ask.tools:
        total += tokens(tool.name) + tokens(tool.description) + tokens(json.dumps(dict(tool.schema)))
    return max(1, total)


def speak(ask: Ask, script: Script | None) -> Spoken:
    """Return the answer. Pure."""
    now = scripts.situation(ask)
    seed = hashlib.sha256(repr((ask.messages, ask.model)).encode("utf-8", "replace")).hexdigest()[:22]
    spoken = scripts.answer(script, ask, seed) if script is not None else None
    if spoken is None:
        spoken = scripts.Spoken(_directed(now, seed) or _unprompted(now, ask.tool_choice, seed))
    return spoken


def _directed(now: Situation, seed: str) -> tuple[Text | ToolCall, ...]:
    lines = _DIRECTIVE.findall(now.user[: scripts.SEARCHED_CHARS_MAX])[:DIRECTIVES_MAX]
    if not lines:
        return ()
    if now.turn >= len(lines):
        return (Text(_summarised(now)),)
    verb, first, rest = lines[now.turn]
    if verb == "say":
        return (Text(f"{first} {rest}".strip()),)
    if verb == "fail":
        status = int(first) if re.fullmatch("[45][0-9][0-9]", first) else 500
        raise RequestError(rest or "the script says so", status=status)
    return (scripts.make_call(now, first, rest.strip() or "{}", f"{seed}00"),)


def _unprompted(now: Situation, choice: str, seed: str) -> tuple[Text | ToolCall, ...]:
    if now.results:
        return (Text(_summarised(now)),)
    tool = _tool_to_try(now, choice) if now.turn == 0 else None
    if tool is not None:
        arguments = "" if tool.custom else _arguments(tool.schema)
        return (scripts.make_call(now, tool.name, arguments, f"{seed}00"),)
    said = now.user.strip()[:ECHO_CHARS_MAX]
    return (Text(f"[scripted model] You said: {said}" if said else "[scripted model] You said nothing."),)


def _summarised(now: Situation) -> str:
    return f"[scripted model] {scripts.summary(now.results)}"


def _tool_to_try(now: Situation, choice: str) -> Tool | None:
    """Return the tool to call: the one demanded, else the first that can do no harm for want of arguments."""
    if choice == "none":
        return None
    for tool in now.tools:
        if choice == tool.name:
            return tool
    if choice == "required":
        return now.tools[0] if now.tools else None
    return next((tool for tool in now.tools if not tool.custom and not tool.schema.get("required")), None)


def _arguments(schema: Any) -> dict[str, Any]:
    """Return a value for each required argument: its default, first choice, or an empty one of its type."""
    properties = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
    required = schema.get("required") if isinstance(schema.get("required"), list) else []
    return {name: _value(properties.get(name)) for name in required if isinstance(name, str)}


def _value(schema: Any) -> Any:
    empty: dict[str, Any] = {"string": ".", "integer": 1, "number": 1, "boolean": False, "array": [], "object": {}}
    match schema:
        case {"default": value} | {"const": value} | {"enum": [value, *_]}:
            return value
        case {"type": str(kind)} if kind in empty:
            return empty[kind]
        case _:
            return "."
