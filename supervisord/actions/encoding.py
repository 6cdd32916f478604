"""An entry as bytes and back: the protobuf wire format of `stockade.v1.Action`, written deterministically (pure).

The encoding is by hand, so that a verifier needs no generated code, and because protobuf does not promise that a
library serialises the same message to the same bytes: fields in order of number, defaults left out, shortest varints,
details as JSON with sorted keys and no spaces. What is decoded must encode to the same bytes, else it is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from json.encoder import c_make_encoder, encode_basestring_ascii  # type: ignore[attr-defined]  # not in typeshed
from typing import Final

from supervisord.actions.types import ENTRY_BYTES_MAX, FIELD_BYTES_MAX, JSON, Action

# Tags are (field number << 3 | wire type); 0 is varint, 2 is length-delimited.
_SEQ: Final = b"\x08"
_TIME: Final = b"\x10"
_FIRST_STRING: Final = 3
_STRINGS: Final = 6
_DETAILS: Final = 9
_VARINT_BYTES_MAX: Final = 10
_NINE_BYTES_SHIFT: Final = 56
_LOW_BITS: Final = 0x7F
_MORE: Final = 0x80
_DELIMITED: Final = 2
_TAGS: Final = tuple(bytes([number << 3 | _DELIMITED]) for number in range(_FIRST_STRING, _DETAILS + 1))
REMEMBERED_FIELDS_MAX: Final = 4096

DETAILS_BYTES_MAX: Final = ENTRY_BYTES_MAX - _STRINGS * (FIELD_BYTES_MAX + 4) - 32
DETAIL_STRING_BYTES_MAX: Final = 2048
_DETAILS_HEAD_CHARACTERS: Final = 1024

_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
# JSONEncoder.encode makes this object anew at each call, which costs more than the encoding of a few keys.
_scan = (
    c_make_encoder(None, _encoder.default, encode_basestring_ascii, None, ":", ",", True, False, False)
    if c_make_encoder is not None
    else None
)


class NotCanonical(ValueError):  # noqa: N818 - read at the raise
    """Bytes that are not what `encode` writes."""


def encode(seq: int, time_ns: int, action: Action) -> tuple[bytes, Action]:
    """The entry's canonical bytes, and the action as those hold it (strings cut where too long).

    Raises ValueError, TypeError or RecursionError where `details` are not JSON.
    """
    try:
        texts = _texts(action)
    except (_TooLong, UnicodeEncodeError):
        short = [cut(text, FIELD_BYTES_MAX) for text in _strings(action)]
        action = _action(short, action.details)
        texts = b"".join(_field(tag, to_bytes(text)) for tag, text in zip(_TAGS, short, strict=False))
    details = b""
    if action.details:
        dumped = _dump(action.details)
        if len(dumped) > DETAILS_BYTES_MAX:
            action, dumped = _brief(action, dumped)
        details = _field(_TAGS[_STRINGS], dumped.encode())
    time = _TIME + _varint(time_ns) if time_ns else b""
    return b"".join((_SEQ, _varint(seq), time, texts, details)), action


def decode(data: bytes) -> tuple[int, int, Action]:
    """Seq, time and action of canonical bytes; NotCanonical for any others."""
    seq, time_ns, texts, details = _parse(data)
    try:
        parsed = json.loads(details) if details else {}
    except (ValueError, RecursionError) as error:
        raise NotCanonical("details are not JSON") from error
    if not isinstance(parsed, dict):
        raise NotCanonical("details are not a JSON object")
    action = _action(texts, parsed)
    try:
        again, _ = encode(seq, time_ns, action)
    except (ValueError, TypeError, RecursionError) as error:
        raise NotCanonical(str(error)) from error
    if again != data:
        raise NotCanonical("the bytes are not in canonical form")
    return seq, time_ns, action


def seq_of(data: bytes) -> int:
    """The `seq` at the start of an entry, or 0 where there is none; for naming a damaged entry."""
    try:
        return _read_varint(data, 1)[0] if data[:1] == _SEQ else 0
    except NotCanonical:
        return 0


def canonical_json(value: JSON) -> str:
    """JSON with sorted keys, no spaces and only ASCII."""
    return _dump(value)


def to_bytes(text: str) -> bytes:
    """UTF-8, with surrogate escapes as the bytes they stand for and lone surrogates written out."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return text.encode("utf-8", "backslashreplace")


