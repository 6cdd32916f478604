"""Look-ups of transparent mode: bytes to a question or nothing, and answers that say nothing but a made-up address."""

from __future__ import annotations

import itertools
import socket
import struct
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway_client.egress import names
from gateway_client.egress.names import BadLength, Framed, MadeUp, Query, framed, query_bytes_max, read_query
from sandbox import transparent


def test_worker_and_sandbox_mean_the_same_addresses_and_port() -> None:
    """They import nothing of each other."""
    assert IPv4Network((transparent.NAMES_NETWORK, transparent.NAMES_PREFIX)) == names.MADE_UP
    assert transparent.NAMES_PORT == names.NAMES_PORT


def question(
    name: bytes, kind: int = 1, *, flags: int = 0x100, family: int = 1, counts: tuple[int, ...] = (1, 0, 0, 0)
) -> bytes:
    labels = b"".join(bytes([len(label)]) + label for label in name.split(b"."))
    return struct.pack(">HHHHHH", 7, flags, *counts) + labels + b"\0" + struct.pack(">HH", kind, family)


def test_a_question_is_read_and_answered_letter_for_letter() -> None:
    data = question(b"API.Example.com")
    query = read_query(data)
    assert isinstance(query, Query)
    assert (query.name, query.wants_address) == ("api.example.com", True)
    answer = query.address(IPv4Address("198.19.0.1"))
    assert answer[12 : len(data)] == data[12:]
    assert answer[:12] == struct.pack(">HHHHHH", 7, 0x8180, 1, 1, 0, 0)
    assert answer[len(data) :] == struct.pack(">HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton("198.19.0.1")
    assert read_query(data + b"\0\0\x29\x04\xd0\0\0\0\0\0\0") == query  # with EDNS beside it


@pytest.mark.parametrize(("kind", "code"), [(28, 0), (65, 0), (16, 5), (255, 5), (15, 5), (12, 5), (252, 5)])
def test_anything_but_an_address_has_an_empty_answer_or_is_refused(kind: int, code: int) -> None:
    query = read_query(question(b"example.com", kind))
    assert isinstance(query, Query)
    assert not query.wants_address
    assert struct.unpack(">HHHH", query.other()[:8]) == (7, 0x8180 | code, 1, 0)


@pytest.mark.parametrize(
    "data",
    [
        question(b"example.com", flags=0x2900),  # another opcode
        question(b"example.com", counts=(2, 0, 0, 0)),
        question(b"example.com", counts=(1, 1, 0, 0)),
        question(b"example.com", family=3),
        question(b"example.com")[:-1],
        question(b"example.com")[:20],
        question(b"10.0.0.1"),
        question(b"exam\xffple.com"),
        struct.pack(">HHHHHH", 7, 0, 1, 0, 0, 0) + b"\0" + struct.pack(">HH", 1, 1),  # the root
        struct.pack(">HHHHHH", 7, 0, 1, 0, 0, 0) + b"\xc0\x0c" + struct.pack(">HH", 1, 1),  # a name that is itself
        struct.pack(">HHHHHH", 7, 0, 1, 0, 0, 0) + b"\x03a.b\0" + struct.pack(">HH", 1, 1),  # a dot in a label
    ],
)
def test_a_malformed_question_is_said_to_be_so(data: bytes) -> None:
    answer = read_query(data)
    assert isinstance(answer, bytes)
    assert (len(answer), answer[3] & 15) == (12, 1)


def test_what_is_no_question_has_no_answer() -> None:
    assert read_query(b"") is None
    assert read_query(question(b"example.com")[:11]) is None
    assert read_query(question(b"example.com", flags=0x8100)) is None  # an answer: two servers would go on for ever
    assert read_query(question(b"a.b") + b"\0" * names.query_bytes_max) is None


@given(st.binary(max_size=600))
def test_any_bytes_are_read_to_something_and_never_answered_at_length(data: bytes) -> None:
    found = read_query(data)
    if isinstance(found, Query):
        assert len(found.no_name()) <= len(data)
        assert found.name == found.name.lower()


# --- over connections


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut bytes where it is said."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def messages_of(parts: list[bytes]) -> tuple[list[bytes], bool]:
    """Give what is read of pieces as they come, and whether it ended at a bad length."""
    coming, found = Framed(), []
    for part in parts:
        coming.feed(part)
        try:
            while (message := coming.next()) is not None:
                found.append(message)
        except BadLength:
            return found, True
    return found, False


GOOD = st.binary(min_size=12, max_size=query_bytes_max)


@given(st.lists(GOOD, max_size=5), st.lists(st.integers(0, 10_000), max_size=20))
def test_messages_come_out_as_they_went_in_however_they_are_cut(sent: list[bytes], cuts: list[int]) -> None:
    assert messages_of(pieces(b"".join(map(framed, sent)), cuts)) == (sent, False)


@given(st.lists(GOOD, max_size=3), st.integers(0, 0xFFFF), st.binary(max_size=40), st.lists(st.integers(0, 2000)))
@example([], 0, b"", [])
@example([], 11, b"x" * 11, [])
@example([], 0xFFFF, b"", [])
def test_a_length_that_cannot_be_ends_it_at_its_two_bytes(
    before: list[bytes], length: int, rest: bytes, cuts: list[int]
) -> None:
    fits = 12 <= length <= query_bytes_max
    data = b"".join(map(framed, before)) + length.to_bytes(2, "big") + (b"" if fits else rest)
    assert messages_of(pieces(data, cuts)) == (before, not fits)


@given(st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=9))
def test_any_bytes_are_cut_to_the_same_messages_which_are_all_that_was_sent(data: bytes, cuts: list[int]) -> None:
    found, bad = messages_of([data])
    assert messages_of(pieces(data, cuts)) == (found, bad)
    assert data.startswith(b"".join(map(framed, found)))
    assert all(12 <= len(message) <= query_bytes_max for message in found)


def test_a_message_at_the_limit_and_one_beyond() -> None:
    longest = b"x" * query_bytes_max
    assert messages_of([framed(longest)]) == ([longest], False)
    assert messages_of([framed(longest + b"x")]) == ([], True)
    assert messages_of([framed(b"x" * 12)]) == ([b"x" * 12], False)
    assert messages_of([framed(b"x" * 11)]) == ([], True)


def test_made_up_addresses_are_stable_told_apart_and_bounded() -> None:
    made = MadeUp()
    assert str(made.address("a.example")) == "198.19.0.1"
    assert str(made.address("b.example")) == "198.19.0.2"
    assert made.address("a.example") == made.address("a.example")
    assert made.name("198.19.0.2") == "b.example"
    for never in ("198.19.0.3", "198.18.0.1", "8.8.8.8", "255.255.255.255"):
        assert made.name(never) is None
    for number in range(names.names_per_agent_max):
        made.address(f"n{number}.example")
    assert made.name("198.19.0.1") != "a.example"  # it was used longest ago
    assert made.address("c.example") < IPv4Address(names.FIRST + names.names_per_agent_max)
