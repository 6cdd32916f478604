"""The one normaliser: what a request, a Host header, an SNI and a scope call a place becomes one value.

That is one `(host, port)` and one path.
Worker and daemon both import it, so the two can never disagree on what was asked for. Pure: no I/O, no look-ups.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from dataclasses import dataclass
from typing import Final

OWN_HOST: Final = "gateway.internal"
"""The name of the proxy itself, as every agent's /etc/hosts has it."""

OWN_PORTS: Final = (3128, 80)
"""The proxy's port, and the one a URL without a port means."""

host_chars_max: Final = 253
label_chars_max: Final = 63
path_bytes_max: Final = 8192
escapes_nested_max: Final = 4
"""How often a path may be escaped over again: a server that decodes once too often is known, four times is nobody."""

_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")
# WHATWG URL, "ends in a number": such a name is an address to some resolvers (0x7f.1, 2130706433, 0177.0.0.1).
_NUMERIC: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_DOTTED_QUAD: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
_PATH: Final = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_QUERY: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?|\[\]{}\"`^-]|%[0-9A-Fa-f]{2})*")
_PERCENT: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_ESCAPED: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_SEPARATORS: Final = re.compile(r"[/\\]")
# What a server may strip from a segment, or take for its end, before it looks whether it is a dot segment.
_AROUND_DOTS: Final = re.compile(r"[\s;?#].*", re.DOTALL)
_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_V4_FORBIDDEN: Final = tuple(
    (ipaddress.IPv4Network(net), why)
    for net, why in (
        ("0.0.0.0/8", "this-network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "carrier-nat"),
        ("127.0.0.0/8", "loopback"),
        ("168.63.129.16/32", "metadata"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "special-purpose"),
        ("192.0.2.0/24", "documentation"),
        ("192.31.196.0/24", "special-purpose"),
        ("192.52.193.0/24", "special-purpose"),
        ("192.88.99.0/24", "6to4-relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "special-purpose"),
        ("198.18.0.0/15", "benchmark"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
# Only 2000::/3 is global unicast (RFC 4291); inside it these embed a v4 address or are not for general use.
_V6_GLOBAL: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_V6_FORBIDDEN: Final = tuple(
    (ipaddress.IPv6Network(net), why)
    for net, why in (
        ("2001::/23", "special-purpose"),
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "6to4"),
        ("3fff::/20", "documentation"),
        ("2620:4f:8000::/48", "special-purpose"),
    )
)


class BadTarget(ValueError):  # noqa: N818 - named for what it says
    """A host, port, authority or path that has no single meaning; `reason` is a stable code for the denial."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Authority:
    """One place: a lower-case name or a canonical address literal, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    def url_form(self, scheme: str) -> str:
        """Give the authority as a URL of `scheme` has it: without the port where it is the default one."""
        if default_port(scheme) == self.port:
            return bracketed(self.host)
        return str(self)

    @property
    def is_own(self) -> bool:
        """Whether it is the proxy itself."""
        return self.host == OWN_HOST and self.port in OWN_PORTS


def default_port(scheme: str) -> int:
    return 443 if scheme in ("https", "tls") else 80


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def normalise_host(text: str) -> str:
    """Give the one spelling of a host; raise BadTarget for whatever two programs could read as two hosts.

    A name is lower-cased and loses one trailing dot. A v4 literal must be the plain dotted quad; a v6 literal stands in
    brackets and is compressed as RFC 5952 has it. Other spellings of an address are refused rather than translated.
    """
    if not text.isascii():
        raise BadTarget("host_not_ascii", "cannot use host: it has characters outside ASCII; write the xn-- form")
    if text.startswith("["):
        return _v6(text)
    if "%" in text:
        raise BadTarget("host_malformed", "cannot use host: it has a percent sign")
    name = text.lower()
    name = name.removesuffix(".")
    if not name or len(name) > host_chars_max:
        raise BadTarget("host_malformed", f"cannot use host: it is empty or longer than {host_chars_max} characters")
    labels = name.split(".")
    if _NUMERIC.fullmatch(labels[-1]):
        return _v4(name)
    for label in labels:
        if len(label) > label_chars_max or not _LABEL.fullmatch(label):
            raise BadTarget("host_malformed", "cannot use host: a label of it is no DNS label")
    return name


def _v4(name: str) -> str:
    if not _DOTTED_QUAD.fullmatch(name):
        raise BadTarget("address_spelling", "cannot use host: an address must be a plain dotted quad")
    try:
        return str(ipaddress.IPv4Address(name))  # refuses leading zeros and parts above 255
    except ValueError as error:
        raise BadTarget("address_spelling", "cannot use host: an address must be a plain dotted quad") from error


def _v6(text: str) -> str:
    if not text.endswith("]") or "%" in text:
        raise BadTarget("address_spelling", "cannot use host: a v6 address stands in brackets and has no zone")
    try:
        address = ipaddress.IPv6Address(text[1:-1])
    except ValueError as error:
        raise BadTarget("address_spelling", "cannot use host: this is no v6 address") from error
    return str(address)


def normalise_port(text: str) -> int:
    """Give the port; 65536+n, signs, spaces and empty text are refused rather than wrapped or defaulted."""
    if not text.isascii() or not _PORT.fullmatch(text) or not 1 <= int(text) <= 65535:  # noqa: PLR2004 - 16 bits
        raise BadTarget("port_malformed", "cannot use port: it is no number from 1 to 65535")
    return int(text)


def parse_authority(text: str, *, default: int | None) -> Authority:
    """Read `host[:port]`; with `default` None the port must be written. No userinfo, no path, nothing around it."""
    for mark in "@/\\?#":
        if mark in text:
            raise BadTarget("authority_malformed", f"cannot use authority: it has {mark!r} in it")
    if text.startswith("["):
        end = text.find("]")
        host, rest = text[: end + 1], text[end + 1 :]
        if end < 0 or (rest and not rest.startswith(":")):
            raise BadTarget("authority_malformed", "cannot use authority: the bracket is not closed")
        colon, port = rest[:1], rest[1:]
    else:
        host, colon, port = text.partition(":")
    if not colon:
        if default is None:
            raise BadTarget("port_missing", "cannot use authority: the port must be written")
        return Authority(host=normalise_host(host), port=default)
    return Authority(host=normalise_host(host), port=normalise_port(port))


def normalise_path(text: str) -> str:
    """Give the one spelling of a path; raise BadTarget for dot segments, encoded separators, NUL and stray characters.

    Unreserved characters are decoded and other escapes upper-cased (RFC 3986 §6.2.2). Dot segments are refused, not
    resolved: servers differ on whether `..;`, `%2e` and `..%2f` count, and a path rule must not depend on it.
    """
    if len(text) > path_bytes_max:
        raise BadTarget("path_too_long", f"cannot use path: it is longer than {path_bytes_max} bytes")
    if not _PATH.fullmatch(text):
        raise BadTarget("path_malformed", "cannot use path: it has characters a path may not have")
    path = _PERCENT.sub(_decode_unreserved, text)
    _refuse_hidden(path)
    return path


def _refuse_hidden(path: str) -> None:
    """Read a path as every server would that decodes it once, twice, ...: no reading may have another structure."""
    reading = path
    for _ in range(escapes_nested_max + 1):
        for segment in reading.split("/"):
            # NFKC: full-width and one-dot-leader forms of a dot are a dot to a server that folds them.
            plain = _AROUND_DOTS.sub("", unicodedata.normalize("NFKC", segment).lstrip())
            if plain in (".", ".."):
                raise BadTarget("path_dot_segment", "cannot use path: it has a dot segment")
        following = _decoded_once(reading)
        if following == reading:
            return
        if len(_SEPARATORS.findall(unicodedata.normalize("NFKC", following))) > reading.count("/"):
            raise BadTarget("path_encoded_separator", "cannot use path: it hides a slash or backslash")
        reading = following
    raise BadTarget("path_encoded_separator", "cannot use path: it is escaped over and over")


def _decoded_once(path: str) -> str:
    raw = _ESCAPED.sub(lambda match: bytes([int(match.group(1), 16)]), path.encode("utf-8"))
    try:
        text = raw.decode("utf-8")  # strict: C0 AE is a dot to a lenient decoder
    except UnicodeDecodeError as error:
        raise BadTarget("path_malformed", "cannot use path: its escapes are no UTF-8") from error
    if any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in text):
        raise BadTarget("path_encoded_control", "cannot use path: it hides a control character")
    return text


def _decode_unreserved(match: re.Match[str]) -> str:
    char = chr(int(match.group(1), 16))
    return char if char in _UNRESERVED else match.group(0).upper()


def check_query(text: str) -> str:
    """Give the query unchanged; raise BadTarget where it holds what no query may hold."""
    if len(text) > path_bytes_max or not _QUERY.fullmatch(text):
        raise BadTarget("query_malformed", "cannot use query: it is too long or has characters a query may not have")
    return text


def address_of(host: str) -> IpAddress | None:
    """Give the address if a normalised host is a literal, None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def forbidden_address(address: IpAddress) -> str | None:
    """Say why an address is none a granted name may lead to (`loopback`, `private`, ...), or None for a public one.

    v4-mapped, NAT64, 6to4 and the like are refused whatever they embed: a public v4 host has a plain spelling.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return next((why for net, why in _V4_FORBIDDEN if address in net), None)
    if address.ipv4_mapped is not None:
        return "v4-mapped"
    if address not in _V6_GLOBAL:
        if address.is_loopback:
            return "loopback"
        if any(address in network for network in _NAT64):
            return "nat64"
        return "link-local" if address.is_link_local else "not-global"
    return next((why for net, why in _V6_FORBIDDEN if address in net), None)
