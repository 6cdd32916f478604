"""Sizes and durations: text to numbers and back."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisord.errors import InvalidInput
from supervisord.sizes import (
    DURATION_SECONDS_MAX,
    SIZE_BYTES_MAX,
    SIZE_PATTERN,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0B", 0),
        ("1B", 1),
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("10MB", 10**7),
        ("2kB", 2000),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "MiB",
        "-1MiB",
        "1 MiB",
        "1mib",
        "1M",
        "1.MiB",
        ".5MiB",
        "1e3B",
        "0.3B",
        "1MiB\n",
        "٣MiB",
        "1" * 16 + "B",
    ],
)
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse_size(text)
    assert raised.value.remedy


def test_the_largest_size_and_one_beyond() -> None:
    assert parse_size("1048576TiB") == SIZE_BYTES_MAX
    with pytest.raises(InvalidInput, match="larger"):
        parse_size("1048577TiB")


@given(st.integers(min_value=0, max_value=SIZE_BYTES_MAX // 2048))
def test_a_size_survives_its_text(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert parse_size(text) == size_bytes
    assert re.search(SIZE_PATTERN, text)


@given(st.text(alphabet="0123456789.KMGTiBkd ", max_size=12) | st.text(max_size=12))
def test_a_text_is_a_size_or_an_error(text: str) -> None:
    try:
        size_bytes = parse_size(text)
    except InvalidInput:
        return
    assert 0 <= size_bytes <= SIZE_BYTES_MAX
    assert re.fullmatch(SIZE_PATTERN, text), "the schema must take what the parser takes"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("30s", 30),
        ("10m", 600),
        ("1h30m", 5400),
        ("2d", 172800),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("1m30ms", 60.03),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-1s", "1.5m", "30m1h", "1s1s", "1 m", "1M", "1m\n", "ms", "1w", "٣s"])
def test_durations_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse_duration(text)
    assert raised.value.remedy


def test_the_longest_duration_and_one_beyond() -> None:
    assert parse_duration("3660d") == DURATION_SECONDS_MAX
    with pytest.raises(InvalidInput, match="longer"):
        parse_duration("3660d1ms")


@given(st.integers(min_value=0, max_value=DURATION_SECONDS_MAX * 1000))
def test_a_duration_survives_its_text(milliseconds: int) -> None:
    assert round(parse_duration(format_duration(milliseconds / 1000)) * 1000) == milliseconds
