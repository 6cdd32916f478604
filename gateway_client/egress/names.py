"""Names of a transparent network: what a look-up asks, what it is answered, and which address stands for which name.

No address of the world is ever told, and nothing is looked up: a name that is granted gets an address made up for this
agent, and its connection there is taken for the name. Pure: bytes in, bytes out (RFC 1035 section 4.1; over connections
with a length before each message, RFC 7766 section 8).
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from gateway_client.egress.target import BadTarget, address_of, normalise_host

query_bytes_max: Final = 512
names_per_agent_max: Final = 4096
answer_seconds: Final = 1
"""For how long a program may keep an answer: grants end."""

MADE_UP: Final = IPv4Network("198.19.0.0/16")
FIRST: Final = int(MADE_UP[1])
NAMES_PORT: Final = 53

A: Final = 1
_IN: Final = 1
_NO_ERROR, _FORM_ERROR, _SERVER_FAILURE, _NO_NAME, _REFUSED = 0, 1, 2, 3, 5
_HEADER: Final = struct.Struct(">HHHHHH")
_RESPONSE, _AVAILABLE, _DESIRED = 0x8000, 0x0080, 0x0100
_OPCODE_AND_KIND: Final = 0xF800
_LABEL_BYTES_MAX: Final = 63
_LENGTH_BYTES: Final = 2
_QUESTION_TAIL: Final = struct.Struct(">HH")
# Asked for beside A by about every resolver; an empty answer is true for each: there is only an A.
_EMPTY: Final = frozenset({28, 64, 65})  # AAAA, SVCB, HTTPS


@dataclass(frozen=True, slots=True)
class Query:
    """One question; `name` is normalised."""

    number: int
    flags: int
    question: bytes
    name: str
    kind: int

    @property
    def wants_address(self) -> bool:
        return self.kind == A

    def address(self, address: IPv4Address) -> bytes:
        """Give the answer that the name has this address."""
        record = struct.pack(">HHHIH", 0xC00C, A, _IN, answer_seconds, 4) + address.packed
        return self._answer(_NO_ERROR, 1) + record

    def other(self) -> bytes:
        """Give the answer to a question for anything but an address: nothing of that kind, or none of our business."""
        return self._answer(_NO_ERROR if self.kind in _EMPTY else _REFUSED)

    def no_name(self) -> bytes:
        return self._answer(_NO_NAME)

    def failure(self) -> bytes:
        return self._answer(_SERVER_FAILURE)

    def _answer(self, code: int, answers: int = 0) -> bytes:
        flags = _RESPONSE | _AVAILABLE | (self.flags & _DESIRED) | code
        return _HEADER.pack(self.number, flags, 1, answers, 0, 0) + self.question


class _Malformed(Exception):  # noqa: N818 - never leaves this module
    pass


def read_query(data: bytes) -> Query | bytes | None:
    """Read a look-up; give the answer to one that is malformed, and None for what deserves none."""
    if len(data) < _HEADER.size or len(data) > query_bytes_max:
        return None
    number, flags, *counts = _HEADER.unpack_from(data)
    if flags & _RESPONSE:  # an answer nobody asked for; two that answer each other would never end
        return None
    try:
        if flags & _OPCODE_AND_KIND or counts[:3] != [1, 0, 0]:
            raise _Malformed
        name, kind, end = _question(data)
    except (_Malformed, BadTarget):
        return _HEADER.pack(number, _RESPONSE | _AVAILABLE | (flags & _DESIRED) | _FORM_ERROR, 0, 0, 0, 0)
    # The question is given back as it was asked, letter for letter: clients check it (draft-vixie-dnsext-dns0x20).
    return Query(number, flags, data[_HEADER.size : end], name, kind)


def _question(data: bytes) -> tuple[str, int, int]:
    """Give the name, normalised, the kind of what is asked of it, and where the question ends."""
    labels: list[str] = []
    position = _HEADER.size
    while position < len(data) and (length := data[position]):
        label = data[position + 1 : position + 1 + length]
        if length > _LABEL_BYTES_MAX or len(label) < length or not label.isascii() or b"." in label:
            raise _Malformed
        labels.append(label.decode("ascii"))
        position += 1 + length
    end = position + 1 + _QUESTION_TAIL.size
    if not labels or end > len(data):
        raise _Malformed
    kind, family = _QUESTION_TAIL.unpack_from(data, position + 1)
    name = normalise_host(".".join(labels))
    if family != _IN or address_of(name) is not None:
        raise _Malformed
    return name, kind, end


class BadLength(Exception):  # noqa: N818 - named for what it says
    """A message on a connection is too long for a look-up, or too short for anything: what follows it is unknown."""


class Framed:
    """Bytes of a connection to messages; holds no more than what was fed and less than one message before."""

    def __init__(self) -> None:
        self._data = bytearray()

    @property
    def begun(self) -> bool:
        """Whether a message has begun to come."""
        return bool(self._data)

    def feed(self, data: bytes) -> None:
        self._data += data

    def next(self) -> bytes | None:
        """Give the next message, None where it has not come as a whole; raise BadLength as soon as that is known."""
        if len(self._data) < _LENGTH_BYTES:
            return None
        length = int.from_bytes(self._data[:_LENGTH_BYTES], "big")
        if not _HEADER.size <= length <= query_bytes_max:
            raise BadLength
        end = _LENGTH_BYTES + length
        if len(self._data) < end:
            return None
        message = bytes(self._data[_LENGTH_BYTES:end])
        del self._data[:end]
        return message


def framed(message: bytes) -> bytes:
    """Give a message as it goes over a connection."""
    return len(message).to_bytes(_LENGTH_BYTES, "big") + message


class MadeUp:
    """The addresses that stand for names, in both directions; bounded, the one that was used longest ago goes first."""

    def __init__(self) -> None:
        self._by_name: OrderedDict[str, int] = OrderedDict()
        self._by_number: dict[int, str] = {}
        self._next = 0

    def address(self, name: str) -> IPv4Address:
        """Give the address of a name; it stays the same while it is used."""
        number = self._by_name.get(name)
        if number is None:
            if len(self._by_name) < names_per_agent_max:
                number, self._next = self._next, self._next + 1
            else:
                _, number = self._by_name.popitem(last=False)
            self._by_name[name] = number
            self._by_number[number] = name
        self._by_name.move_to_end(name)
        return IPv4Address(FIRST + number)

    def name(self, address: str) -> str | None:
        """Give the name that an address stands for, None where nothing was ever told of it."""
        return self._by_number.get(int(IPv4Address(address)) - FIRST)
