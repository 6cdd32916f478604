"""YAML documents with the position of every key: parsed within limits, checked against a JSON Schema (pure).

PyYAML's event stream is used rather than its constructors: it is iterative, so depth is ours to bound, and it leaves
duplicate keys, aliases and YAML 1.1's surprises (`no` is false, `0777` is octal, `1:30` is 90) for us to refuse.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from supervisord.errors import InvalidInput
from supervisord.ids import shown

DOCUMENT_BYTES_MAX: Final = 64 * 1024
DOCUMENT_NODES_MAX: Final = 4096
DOCUMENT_DEPTH_MAX: Final = 16
PROBLEMS_MAX: Final = 20
KEY_CHARACTERS_MAX: Final = 128

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]
Path = tuple[str | int, ...]

_INT: Final = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})", re.ASCII)
_FLOAT: Final = re.compile(r"[-+]?[0-9]{1,15}\.[0-9]{1,15}", re.ASCII)
_AMBIGUOUS: Final = re.compile(r"[Yy]es|[Nn]o|[Oo]n|[Oo]ff|YES|NO|ON|OFF|[-+]?0[0-9]+|0[xo][0-9a-fA-F]+", re.ASCII)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Position:
    """Line and column, both counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a document, where, and what to do."""

    source: str
    position: Position | None
    key: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        where = f":{self.position.line}:{self.position.column}" if self.position else ""
        key = f" {self.key}:" if self.key else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.source}{where}:{key} {self.message}{remedy}"


class InvalidDocument(InvalidInput):
    """A file that says something Stockade does not understand; `problems` has every one that was found."""

    def __init__(self, what: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"cannot read {what}: " + "\n  ".join(str(problem) for problem in self.problems))


@dataclass(frozen=True, slots=True)
class Document:
    """The plain value of a document and the position of every key and item in it."""

    source: str
    value: Value
    positions: Mapping[Path, Position]

    def position(self, path: Path) -> Position | None:
        """Gives the position of the path or of the nearest thing around it."""
        while path and path not in self.positions:
            path = path[:-1]
        return self.positions.get(path)

    def problem(self, path: Path, message: str, remedy: str = "") -> Problem:
        return Problem(self.source, self.position(path), dotted(path), message, remedy)


def dotted(path: Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def parse_document(text: str, *, source: str, what: str = "document") -> Document:
    """Parses one YAML document; raises InvalidDocument with line and column."""
    if len(text.encode("utf-8", "surrogatepass")) > DOCUMENT_BYTES_MAX:
        raise InvalidDocument(
            what, [Problem(source, None, "", f"longer than {DOCUMENT_BYTES_MAX} bytes", "split or shorten it")]
        )
    try:
        return _Composer(source, what).compose(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = Position(mark.line + 1, mark.column + 1) if mark else None
        raise InvalidDocument(what, [Problem(source, position, "", f"not YAML: {error.problem}")]) from error
    except yaml.YAMLError as error:
        raise InvalidDocument(what, [Problem(source, None, "", f"not YAML: {shown(str(error))}")]) from error


@dataclass(slots=True)
class _Open:
    """A collection that is being filled; `key` is the mapping key that waits for its value."""

    value: list[Value] | dict[str, Value]
    path: Path
    anchor: str | None
    key: str | None = None


class _Composer:
    """Builds the plain value out of YAML events, within the limits above."""

    def __init__(self, source: str, what: str) -> None:
        self.source = source
        self.what = what
        self.positions: dict[Path, Position] = {}
        self.stack: list[_Open] = []
        self.root: Value = None
        self.documents = 0
        self.nodes = 0

    def compose(self, events: Iterator[yaml.Event]) -> Document:
        for event in events:
            match event:
                case yaml.DocumentStartEvent():
                    self.documents += 1
                    if self.documents > 1:
                        raise self.refuse(event, "a second document in the same file", "one file holds one document")
                case yaml.AliasEvent():
                    # Aliases make bombs, and nothing here is long enough to need them.
                    raise self.refuse(event, "YAML aliases are not accepted", "write the value out")
                case yaml.ScalarEvent():
                    self.node(event)
                    self.scalar(event)
                case yaml.MappingStartEvent():
                    self.node(event)
                    self.open(event, {})
                case yaml.SequenceStartEvent():
                    self.node(event)
                    self.open(event, [])
                case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                    self.stack.pop()
                case _:
                    pass
        return Document(self.source, self.root, self.positions)

    def refuse(self, event: yaml.Event, message: str, remedy: str = "") -> InvalidDocument:
        position = _position(event)
        key = dotted(self.here()) if self.stack else ""
        return InvalidDocument(self.what, [Problem(self.source, position, key, message, remedy)])

    def node(self, event: yaml.NodeEvent) -> None:
        self.nodes += 1
        if self.nodes > DOCUMENT_NODES_MAX:
            raise self.refuse(event, f"more than {DOCUMENT_NODES_MAX} values", "shorten it")
        if event.anchor is not None:
            raise self.refuse(event, "YAML anchors are not accepted", "write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise self.refuse(event, f"the YAML tag {shown(str(tag))} is not accepted", "leave the tag out")

    def here(self) -> Path:
        top = self.stack[-1]
        if isinstance(top.value, list):
            return (*top.path, len(top.value))
        return top.path if top.key is None else (*top.path, top.key)

    def open(self, event: yaml.CollectionStartEvent, value: list[Value] | dict[str, Value]) -> None:
        if len(self.stack) >= DOCUMENT_DEPTH_MAX:
            raise self.refuse(event, f"nested deeper than {DOCUMENT_DEPTH_MAX}", "flatten it")
        path = self.here() if self.stack else ()
        self.put(event, value)
        self.stack.append(_Open(value, path, event.anchor))

    def scalar(self, event: yaml.ScalarEvent) -> None:
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.value, dict) and top.key is None:
            self.key(event, top)
        else:
            self.put(event, self.plain(event) if event.implicit[0] else event.value)

    def key(self, event: yaml.ScalarEvent, top: _Open) -> None:
        assert isinstance(top.value, dict)  # noqa: S101 - only scalar() calls this; for the type checker
        if len(event.value) > KEY_CHARACTERS_MAX or _CONTROL.search(event.value):
            raise self.refuse(
                event,
                "a key that is too long or has control characters",
                f"use at most {KEY_CHARACTERS_MAX} characters",
            )
        if event.value == "<<" and event.implicit[0]:
            raise self.refuse(event, "YAML merge keys are not accepted", "write the keys out")
        if event.value in top.value:
            first = self.positions[(*top.path, event.value)]
            raise self.refuse(
                event,
                f"the key {shown(event.value)} is here twice, first in line {first.line}",
                "remove one of the two",
            )
        top.key = event.value
        self.positions[(*top.path, event.value)] = _position(event)

    def put(self, event: yaml.NodeEvent, value: Value) -> None:
        if not self.stack:
            self.root = value
            self.positions[()] = _position(event)
            return
        top = self.stack[-1]
        if isinstance(top.value, list):
            self.positions[self.here()] = _position(event)
            top.value.append(value)
        elif top.key is None:
            raise self.refuse(event, "a key that is a list or a mapping", "a key is a plain word")
        else:
            top.value[top.key] = value
            top.key = None

    def plain(self, event: yaml.ScalarEvent) -> Value:
        """Gives the value of an unquoted scalar: YAML 1.2's core, and what YAML 1.1 reads otherwise is refused."""
        text = event.value
        match text:
            case "" | "~" | "null":
                return None
            case "true" | "True":
                return True
            case "false" | "False":
                return False
            case _ if _AMBIGUOUS.fullmatch(text):
                raise self.refuse(event, f"{shown(text)} means different things to different YAML readers", "quote it")
            case _ if _INT.fullmatch(text):
                return int(text)
            case _ if _FLOAT.fullmatch(text):
                return float(text)
            case _:
                return text


