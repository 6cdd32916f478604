"""Entries as bytes: canonical, bounded, and the protobuf message that the API publishes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stockade.v1 import actions_pb2

from supervisord.actions import encoding
from supervisord.actions.types import ENTRY_BYTES_MAX, FIELD_BYTES_MAX, JSON, Action

PLAIN = Action("ag_x", "agent:ag_x", "egress.request", "http://a.example/", "allowed", "", {"b": 1, "a": [True, None]})

texts = st.text(max_size=200) | st.binary(max_size=200).map(encoding.to_text)
values: st.SearchStrategy[JSON] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
actions = st.builds(
    Action, texts, texts, texts, texts, texts, texts, st.dictionaries(st.text(max_size=9), values, max_size=4)
)


@given(st.integers(1, 2**63), st.integers(0, 2**63 - 1), actions)
def test_what_is_encoded_is_decoded(seq: int, time_ns: int, action: Action) -> None:
    data, kept = encoding.encode(seq, time_ns, action)
    assert encoding.decode(data) == (seq, time_ns, kept)
    assert encoding.seq_of(data) == seq
    assert len(data) <= ENTRY_BYTES_MAX


def test_the_bytes_are_the_published_message() -> None:
    data, _ = encoding.encode(7, 1_790_000_000_123_456_789, PLAIN)
    message = actions_pb2.Action.FromString(data)
    assert (message.seq, message.time_unix_nanos, message.verb) == (7, 1_790_000_000_123_456_789, "egress.request")
    assert message.details_json == b'{"a":[true,null],"b":1}'
    assert message.SerializeToString(deterministic=True) == data


@given(st.binary(max_size=60))
def test_other_bytes_are_refused_or_canonical(data: bytes) -> None:
    try:
        seq, time_ns, action = encoding.decode(data)
    except encoding.NotCanonical:
        return
    assert encoding.encode(seq, time_ns, action)[0] == data


@pytest.mark.parametrize(
    "data",
    [b"\x08", b"\x08\x80\x00", b"\x08\x01\x08\x01", b"\x1a\x00\x08\x01", b"\x08\x01\x1a\x05a", b"\x08\x01\x52\x01a",
     b"\x08\x01\x4a\x02[]", b'\x08\x01\x4a\x07{ "a":1}', b"\x08\x01\x4a\x02{}", b"\x08" + b"\xff" * 11],
)  # fmt: skip
def test_a_second_way_to_write_an_entry_is_refused(data: bytes) -> None:
    with pytest.raises(encoding.NotCanonical):
        encoding.decode(data)


@pytest.mark.parametrize("length", [FIELD_BYTES_MAX, FIELD_BYTES_MAX + 1])
def test_a_field_is_cut_at_its_limit_and_says_so(length: int) -> None:
    data, kept = encoding.encode(1, 1, Action("a", "b", "c", "x" * length, "d"))
    assert len(kept.object) == FIELD_BYTES_MAX
    assert kept.object.endswith(f"[cut, {length} bytes]") == (length > FIELD_BYTES_MAX)
    assert encoding.decode(data)[2] == kept


def test_details_are_cut_and_keep_a_digest() -> None:
    _, kept = encoding.encode(1, 1, Action("a", "b", "c", "d", "e", "", {"one": "x" * 50_000, "two": 2}))
    assert str(kept.details["one"]).endswith("[cut, 50000 bytes]")
    assert kept.details["two"] == 2
    data, kept = encoding.encode(1, 1, Action("a", "b", "c", "d", "e", "", {str(n): "x" * 1000 for n in range(100)}))
    assert kept.details["cut"] is True
    assert len(data) <= ENTRY_BYTES_MAX


def test_an_entry_of_only_long_fields_stays_below_its_limit() -> None:
    long = "\udcff" * 9000
    data, _ = encoding.encode(
        2**63, 2**63 - 1, Action(long, long, long, long, long, long, {str(n): "\u20ac" * 90 for n in range(100)})
    )
    assert len(data) <= ENTRY_BYTES_MAX
    encoding.decode(data)


def test_bytes_that_are_no_text_are_kept() -> None:
    action = Action("a", "b", "c", b"\xff\x1b[2J\x80".decode("utf-8", "surrogateescape"), "d")
    data, kept = encoding.encode(1, 1, action)
    assert b"\xff\x1b[2J\x80" in data
    assert kept == action
    assert encoding.decode(encoding.encode(1, 1, Action("a", "b", "c", "\ud800", "d"))[0])[2].object == "\\ud800"


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": object()}, {"a": {1, 2}}])
def test_details_that_are_not_json_are_refused(bad: dict[str, JSON]) -> None:
    with pytest.raises((ValueError, TypeError)):
        encoding.encode(1, 1, Action("a", "b", "c", "d", "e", "", bad))


def test_a_cycle_in_details_ends() -> None:
    bad: dict[str, JSON] = {}
    bad["a"] = bad
    with pytest.raises(RecursionError):
        encoding.encode(1, 1, Action("a", "b", "c", "d", "e", "", bad))


def test_canonical_json_does_not_depend_on_order() -> None:
    assert encoding.canonical_json({"b": "é", "a": 1}) == '{"a":1,"b":"\\u00e9"}'
    assert json.loads(encoding.canonical_json({"b": "é"})) == {"b": "é"}
