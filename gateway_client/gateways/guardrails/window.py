"""Finding and masking matches, in whole texts and in streams of pieces: both give the same text. Pure."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gateway_client.gateways.guardrails.pattern import BEFORE_CHARS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.gateways.guardrails.pattern import Pattern


@dataclass(frozen=True, slots=True)
class Span:
    start: int
    end: int
    names: tuple[str, ...]


class Patterns:
    """A row of patterns made ready."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._patterns = tuple(patterns)
        self.longest = max((pattern.longest for pattern in patterns), default=0)
        prefixes = "|".join(f"(?:{pattern.prefix})" for pattern in patterns)
        self._prefix = re.compile(prefixes) if patterns else None

    def spans(self, text: str, at: int = 0) -> list[Span]:
        """Return where matches are from `at` on, from left to right; those that overlap become one."""
        found = sorted((start, end, p.name) for p in self._patterns for start, end in p.find(text, at))
        merged: list[Span] = []
        for start, end, name in found:
            last = merged[-1] if merged else None
            if last is not None and start < last.end:
                merged[-1] = Span(last.start, max(last.end, end), tuple(dict.fromkeys((*last.names, name))))
            else:
                merged.append(Span(start, end, (name,)))
        return merged

    def open_from(self, text: str, at: int = 0) -> int:
        """Return where the first match may begin that more text could complete or change; the length for none."""
        if self._prefix is None:
            return len(text)
        found = self._prefix.search(text, max(at, len(text) - self.longest))
        return len(text) if found is None else found.start()


class Writer(Protocol):
    """Writes what is shown instead of a match, and sees all that is not masked, in order."""

    def passed(self, text: str) -> None: ...

    def mask(self, name: str, found: str) -> str: ...


class PlainText:
    def passed(self, text: str) -> None:
        """Nothing of it changes a mask."""

    def mask(self, name: str, found: str) -> str:  # noqa: ARG002 - what was found is never shown
        return f"[masked:{name}]"


class JsonText:
    """JSON as text, the arguments of a tool: whatever is masked in it, it stays JSON."""

    def __init__(self) -> None:
        self._in_string = False
        self._escaped = False

    def passed(self, text: str) -> None:
        for char in text:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = self._in_string
            elif char == '"':
                self._in_string = not self._in_string

    def mask(self, name: str, found: str) -> str:
        if not self._in_string and found.isdigit():
            return "1" + "0" * (len(found) - 1)  # a number stays one
        return f"[masked:{name}]"


class Window:
    """Holds back the end of a stream of text as long as it may be the beginning of a match, and no longer.

    What it holds is bounded by the longest match. Names of what was found are counted in `found`.
    """

    def __init__(self, patterns: Patterns, writer: Writer | None = None) -> None:
        self._patterns = patterns
        self._writer: Writer = writer or PlainText()
        self._held = ""
        self._before = ""
        """The last characters let go, as they came: what may not stand before a match is looked for in them."""
        self.found: Counter[str] = Counter()

    def feed(self, text: str) -> str:
        """Return what may go on, with matches masked."""
        self._held += text
        text = self._before + self._held
        return self._let_go(text, self._patterns.open_from(text, len(self._before)))

    def end(self) -> str:
        """Return the rest."""
        text = self._before + self._held
        return self._let_go(text, len(text))

    def _let_go(self, text: str, until: int) -> str:
        at = len(self._before)
        spans = [span for span in self._patterns.spans(text, at) if span.start < until]
        if spans and spans[-1].end > until:  # more may come to overlap it: it stays whole
            until = spans.pop().start
        shown = []
        for span in spans:
            shown.append(self._pass(text[at : span.start]))
            shown.append(self._writer.mask(span.names[0], text[span.start : span.end]))
            at = span.end
            self.found.update(span.names)
        shown.append(self._pass(text[at:until]))
        self._before = text[max(0, until - BEFORE_CHARS) : until]
        self._held = text[until:]
        return "".join(shown)

    def _pass(self, text: str) -> str:
        self._writer.passed(text)
        return text


def masked(patterns: Patterns, text: str, found: Counter[str], writer: Writer | None = None) -> str:
    """Return a whole text with matches masked, and count them."""
    window = Window(patterns, writer)
    window._held = text  # noqa: SLF001 - a whole text has no end to hold back
    shown = window.end()
    found.update(window.found)
    return shown
