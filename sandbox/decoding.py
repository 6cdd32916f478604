"""Frozen dataclasses as JSON and back, strictly; no I/O, no os, no clock.

What travels between daemon and launcher is decoded here: unknown keys and wrong types raise `InvalidPlan` that names
the field.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Decoder = Callable[[object, str], Any]
_decoders: dict[type, dict[str, Decoder]] = {}


class InvalidPlan(ValueError):  # noqa: N818 - reads as what the plan is
    """The plan cannot be performed as written; the text names the field."""


def plain_values(value: Any) -> Any:
    """Do what `dataclasses.asdict` does, without its copies: what is in a plan cannot change."""
    if type(value) is tuple:
        return [plain_values(item) for item in value]
    slots = getattr(type(value), "__slots__", None)
    return value if slots is None else {name: plain_values(getattr(value, name)) for name in slots}


def decode(kind: type[T], value: object, where: str) -> T:
    """Make a dataclass of a JSON object, strictly: no unknown key, no missing one, no conversion."""
    if kind not in _decoders:
        names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        hints = typing.get_type_hints(kind)
        _decoders[kind] = {name: _decoder(hints[name]) for name in names}
    if not isinstance(value, dict):
        raise InvalidPlan(f"{where}: must be an object")
    decoders = _decoders[kind]
    fields = {}
    for name, item in value.items():
        decoder = decoders.get(name)
        if decoder is None:
            raise InvalidPlan(f"{where}: unknown key {name!r}")
        fields[name] = decoder(item, f"{where}.{name}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise InvalidPlan(f"{where}: {error}") from error


def _decoder(hint: Any) -> Decoder:  # noqa: PLR0911 - one return a kind of hint
    """Return what decodes a value of this type; made once for each field, because every launch decodes thrice."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (_decoder(a) for a in arguments if a is not type(None))
        return lambda value, where: None if value is None else inner(value, where)
    if origin is Literal:
        return lambda value, where: _literal(arguments, value, where)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            each = _decoder(arguments[0])
            return lambda value, where: tuple(
                [each(item, f"{where}[{i}]") for i, item in enumerate(_list(value, where))]
            )
        inners = [_decoder(argument) for argument in arguments]
        return lambda value, where: _fixed(inners, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        kind = hint
        return lambda value, where: decode(kind, value, where)
    if hint is float:
        return lambda value, where: float(value) if type(value) is int else _plain(float, value, where)
    return lambda value, where: _plain(hint, value, where)


def _plain(kind: type, value: object, where: str) -> object:
    # type(), not isinstance: True is an int for Python, not for a plan.
    if type(value) is not kind:
        raise InvalidPlan(f"{where}: must be of type {kind.__name__}, not {type(value).__name__}")
    return value


def _literal(allowed: tuple[Any, ...], value: object, where: str) -> object:
    if value not in allowed:
        raise InvalidPlan(f"{where}: must be one of {', '.join(map(str, allowed))}")
    return value


def _list(value: object, where: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise InvalidPlan(f"{where}: must be a list")
    return value


def _fixed(inners: Sequence[Decoder], value: object, where: str) -> tuple[Any, ...]:
    items = _list(value, where)
    if len(items) != len(inners):
        raise InvalidPlan(f"{where}: must have {len(inners)} entries")
    return tuple([inner(item, where) for inner, item in zip(inners, items, strict=True)])