def to_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def cut(text: str, bytes_max: int) -> str:
    """The text in at most `bytes_max` bytes; what was too long ends in a mark that says how much is missing."""
    data = to_bytes(text)
    if len(data) <= bytes_max:
        return to_text(data)  # not `text`: lone surrogates are written out, and what is returned will be read back
    mark = f"[cut, {len(data)} bytes]".encode()
    return to_text(data[: bytes_max - len(mark)] + mark)


class _TooLong(Exception):  # noqa: N818 - goes no further than `encode`
    pass


def _texts(action: Action) -> bytes:
    return b"".join(map(_remembered, _TAGS, _strings(action)))


def _strings(action: Action) -> tuple[str, str, str, str, str, str]:
    return action.agent_id, action.actor, action.verb, action.object, action.verdict, action.reason


@lru_cache(maxsize=REMEMBERED_FIELDS_MAX)
def _remembered(tag: bytes, text: str) -> bytes:
    # Nearly all texts come again and again: ids, verbs, verdicts, the same few URLs.
    data = text.encode()
    if len(data) > FIELD_BYTES_MAX:
        raise _TooLong
    return _field(tag, data)


def _field(tag: bytes, data: bytes) -> bytes:
    return tag + _varint(len(data)) + data if data else b""


def _brief(action: Action, dumped: str) -> tuple[Action, str]:
    """The action with details that fit: strings cut, or where that does not do, a digest of all."""
    brief: dict[str, JSON] = {key: _cut_json(value) for key, value in action.details.items()}
    short = _dump(brief)
    if len(short) > DETAILS_BYTES_MAX:
        digest = hashlib.sha256(dumped.encode()).hexdigest()
        brief = {"cut": True, "bytes": len(dumped), "sha256": digest, "head": dumped[:_DETAILS_HEAD_CHARACTERS]}
        short = _dump(brief)
    return replace(action, details=brief), short


def _action(texts: list[str], details: Mapping[str, JSON]) -> Action:
    agent_id, actor, verb, obj, verdict, reason = texts
    return Action(agent_id, actor, verb, obj, verdict, reason, details)


def _cut_json(value: JSON) -> JSON:
    match value:
        case str():
            return cut(value, DETAIL_STRING_BYTES_MAX)
        case Mapping():
            return {key: _cut_json(item) for key, item in value.items()}
        case list() | tuple():
            return [_cut_json(item) for item in value]
        case _:
            return value


def _dump(value: JSON) -> str:
    # Without the markers that find cycles, a cycle ends in RecursionError.
    return _encoder.encode(value) if _scan is None else "".join(_scan(value, 0))


def _varint(value: int) -> bytes:
    if value >> _NINE_BYTES_SHIFT and not value >> 63:
        # Times of this century: nine bytes.
        return bytes(
            (
                value & 127 | 128,
                value >> 7 & 127 | 128,
                value >> 14 & 127 | 128,
                value >> 21 & 127 | 128,
                value >> 28 & 127 | 128,
                value >> 35 & 127 | 128,
                value >> 42 & 127 | 128,
                value >> 49 & 127 | 128,
                value >> 56,
            )
        )
    out = bytearray()
    while value > _LOW_BITS:
        out.append(value & _LOW_BITS | _MORE)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(_VARINT_BYTES_MAX):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & _LOW_BITS) << 7 * shift
        if byte < _MORE:
            return value, at
    raise NotCanonical("a number does not end")


def _parse(data: bytes) -> tuple[int, int, list[str], bytes]:
    numbers = {_SEQ[0]: 0, _TIME[0]: 0}
    fields = [b""] * len(_TAGS)
    at = 0
    while at < len(data):
        tag = data[at]
        value, at = _read_varint(data, at + 1)
        if tag in numbers:
            numbers[tag] = value
        elif tag & 7 == _DELIMITED and _FIRST_STRING <= tag >> 3 <= _DETAILS:
            fields[(tag >> 3) - _FIRST_STRING] = data[at : at + value]
            at += value
        else:
            raise NotCanonical(f"unknown field tag {tag:#x}")
    return numbers[_SEQ[0]], numbers[_TIME[0]], [to_text(field) for field in fields[:_STRINGS]], fields[_STRINGS]
