"""TOML tables with the position of every key, read so that no key goes unnoticed (pure)."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar

from supervisord.documents import Position, Problem, nearest
from supervisord.ids import shown

PATH_BYTES_MAX: Final = 4096

E = TypeVar("E", bound=Enum)


def key_positions(text: str) -> dict[str, Position]:
    """Gives the position of every dotted key of a TOML text that parses; an entry of `[[a]]` is `a[0]`.

    tomllib keeps no positions. But statements end where lines end, and one that is not whole does not parse: so lines
    are collected until they do.
    """
    positions: dict[str, Position] = {}
    counts: dict[str, int] = {}
    table, statement, start = "", "", Position(1, 1)
    for number, line in enumerate(text.split("\n"), start=1):
        if not statement:
            start = Position(number, 1 + len(line) - len(line.lstrip()))
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            table = _table_name(parsed, counts)
            positions.setdefault(table, start)
        else:
            for key in _dotted_keys(parsed, table):
                positions.setdefault(key, start)
        statement = ""
    return positions


def _table_name(parsed: Mapping[str, object], counts: dict[str, int]) -> str:
    """Gives the name of the table that a header opens, out of that header parsed by itself."""
    name = ""
    level: object = parsed
    while isinstance(level, dict) and level:
        key, level = next(iter(level.items()))
        name = f"{name}.{key}" if name else key
        if isinstance(level, list):
            counts[name] = counts.get(name, -1) + 1
        if name in counts:
            name = f"{name}[{counts[name]}]"
    return name


def _dotted_keys(value: object, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, below in value.items():
            inner = f"{name}.{key}" if name else key
            yield inner
            yield from _dotted_keys(below, inner)
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield f"{name}[{index}]"
            yield from _dotted_keys(below, f"{name}[{index}]")


class Findings:
    """Collects what is wrong with a TOML text, each with its position."""

    def __init__(self, source: str, text: str) -> None:
        self.source = source
        self.text = text
        self.problems: list[Problem] = []
        self._positions: dict[str, Position] | None = None

    def add(self, key: str, message: str, remedy: str = "") -> None:
        if self._positions is None:
            self._positions = key_positions(self.text)
        around = f"{key}[0]" if f"{key}[0]" in self._positions and key not in self._positions else key
        while around and around not in self._positions:
            around = around[: max(around.rfind("."), around.rfind("["), 0)]
        self.problems.append(Problem(self.source, self._positions.get(around), key, message, remedy))


class Table:
    """One table: the keys that are asked for are the known ones, and `end()` names the others."""

    def __init__(self, findings: Findings, name: str, value: object) -> None:
        self.findings = findings
        self.name = name
        self.values: Mapping[str, object] = value if isinstance(value, dict) else {}
        self.known: list[str] = []
        if not isinstance(value, dict):
            findings.add(name, "is not a table", f"write [{name}]")

    def key(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def problem(self, key: str, message: str, remedy: str = "") -> None:
        self.findings.add(self.key(key), message, remedy)

    def get(self, key: str) -> object:
        self.known.append(key)
        return self.values.get(key)

    def table(self, key: str) -> "Table":
        value = self.get(key)
        return Table(self.findings, self.key(key), {} if value is None else value)

    def tables(self, key: str, most: int) -> list["Table"]:
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most:
            self.problem(key, f"is not a list of up to {most} tables", f"write [[{self.key(key)}]]")
            return []
        return [Table(self.findings, f"{self.key(key)}[{index}]", item) for index, item in enumerate(value)]

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or "\0" in value:
            self.problem(key, f"{shown(str(value))} is not a text", "put it in quotes")
            return default
        return value

    def matching(self, key: str, default: str, pattern: re.Pattern[str], wanted: str) -> str:
        value = self.text(key, default)
        if value != default and pattern.fullmatch(value) is None:
            self.problem(key, f"{shown(value)} is not {wanted}", "correct it")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(key, f"{shown(str(value))} is neither true nor false", "write true or false, without quotes")
            return default
        return value

    def whole(self, key: str, default: int, least: int, most: int) -> int:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.problem(key, f"{shown(str(value))} is not a whole number from {least} to {most}", "correct it")
            return default
        return value

    def number(self, key: str, default: float | None, least: float, most: float) -> float | None:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            self.problem(key, f"{shown(str(value))} is not a number from {least} to {most}", "correct it")
            return default
        return float(value)

    def one_of(self, key: str, default: E) -> E:
        value = self.get(key)
        words = [str(member.value) for member in type(default)]
        if value is None:
            return default
        if value not in words:
            self.problem(key, f"{shown(str(value))} is none of {', '.join(words)}", nearest(str(value), words))
            return default
        return type(default)(value)

    def path(self, key: str, default: Path | None) -> Path | None:
        """Gives an absolute path; an empty text is none."""
        text = self.text(key, "" if default is None else str(default))
        return self.absolute(key, text) if text else None

    def absolute(self, key: str, text: str) -> Path:
        if not text.startswith("/") or ".." in text.split("/") or len(text.encode()) > PATH_BYTES_MAX:
            self.problem(key, f"{shown(text)} is not an absolute path without `..`", "begin it with /")
        return Path(text)

    def end(self) -> None:
        for key in self.values:
            if key not in self.known:
                self.problem(key, "unknown key", nearest(key, self.known))
