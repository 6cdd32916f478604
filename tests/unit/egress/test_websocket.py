"""Upgrades: what asks for a WebSocket and nothing else, what proves the host agreed, and what the parser lets in."""

from __future__ import annotations

import pytest

from gateway_client.egress import websocket
from gateway_client.egress.messages import Limits
from gateway_client.egress.request import Form
from gateway_client.egress.target import Authority
from gateway_client.egress.upstream import forward_head
from gateway_client.egress.wire import Head, RequestReader, WireError

WHERE = Authority("example.com", 443)
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # and its proof, of RFC 6455 section 1.3
PROOF = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: example.com\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + KEY + b"\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
)


def read(data: bytes, *, inside: Authority | None = WHERE, secure: bool = True) -> Head:
    reader = RequestReader(Limits(), inside=inside, secure=secure)
    reader.feed(data)
    head = reader.next_head()
    assert head is not None
    return head


def test_a_websocket_is_asked_for_anew_with_what_it_needs() -> None:
    head = read(UPGRADE)
    assert (head.upgrade, head.form, head.scheme) == (True, Form.FORWARD, "https")
    target, headers = forward_head(head, absolute=False)
    assert target == b"/chat"
    assert dict(headers) == {
        b"host": b"example.com",
        b"sec-websocket-version": b"13",
        b"sec-websocket-key": KEY,
        b"sec-websocket-protocol": b"chat",
        b"connection": b"Upgrade",
        b"upgrade": b"websocket",
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GET", b"POST"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"Upgrade: WebSocket", b"Upgrade: h2c"),
        (b"Upgrade: WebSocket", b"Upgrade: websocket, h2c"),
        (b"Upgrade: WebSocket", b"Upgrade: websocket\r\nUpgrade: h2c"),
        (b"keep-alive, Upgrade", b"keep-alive"),
        (b"Version: 13", b"Version: 8"),
        (KEY, b"short"),
        (b"Host:", b"Content-Length: 0\r\nHost:"),
        (b"Host:", b"Transfer-Encoding: chunked\r\nHost:"),
        (b"Host:", b"HTTP2-Settings: AAMAAABk\r\nHost:"),
    ],
)
def test_every_other_upgrade_is_refused(old: bytes, new: bytes) -> None:
    with pytest.raises(WireError):
        read(UPGRADE.replace(old, new))


@pytest.mark.parametrize("path", [b"/v1/models", b"/.stockade/v1/whoami"])
def test_the_worker_itself_upgrades_nothing(path: bytes) -> None:
    request = UPGRADE.replace(b"/chat", path).replace(b"example.com", b"gateway.internal")
    with pytest.raises(WireError) as caught:
        read(request, inside=None, secure=False)
    assert caught.value.reject.reason_code == "upgrade_refused"


def test_the_host_agreed_only_with_the_proof() -> None:
    asked = read(UPGRADE).headers
    good = ((b"upgrade", b"websocket"), (b"connection", b"Upgrade"), (b"sec-websocket-accept", PROOF))
    assert websocket.agreed(asked, good)
    assert not websocket.agreed(asked, good[:2])
    assert not websocket.agreed(asked, (*good[:2], (b"sec-websocket-accept", PROOF[::-1])))
    assert not websocket.agreed(asked, (*good, good[2]))
    assert not websocket.agreed(asked, good[1:])
    assert websocket.answer((*good, (b"content-length", b"5"), (b"keep-alive", b"1"))) == (
        b"HTTP/1.1 101 Switching Protocols\r\nsec-websocket-accept: " + PROOF + b"\r\nconnection: Upgrade\r\n"
        b"upgrade: websocket\r\n\r\n"
    )


def test_inside_of_tls_only_a_path_for_the_very_host_is_a_target() -> None:
    good = b"GET /a HTTP/1.1\r\nHost: example.com\r\n\r\n"
    assert read(good).scheme == "https"
    assert read(good.replace(b"example.com", b"EXAMPLE.com:443")).authority == WHERE
    for bad in (
        good.replace(b"Host: example.com", b"Host: example.com:80"),
        good.replace(b"Host: example.com", b"Host: other.example"),
        good.replace(b"/a", b"https://example.com/a"),
        good.replace(b"/a", b"http://example.com/a"),
        good.replace(b"/a", b"*").replace(b"GET", b"OPTIONS"),
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n",
    ):
        with pytest.raises(WireError):
            read(bad)
