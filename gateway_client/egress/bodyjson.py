"""JSON of agents under limits that are checked before it is parsed, and numbers that every reader reads alike. Pure.

`json.loads` makes an object of some hundred bytes of every `[],`, and nothing else runs meanwhile: so a body is weighed
as it comes, piece by piece, and one that would cost too much is refused before a parser sees it.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final, NoReturn

containers_max: Final = 32_768
"""Objects and arrays in one body: a long conversation of an agent with a hundred tools has some thousands."""
values_max: Final = 400_000
"""All values in one body; embeddings of 300,000 tokens, the most the API takes, are as many numbers."""
members_max: Final = 65_536
"""Keys of all objects in one body."""
digits_max: Final = 64
"""Of one number: reading it costs the square of its length."""

_NO_CONTAINER: Final = bytes(set(range(256)) - set(b"[{"))
_NO_VALUE: Final = bytes(set(range(256)) - set(b"[{,:"))
_LONG_NUMBER: Final = re.compile(rb"[0-9]{%d}" % (digits_max + 1))
_STRING: Final = re.compile(rb'"[^"]*"')


class BadCall(ValueError):  # noqa: N818 - named for what it says
    """A body that is no call of its dialect; `reason` is a stable code."""

    def __init__(self, reason: str, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


class Scales:
    """Weighs a body as its pieces come: counts what is outside of strings and makes an object; raises BadCall."""

    __slots__ = ("_containers", "_escaped", "_in_string", "_members", "_values")

    def __init__(self) -> None:
        self._in_string = False
        self._escaped = False
        self._containers = 0
        self._members = 0
        self._values = 0

    def feed(self, piece: bytes) -> None:
        if self._escaped:  # the backslash was the last byte of the piece before
            piece = piece[1:]
            self._escaped = False
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece, self._escaped = piece[:-1], True
        piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        if self._in_string:
            _, quote, piece = piece.partition(b'"')
            if not quote:
                return
            self._in_string = False
        piece = _STRING.sub(b"", piece)
        outside, quote, _ = piece.partition(b'"')
        self._in_string = bool(quote)
        self._containers += len(outside.translate(None, _NO_CONTAINER))
        self._values += len(outside.translate(None, _NO_VALUE))
        self._members += outside.count(b":")
        if self._containers > containers_max or self._members > members_max or self._values > values_max:
            raise BadCall(
                "body_too_complex",
                f"the body has over {containers_max} objects and arrays, {members_max} keys or {values_max} values",
                status=413,
            )
        if _LONG_NUMBER.search(outside):
            raise BadCall("body_malformed", f"the body has a number of over {digits_max} digits")


def read_object(body: bytes) -> dict[str, Any]:
    """Give the object a weighed body is; raise BadCall for all else, and for numbers that are none in JSON."""
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BadCall("body_malformed", "the body is no JSON, or has a number that is not finite") from error
    if not isinstance(document, dict):
        raise BadCall("body_malformed", "the body is no JSON object")
    return document


def write_object(document: dict[str, Any]) -> bytes:
    """Give the compact JSON of a document that `read_object` gave."""
    try:
        return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: only its escape can carry it
        return json.dumps(document, allow_nan=False, separators=(",", ":")).encode("ascii")
    except RecursionError as error:
        raise BadCall("body_malformed", "the body is nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e999: written again it would be `Infinity`, which is no JSON
        raise ValueError(text)
    return number
