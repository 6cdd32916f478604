"""An agent's bytes to `Head`, body and end, or to `Reject`. No I/O.

h11 parses heads; what it lets through and two programs could read in two ways is refused before it: bare CR or LF, NUL,
other controls, folded lines, Content-Length twice or beside Transfer-Encoding, chunk extensions, trailers, versions
other than 1.1 and 1.0, Upgrade to anything but a WebSocket, TRACE.

h11 looks at its size limit only between calls, so a head is bounded here, and
h11 gets at most 16 KiB a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

import h11

from gateway_client.egress import websocket
from gateway_client.egress.mcpcall import MCP_ROOT
from gateway_client.egress.request import Form
from gateway_client.egress.target import (
    Authority,
    BadTarget,
    check_query,
    default_port,
    normalise_path,
    parse_authority,
)

if TYPE_CHECKING:
    from gateway_client.egress.messages import Limits

h11_feed_bytes_max: Final = 16 * 1024
body_piece_bytes_max: Final = 16 * 1024
content_length_digits_max: Final = 15
chunk_size_digits_max: Final = 8
chunks_free_max: Final = 4096
chunk_bytes_mean_min: Final = 32
"""Of a body of more chunks than are free: each costs a parser as much as a kilobyte, and real clients send those."""

SELF_ROOT: Final = "/.stockade/"

_METHOD: Final = re.compile(rb"[A-Z]{1,20}")
_METHODS_REFUSED: Final = frozenset({b"TRACE", b"TRACK", b"DEBUG", b"PRI"})
_HEAD_BAD: Final = re.compile(rb"[^\t\r\n\x20-\x7e]|\r(?!\n)|(?<!\r)\n|\n[ \t]")
_START_BAD: Final = re.compile(rb"[^A-Z]")
_LENGTH: Final = re.compile(rb"[0-9]{1,%d}" % content_length_digits_max)
_CHUNK_LINE: Final = re.compile(rb"[0-9A-Fa-f]{1,%d}" % chunk_size_digits_max)
_SINGLE: Final = frozenset(
    {
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"expect",
        b"content-type",
        b"authorization",
        b"upgrade",
        b"sec-websocket-key",
        b"sec-websocket-version",
    }
)

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Reject:
    """Why bytes are no request we serve. Everything after them on the connection is dropped."""

    status: int
    reason_code: str
    detail: str


class WireError(Exception):
    def __init__(self, reject: Reject) -> None:
        super().__init__(reject.detail)
        self.reject = reject


def _refuse(reason_code: str, detail: str, *, status: int = 400) -> WireError:
    return WireError(Reject(status, reason_code, detail))


@dataclass(frozen=True, slots=True)
class Head:
    """One request head as parsed; what goes upstream is written from it."""

    form: Form
    method: str
    scheme: str
    authority: Authority
    path: str
    query: str
    headers: Headers = field(repr=False)
    """Names in lower case, in order."""
    content_length: int | None
    """None: chunked."""
    http11: bool
    expects_continue: bool
    upgrade: bool = False
    """Whether it asks for a WebSocket."""

    @property
    def has_body(self) -> bool:
        return self.content_length != 0


class End(Enum):
    """The end of a body."""

    OF_BODY = auto()


def parse_target(
    method: bytes, target: bytes, hosts: list[bytes], *, inside: Authority | None, secure: bool = False
) -> tuple[Form, str, Authority, str, str]:
    """Read the request-target: form, scheme, authority, path and query. Host must name the same place.

    `inside` is the authority of the CONNECT the request came through, None on a bare connection; `secure` says that it
    came through TLS, for which that authority was the name.
    """
    text = target.decode("ascii")
    host = hosts[0].decode("ascii") if hosts else None
    if secure and not text.startswith("/"):
        raise _refuse("host_mismatch", "inside of TLS the target is a path, and Host says where")
    if method == b"CONNECT":
        authority = parse_authority(text, default=None)
        if host is not None and parse_authority(host, default=authority.port) != authority:
            raise _refuse("host_mismatch", "Host names another place than the target")
        return Form.CONNECT, "tls", authority, "", ""
    if text.startswith("/"):
        authority, path_and_query = _origin_authority(host, inside=inside), text
    else:
        authority, path_and_query = _absolute(text, host, inside=inside)
    if "#" in text or "\\" in text:
        raise _refuse("path_malformed", "the target has a fragment or a backslash in it")
    path, _, query = path_and_query.partition("?")
    path, query = normalise_path(path), check_query(query)
    if secure:
        return Form.FORWARD, "https", authority, path, query
    if not authority.is_own:
        return Form.FORWARD, "http", authority, path, query
    if path.startswith(MCP_ROOT):
        return Form.MCP, "http", authority, path, query
    form = Form.SELF if path.startswith(SELF_ROOT) else Form.MODEL
    return form, "http", authority, path, query


def _origin_authority(host: str | None, *, inside: Authority | None) -> Authority:
    if host is None:
        raise _refuse("host_missing", "there is no Host header")
    authority = parse_authority(host, default=default_port("http") if inside is None else inside.port)
    if inside is None:
        if not authority.is_own:
            raise _refuse("host_mismatch", "origin-form is for gateway.internal; elsewhere use this address as a proxy")
    elif authority != inside:
        raise _refuse("host_mismatch", "Host names another place than the CONNECT")
    return authority


def _absolute(text: str, host: str | None, *, inside: Authority | None) -> tuple[Authority, str]:
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.lower() != "http":
        raise _refuse("scheme_refused", "the target is no http:// URL; https:// goes through CONNECT")
    end = re.search(r"[/?#\\]", rest)
    cut = end.start() if end else len(rest)
    authority = parse_authority(rest[:cut], default=default_port("http"))
    if host is not None and parse_authority(host, default=default_port("http")) != authority:
        raise _refuse("host_mismatch", "Host names another place than the target")
    if inside is not None and not inside.is_own and authority != inside:
        raise _refuse("host_mismatch", "the target names another place than the CONNECT")
    tail = rest[cut:]
    return authority, tail if tail.startswith("/") else "/" + tail


class ChunkScan:
    """Takes a chunked body apart strictly: hex size, CRLF, data, CRLF, no extensions, no trailers, no crumbs."""

    __slots__ = ("_bytes", "_chunks", "_left", "_line", "done")

    def __init__(self) -> None:
        self._left = 0  # bytes of data and its CRLF still to come; 0: a size line is next
        self._line = b""
        self._chunks = 0
        self._bytes = 0
        self.done = False

    def feed(self, data: bytes) -> tuple[int, bytes]:
        """Give how many bytes of `data` belong to the body, and what they carry; raise WireError at the first wrong."""
        position = 0
        carried = []
        while position < len(data) and not self.done:
            if self._left > 2:  # noqa: PLR2004 - the CRLF after the data
                piece = data[position : position + self._left - 2]
                carried.append(piece)
                position += len(piece)
                self._left -= len(piece)
            elif self._left:
                if data[position : position + 1] != (b"\r" if self._left == 2 else b"\n"):  # noqa: PLR2004
                    raise _refuse("chunk_malformed", "a chunk is longer than its size says")
                position += 1
                self._left -= 1
            else:
                position += self._size_line(data, position)
        return position, b"".join(carried)

    def _size_line(self, data: bytes, position: int) -> int:
        start = len(self._line)
        self._line += data[position : position + chunk_size_digits_max + 4 - start]
        if self._line.startswith(b"0\r\n"):
            if len(self._line) < 5:  # noqa: PLR2004 - "0 CR LF CR LF"
                self._check_partial(b"0\r\n\r\n")
                return len(self._line) - start
            if not self._line.startswith(b"0\r\n\r\n"):
                raise _refuse("trailer_refused", "a chunked body ends without trailers")
            self.done = True
            return 5 - start
        end = self._line.find(b"\r\n")
        if end < 0:
            digits = self._line.removesuffix(b"\r")
            if not _CHUNK_LINE.fullmatch(digits):
                raise _refuse("chunk_malformed", "a chunk size is no plain hexadecimal number")
            return len(self._line) - start
        digits = self._line[:end]
        if not _CHUNK_LINE.fullmatch(digits) or int(digits, 16) == 0:
            raise _refuse("chunk_malformed", "a chunk size is no plain hexadecimal number")
        self._left = int(digits, 16) + 2
        self._line = b""
        self._chunks += 1
        self._bytes += self._left - 2
        if self._chunks > chunks_free_max and self._bytes < self._chunks * chunk_bytes_mean_min:
            raise _refuse("chunks_too_small", f"the body comes in chunks of under {chunk_bytes_mean_min} bytes")
        return end + 2 - start

    def _check_partial(self, whole: bytes) -> None:
        if not whole.startswith(self._line):
            raise _refuse("trailer_refused", "a chunked body ends without trailers")


class RequestReader:
    """Reads the requests of one connection, one after another.

    `feed()` takes bytes; `next_head()` gives a Head once it is whole; then `next_body()` gives bytes and at last `End`.
    Both give None when they need more and raise WireError for what is refused; after that the reader is of no use.
    """

    def __init__(self, limits: Limits, *, inside: Authority | None = None, secure: bool = False) -> None:
        self._limits = limits
        self._inside = inside
        self._secure = secure
        self._buffer = bytearray()
        self._scanned = 0
        self._in_body = False
        self._left = 0
        self._chunks: ChunkScan | None = None

    @property
    def has_bytes(self) -> bool:
        """Whether bytes wait that no head or body has taken."""
        return bool(self._buffer)

    def take_rest(self) -> bytes:
        """Give the bytes after a CONNECT head, which belong to the tunnel."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_head(self) -> Head | None:
        raw = self._extract_head()
        return None if raw is None else self._parse_head(raw)

    def _extract_head(self) -> bytes | None:
        buffer, limits = self._buffer, self._limits
        if not buffer:
            return None
        if _START_BAD.match(buffer):
            raise _refuse("not_http", "this is no HTTP/1.1 request (TLS, SOCKS and HTTP/2 are not spoken here)")
        end = buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        stop = end + 4 if end >= 0 else len(buffer) - buffer.endswith(b"\r")
        if _HEAD_BAD.search(buffer, max(0, self._scanned - 2), stop):
            raise _refuse(
                "head_malformed", "the head has a bare CR or LF, a folded line or a character no head may have"
            )
        self._scanned = stop
        line_end = buffer.find(b"\r\n")
        if (line_end if line_end >= 0 else len(buffer)) > limits.request_line_bytes_max:
            raise _refuse(
                "request_line_too_long", f"the first line is over {limits.request_line_bytes_max} bytes", status=414
            )
        if (stop if end >= 0 else len(buffer)) > limits.header_bytes_max:
            raise _refuse("head_too_long", f"the head is over {limits.header_bytes_max} bytes", status=431)
        if end < 0:
            return None
        raw = bytes(buffer[:stop])
        del buffer[:stop]
        self._scanned = 0
        return raw

    def _parse_head(self, raw: bytes) -> Head:
        lines = raw[:-4].split(b"\r\n")
        if len(lines) - 1 > self._limits.header_count_max:
            raise _refuse("too_many_headers", f"there are over {self._limits.header_count_max} headers", status=431)
        words = lines[0].split(b" ")
        if len(words) != 3 or words[2] not in (b"HTTP/1.1", b"HTTP/1.0"):  # noqa: PLR2004
            raise _refuse("version_refused", "the first line is no METHOD TARGET HTTP/1.1")
        method, target, version = words
        if method in _METHODS_REFUSED or not _METHOD.fullmatch(method):
            raise _refuse("method_refused", "the method is not one that is passed on")
        # h11 merges what it may (lengths said twice): look at the lines themselves, let it judge the syntax below.
        headers = tuple(
            (name.lower(), value.strip(b" \t")) for name, _, value in (line.partition(b":") for line in lines[1:])
        )
        length, expects, upgrade = _framing(method, headers, http11=version == b"HTTP/1.1")
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.header_bytes_max)
        try:
            for start in range(0, len(raw), h11_feed_bytes_max):
                connection.receive_data(raw[start : start + h11_feed_bytes_max])
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise _refuse("head_malformed", "the head is not as RFC 9112 has it") from error
        if not isinstance(event, h11.Request) or event.target != target or event.method != method:
            raise _refuse("head_malformed", "the head is not as RFC 9112 has it")
        hosts = [value for name, value in headers if name == b"host"]
        try:
            form, scheme, authority, path, query = parse_target(
                method, target, hosts, inside=self._inside, secure=self._secure
            )
        except BadTarget as error:
            raise _refuse(error.reason, str(error)) from error
        self._in_body = True
        if upgrade and form is not Form.FORWARD:
            raise _refuse("upgrade_refused", "the connection is not upgraded to another protocol")
        self._left = length or 0
        self._chunks = ChunkScan() if length is None else None
        return Head(
            form=form,
            method=method.decode("ascii"),
            scheme=scheme,
            authority=authority,
            path=path,
            query=query,
            headers=headers,
            content_length=length,
            http11=version == b"HTTP/1.1",
            expects_continue=expects,
            upgrade=upgrade,
        )

    def next_body(self) -> bytes | End | None:
        """Give the next bytes of the body, its end, or None when more is needed."""
        piece = b""
        if self._in_body and self._chunks is not None:
            taken, piece = self._chunks.feed(bytes(self._buffer[:body_piece_bytes_max]))
            del self._buffer[:taken]
            self._in_body = not self._chunks.done
        elif self._in_body:
            piece = bytes(self._buffer[: min(self._left, body_piece_bytes_max)])
            del self._buffer[: len(piece)]
            self._left -= len(piece)
            self._in_body = self._left > 0
        if piece:
            return piece
        return None if self._in_body else End.OF_BODY


