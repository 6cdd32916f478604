"""The forward proxy connects where the operator and public addressing allow, and nowhere else, however spelled."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support.embedded_gateway import EmbeddedGateway

if TYPE_CHECKING:
    from collections.abc import Iterator

BULK_BYTES = 3_000_000


def everything(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


class Echo:
    """A server on loopback that counts who connects, and sends back what it gets after its client's end-of-file."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.sendall(b"got " + everything(connection))


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.listener.close()


@pytest.fixture(scope="module")
def gateway(echo: Echo) -> Iterator[EmbeddedGateway]:
    hosts = {"pinned.test": f"127.0.0.1:{echo.port}", "Same-Port.Test.": "127.0.0.1"}
    with EmbeddedGateway(hosts=hosts) as running:
        assert running.ready["ready"], running.ready
        yield running


def refusal(gateway: EmbeddedGateway, allow: str) -> str:
    with gateway.connect(allow) as connection:
        data = everything(connection)
    assert data[0] == 1, f"{allow} was opened"
    assert len(data) == 3 + int.from_bytes(data[1:3], "big")
    return data[3:].decode()


@pytest.mark.parametrize("allow", ["tcp:pinned.test:9", "http://pinned.test:9", "tcp:same-port.test:{port}"])
def test_pinned_host_passes_bytes_both_ways_with_half_close(gateway: EmbeddedGateway, echo: Echo, allow: str) -> None:
    sent = b"x" * BULK_BYTES
    with gateway.connect(allow.format(port=echo.port)) as connection:
        assert connection.recv(1) == b"\x00"
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b"got " + sent


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "0x7f.1", "0177.0.0.1", "2130706433", "0.0.0.0", "0", "[::1]", "[::]",
     "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[0:0:0:0:0:ffff:7f00:0001]"],
)  # fmt: skip
def test_spelling_of_loopback_is_refused(gateway: EmbeddedGateway, echo: Echo, host: str) -> None:
    before = echo.connections
    assert "cannot reach" in refusal(gateway, f"tcp:{host}:{echo.port}")
    assert echo.connections == before


@pytest.mark.parametrize(
    ("host", "why"),
    [("169.254.169.254", "metadata service"), ("10.0.0.1", "private"), ("100.64.0.1", "carrier-grade NAT"),
     ("192.0.2.1", "documentation"), ("[fe80::1]", "link-local"), ("[fd00:ec2::254]", "metadata service")],
)  # fmt: skip
def test_special_address_is_refused(gateway: EmbeddedGateway, host: str, why: str) -> None:
    assert why in refusal(gateway, f"http://{host}:80")


def test_name_that_does_not_resolve_is_said_so(gateway: EmbeddedGateway) -> None:
    assert refusal(gateway, "tcp:no-such-host.invalid:443") == (
        "cannot reach no-such-host.invalid: the name does not resolve"
    )


def test_pinned_name_that_does_not_answer_is_said_so(gateway: EmbeddedGateway) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]
    assert "nothing answers there" in refusal(gateway, f"tcp:same-port.test:{port}")


def test_allowed_network_opens_what_is_otherwise_refused(echo: Echo) -> None:
    with EmbeddedGateway(allow_networks=["127.0.0.1/32"]) as gateway:
        with gateway.connect(f"tcp:127.0.0.1:{echo.port}") as connection:
            assert connection.recv(1) == b"\x00"
        assert "loopback" in refusal(gateway, f"tcp:127.0.0.2:{echo.port}")
