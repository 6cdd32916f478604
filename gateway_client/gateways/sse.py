"""Server-sent events, incrementally and in bounded memory. Pure; WHATWG HTML §9.2.6.

Fed any split of a stream it yields the same events. An event larger than `event_bytes_max` is yielded with `cut` set
and without data: the caller can still pass on its bytes, it just cannot read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

EVENT_BYTES_MAX: Final = 4 * 1024 * 1024

# A blank line: two line ends in a row, each CRLF, LF or CR.
_BLANK_LINE: Final = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")
_LONGEST_BLANK: Final = 4


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its name, its data (lines joined by LF) and the bytes it came in, blank line included."""

    name: str
    data: bytes
    raw: bytes
    cut: bool = False


class Splitter:
    """Splits a stream of bytes into events."""

    def __init__(self, *, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._limit = event_bytes_max
        self._buffer = bytearray()
        self._searched = 0
        self._cut = False

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that `data` completes."""
        self._buffer += data
        events = []
        while (end := self._end_of_event()) is not None:
            raw = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._searched = 0
            events.append(Event("", b"", raw, cut=True) if self._cut or len(raw) > self._limit else _parse(raw))
            self._cut = False
        if len(self._buffer) > self._limit:
            # Keep only what may be the start of the blank line; the bytes are the caller's already.
            self._cut = True
            del self._buffer[:-_LONGEST_BLANK]
            self._searched = 0
        return events

    def finish(self) -> list[Event]:
        """Return the last event of a stream that ended without its blank line."""
        raw, self._buffer = bytes(self._buffer), bytearray()
        if not raw.strip():
            return []
        return [Event("", b"", raw, cut=True) if self._cut else _parse(raw)]

    def _end_of_event(self) -> int | None:
        found = _BLANK_LINE.search(self._buffer, max(0, self._searched - _LONGEST_BLANK))
        self._searched = len(self._buffer)
        # A CR at the very end may be half of a CRLF: wait for the next byte.
        if found is None or (found.end() == len(self._buffer) and self._buffer.endswith(b"\r")):
            return None
        return found.end()


def _parse(raw: bytes) -> Event:
    name = ""
    data = []
    for line in re.split(rb"\r\n|\n|\r", raw.rstrip(b"\r\n")):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            name = value.decode("utf-8", "replace")
        elif field == b"data":
            data.append(value)
    return Event(name, b"\n".join(data), raw)


def encode(data: bytes, *, name: str = "") -> bytes:
    """Return the bytes of one event; `data` holds no line end (compact JSON never does)."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + data + b"\n\n"
