"""The script of a scripted model: rules that turn a conversation into an answer. Pure and stateless.

A script is `{"rules": [RULE, …]}`. The first rule whose `when` holds answers with the step of the current turn:

    {"when": {"user": REGEX, "system": REGEX, "result": REGEX, "tools": [NAME, …], "model": GLOB,
              "last": "user" | "tool"},
     "steps": [STEP, …]}        or one STEP's keys directly in the rule

All keys of `when` are optional and all that are there must hold. `user` is searched in the last message of a person,
`result` in the newest tool results, `tools` must all be offered. The turn counts the model's own answers since that
last message of a person, so it needs no memory: the same conversation gets the same answer, whoever asks and when.
Past the last step, the last one without calls answers (or, where there is none, the built-in summary).

    STEP: {"say": TEXT, "call": [{"name": NAME, "arguments": OBJECT or TEXT}],
           "error": {"status": 429, "message": TEXT}, "delay_ms": N, "chunk_chars": N, "chunk_delay_ms": N,
           "stop": "end" | "length" | "refusal"}

In every string `${{ NAME }}` is replaced: `user`, `system`, `result` (newest results, joined), `results` (all of this
prompt), `summary` (of `results`), `turn`, `model`, `tools`, or a group of the regexes (`1`, a group's name).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from gateway_client.gateways.embedded.conversation import (
    Ask,
    Message,
    RequestError,
    Stop,
    Text,
    Tool,
    ToolCall,
    ToolResult,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

SEARCHED_CHARS_MAX: Final = 64 * 1024
STEPS_MAX: Final = 1_000
DELAY_MS_MAX: Final = 600_000
REPLACED_CHARS_MAX: Final = 1024 * 1024

_PLACE: Final = re.compile(r"\$\{\{\s*(\w+)\s*\}\}")
_WHEN_KEYS: Final = {"user", "system", "result", "tools", "model", "last"}
_STEP_KEYS: Final = {"say", "call", "error", "delay_ms", "chunk_chars", "chunk_delay_ms", "stop"}


class ScriptError(ValueError):
    """A script that cannot be used; says where and what is expected."""


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class Failure:
    status: int
    message: str


@dataclass(frozen=True, slots=True)
class Step:
    say: str = ""
    call: tuple[Call, ...] = ()
    error: Failure | None = None
    delay_ms: int = 0
    chunk_chars: int = 16
    chunk_delay_ms: int = 0
    stop: Stop = Stop.END


@dataclass(frozen=True, slots=True)
class When:
    user: re.Pattern[str] | None = None
    system: re.Pattern[str] | None = None
    result: re.Pattern[str] | None = None
    tools: frozenset[str] = frozenset()
    model: str = "*"
    last: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    when: When
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Script:
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Situation:
    """What a conversation has come to."""

    user: str
    system: str
    last: str
    turn: int
    results: tuple[str, ...]
    newest: tuple[str, ...]
    tools: tuple[Tool, ...]
    model: str


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a script answers."""

    parts: tuple[Text | ToolCall, ...]
    step: Step = field(default_factory=Step)


def situation(ask: Ask) -> Situation:
    start = max((index for index, message in enumerate(ask.messages) if message.role == "user"), default=0)
    since = ask.messages[start:]
    results = [_results(message) for message in since if message.role == "tool"]
    last = since[-1] if since else Message("user", ())
    return Situation(
        user=since[0].text if since and since[0].role == "user" else "",
        system="\n".join(message.text for message in ask.messages if message.role == "system"),
        last="tool" if last.role == "tool" else "user",
        turn=sum(message.role == "assistant" for message in since),
        results=tuple(text for group in results for text in group),
        newest=results[-1] if results and last.role == "tool" else (),
        tools=ask.tools,
        model=ask.model,
    )


def _results(message: Message) -> tuple[str, ...]:
    return tuple(part.text for part in message.parts if isinstance(part, ToolResult))


