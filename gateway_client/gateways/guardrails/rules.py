"""Which patterns are looked for in which direction for which model, and what is done about a match. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from gateway_client.gateways.guardrails import builtin
from gateway_client.gateways.guardrails.window import Patterns

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping, Sequence

    from gateway_client.gateways.guardrails.pattern import Pattern

REASON: Final = "guardrail_blocked"


class Direction(Enum):
    REQUEST = "request"
    RESPONSE = "response"


class Action(Enum):
    BLOCK = "block"
    MASK = "mask"


@dataclass(frozen=True, slots=True)
class Rule:
    """One `[[gateway.guardrails]]`; `models` are globs of the name asked for."""

    name: str
    directions: frozenset[Direction]
    action: Action
    patterns: tuple[Pattern, ...]
    models: tuple[str, ...] = ("*",)

    def applies(self, model: str, direction: Direction) -> bool:
        return direction in self.directions and any(fnmatchcase(model, glob) for glob in self.models)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found and done: names and counts, never the text."""

    direction: Direction
    action: Action
    rules: tuple[str, ...]
    patterns: Mapping[str, int]

    @property
    def message(self) -> str:
        what = "the request holds" if self.direction is Direction.REQUEST else "the answer held"
        return f"{REASON}: {what} {', '.join(self.patterns)}, which guardrail {', '.join(self.rules)} does not let pass"


class Guard:
    """The rules of one model and direction, made ready."""

    def __init__(self, rules: Sequence[Rule], direction: Direction) -> None:
        self.direction = direction
        # Where two rules have one pattern, blocking wins.
        ordered = sorted(rules, key=lambda rule: rule.action is Action.MASK)
        self._rule_of: dict[str, Rule] = {}
        for rule in ordered:
            for pattern in rule.patterns:
                self._rule_of.setdefault(pattern.name, rule)
        self.patterns = Patterns(tuple(dict.fromkeys(pattern for rule in ordered for pattern in rule.patterns)))

    def blocks(self, found: Mapping[str, int]) -> bool:
        return any(count and self._rule_of[name].action is Action.BLOCK for name, count in found.items())

    def verdict(self, found: Counter[str]) -> Verdict | None:
        """Return what is to be told; None where nothing was found."""
        names = [name for name, count in found.items() if count]
        if not names:
            return None
        action = Action.BLOCK if self.blocks(found) else Action.MASK
        told = sorted(name for name in names if self._rule_of[name].action is action)
        rules = tuple(dict.fromkeys(self._rule_of[name].name for name in told))
        return Verdict(self.direction, action, rules, {name: found[name] for name in told})


class Rules:
    """All rules of the gateway."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self._rules = tuple(rules)
        self._guards: dict[tuple[tuple[str, ...], Direction], Guard] = {}

    def __bool__(self) -> bool:
        return bool(self._rules)

    def guard(self, model: str, direction: Direction) -> Guard | None:
        """Return what guards a model in a direction; None where no rule does."""
        rules = [rule for rule in self._rules if rule.applies(model, direction)]
        if not rules:
            return None
        # By the rules and not the model's name, which is an agent's to choose: the table stays small.
        key = (tuple(rule.name for rule in rules), direction)
        if key not in self._guards:
            self._guards[key] = Guard(rules, direction)
        return self._guards[key]


def patterns_of(names: Sequence[str], own: Sequence[Pattern] = ()) -> tuple[Pattern, ...]:
    """Return the patterns of sets and names, and an operator's own; raises LookupError."""
    found = [pattern for name in names for pattern in builtin.named(name)]
    return tuple(dict.fromkeys((*found, *own)))
