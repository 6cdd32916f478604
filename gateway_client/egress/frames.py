"""What a host sends over HTTP/2, taken apart into frames and bounded before the h2 library sees any (RFC 9113). Pure.

h2 keeps the states, HPACK and flow control. But it gathers all of a frame before it minds its length, counts no frame
but CONTINUATION, keeps every setting it was ever told, and takes a GOAWAY for the end of streams that go on. So it gets
one whole frame at a time here, of the kinds that one request needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

frame_bytes_max: Final = 16 * 1024
"""Of a frame's payload: the least that an end may allow (RFC 9113 section 4.2), and what we do."""
header_block_bytes_max: Final = 32 * 1024
"""As compressed. Taking one apart takes 1.3 ms a KiB at worst (measured), in one step."""
continuations_max: Final = 8
settings_max: Final = 64
"""In one frame; six are defined."""
frames_idle_max: Final = 512
"""That move nothing: PING, SETTINGS, empty DATA, CONTINUATION (CVE-2024-27316, CVE-2019-9512 to 9518), unknown ones."""
frames_idle_per_progress: Final = 32
"""How many are forgotten at one that moves something: a host makes room, measures time and keeps alive."""

_HEADER_BYTES: Final = 9
_STREAM: Final = 1  # the one that a client opens first, and we no other
_ACK: Final = 0x1
_END_HEADERS: Final = 0x4
_SETTING_BYTES: Final = 6
_GOAWAY_BYTES_MIN: Final = 8
_SETTINGS_KEPT: Final = frozenset({0x2, 0x4})  # ENABLE_PUSH, to be refused; INITIAL_WINDOW_SIZE
"""The others bound what we do not do: more streams, larger frames, a second block of headers."""


class Kind(IntEnum):
    DATA = 0x0
    HEADERS = 0x1
    PRIORITY = 0x2
    RST_STREAM = 0x3
    SETTINGS = 0x4
    PUSH_PROMISE = 0x5
    PING = 0x6
    GOAWAY = 0x7
    WINDOW_UPDATE = 0x8
    CONTINUATION = 0x9


class BadFrames(Exception):  # noqa: N818 - named for what it says
    """The host breaks the rules of HTTP/2, or our bounds; the text says which."""


@dataclass(frozen=True, slots=True)
class GoAway:
    """The host takes no more streams; of ours it says whether it goes on with it."""

    goes_on: bool
    code: int


class FrameReader:
    """`feed()` takes bytes of any size; `next_frame()` gives whole frames, raw, or None where more is needed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._begun = False
        self._block_bytes = 0
        self._continuations: int | None = None
        """None: not within a block of headers."""
        self._idle = 0

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def progress(self) -> None:
        """Say that the exchange has moved."""
        self._idle = max(0, self._idle - frames_idle_per_progress)

    def next_frame(self) -> bytes | GoAway | None:
        """Give the next frame that matters; raise BadFrames."""
        buffer = self._buffer
        while len(buffer) >= _HEADER_BYTES:
            length = int.from_bytes(buffer[:3], "big")
            kind, flags = buffer[3], buffer[4]
            stream = int.from_bytes(buffer[5:_HEADER_BYTES], "big") & 0x7FFFFFFF
            if length > frame_bytes_max:
                raise BadFrames("a frame is longer than was allowed")
            if len(buffer) < _HEADER_BYTES + length:
                return None
            raw = bytes(buffer[: _HEADER_BYTES + length])
            del buffer[: _HEADER_BYTES + length]
            found = self._judge(kind, flags, stream, raw)
            if found is not None:
                return found
        return None

    def _judge(self, kind: int, flags: int, stream: int, raw: bytes) -> bytes | GoAway | None:
        """Give a frame, or None for one that is to be ignored."""
        self._idle += 1
        if self._idle > frames_idle_max:
            raise BadFrames("one frame after another comes to nothing")
        if not self._begun and (kind != Kind.SETTINGS or flags & _ACK):
            raise BadFrames("it does not begin with its settings")
        self._begun = True
        if self._continuations is not None and kind != Kind.CONTINUATION:
            raise BadFrames("another frame is within a block of headers")
        match kind:
            case Kind.HEADERS | Kind.CONTINUATION:
                self._block(kind, flags, len(raw) - _HEADER_BYTES)
            case Kind.PUSH_PROMISE:
                raise BadFrames("it pushes what nobody asked for")
            case Kind.SETTINGS if not flags & _ACK:
                return _settings(raw)
            case Kind.GOAWAY:
                return _goaway(stream, raw[_HEADER_BYTES:])
            case Kind.DATA | Kind.RST_STREAM | Kind.WINDOW_UPDATE | Kind.PING | Kind.SETTINGS:
                pass
            case _:  # PRIORITY is for servers; what is unknown is ignored (RFC 9113 section 5.5)
                return None
        if stream not in (0, _STREAM):
            raise BadFrames("a frame is of a stream that was not opened")
        return raw

    def _block(self, kind: int, flags: int, length: int) -> None:
        if kind == Kind.HEADERS:
            self._block_bytes, count = length, 0
        elif self._continuations is None:
            raise BadFrames("a block of headers goes on that was not begun")
        else:
            self._block_bytes += length
            count = self._continuations + 1
        if self._block_bytes > header_block_bytes_max or count > continuations_max:
            raise BadFrames("its headers have no end")
        self._continuations = None if flags & _END_HEADERS else count


def _settings(raw: bytes) -> bytes:
    """Give a SETTINGS frame without the settings that do not matter here: h2 would keep each of 65536 in memory."""
    payload = raw[_HEADER_BYTES:]
    if len(payload) % _SETTING_BYTES or len(payload) > settings_max * _SETTING_BYTES:
        raise BadFrames("its settings are malformed or too many")
    each = (payload[start : start + _SETTING_BYTES] for start in range(0, len(payload), _SETTING_BYTES))
    kept = b"".join(setting for setting in each if int.from_bytes(setting[:2], "big") in _SETTINGS_KEPT)
    return len(kept).to_bytes(3, "big") + raw[3:_HEADER_BYTES] + kept


def _goaway(stream: int, payload: bytes) -> GoAway:
    if stream or len(payload) < _GOAWAY_BYTES_MIN:
        raise BadFrames("its farewell is malformed")
    last = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
    code = int.from_bytes(payload[4:8], "big")
    # Without an error it still answers the streams up to the last it names (RFC 9113 section 6.8).
    return GoAway(goes_on=code == 0 and last >= _STREAM, code=code)