def check_schema(document: Document, validator: Draft202012Validator, *, what: str) -> dict[str, Value]:
    """Gives the document's mapping when it satisfies the schema; raises InvalidDocument with every problem found."""
    problems: list[Problem] = []
    for error in sorted(validator.iter_errors(document.value), key=lambda error: list(map(str, error.absolute_path))):
        problems.extend(_problems(document, error))
        if len(problems) >= PROBLEMS_MAX:
            break
    if problems:
        raise InvalidDocument(what, problems[:PROBLEMS_MAX])
    if not isinstance(document.value, dict):
        raise InvalidDocument(what, [document.problem((), "is not a mapping", "begin with `kind:`")])
    return document.value


def nearest(word: str, words: Sequence[str]) -> str:
    """Gives "did you mean …?" for the nearest of the words, or the list of them where none is near."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(words))}"


def _listed(error: ValidationError) -> list[object]:
    return list(error.validator_value) if isinstance(error.validator_value, list) else []


def _position(event: yaml.Event) -> Position:
    mark = event.start_mark
    return Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)


def _problems(document: Document, error: ValidationError) -> Iterator[Problem]:
    path: Path = tuple(error.absolute_path)
    schema = error.schema if isinstance(error.schema, Mapping) else {}
    match error.validator:
        case "additionalProperties" if isinstance(error.instance, dict):
            known = list(schema.get("properties", {}))
            patterns = list(schema.get("patternProperties", {}))
            for key in error.instance:
                if key in known or any(re.search(pattern, key) for pattern in patterns):
                    continue
                remedy = nearest(key, known) if known else f"a key here matches {' or '.join(patterns)}"
                yield document.problem((*path, key), "unknown key", remedy)
        case "required" if isinstance(error.instance, dict):
            missing = [str(key) for key in _listed(error) if key not in error.instance]
            yield document.problem(path, f"the key {', '.join(missing)} is missing", "add it")
        case "enum":
            words = [str(word) for word in _listed(error)]
            yield document.problem(path, f"{shown(str(error.instance))} is none of {', '.join(words)}", "choose one")
        case "const":
            yield document.problem(path, f"{shown(str(error.instance))} is not {error.validator_value}", "correct it")
        case "type" | "oneOf" | "anyOf":
            wanted = schema.get("description") or error.validator_value
            yield document.problem(path, f"{shown(str(error.instance))} is not what belongs here", f"wanted: {wanted}")
        case _:
            wanted = schema.get("description") or f"{error.validator} {error.validator_value}"
            yield document.problem(path, f"{shown(str(error.instance))} is not accepted", f"wanted: {wanted}")
