"""Ids from entropy, and names and ids from callers."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisord import ids
from supervisord.errors import InvalidInput


def test_a_new_id_has_its_prefix_and_all_of_the_entropy() -> None:
    assert ids.new_agent_id(bytes) == "ag_" + "a" * 26
    assert ids.new_grant_id(lambda count: b"\xff" * count) == "gr_" + "7" * 25 + "4"
    assert ids.new_receipt_id(bytes).startswith("rc_")
    assert ids.new_stream_id(bytes).startswith("st_")


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_new_ids_parse_and_differ_as_their_entropy_does(one: bytes, other: bytes) -> None:
    first, second = ids.new_agent_id(lambda _: one), ids.new_agent_id(lambda _: other)
    assert ids.agent_id(first) == first
    assert ids.is_agent_id(first)
    assert (first == second) == (one == other)


def test_too_little_entropy_is_an_error() -> None:
    with pytest.raises(ValueError, match="15 bytes"):
        ids.new_agent_id(lambda _: b"x" * 15)


@pytest.mark.parametrize("name", ["a", "0", "web-1", "a.b_c-d", "x" * 63])
def test_names_that_are_taken(name: str) -> None:
    assert ids.agent_name(name) == name
    assert ids.policy_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "A", "-a", ".a", "_a", "a/b", "a..b", "..", "../x", "a b", "a\n", "a\0", "x" * 64, "é", "\u0430", "a:b"],
)
@pytest.mark.parametrize("parse", [ids.agent_name, ids.policy_name])
def test_names_that_are_refused(parse: Callable[[str], str], name: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse(name)
    assert raised.value.remedy
    assert re.fullmatch(r"[ -~…]*", raised.value.message)


def test_an_agents_name_cannot_pass_for_an_id() -> None:
    with pytest.raises(InvalidInput, match="ag_ begins an agent id"):
        ids.agent_name("ag_x")
    assert ids.policy_name("ag_x") == "ag_x"


@pytest.mark.parametrize("text", ["", "ag_", "ag_" + "a" * 25, "ag_" + "a" * 27, "AG_" + "a" * 26, "gr_" + "a" * 26])
def test_agent_ids_that_are_refused(text: str) -> None:
    assert not ids.is_agent_id(text)
    with pytest.raises(InvalidInput):
        ids.agent_id(text)


@pytest.mark.parametrize("text", ["ag_" + "a" * 25 + c for c in "01A/.\n"] + ["ag_../../etc/passwd"])
def test_an_id_holds_nothing_that_makes_a_path_or_a_line(text: str) -> None:
    with pytest.raises(InvalidInput):
        ids.agent_id(text)


def test_instances_are_short_and_plain() -> None:
    assert ids.instance_name("t3kx9") == "t3kx9"
    for bad in ("", "a_b", "a.b", "A", "-a", "x" * 33):
        with pytest.raises(InvalidInput):
            ids.instance_name(bad)


def test_labels() -> None:
    assert ids.label("team", "A b/c") == ("team", "A b/c")
    for key, value in (("", "x"), ("Team", "x"), ("a..b", "x"), ("k", "x" * 129), ("k", "a\nb"), ("k", "é")):
        with pytest.raises(InvalidInput):
            ids.label(key, value)


@given(st.text(max_size=300))
def test_what_an_error_shows_of_a_text_is_bounded_and_printable_ascii(text: str) -> None:
    shown = ids.shown(text)
    assert len(shown) <= 900
    assert re.fullmatch(r"[ -~]*…?", shown)
