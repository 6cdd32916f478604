"""The normaliser: one spelling for every place, and no spelling at all for what has two meanings."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway_client.egress.target import (
    Authority,
    BadTarget,
    address_of,
    forbidden_address,
    host_chars_max,
    label_chars_max,
    normalise_host,
    normalise_path,
    normalise_port,
    parse_authority,
    path_bytes_max,
)


@given(st.text(max_size=300))
def test_a_host_is_refused_or_has_one_spelling(text: str) -> None:
    with contextlib.suppress(BadTarget):
        once = normalise_host(text)
        assert normalise_host(f"[{once}]" if ":" in once else once) == once


@given(st.text(alphabet="0123456789abcdefx.[]:%", max_size=40))
@example("0x7f.1")
@example("2130706433")
@example("0177.0.0.1")
@example("127.1")
@example("127.0.0.1.")
@example("[::ffff:127.0.0.1]")
@example("[::1%lo]")
def test_what_a_resolver_takes_for_an_address_is_that_address_or_refused(text: str) -> None:
    try:
        host = normalise_host(text)
    except BadTarget:
        return
    try:
        taken = socket.inet_ntoa(socket.inet_aton(text.removesuffix(".")))
    except OSError:
        taken = None
    if taken is not None:
        assert host == taken
    if (address := address_of(host)) is not None:
        assert str(address) == host


@given(st.ip_addresses())
def test_every_plain_address_is_kept(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    text = f"[{address.exploded}]" if address.version == 6 else str(address)
    assert normalise_host(text) == str(address)
    if address.is_private or address.is_loopback or address.is_link_local or address.is_multicast:
        assert forbidden_address(address) is not None


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1", "loopback"),
        ("10.1.2.3", "private"),
        ("169.254.169.254", "link-local"),
        ("100.64.0.1", "carrier-nat"),
        ("168.63.129.16", "metadata"),
        ("::1", "loopback"),
        ("::ffff:8.8.8.8", "v4-mapped"),
        ("64:ff9b::808:808", "nat64"),
        ("2002:7f00:1::", "6to4"),
        ("fe80::1", "link-local"),
        ("fd00::1", "not-global"),
        ("8.8.8.8", None),
        ("2606:4700::1111", None),
    ],
)
def test_addresses_no_scope_opens(address: str, why: str | None) -> None:
    assert forbidden_address(ipaddress.ip_address(address)) == why


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a..b",
        "-a.b",
        "a-.b",
        "a b",
        "a\0b",
        "a/b",
        "a@b",
        "ex\u00e4mple.com",
        "\u2488.com",
        "a%2eb",
        "[::1",
        "::1",
        "1.2.3",
        "1.2.3.256",
        "01.2.3.4",
        "0x1",
        "a.0x",
        "a.1",
    ],
)
def test_hosts_with_two_meanings_are_refused(text: str) -> None:
    with pytest.raises(BadTarget):
        normalise_host(text)


@pytest.mark.parametrize("text", ["EXAMPLE.com", "example.com.", "Example.COM."])
def test_case_and_one_trailing_dot_do_not_matter(text: str) -> None:
    assert normalise_host(text) == "example.com"


def test_names_are_bounded() -> None:
    label = "a" * label_chars_max
    assert normalise_host(label) == label
    with pytest.raises(BadTarget):
        normalise_host(label + "a")
    name = ".".join(["a" * 49] * 5)[:host_chars_max]
    assert normalise_host(name) == name
    with pytest.raises(BadTarget):
        normalise_host(".".join(["a" * 60] * 5))


@pytest.mark.parametrize(
    "text", ["", "0", "65536", "65616", "-1", "+80", " 80", "80 ", "8_0", "\u0668\u0660", "000080"]
)
def test_ports_are_plain_numbers_in_range(text: str) -> None:
    with pytest.raises(BadTarget):
        normalise_port(text)


@pytest.mark.parametrize("text", ["user@host:80", "host:80@evil:80", "host:80/x", "host\\@x:80", "host:80#x", "h:1:2"])
def test_an_authority_has_nothing_around_it(text: str) -> None:
    with pytest.raises(BadTarget):
        parse_authority(text, default=None)


def test_the_port_must_be_written_where_there_is_no_default() -> None:
    assert parse_authority("[::1]:80", default=None) == Authority("::1", 80)
    assert parse_authority("a.b", default=80) == Authority("a.b", 80)
    with pytest.raises(BadTarget):
        parse_authority("a.b", default=None)


@given(st.text(alphabet="/.%25Ffe~a;*\\", max_size=30).map(lambda text: "/" + text))
def test_a_path_is_refused_or_has_one_spelling_without_dots(text: str) -> None:
    with contextlib.suppress(BadTarget):
        once = normalise_path(text)
        assert normalise_path(once) == once
        assert not {".", ".."} & {part.partition(";")[0] for part in once.split("/")}


@pytest.mark.parametrize(
    "text",
    [
        "/a/../b",
        "/a/./b",
        "/a/%2e%2e/b",
        "/a/.%2E",
        "/a/..;x/b",
        "/a%2fb",
        "/a%5cb",
        "/a\\b",
        "/%00",
        "/%0d%0a",
        "/a#b",
        "/a b",
        "/\u00e4",
        "/a%2",
        "/a%zz",
        "/%252e%252e/",
        "/v1/..%3B/x",
        "/v1/..%3b",
        "/v1/%2e%2e%3bx/",
        "/v1/%C0%AE%C0%AE/x",
        "/v1/%c0%afadmin",
        "/v1/%E9",
        "/v1/..%20/x",
        "/v1/%20../x",
        "/v1/..%09/x",
        "/v1/..%3f/x",
        "/v1/..%23/x",
        "/v1/%25252e%25252e/x",
        "/v1/%2525252e%2525252e/x",
        "/v1/a%25252fb",
        "/v1/a%25255cb",
        "/v1/%EF%BC%8E%EF%BC%8E/x",
        "/v1/a%EF%BC%8F..%EF%BC%8Fb",
        "/v1/%C2%85",
        "/v1/%7f",
        "/v1/%252500",
        "/v1/%" + "25" * 9 + "41",
        "a",
    ],
)
def test_paths_that_hide_something_are_refused(text: str) -> None:
    with pytest.raises(BadTarget):
        normalise_path(text)


@pytest.mark.parametrize(
    "text",
    [
        "/v1/...",
        "/v1/..a",
        "/v1/.well-known/x",
        "/v1/a;b=..",
        "/v1/a%20b",
        "/v1/100%25",
        "/v1/%E3%81%82",
        "/v1/a%3Bb",
        "/v1/a%252Cb",
        "/v1/a%3Fb",
    ],
)
def test_paths_that_hide_nothing_pass_as_they_are(text: str) -> None:
    assert normalise_path(text) == text


def test_paths_are_bounded() -> None:
    assert len(normalise_path("/" + "a" * (path_bytes_max - 1))) == path_bytes_max
    with pytest.raises(BadTarget):
        normalise_path("/" + "a" * path_bytes_max)
