"""One request and its answer over HTTP/2 (RFC 9113), by the h2 library: bytes in, events out. Pure.

A connection has one stream, is for one request, and pushes nothing. What h2 does not look at and HTTP/1.1 would mind is
refused here: an answer is written to an agent from what this gives.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

import h2.events as h2_events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

from gateway_client.egress.frames import BadFrames, FrameReader, GoAway, frame_bytes_max

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress.upstream import HeaderList
    from gateway_client.egress.wire import Headers

window_bytes: Final = 1024 * 1024
"""What a host may have on its way to us. More than the buffers hold stays with the kernel and its sender."""
header_list_bytes_max: Final = 64 * 1024
"""Of an answer, as counted by RFC 9113 section 6.5.2; h2 and hpack stop there."""
informational_max: Final = 8
sent_bytes_moving_min: Final = 64
"""A piece of a body that counts as progress: a host that makes room for a byte at a time wastes both sides' time."""

_STREAM: Final = 1
_NOT_IN_REQUESTS: Final = frozenset(
    {
        b"connection",
        b"expect",
        b"host",  # it is :authority
        b"http2-settings",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_METHOD: Final = re.compile(rb"[A-Z]{1,20}")
_TARGET: Final = re.compile(rb"/[\x21-\x7e]*")
_AUTHORITY: Final = re.compile(rb"[a-z0-9._:\[\]-]{1,300}")
_NAME: Final = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~-]+")
_VALUE: Final = re.compile(rb"(?:[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?)?")
_VALUE_BACK: Final = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_STATUS: Final = re.compile(rb"[2-9][0-9][0-9]")
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")


class BadAnswer(Exception):  # noqa: N818 - named for what it says
    """The host sent no answer that can be passed on; the text says why."""


class BadRequest(ValueError):  # noqa: N818 - named for what it says
    """What was to be sent is no request of HTTP/2. It was parsed and written by us: this is a second look."""


@dataclass(frozen=True, slots=True)
class Head:
    """The final answer's head; `ended` where nothing follows it."""

    status: int
    headers: Headers = field(repr=False)
    length: int | None
    ended: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of the body, and what they took of the window: to be given back once they have been passed on."""

    data: bytes = field(repr=False)
    window: int


class Step(Enum):
    """What a step came to that is no part of an answer."""

    NEED_MORE = auto()
    NOTHING = auto()
    END_OF_BODY = auto()


def request_fields(method: str, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> HeaderList:
    """Give the field list of a request from the head that HTTP/1.1 would have had; raise BadRequest.

    One `host` becomes `:authority`; several `cookie`, which the other end would join (section 8.2.3), are joined.
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or not _AUTHORITY.fullmatch(hosts[0]):
        raise BadRequest("cannot send request: it is for no one host")
    if not _METHOD.fullmatch(method.encode("ascii")) or not _TARGET.fullmatch(target) or method == "CONNECT":
        raise BadRequest("cannot send request: its method or target is malformed")
    if sum(name == b"content-length" for name, _ in headers) > 1:
        raise BadRequest("cannot send request: it has two lengths")
    fields: HeaderList = [
        (b":method", method.encode("ascii")),
        (b":scheme", b"https"),
        (b":authority", hosts[0]),
        (b":path", target),
    ]
    cookies = []
    for name, value in headers:
        if name in _NOT_IN_REQUESTS:
            continue
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadRequest("cannot send request: a header is malformed")
        if name == b"cookie":
            cookies += [value] if value else []
        else:
            fields.append((name, value))
    if cookies:
        fields.append((b"cookie", b"; ".join(cookies)))
    return fields


class Http2Client:
    """Our end of a connection. Every method may raise BadAnswer, and after that it is of no more use."""

    def __init__(self) -> None:
        self._connection = H2Connection(H2Configuration(client_side=True, normalize_inbound_headers=False))
        self._connection.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.MAX_CONCURRENT_STREAMS: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: window_bytes,
                SettingCodes.MAX_FRAME_SIZE: frame_bytes_max,
                SettingCodes.MAX_HEADER_LIST_SIZE: header_list_bytes_max,
            },
        )
        self._connection.decoder.max_header_list_size = header_list_bytes_max
        self._frames = FrameReader()
        self._events: deque[Head | Piece | Step] = deque()
        self._settled = False
        self._answered = False
        self._informational = 0

    # --- the request

    def begin(self, fields: HeaderList, *, end: bool) -> None:
        """Open the connection and send the head; `end`: there is no body."""
        connection = self._connection
        connection.initiate_connection()
        connection.increment_flow_control_window(window_bytes - connection.inbound_flow_control_window)
        connection.send_headers(_STREAM, fields, end_stream=end)

    @property
    def room(self) -> int:
        """How many bytes of a body the host takes now.

        None before its settings: a host whose window is smaller than it is by default may reset a stream that filled
        that one (section 6.9.3), and nghttp2 does.
        """
        if not self._settled:
            return 0
        try:
            return max(0, min(self._connection.local_flow_control_window(_STREAM), frame_bytes_max))
        except H2Error:  # it has ended the stream
            return 0

    def send(self, data: bytes, *, moving: bool) -> None:
        """Send a piece of the body, not longer than `room`; `moving` where it was not the host that made it small."""
        try:
            self._connection.send_data(_STREAM, data)
        except H2Error as error:
            raise BadAnswer(_said(error)) from error
        if moving or len(data) >= sent_bytes_moving_min:
            self._frames.progress()

    def end(self) -> None:
        """Say that the body is whole."""
        try:
            self._connection.end_stream(_STREAM)
        except H2Error as error:
            raise BadAnswer(_said(error)) from error
        self._frames.progress()

    def outgoing(self) -> bytes:
        """Give the bytes for the wire that have gathered."""
        return self._connection.data_to_send()

    # --- the answer

    def feed(self, data: bytes) -> None:
        self._frames.feed(data)

    def passed_on(self, piece: Piece) -> None:
        """Make room for as much again."""
        self._give_back(piece.window)

    def step(self) -> Head | Piece | Step:
        """Take one frame; give what it came to."""
        if self._events:
            return self._events.popleft()
        try:
            frame = self._frames.next_frame()
            if frame is None:
                return Step.NEED_MORE
            if isinstance(frame, GoAway):
                if not frame.goes_on:
                    raise BadAnswer(f"the host ended the connection ({_code(frame.code)})")
            else:
                for event in self._connection.receive_data(frame):
                    self._take(event)
        except BadFrames as error:
            raise BadAnswer(f"the host speaks no sound HTTP/2: {error}") from error
        except H2Error as error:
            raise BadAnswer(_said(error)) from error
        return self._events.popleft() if self._events else Step.NOTHING

    def _take(self, event: h2_events.Event) -> None:
        match event:
            case h2_events.InformationalResponseReceived():
                self._informational += 1
                if self._answered or _status(event.headers) == b"101" or self._informational > informational_max:
                    raise BadAnswer("the host sent an interim answer where none may be, or one after another")
            case h2_events.ResponseReceived():
                self._answered = True
                self._frames.progress()
                self._events.append(_head(event.headers, ended=event.stream_ended is not None))
            case h2_events.DataReceived():
                self._data(event.data or b"", event.flow_controlled_length or 0)
            case h2_events.StreamEnded():
                if not self._answered:
                    raise BadAnswer("the host ended the stream without an answer")
                self._events.append(Step.END_OF_BODY)
            case h2_events.RemoteSettingsChanged():
                self._settled = True
            case h2_events.StreamReset():
                raise BadAnswer(f"the host reset the stream ({_code(event.error_code)})")
            case _:  # trailers are dropped; windows and pings are h2's
                pass

    def _data(self, data: bytes, window: int) -> None:
        if not self._answered:
            raise BadAnswer("the host sent a body without an answer")
        if data:
            self._frames.progress()
            self._events.append(Piece(data, window))
        else:
            self._give_back(window)

    def _give_back(self, window: int) -> None:
        if not window:
            return
        try:
            self._connection.acknowledge_received_data(window, _STREAM)
        except H2Error as error:
            raise BadAnswer(_said(error)) from error