def _framing(method: bytes, headers: Headers, *, http11: bool) -> tuple[int | None, bool, bool]:
    """Give the length of the body (None: chunked), whether the client waits for 100 Continue, and for a WebSocket."""
    seen = _checked(headers, http11=http11)
    upgrade = b"upgrade" in seen
    if upgrade and not (http11 and websocket.asked_for(method, seen)):
        raise _refuse("upgrade_refused", "the connection is not upgraded to another protocol than WebSocket, by a GET")
    length = seen.get(b"content-length")
    coding = seen.get(b"transfer-encoding")
    if method == b"CONNECT" and (coding is not None or length not in (None, b"0")):
        raise _refuse("framing_ambiguous", "CONNECT has no body")
    if coding is not None:
        if length is not None or not http11 or coding.lower() != b"chunked":
            raise _refuse("framing_ambiguous", "Transfer-Encoding is chunked alone, in HTTP/1.1, without a length")
        return None, b"expect" in seen, False
    if length is None:
        return 0, False, upgrade
    if not _LENGTH.fullmatch(length):
        raise _refuse("framing_ambiguous", "Content-Length is no plain number")
    return int(length), b"expect" in seen and int(length) > 0, upgrade


def _checked(headers: Headers, *, http11: bool) -> dict[bytes, bytes]:
    seen: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _SINGLE and name in seen:
            raise _refuse("header_doubled", "a header that stands once is there twice")
        seen[name] = value
    if b"http2-settings" in seen:
        raise _refuse("upgrade_refused", "the connection is not upgraded to another protocol")
    if http11 and b"host" not in seen:
        raise _refuse("host_missing", "there is no Host header")
    if seen.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise _refuse("expect_refused", "the expectation is unknown", status=417)
    return seen