def answer(script: Script, ask: Ask, seed: str) -> Spoken | None:
    """Return what the script says, or None where no rule holds; `seed` makes the ids of calls."""
    now = situation(ask)
    for rule in script.rules:
        groups = _matches(rule.when, now)
        if groups is None:
            continue
        step = _step(rule, now.turn)
        if step is None:
            return None
        if step.error is not None:
            raise RequestError(step.error.message, status=step.error.status)
        names = {**values(now), **groups}
        parts: list[Text | ToolCall] = [Text(replace_places(step.say, names))] if step.say else []
        for index, call in enumerate(step.call):
            parts.append(make_call(now, call.name, _replaced(call.arguments, names), f"{seed}{index:02d}"))
        return Spoken(tuple(parts), step)
    return None


def _step(rule: Rule, turn: int) -> Step | None:
    if turn < len(rule.steps):
        return rule.steps[turn]
    return next((step for step in reversed(rule.steps) if not step.call), None)


def make_call(now: Situation, name: str, arguments: Any, suffix: str) -> ToolCall:
    custom = any(tool.custom for tool in now.tools if tool.name == name)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{suffix}", name, text, custom=custom)


def _matches(when: When, now: Situation) -> dict[str, str] | None:
    if not fnmatchcase(now.model, when.model) or (when.last and when.last != now.last):
        return None
    if not when.tools <= {tool.name for tool in now.tools}:
        return None
    groups: dict[str, str] = {}
    for pattern, text in ((when.system, now.system), (when.result, "\n".join(now.newest)), (when.user, now.user)):
        if pattern is None:
            continue
        found = pattern.search(text[:SEARCHED_CHARS_MAX])
        if found is None:
            return None
        groups |= {str(index): value or "" for index, value in enumerate(found.groups(), 1)}
        groups |= {name: value or "" for name, value in found.groupdict().items()}
    return groups


def values(now: Situation) -> dict[str, str]:
    return {
        "user": now.user,
        "system": now.system,
        "result": "\n".join(now.newest),
        "results": "\n".join(now.results),
        "summary": summary(now.results),
        "turn": str(now.turn),
        "model": now.model,
        "tools": ", ".join(tool.name for tool in now.tools),
    }


def replace_places(text: str, names: Mapping[str, str]) -> str:
    """Replace `${{ name }}`; unknown names stay, so that a shell's own `${x}` never needs escaping."""
    return _PLACE.sub(lambda found: names.get(found[1], found[0]), text)[:REPLACED_CHARS_MAX]


