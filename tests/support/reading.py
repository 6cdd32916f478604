"""Requests read from bytes that come in pieces, as a connection's would."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway_client.egress.messages import Limits
from gateway_client.egress.wire import End, Head, Reject, RequestReader, WireError

if TYPE_CHECKING:
    from gateway_client.egress.target import Authority


@dataclass
class Read:
    heads: list[Head] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    reject: Reject | None = None


def read(
    data: bytes,
    *,
    step: int = 1 << 20,
    limits: Limits | None = None,
    inside: Authority | None = None,
    secure: bool = False,
) -> Read:
    """Feed bytes in pieces until they are used up or refused."""
    reader, result = RequestReader(limits or Limits(), inside=inside, secure=secure), Read()
    pieces = (data[start : start + step] for start in range(0, len(data), step))
    body: bytearray | None = None
    try:
        while True:
            if body is None:
                head = reader.next_head()
                if head is not None:
                    result.heads.append(head)
                    body = bytearray()
                    continue
            else:
                piece = reader.next_body()
                if piece is End.OF_BODY:
                    result.bodies.append(bytes(body))
                    body = None
                    continue
                if piece is not None:
                    body += piece
                    continue
            piece = next(pieces, None)
            if piece is None:
                return result
            reader.feed(piece)
    except WireError as error:
        result.reject = error.reject
        return result
