"""The PROXY v2 preface that the dialer writes and the embedded gateway reads: who connects, and what they may reach.

A PROXY protocol version 2 header (https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt §2.2) without addresses
(AF_UNSPEC) whose one custom TLV holds JSON. It is written on the daemon's word, before the socket reaches a worker,
so a worker that was taken over cannot change what it says. Pure: bytes in, values out.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass, field
from typing import Any, Final

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
FIXED_BYTES: Final = 16
TLV_STOCKADE: Final = 0xE0  # PP2_TYPE_MIN_CUSTOM
PREFACE_BYTES_MAX: Final = 32 * 1024
NAME_CHARS_MAX: Final = 256
LABELS_MAX: Final = 64
HOST_CHARS_MAX: Final = 253
PORT_MAX: Final = 65535

_VERSION_2: Final = 0x20
_COMMAND_PROXY: Final = 0x01
_FAMILY_UNSPEC: Final = 0x00
_MCP: Final = re.compile(r"mcp:([A-Za-z0-9._-]{1,100}):([A-Za-z0-9._/*,-]{1,24576})")
_HOST: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\]")


class PrefaceError(ValueError):
    """The bytes are no preface of ours; the connection is closed without an answer."""


@dataclass(frozen=True, slots=True)
class Api:
    """HTTP to the gateway's own API."""


@dataclass(frozen=True, slots=True)
class Destination:
    """One host and port that a current grant names. `scheme` is `tcp` (opaque) or `http` (origin-form)."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{'tcp:' if self.scheme == 'tcp' else 'http://'}{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Mcp:
    """Messages to one MCP server, and the tools (as globs) that may be called there."""

    server: str
    tools: tuple[str, ...]

    def __str__(self) -> str:
        return f"mcp:{self.server}:{','.join(self.tools)}"


@dataclass(frozen=True, slots=True)
class Preface:
    agent_id: str
    name: str
    x: int
    allow: Api | Destination | Mcp
    labels: dict[str, str] = field(default_factory=dict)


def parse_allow(text: str) -> Api | Destination | Mcp:
    """Parse `api`, `tcp:host:port`, `http://host:port` or `mcp:SERVER:GLOB,GLOB`; hosts in lower case."""
    if text == "api":
        return Api()
    if (mcp := _MCP.fullmatch(text)) is not None:
        return Mcp(mcp[1], tuple(mcp[2].split(",")))
    for scheme, prefix in (("tcp", "tcp:"), ("http", "http://")):
        if text.startswith(prefix):
            host, colon, port = text.removeprefix(prefix).rpartition(":")
            number = int(port) if port.isascii() and port.isdigit() and len(port) <= len(str(PORT_MAX)) else 0
            if colon and len(host) <= HOST_CHARS_MAX and _HOST.fullmatch(host) and 1 <= number <= PORT_MAX:
                return Destination(scheme, host, number)
            break
    raise PrefaceError(f"cannot read allow {text[:300]!r}: expected api, tcp:host:port or http://host:port")


def encode(preface: Preface) -> bytes:
    """Return the preface as bytes to write before anything else."""
    document = {
        "agent_id": preface.agent_id,
        "name": preface.name,
        "labels": preface.labels,
        "x": preface.x,
        "allow": "api" if isinstance(preface.allow, Api) else str(preface.allow),
    }
    value = json.dumps(document, separators=(",", ":"), ensure_ascii=True).encode()
    if len(value) + 3 > PREFACE_BYTES_MAX - FIXED_BYTES:
        raise PrefaceError(
            f"cannot write preface of {preface.agent_id}: labels are larger than {PREFACE_BYTES_MAX} bytes"
        )
    tlv = struct.pack("!BH", TLV_STOCKADE, len(value)) + value
    return SIGNATURE + struct.pack("!BBH", _VERSION_2 | _COMMAND_PROXY, _FAMILY_UNSPEC, len(tlv)) + tlv


def length_after_fixed(fixed: bytes) -> int:
    """How many bytes follow the first 16; refuses what is no PROXY v2 header without addresses."""
    if len(fixed) != FIXED_BYTES or not fixed.startswith(SIGNATURE):
        raise PrefaceError("cannot read preface: no PROXY v2 signature")
    version_command, family, length = struct.unpack("!BBH", fixed[12:])
    if version_command not in (_VERSION_2, _VERSION_2 | _COMMAND_PROXY) or family != _FAMILY_UNSPEC:
        raise PrefaceError(f"cannot read preface: version and command {version_command:#x}, family {family:#x}")
    if length > PREFACE_BYTES_MAX - FIXED_BYTES:
        raise PrefaceError(f"cannot read preface: {length} bytes announced, at most {PREFACE_BYTES_MAX} are taken")
    return int(length)


def decode_rest(rest: bytes) -> Preface:
    """Return the value of the bytes after the first 16."""
    offset = 0
    value: bytes | None = None
    while offset < len(rest):
        if offset + 3 > len(rest):
            raise PrefaceError("cannot read preface: a TLV is cut short")
        kind, length = struct.unpack_from("!BH", rest, offset)
        offset += 3
        if offset + length > len(rest):
            raise PrefaceError("cannot read preface: a TLV is longer than the header")
        if kind == TLV_STOCKADE:
            if value is not None:
                raise PrefaceError("cannot read preface: two Stockade TLVs")
            value = rest[offset : offset + length]
        offset += length
    if value is None:
        raise PrefaceError("cannot read preface: no Stockade TLV")
    return _value(value)


def decode(data: bytes) -> tuple[Preface, bytes]:
    """Return the preface at the start of `data`, and what follows it."""
    end = FIXED_BYTES + length_after_fixed(data[:FIXED_BYTES])
    if len(data) < end:
        raise PrefaceError("cannot read preface: cut short")
    return decode_rest(data[FIXED_BYTES:end]), data[end:]


def _value(data: bytes) -> Preface:
    try:
        document: Any = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise PrefaceError(f"cannot read preface: {error}") from error
    match document:
        case {"agent_id": str(agent_id), "name": str(name), "labels": dict(labels), "x": int(x), "allow": str(allow)}:
            pass
        case _:
            raise PrefaceError("cannot read preface: agent_id, name, labels, x and allow are needed")
    if len(agent_id) > NAME_CHARS_MAX or len(name) > NAME_CHARS_MAX or len(labels) > LABELS_MAX:
        raise PrefaceError("cannot read preface: a field is too long")
    if not all(isinstance(value, str) for value in labels.values()):
        raise PrefaceError("cannot read preface: labels must be strings")
    return Preface(agent_id=agent_id, name=name, x=x, allow=parse_allow(allow), labels=labels)
