"""What is printed: JSON documents, tables, and nothing that drives a terminal.

Agents choose many of these strings (paths, reasons, names of what they asked for). In JSON everything beyond ASCII is
escaped; in tables everything that is not printable is: control characters, ESC sequences, bidirectional overrides.
"""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

CELL_CHARACTERS_MAX: Final = 120
KIBI: Final = 1024
LAST_BYTE: Final = 0xFF
LAST_IN_PLANE: Final = 0xFFFF


def escape(text: str, *, characters_max: int | None = None) -> str:
    r"""The text with everything unprintable as \xNN, \uNNNN or \UNNNNNNNN, and cut where a limit is given."""
    if not text.isprintable() or "\\" in text:
        text = "".join(map(_escaped, text))
    if characters_max is not None and len(text) > characters_max:
        text = text[: characters_max - 1] + "…"
    return text


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    point = ord(character)
    if point <= LAST_BYTE:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point <= LAST_IN_PLANE else f"\\U{point:08x}"


def escape_lines(data: bytes) -> str:
    """Output of an agent for a terminal: line ends and tabs stay, all else as escape() has it."""
    text = data.decode("utf-8", "backslashreplace")
    return "".join(c if c in "\n\t\\" else _escaped(c) for c in text)


def when(moment: datetime | None) -> str | None:
    """RFC 3339 in UTC, to the microsecond."""
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def plain(value: Any) -> Any:
    """The value as JSON has it: dataclasses as objects, times as RFC 3339, bytes as base64."""
    match value:
        case datetime():
            return when(value)
        case bytes():
            return b64encode(value).decode()
        case str() | int() | float() | None:
            return value
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _ if is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        case _:
            raise TypeError(f"no JSON form for {type(value).__name__}")


def print_json(value: Any) -> None:
    """One document on one line."""
    sys.stdout.write(json.dumps(plain(value)) + "\n")
    sys.stdout.flush()


def print_table(head: Sequence[str], rows: Iterable[Sequence[str | None]]) -> None:
    cells = [tuple(head)]
    cells += [tuple(escape(cell or "-", characters_max=CELL_CHARACTERS_MAX) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.flush()


def print_facts(facts: Mapping[str, Any], indent: int = 0) -> None:
    """`key: value` a line, objects below each other."""
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            sys.stdout.write(f"{' ' * indent}{escape(key)}:\n")
            print_facts(value, indent + 2)
            continue
        if isinstance(value, list):
            value = ", ".join(item if isinstance(item, str) else json.dumps(item) for item in value)  # noqa: PLW2901
        text = "-" if value in (None, "", {}) else value if isinstance(value, str) else json.dumps(value)
        sys.stdout.write(f"{' ' * indent}{escape(key)}: {escape(text)}\n")
    sys.stdout.flush()


def say(line: str) -> None:
    """A line for people on stdout, escaped."""
    sys.stdout.write(escape(line) + "\n")
    sys.stdout.flush()


def complain(line: str) -> None:
    """A line for people on stderr, escaped."""
    sys.stderr.write(escape(line) + "\n")
    sys.stderr.flush()


def size(value: int | None) -> str | None:
    """`12.5MiB`."""
    if value is None:
        return None
    number, unit = float(value), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if number < KIBI:
            break
        number, unit = number / KIBI, bigger
    return f"{number:.0f}{unit}" if unit == "B" else f"{number:.1f}{unit}"


def amount(bound: str, value: float) -> str | None:
    """How much of a budget's bound: bytes as a size, others as a number with all its digits."""
    return size(int(value)) if bound == "egress_bytes" else f"{value:.15g}"


def text(value: object) -> str | None:
    return None if value is None else str(value)


def moment(value: datetime | None) -> str | None:
    """A time for a table, to the second, in UTC."""
    return None if value is None else value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
