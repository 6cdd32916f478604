"""Frozen dataclasses to JSON frames and back: strict, so that a frame from a process that was taken over is a value.

Every frame is one JSON object with `"m"`, the name of the message. Unknown keys, missing keys and wrong types are
refused.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, TypeVar, Union

frame_bytes_max: Final = 64 * 1024

_PLAIN: Final = frozenset({str, int, float, bool, type(None)})

Message = TypeVar("Message")


class BadFrame(ValueError):  # noqa: N818 - named for what it says
    """A frame that is no message of the channel it came on."""


def encode(message: object) -> bytes:
    """Give the frame of a message; raise BadFrame if it would be larger than any channel takes."""
    frame = json.dumps(
        {"m": type(message).__name__, **_to_json(message)}, separators=(",", ":"), ensure_ascii=False
    ).encode("utf-8", "surrogatepass")
    if len(frame) > frame_bytes_max:
        raise BadFrame(f"cannot send {type(message).__name__}: {len(frame)} bytes are more than {frame_bytes_max}")
    return frame


def decode(frame: bytes, expected: tuple[type[Message], ...]) -> Message:
    """Read a frame as one of the expected messages; raise BadFrame for anything else."""
    if len(frame) > frame_bytes_max:
        raise BadFrame(f"cannot read frame: it is longer than {frame_bytes_max} bytes")
    try:
        value = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"cannot read frame: {error}") from error
    if not isinstance(value, dict):
        raise BadFrame("cannot read frame: it is no JSON object")
    name = value.pop("m", None)
    for kind in expected:
        if kind.__name__ == name:
            return typing.cast("Message", _build(kind, value))
    raise BadFrame(f"cannot read frame: {str(name)[:40]!r} is no message of this channel")


def _to_json(value: Any) -> Any:
    if type(value) in _PLAIN:  # most are, and this runs for every field of every frame
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag = {"verdict": type(value).__name__} if type(value) in _tagged() else {}
        return {**tag, **{field.name: _to_json(getattr(value, field.name)) for field in _fields(type(value))}}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return value


@lru_cache(maxsize=1)
def _tagged() -> frozenset[type]:
    """Give the classes that travel as one of a union of dataclasses, and so carry their name."""
    from gateway_client.egress.decide import Allow, Refuse, Reply  # noqa: PLC0415 - the codec is below the types

    return frozenset((Allow, Refuse, Reply))


@lru_cache(maxsize=256)
def _fields(kind: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


@lru_cache(maxsize=256)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: type, value: dict[str, Any]) -> object:
    hints = _hints(kind)
    if not value.keys() <= hints.keys():
        raise BadFrame(f"cannot read {kind.__name__}: unknown key")
    try:
        return kind(**{name: _read(hints[name], item, f"{kind.__name__}.{name}") for name, item in value.items()})
    except TypeError as error:
        raise BadFrame(f"cannot read {kind.__name__}: a key is missing") from error


def _read(hint: Any, value: Any, where: str) -> Any:  # noqa: C901, PLR0911, PLR0912 - one flat case a type
    if hint is typing.Any:
        return value
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, where)
    if origin is tuple:
        if isinstance(value, list):
            if len(arguments) == 2 and arguments[1] is Ellipsis:  # noqa: PLR2004 - tuple[T, ...]
                return tuple(_read(arguments[0], item, where) for item in value)
            if len(arguments) == len(value):
                return tuple(_read(each, item, where) for each, item in zip(arguments, value, strict=True))
    elif origin is dict:
        if isinstance(value, dict):
            return {key: _read(arguments[1], item, where) for key, item in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, dict):
            return _build(hint, value)
    elif isinstance(hint, type) and issubclass(hint, StrEnum):
        if isinstance(value, str) and value in hint._value2member_map_:
            return hint(value)
    elif hint is bool or hint is str:
        if isinstance(value, hint):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise BadFrame(f"cannot read {where}: wrong type")


def _read_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    kinds = [each for each in arguments if each is not type(None)]
    if value is None and len(kinds) < len(arguments):
        return None
    if len(kinds) == 1:
        return _read(kinds[0], value, where)
    if isinstance(value, dict) and isinstance(value.get("verdict"), str):
        name = value["verdict"]
        for kind in kinds:
            if kind.__name__ == name:
                return _build(kind, {key: item for key, item in value.items() if key != "verdict"})
    raise BadFrame(f"cannot read {where}: wrong type")