def _replaced(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return replace_places(value, names)
    if isinstance(value, list):
        return [_replaced(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _replaced(item, names) for key, item in value.items()}
    return value


_NOTABLE: Final = re.compile(
    r"\b(error|fail(ed|ure)?|fatal|panic|exception|refused|timed? ?out|denied)\b", re.IGNORECASE
)
_VARYING: Final = re.compile(r"\d+|0x[0-9a-f]+", re.IGNORECASE)
SUMMARY_LINES_MAX: Final = 5
SUMMARY_LINE_CHARS_MAX: Final = 160


def summary(results: tuple[str, ...]) -> str:
    """Say what tool results hold: their size and the lines that speak of failure, grouped and counted."""
    lines = [line.strip() for text in results for line in text[:REPLACED_CHARS_MAX].splitlines() if line.strip()]
    kinds: dict[str, list[str]] = {}
    for line in lines:
        if _NOTABLE.search(line):
            kinds.setdefault(_VARYING.sub("#", line), []).append(line)
    said = [f"{len(results)} tool result{'s' * (len(results) != 1)}, {len(lines)} lines."]
    if kinds:
        said.append("Lines that speak of failure, most frequent first:")
        most = sorted(kinds.values(), key=lambda group: -len(group))[:SUMMARY_LINES_MAX]
        said.extend(f"- {len(group)}x {group[0][:SUMMARY_LINE_CHARS_MAX]}" for group in most)
    elif lines:
        said.append("It begins:")
        said.extend(f"  {line[:SUMMARY_LINE_CHARS_MAX]}" for line in lines[:SUMMARY_LINES_MAX])
    return "\n".join(said)


def parse(document: object, where: str = "script") -> Script:
    """Return the script in a JSON value; raises ScriptError naming the place."""
    match document:
        case {"rules": list(rules), **rest} if not rest:
            return Script(tuple(_rule(rule, f"{where}.rules[{index}]") for index, rule in enumerate(rules)))
        case _:
            raise ScriptError(f"cannot read {where}: expected an object with the one key rules")


def _rule(value: object, where: str) -> Rule:
    if not isinstance(value, dict):
        raise ScriptError(f"cannot read {where}: expected an object")
    when = _when(value.get("when", {}), f"{where}.when")
    own = {key: item for key, item in value.items() if key != "when"}
    if "steps" not in own:
        return Rule(when, (_parse_step(own, where),))
    steps = own.pop("steps")
    if own or not isinstance(steps, list) or not 1 <= len(steps) <= STEPS_MAX:
        raise ScriptError(f"cannot read {where}: expected when and steps, a list of 1 to {STEPS_MAX} steps")
    return Rule(when, tuple(_parse_step(step, f"{where}.steps[{index}]") for index, step in enumerate(steps)))


def _when(value: object, where: str) -> When:
    if not isinstance(value, dict) or not value.keys() <= _WHEN_KEYS:
        raise ScriptError(f"cannot read {where}: expected an object with keys of {', '.join(sorted(_WHEN_KEYS))}")
    tools = value.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, str) for tool in tools):
        raise ScriptError(f"cannot read {where}.tools: expected a list of names")
    last = value.get("last", "")
    if last not in ("", "user", "tool"):
        raise ScriptError(f"cannot read {where}.last: expected user or tool")
    return When(
        user=_pattern(value, "user", where),
        system=_pattern(value, "system", where),
        result=_pattern(value, "result", where),
        tools=frozenset(tools),
        model=str(value.get("model", "*")),
        last=last,
    )


def _pattern(value: dict[str, Any], key: str, where: str) -> re.Pattern[str] | None:
    text = value.get(key)
    if text is None:
        return None
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise ScriptError(f"cannot read {where}.{key}: {error}") from error


def _parse_step(value: object, where: str) -> Step:
    if not isinstance(value, dict) or not value or not value.keys() <= _STEP_KEYS:
        raise ScriptError(f"cannot read {where}: expected an object with keys of {', '.join(sorted(_STEP_KEYS))}")
    failure = None
    match value.get("error"):
        case None:
            pass
        case {"status": int(status), "message": str(message)} if 400 <= status <= 599:  # noqa: PLR2004 - HTTP's errors
            failure = Failure(status, message)
        case _:
            raise ScriptError(f"cannot read {where}.error: expected a status of 400 to 599 and a message")
    say = value.get("say", "")
    if not isinstance(say, str):
        raise ScriptError(f"cannot read {where}.say: expected a string")
    try:
        stop = Stop(value.get("stop", "end"))
    except ValueError as error:
        raise ScriptError(f"cannot read {where}.stop: expected end, length or refusal") from error
    return Step(
        say=say,
        call=_calls(value.get("call", []), where),
        error=failure,
        delay_ms=_number(value, "delay_ms", 0, where),
        chunk_chars=max(1, _number(value, "chunk_chars", 16, where)),
        chunk_delay_ms=_number(value, "chunk_delay_ms", 0, where),
        stop=stop,
    )


def _calls(value: object, where: str) -> tuple[Call, ...]:
    if not isinstance(value, list):
        raise ScriptError(f"cannot read {where}.call: expected a list")
    calls = []
    for index, item in enumerate(value):
        match item:
            case {"name": str(name), **rest} if rest.keys() <= {"arguments"}:
                calls.append(Call(name, rest.get("arguments", {})))
            case _:
                raise ScriptError(f"cannot read {where}.call[{index}]: expected a name and arguments")
    return tuple(calls)


def _number(value: dict[str, Any], key: str, default: int, where: str) -> int:
    number = value.get(key, default)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= DELAY_MS_MAX:
        raise ScriptError(f"cannot read {where}.{key}: expected a number of 0 to {DELAY_MS_MAX}")
    return number
