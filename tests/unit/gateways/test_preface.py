"""What the dialer writes is what the gateway reads, and nothing else is taken for a preface."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.gateways.preface import (
    FIXED_BYTES,
    SIGNATURE,
    Api,
    Destination,
    Preface,
    PrefaceError,
    decode,
    encode,
    parse_allow,
)

HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?", fullmatch=True),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)
PREFACES = st.builds(
    Preface,
    agent_id=st.text(max_size=40),
    name=st.text(max_size=64),
    x=st.integers(0, 2**63),
    allow=st.one_of(
        st.builds(Api), st.builds(Destination, st.sampled_from(["tcp", "http"]), HOSTS, st.integers(1, 65535))
    ),
    labels=st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=8),
)


@given(PREFACES, st.binary(max_size=64))
def test_round_trip_leaves_what_follows(preface: Preface, after: bytes) -> None:
    assert decode(encode(preface) + after) == (preface, after)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_cleanly(data: bytes) -> None:
    for attempt in (data, SIGNATURE + data):
        with pytest.raises(PrefaceError):
            decode(attempt)


@given(PREFACES, st.data())
def test_cut_anywhere_is_refused(preface: Preface, data: st.DataObject) -> None:
    whole = encode(preface)
    with pytest.raises(PrefaceError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


@pytest.mark.parametrize(
    "text",
    ["", "tcp:", "tcp:host", "tcp:host:0", "tcp:host:65536", "tcp:host:+80", "tcp:host:٣", "tcp:ho st:80",
     "tcp:HOST:80", "tcp:user@host:80", "tcp:::1:80", "http://host:80/path", "http://host", "https://host:443",
     "file:/etc/passwd", "tcp:host\0:80", "tcp:" + "a" * 254 + ":80", "API"],
)  # fmt: skip
def test_odd_allow_is_refused(text: str) -> None:
    with pytest.raises(PrefaceError, match="cannot read allow"):
        parse_allow(text)


def test_two_values_are_refused() -> None:
    whole = encode(Preface("ag_1", "n", 1, Api()))
    rest = whole[FIXED_BYTES:] * 2
    with pytest.raises(PrefaceError, match="two"):
        decode(whole[:14] + struct.pack("!H", len(rest)) + rest)


def test_unknown_tlv_is_passed_over() -> None:
    whole = encode(Preface("ag_1", "n", 1, Api()))
    rest = b"\x04\x00\x02zz" + whole[FIXED_BYTES:]
    assert decode(whole[:14] + struct.pack("!H", len(rest)) + rest)[0].agent_id == "ag_1"