def _status(headers: Sequence[tuple[bytes, bytes]] | None) -> bytes:
    return next((value for name, value in headers or () if name == b":status"), b"")


def _head(found: Sequence[tuple[bytes, bytes]] | None, *, ended: bool) -> Head:
    """Give the head of an answer as HTTP/1.1 may have it."""
    fields = [(bytes(name), bytes(value)) for name, value in found or ()]
    status = _status(fields)
    headers = tuple((name, value) for name, value in fields if not name.startswith(b":"))
    if not _STATUS.fullmatch(status):
        raise BadAnswer("the host sent an answer without a status")
    if not all(_NAME.fullmatch(name) and _VALUE_BACK.fullmatch(value) for name, value in headers):
        raise BadAnswer("the host sent a header that HTTP/1.1 cannot have")
    lengths = [value for name, value in headers if name == b"content-length"]
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(value) for value in lengths):
        raise BadAnswer("the host told more than one length")
    return Head(int(status), headers, int(lengths[0]) if lengths else None, ended)


def _code(code: ErrorCodes | int | None) -> str:
    try:
        return ErrorCodes(code or 0).name
    except ValueError:
        return f"error {code}"


def _said(error: H2Error) -> str:
    """Name what h2 found by its kind: its words carry what the host sent."""
    return f"the host speaks no sound HTTP/2: {type(error).__name__.removesuffix('Error')}"
